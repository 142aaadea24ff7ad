"""What the recipes share: data into prompts and completions, then train, merge, export, and evaluate all of these.

    python examples/recipes/gsm8k.py train.jsonl --output out/gsm8k
    python examples/recipes/gsm8k.py train.jsonl --output out --model MODEL --items 100 --set num_blocks=8 --limit 9

Run again, it goes on where it stopped. `--set` changes any option of `diablo_export.train`.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diablo_export
from diablo_export.console import set_verbosity
from diablo_export.errors import require

PAPER = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
STEPS = ("train", "merge", "export", "evaluate")


def run(
    about: str,
    example: Callable[[dict[str, Any]], dict[str, str]],
    *,
    model: str,
    tasks: Sequence[str] = (),
    unsafe_code: bool = False,
    **training: Any,
) -> None:
    """Run a recipe.

    Args:
        about: the recipe's docstring, for --help.
        example: an item of the data file as {"prompt", "completion"}.
        model: the base that the paper took.
        tasks: of lm-evaluation-harness.
        unsafe_code: the tasks run what the model writes.
        training: options of `train`.
    """
    options = _arguments(about, model, tasks)
    if "evaluate" in options.steps and options.tasks:
        require("lm_eval", "eval")  # before hours of training
    options.output.mkdir(parents=True, exist_ok=True)
    data, adapter = options.output / "train.jsonl", options.output / "adapter"
    lines = [json.dumps(example(item)) for item in read(options.data)[: options.items]]
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    training |= dict(options.set)
    grid = training.get("base_quantize", "none")
    if "train" in options.steps and not adapter.exists():
        diablo_export.train(options.model, data, adapter, resume=True, **training)
    made = {"merge": options.output / "merged", "export": options.output / "branch"}
    for step, folder in made.items():
        if step in options.steps and not folder.exists():
            getattr(diablo_export, step)(options.model, adapter, folder, quantize=grid)
    if "evaluate" in options.steps and options.tasks:
        tuned = {"base": (options.model, None), "tuned": (options.model, adapter)}
        exported = {step: (folder, None) for step, folder in made.items() if folder.exists()}
        for name, figures in evaluate(tuned | exported, options, unsafe_code):
            print(json.dumps({"model": name, **figures}), flush=True)


def evaluate(
    models: dict[str, tuple[Any, Path | None]], options: argparse.Namespace, unsafe_code: bool
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each model's figures on the tasks, all of them from the same harness."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from diablo_export.measure.harness import language_model

    manager = TaskManager(include_path=options.include_path)
    for name, (path, adapter) in models.items():
        found = lm_eval.simple_evaluate(
            language_model(path, adapter, batch_size=options.batch_size),
            tasks=options.tasks,
            task_manager=manager,
            limit=options.limit,
            bootstrap_iters=0,  # no error bars
            confirm_run_unsafe_code=unsafe_code,
        )
        yield name, {task: _numbers(values) for task, values in found["results"].items()}


def alpaca(item: dict[str, Any]) -> dict[str, str]:
    """An item of the Alpaca form: instruction, input where there is one, output."""
    asked = [f"### Instruction:\n{item['instruction']}"]
    if item.get("input"):
        asked.append(f"### Input:\n{item['input']}")
    return {"prompt": "\n\n".join([*asked, "### Response:\n"]), "completion": str(item["output"])}


def read(file: Path) -> list[dict[str, Any]]:
    """The items of a JSON list or of JSON Lines."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float) and "stderr" not in name}


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _arguments(about: str, model: str, tasks: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a JSON list or JSON Lines")
    parser.add_argument("--output", type=Path, required=True, help="folder for adapter, merge and export")
    parser.add_argument("--model", default=model, help=f"the base; default: {model}")
    parser.add_argument("--items", type=int, help="take only the first so many of the data")
    parser.add_argument("--set", type=_assignment, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS), help=",".join(STEPS))
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(tasks), help="of the harness")
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="evaluate only so many items of each task")
    parser.add_argument("--batch-size", type=int, default=1, help="of the evaluation in torch")
    set_verbosity(20)
    return parser.parse_args()
