"""Training data: files into examples, examples into tokens. No torch here.

A file is JSON Lines in one of four forms, or plain text with one document per blank-line paragraph (.txt):

    {"text": …}                     loss on everything
    {"prompt": …, "completion": …}  loss on the completion
    {"messages": [{"role": …, "content": …}, …]}  the tokenizer's chat template, which also gets "tools" where there are
                                    any; loss on what the assistant says
    {"text": …, "label": …}         classification; labels are strings or integers
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.errors import DataError, indented

IGNORED = -100  # torch's cross entropy skips this target
FORMS = '{"text"}, {"prompt", "completion"}, {"messages"} or {"text", "label"}'
_SHOWN = 10  # bad lines that are listed before the rest is counted


@dataclass(frozen=True)
class Example:
    """One line (or paragraph) of a data file."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None  # that the assistant may call, as JSON schemas
    label: str | int | None = None
    line: int = 0  # where it starts in its file, from 1

    @property
    def form(self) -> str:
        """`text`, `completion` or `messages`."""
        return "text" if self.text is not None else "completion" if self.prompt is not None else "messages"


@dataclass(frozen=True)
class Encoded:
    """The tokens of one example, or of one packed piece."""

    ids: npt.NDArray[np.int32]  # (tokens,)
    target: npt.NDArray[np.bool_]  # (tokens,): whether this token is to be predicted
    label: int = IGNORED  # class index
    line: int = 0
    lost: int = 0  # tokens that were cut off

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        lost = self.lost + max(0, len(self.ids) - length)
        return Encoded(self.ids[:length], self.target[:length], self.label, self.line, lost)


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a data file, all of one form, and all with a label or none.

    Raises:
        DataError: cannot be read, empty, or bad lines; each is named by its number with what was found.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a .jsonl or .txt file") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line} is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    examples = _paragraphs(content) if path.suffix.lower() == ".txt" else _json_lines(path, content)
    if not examples:
        raise DataError(f"{path}: holds no examples; it needs at least one line of {FORMS}, or text when it is a .txt")
    _check_alike(path, examples)
    return examples


def _paragraphs(content: str) -> list[Example]:
    found = re.finditer(r"\S.*?(?=\n[^\S\n]*\n|\Z)", content, re.DOTALL)
    lines, at, examples = 1, 0, []
    for match in found:
        lines, at = lines + content.count("\n", at, match.start()), match.start()
        examples.append(Example(text=match.group().rstrip(), line=lines))
    return examples


def _json_lines(path: Path, content: str) -> list[Example]:
    examples: list[Example] = []
    faults: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(_example(line, number))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        listed = indented(faults, _SHOWN)
        raise DataError(f"{path}: bad lines; each must be a JSON object like {FORMS}:\n{listed}")
    return examples


def _example(line: str, number: int) -> Example:
    """Raises ValueError saying what is wrong with the line."""
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): {_short(line)}") from error
    except RecursionError as error:
        raise ValueError(f"not JSON (brackets too deep within each other): {_short(line)}") from error
    if "\\u" in line and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"has half of a surrogate pair (\\ud800 to \\udfff), which is no character: {_short(line)}")
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {_kind(value)}, not an object: {_short(line)}")
    forms = [form for form in (("text",), ("prompt", "completion"), ("messages",)) if all(key in value for key in form)]
    if not forms:
        raise ValueError(f"has the keys {', '.join(map(repr, value)) or 'nothing'}; that is none of the forms")
    if len(forms) > 1:
        raise ValueError(f"has the keys {', '.join(map(repr, value))}; that is more than one form")
    if forms[0] == ("messages",):
        return Example(messages=_messages(value["messages"]), tools=_tools(value.get("tools")), line=number)
    for key in forms[0]:
        if not isinstance(value[key], str):
            raise ValueError(f"{key!r} is a JSON {_kind(value[key])}, it must be a string: {_short(line)}")
        if not value[key] and key != "prompt":
            raise ValueError(f"{key!r} is empty")
    if forms[0] == ("prompt", "completion"):
        return Example(prompt=value["prompt"], completion=value["completion"], line=number)
    label = value.get("label")
    if "label" in value and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ValueError(f"'label' is {_short(json.dumps(label))}; it must be a string or an integer")
    return Example(text=value["text"], label=label, line=number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which json would take the last where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' is {_short(json.dumps(value))}; it must be a list of messages")
    for index, message in enumerate(value):
        parts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        silent = parts[1] is None and isinstance(message, dict) and message.get("tool_calls")
        if not (isinstance(parts[0], str) and (isinstance(parts[1], str) or silent)):
            raise ValueError(
                f"message {index + 1} is {_short(json.dumps(message))}; it needs a string role and content"
            )
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation, a list or, as data sets of fixed columns have it, that list as JSON text."""
    found = value
    if isinstance(value, str) and value:
        with contextlib.suppress(ValueError):
            found = json.loads(value)
    if found and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ValueError(f"'tools' is {_short(json.dumps(value))}; it must be a list of objects, each a tool")
    return found or None


def _check_alike(path: Path, examples: list[Example]) -> None:
    first = examples[0]
    for example in examples:
        if example.form != first.form:
            raise DataError(
                f"{path}: line {example.line} is of the form {example.form!r}, line {first.line} of the form "
                f"{first.form!r}; one file holds one form, so split it"
            )
    labelled = [example for example in examples if example.label is not None]
    if labelled and len(labelled) < len(examples):
        bare = next(example for example in examples if example.label is None)
        raise DataError(
            f"{path}: {len(labelled)} of {len(examples)} lines have a label: line {labelled[0].line} has one "
            f"({labelled[0].label!r}), line {bare.line} has none; label every line, or none"
        )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"


def encode(example: Example, tokenizer: Any, max_length: int | None = None, label: int | None = None) -> Encoded:
    """Tokens of an example and which of them are to be predicted, at most `max_length`.

    A labelled example gets what the tokenizer puts around a text; an unlabelled one also ends with the
    end-of-sequence token, so that the model learns to stop.

    Raises:
        DataError: messages for a tokenizer without a (usable) chat template.
    """
    lost = 0
    if example.messages is not None:
        ids, target = _chat(example, tokenizer)
    elif example.completion is not None:
        prompt = _tokens(tokenizer, example.prompt or "")
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt.pop()  # some tokenizers end every text; the prompt is not the end
        completion = _ended(_going_on(tokenizer, example.prompt or "", example.completion), tokenizer)
        ids, target = prompt + completion, [False] * len(prompt) + [True] * len(completion)
    elif example.label is not None:
        ids = _tokens(tokenizer, example.text or "")
        if max_length and len(ids) > max_length:  # the tokenizer keeps the closing token
            lost = len(ids) - max_length
            ids = _tokens(tokenizer, example.text or "", truncation=True, max_length=max_length)
        target = [False] * len(ids)
    else:
        ids = _ended(_tokens(tokenizer, example.text or ""), tokenizer)
        target = [True] * len(ids)
    whole = Encoded(
        np.array(ids, np.int32), np.array(target, np.bool_), IGNORED if label is None else label, example.line, lost
    )
    return whole.cut(max_length) if max_length else whole


def _tokens(tokenizer: Any, text: str, special: bool = True, **cut: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False, **cut)["input_ids"])


def _going_on(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text that goes on after another one.

    Llama's tokenizers put a space before what they are given; behind another text there is none. Where a token would
    span both texts they are taken apart, as generation does.
    """
    for start in (before, "\n"):  # a line's end joins no letters to itself
        first, both = tokenizer([start, start + text], add_special_tokens=False, verbose=False)["input_ids"]
        if both[: len(first)] == first:
            return list(both[len(first) :])
    return _tokens(tokenizer, text, special=False)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _chat(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The conversation through the chat template; what the assistant says, up to its closing marks, is predicted."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f'line {example.line} has "messages", but the model\'s tokenizer has no chat template; '
            'use {"prompt", "completion"} lines, or a model with one'
        )
    if not tokenizer.is_fast:
        raise DataError(
            f'line {example.line} has "messages", and {type(tokenizer).__name__} does not say where its tokens lie, so '
            'that turns cannot be told apart; use {"prompt", "completion"} lines'
        )
    messages = example.messages or []
    spans, full = [], _template(tokenizer, example, messages)
    if example.tools and full == _template(tokenizer, replace(example, tools=None), messages):
        raise DataError(
            f'line {example.line} has "tools", which this tokenizer\'s chat template does not show to the model: it '
            'would learn to call what it cannot see. Leave out "tools" and say them in a system message, or take a '
            "model whose template has them"
        )
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            through = _template(tokenizer, example, messages[: index + 1])
            before = _before(tokenizer, example, messages[:index], through)
            if not (full.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"line {example.line}: this tokenizer's chat template changes earlier turns when later ones "
                    f"follow, so message {index + 1} cannot be told apart; give each assistant turn a line of its own, "
                    "as the last message"
                )
            spans.append((len(before), len(through)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]


def _before(tokenizer: Any, example: Example, earlier: list[dict[str, Any]], through: str) -> str:
    """What stands before an assistant's words: the earlier turns and the header of its own."""
    if earlier:
        return _template(tokenizer, example, earlier, add_generation_prompt=True)
    asked = [{"role": "user", "content": "?"}]  # templates may refuse to begin with nothing: the header is learned here
    header = _template(tokenizer, example, asked, add_generation_prompt=True)
    header = header.removeprefix(_template(tokenizer, example, asked))
    return through[: through.find(header) + len(header)] if header in through else ""


def _template(tokenizer: Any, example: Example, messages: list[dict[str, Any]], **more: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=example.tools, tokenize=False, **more))
    except Exception as error:  # templates raise their own errors, such as for roles that do not alternate
        raise DataError(
            f"line {example.line}: the tokenizer's chat template refuses these messages: {error}"
        ) from error


def class_names(examples: Sequence[Example], path: str | Path) -> list[str | int]:
    """The labels of a classification set in class order: integers by value, strings by the alphabet.

    Raises:
        DataError: no labels, integers and strings mixed, names that white space alone tells apart, or one label only.
    """
    first = examples[0]
    if first.label is None:
        raise DataError(f'{path}: text-classification needs {{"text", "label"}} lines; line {first.line} has no label')
    for example in examples:
        if type(example.label) is not type(first.label):
            raise DataError(
                f"{path}: line {example.line} has the label {example.label!r}, line {first.line} {first.label!r}; "
                "labels must be all strings or all integers"
            )
    found = sorted(
        {example.label for example in examples if example.label is not None}, key=lambda v: (str(type(v)), v)
    )
    bare: dict[str, str | int] = {}
    for name in found:
        if (other := bare.setdefault(str(name).strip(), name)) != name:
            raise DataError(f"{path}: has the labels {other!r} and {name!r}, which differ in white space alone")
    if len(found) == 1:
        raise DataError(
            f"{path}: all {len(examples)} lines have the label {found[0]!r}; a classifier needs two at least"
        )
    return found
