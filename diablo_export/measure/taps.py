"""What goes into and comes out of each module of a running model, exported or in torch, step by step on its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export import runtime
from diablo_export.blockdiag import Array
from diablo_export.errors import ExportError
from diablo_export.measure.onnx_runner import CACHE, OnnxRunner, cache_key
from diablo_export.measure.places import Graph, Place
from diablo_export.measure.prompts import Ids
from diablo_export.trainer.hooks import removed_after
from diablo_export.trainer.layer import set_enabled

Seen = dict[str, tuple[Array, Array]]  # by module: its input (rows, in_features) and output (rows, out_features)
Outputs = dict[str, Array]  # by module: its output alone, which is half the memory

EMBEDDINGS = ""  # the module under which embeddings of a rounded table are seen


@dataclass(frozen=True)
class OnnxTaps:
    """An exported model whose session gives the values at `places` too, and those of rounded embeddings and experts."""

    graph: Graph
    runner: OnnxRunner
    places: Mapping[str, Place]

    def see(self, pieces: Sequence[Ids]) -> Iterator[Seen]:
        """Run one sequence cut into pieces, each behind the cache of those before it; what each piece showed."""
        rounded = _rounded(self.graph)
        for values in self.values(pieces, sorted(_wanted(self.graph, self.places))):
            seen = {name: _of(place, values) for name, place in self.places.items()}
            yield seen | {name: (values[value], values[value]) for name, value in rounded.items()}

    def values(self, pieces: Sequence[Ids], names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """As `see`: these values of the graph, a row for each token."""
        session, length = self.runner.session, self.runner.length
        cache, past = {} if length else self.runner.empty_cache(), 0
        present = {cache_key(v.name): v.name for v in session.get_outputs() if CACHE.match(v.name)} if cache else {}
        for piece in pieces:
            own = self.runner.padded(piece) if length else self.runner.feeds(piece, past)
            feeds = {**own, **cache, **self.runner.fixed}
            found = runtime.run(session, feeds, self.runner.adapter, [*names, *present.values()])
            values = dict(zip([*names, *present.values()], found, strict=True))
            cache, past = {name: values[present[cache_key(name)]] for name in cache}, past + len(piece)
            # of a fixed length, what was filled up comes last
            yield {name: _rows(values[name])[: len(piece) if length else None] for name in names}

    def outputs(self, pieces: Sequence[Ids]) -> Iterator[Outputs]:
        """As `see`, the outputs alone."""
        for seen in self.see(pieces):
            yield {name: seen[name][1] for name in self.places}


@dataclass(frozen=True)
class TorchTaps:
    """A model in torch, watched at some of its modules."""

    model: nn.Module
    adapted: bool
    modules: Sequence[str]
    switch: Callable[[nn.Module, bool], None] = set_enabled

    def see(self, pieces: Sequence[Ids]) -> Iterator[Seen]:
        """As `OnnxTaps.see`."""
        inputs: dict[str, Array] = {}
        outputs: dict[str, Array] = {}

        def before(name: str, x: torch.Tensor) -> None:
            inputs[name] = _numpy(x)

        def after(name: str, y: torch.Tensor) -> None:
            outputs[name] = _numpy(y)

        with self._hooked(before, after):
            for _ in self._run(pieces):
                yield {name: (inputs[name], outputs[name]) for name in inputs}
                inputs, outputs = {}, {}

    def outputs(self, pieces: Sequence[Ids]) -> Iterator[Outputs]:
        """As `see`, the outputs alone, in the order in which the network calls its modules."""
        found: Outputs = {}
        with self._hooked(lambda name, x: None, lambda name, y: found.update({name: _numpy(y)})):
            for _ in self._run(pieces):
                yield dict(found)
                found.clear()

    def beside(self, pieces: Sequence[Ids], seen: Sequence[Seen], compare: Callable[..., None]) -> None:
        """Run with what every module of another model read and gave put in place of the own.

        Then each module stands beside its twin, however far the two models have drifted apart: both have the same
        input, and that input should have come of the twins' outputs.

        Args:
            pieces: as for `see`.
            seen: what the other model showed, a piece each; rounded embeddings and experts among it are taken, too.
            compare: called with the module's name, the input that torch has for it and the other's, the output that
                torch has for the other's input and the other's, (rows, features) each.
        """
        current: Seen = {}
        own: dict[str, Array] = {}

        def before(name: str, x: torch.Tensor) -> torch.Tensor:
            own[name] = _numpy(x)
            return torch.from_numpy(current[name][0]).to(x.dtype).reshape(x.shape)

        def after(name: str, y: torch.Tensor) -> torch.Tensor:
            x, found = current[name]
            compare(name, own.pop(name), x, _numpy(y), found)
            return torch.from_numpy(found).to(y.dtype).reshape(y.shape)

        def taken(name: str, y: torch.Tensor) -> torch.Tensor:
            found = current[name][1]
            if name != EMBEDDINGS:
                compare(name, found, found, _numpy(y), found)
            return torch.from_numpy(found).to(y.dtype).reshape(y.shape)

        others = iter(seen)
        handles = []
        for name in seen[0].keys() - set(self.modules):
            module: Any = self.model.get_submodule(name) if name else self.model.get_input_embeddings()  # type: ignore[operator]
            handles.append(module.register_forward_hook(lambda _, __, y, n=name: taken(n, y)))
        with removed_after(handles), self._hooked(before, after):
            for _ in self._run(pieces, lambda: current.update(next(others))):
                pass

    @torch.inference_mode()
    def _run(self, pieces: Sequence[Ids], ready: Callable[[], None] = lambda: None) -> Iterator[None]:
        self.switch(self.model, self.adapted)
        more: dict[str, Any] = {} if len(pieces) == 1 else {"use_cache": True}
        for piece in pieces:
            ready()
            output = self.model(input_ids=torch.from_numpy(np.asarray(piece, np.int64))[None], **more)
            if more:
                more["past_key_values"] = output.past_key_values
            yield

    @contextmanager
    def _hooked(
        self, before: Callable[[str, torch.Tensor], Any], after: Callable[[str, torch.Tensor], Any]
    ) -> Iterator[None]:
        handles = []
        for name in self.modules:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda _, x, n=name: before(n, x[0])))
            handles.append(module.register_forward_hook(lambda _, x, y, n=name: after(n, y)))
        with removed_after(handles):
            yield


def open_session(
    graph: Graph, places: Mapping[str, Place], threads: int | None, initializers: Mapping[str, Array] | None = None
) -> Any:
    """A session of the graph that gives the values at `places`, too.

    Raises:
        ExportError: onnxruntime refuses the model.
    """
    model = graph.tapped(_wanted(graph, places))
    path = graph.path
    return runtime.session(path, model=model, initializers=initializers, threads=threads, spin=False)


def check(seen: Seen, wanted: Outputs, sizes: Mapping[str, int]) -> None:
    """Refuse values of other sizes than torch has.

    Args:
        seen: what an export showed of one piece.
        wanted: the outputs that torch has for it.
        sizes: how many inputs each module has in torch.

    Raises:
        ExportError: names the module and both shapes.
    """
    for name, (x, y) in seen.items():
        if name not in wanted:  # rounded embeddings or experts
            continue
        shapes = (x.shape, y.shape), ((len(wanted[name]), sizes[name]), wanted[name].shape)
        if shapes[0] != shapes[1]:
            raise ExportError(f"{name}: reads and gives {shapes[0]} in the export, {shapes[1]} in torch")


def _wanted(graph: Graph, places: Mapping[str, Place]) -> set[str]:
    taps = {name for place in places.values() for name in place.taps}
    return taps | set(_rounded(graph).values())


def _rounded(graph: Graph) -> dict[str, str]:
    """By module the values of what is rounded and no linear layer."""
    return {**({EMBEDDINGS: graph.rounded_table} if graph.rounded_table else {}), **graph.mixed}


def _of(place: Place, values: Mapping[str, Array]) -> tuple[Array, Array]:
    parts = [values[part.y][:, part.start : part.stop] for part in place.parts]
    return values[place.x], parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _rows(value: Array) -> Array:
    return np.asarray(value.reshape(-1, value.shape[-1]), np.float32)


def _numpy(value: torch.Tensor) -> Array:
    rows: Array = value.detach().float().reshape(-1, value.shape[-1]).cpu().numpy()
    return rows
