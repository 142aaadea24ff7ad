"""Data files into examples, tokens and batches: what is read, what is predicted, and what a bad line is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from diablo_export.errors import DataError
from diablo_export.trainer.batches import Batches, collate, encode_all, pack
from diablo_export.trainer.data import IGNORED, Encoded, Example, class_names, encode, read_examples

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama"))


@pytest.fixture
def chat_tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama"), chat_template=CHAT)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def call(*lines: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
        return path

    return call


def item(length: int, first: int = 0) -> Encoded:
    return Encoded(np.arange(first, first + length, dtype=np.int32), np.ones(length, np.bool_))


# reading


def test_reads_every_form(write: Callable[..., Path]) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert read_examples(write({"text": "a", "id": 7}, "", {"text": "b"})) == [
        Example(text="a", line=1),
        Example(text="b", line=3),
    ]
    assert read_examples(write({"prompt": "", "completion": "c"})) == [Example(prompt="", completion="c", line=1)]
    assert read_examples(write({"messages": messages})) == [Example(messages=messages, line=1)]
    assert read_examples(write({"text": "a", "label": 0}, {"text": "b", "label": 1}))[1].label == 1


def test_text_file_is_one_document_per_paragraph(write: Callable[..., Path]) -> None:
    path = write("", "one", "still one", "", "  ", "two ", "", "", "three", name="data.txt")
    assert read_examples(path) == [
        Example(text="one\nstill one", line=2),
        Example(text="two", line=6),
        Example(text="three", line=9),
    ]
    assert read_examples(path.rename(path.with_name("DATA.TXT")))[1].text == "two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 2: not JSON \(Expecting ',' delimiter at column 13\): \{\"text\": \"a\""),
        (r'{"text": "cat \ud83d"}', "line 2: has half of a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\udc00"}]}', "line 2: has half of a surrogate pair"),
        ("[" * 100_000, r"line 2: not JSON \(brackets too deep within each other\): \[\["),
        ("[1, 2]", r"line 2: a JSON list, not an object: \[1, 2\]"),
        ('{"question": "a", "answer": "b"}', "line 2: has the keys 'question', 'answer'; that is none of the forms"),
        ("{}", "line 2: has the keys nothing"),
        ('{"text": 5}', "line 2: 'text' is a JSON number, it must be a string"),
        ('{"text": ""}', "line 2: 'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"prompt": "a"}', "line 2: has the keys 'prompt'; that is none"),
        ('{"text": "a", "messages": []}', "line 2: has the keys 'text', 'messages'; that is more than one form"),
        ('{"text": "a", "text": "b"}', "line 2: has the key 'text' twice in one object"),
        ('{"messages": [{"role": "user", "role": "tool", "content": "a"}]}', "line 2: has the key 'role' twice"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}', "line 2: 'tools' is .*must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "[1]"}', "line 2: 'tools' is .*must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "a"}', "line 2: 'tools' is \"a\"; it must be"),
        ('{"messages": []}', r"line 2: 'messages' is \[\]; it must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 is .*needs a string role and content"),
        ('{"text": "a", "label": 0.5}', "line 2: 'label' is 0.5; it must be a string or an integer"),
        ('{"text": "a", "label": null}', "line 2: 'label' is null"),
        ('{"text": "a", "label": true}', "line 2: 'label' is true"),
    ],
)
def test_bad_line_is_named_with_what_was_found(write: Callable[..., Path], line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_examples(write({"text": "fine"}, line))
    assert "data.jsonl" in str(error.value)


def test_all_bad_lines_are_listed_up_to_ten(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"(?s)line 1:.*line 10:.*… and 2 more"):
        read_examples(write(*["{"] * 12))


def test_files_that_hold_nothing_usable(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.jsonl: holds no examples"):
        read_examples(write())
    with pytest.raises(DataError, match=r"data.txt: holds no examples"):
        read_examples(write("", name="data.txt"))
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read: No such file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"one\ntw\xf6")
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_examples(tmp_path / "latin.txt")


def test_label_in_one_line_only_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"1 of 3 lines have a label: line 2 has one \('x'\), line 1 has none"):
        read_examples(write({"text": "a"}, {"text": "b", "label": "x"}, {"text": "c"}))


def test_mixed_forms_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="line 2 is of the form 'completion', line 1 of the form 'text'"):
        read_examples(write({"text": "a"}, {"prompt": "b", "completion": "c"}))


def test_class_names_are_sorted_by_value() -> None:
    def examples(*labels: Any) -> list[Example]:
        return [Example(text="a", label=label, line=n) for n, label in enumerate(labels, 1)]

    assert class_names(examples(10, 9, 10), "f") == [9, 10]
    assert class_names(examples("b", "a"), "f") == ["a", "b"]
    with pytest.raises(DataError, match="all 2 lines have the label 'a'"):
        class_names(examples("a", "a"), "f")
    with pytest.raises(
        DataError, match="line 2 has the label 1, line 1 'a'; labels must be all strings or all integers"
    ):
        class_names(examples("a", 1), "f")
    with pytest.raises(DataError, match="line 1 has no label"):
        class_names(examples(None), "f")
    with pytest.raises(DataError, match="f: has the labels 'a' and 'a ', which differ in white space alone"):
        class_names(examples("a ", "b", "a"), "f")


# tokens


def test_text_ends_with_the_end_token(tokenizer: Any) -> None:
    ids = encode(Example(text="the cat"), tokenizer).ids.tolist()
    assert ids == [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert encode(Example(text="the cat"), tokenizer).target.all()


def test_loss_is_on_the_completion_only(tokenizer: Any) -> None:
    encoded = encode(Example(prompt="the cat", completion=" sat on"), tokenizer)
    predicted = encoded.ids[encoded.target]
    assert tokenizer.decode(predicted) == " sat on</s>"
    assert tokenizer.decode(encoded.ids[~encoded.target]) == "the cat"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("2+2=", "4"), ("the cat", " sat"), ("f(", "x)"), ("said: ", "yes"), ("the ca", "t sat")]
)
def test_tokens_say_what_prompt_and_completion_say(prompt: str, completion: str) -> None:
    """Llama's tokenizers put a space before a text: not before one that goes on. (In some a token would span both.)"""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = ["the cat sat, it said: yes, 2+2=4\n f(x)"] * 4
    bare.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    encoded = encode(Example(prompt=prompt, completion=completion), tokenizer)
    assert tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=True) == prompt + completion
    assert encoded.ids[~encoded.target].tolist() == tokenizer(prompt)["input_ids"]


def test_loss_is_on_assistant_turns_only(chat_tokenizer: Any) -> None:
    turns = [("system", "the"), ("user", "cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "mat")]
    example = Example(messages=[{"role": role, "content": content} for role, content in turns])
    encoded = encode(example, chat_tokenizer)
    assert (
        chat_tokenizer.decode(encoded.ids)
        == "[system]the</s>[user]cat</s>[assistant]sat</s>[user]on</s>[assistant]mat</s>"
    )
    assert chat_tokenizer.decode(encoded.ids[encoded.target]) == "sat</s>mat</s>"


def test_a_chat_that_the_assistant_begins(chat_tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "sat"}, {"role": "user", "content": "cat"}]
    encoded = encode(Example(1, messages=messages), chat_tokenizer)
    assert chat_tokenizer.decode(encoded.ids[encoded.target]) == "sat</s>"


def test_tools_go_through_the_template(chat_tokenizer: Any, write: Callable[..., Path]) -> None:
    tools = [{"type": "function", "function": {"name": "dog", "parameters": {"type": "object"}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "dog", "arguments": {"a": 1}}}]}
    messages = [{"role": "user", "content": "cat"}, call, {"role": "tool", "content": "mat"}]
    file = write(*({"messages": messages, "tools": given} for given in (tools, json.dumps(tools), [], None, "")))
    listed, text, *without = read_examples(file)
    assert listed.tools == text.tools == tools and all(example.tools is None for example in without)
    with pytest.raises(DataError, match='line 1 has "tools", which this tokenizer\'s chat template does not show'):
        encode(listed, chat_tokenizer)
    chat_tokenizer.chat_template = (
        "{% for tool in tools or [] %}[system]{{ tool.function.name }}</s>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls[0].function.name }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoded = encode(listed, chat_tokenizer)
    assert chat_tokenizer.decode(encoded.ids) == "[system]dog</s>[user]cat</s>[assistant]dog</s>[tool]mat</s>"
    assert chat_tokenizer.decode(encoded.ids[encoded.target]) == "dog</s>"
    assert chat_tokenizer.decode(encode(without[0], chat_tokenizer).ids).startswith("[user]cat")


def test_chat_without_a_usable_template_is_refused(tokenizer: Any, chat_tokenizer: Any) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = Example(messages=[{"role": role, "content": content} for role, content in turns], line=3)
    with pytest.raises(DataError, match='line 3 has "messages", but the model\'s tokenizer has no chat template'):
        encode(example, tokenizer)
    chat_tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(DataError, match="line 3: this tokenizer's chat template changes earlier turns"):
        encode(example, chat_tokenizer)
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 3: the tokenizer's chat template refuses these messages: roles must"):
        encode(example, chat_tokenizer)
    slow = ByT5Tokenizer()  # type: ignore[no-untyped-call]
    slow.chat_template = CHAT
    with pytest.raises(DataError, match='line 3 has "messages", and ByT5Tokenizer does not say where its tokens lie'):
        encode(example, slow)


def test_classification_keeps_the_tokenizers_own_marks() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "[UNK]": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 0), ("[SEP]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]")
    encoded = encode(Example(text="a b a b", label="x"), tokenizer, max_length=4, label=1)
    assert encoded.ids.tolist() == [0, 2, 3, 1], "a cut text must still end with its closing token"
    assert encoded.label == 1 and not encoded.target.any() and encoded.lost == 2
    assert encode(Example(text="a b", label="x"), tokenizer, max_length=4, label=1).lost == 0


def test_lines_without_room_for_their_completion_are_left_out(tokenizer: Any) -> None:
    long = Example(prompt="the cat sat on the mat", completion=" and", line=1)
    short = Example(prompt="the", completion=" cat", line=2)
    length = len(tokenizer(long.prompt)["input_ids"])
    items, dropped = encode_all([long, short], tokenizer, max_length=length)
    assert [item.line for item in items] == [2] and dropped == [1]
    with pytest.raises(
        DataError, match=r"no line has a completion or assistant turn within \d+ tokens; raise --max-length"
    ):
        encode_all([long], tokenizer, max_length=length)


def test_unknown_label_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="line 4 has the label 'c'; the training data has 'a', 'b'"):
        encode_all([Example(text="x", label="c", line=4)], tokenizer, max_length=8, classes=["a", "b"])


# batches


def test_packing_loses_nothing(tokenizer: Any) -> None:
    pieces = pack([item(5), item(9, 5), item(3, 14)], 4)
    assert [len(piece.ids) for piece in pieces] == [4, 4, 4, 4]  # a last piece of one token would predict nothing
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == list(range(16))
    assert [len(piece.ids) for piece in pack([item(10)], 4)] == [4, 4, 2]
    long = Example(text="the cat sat on the mat. " * 500)
    items, dropped = encode_all([long], tokenizer, max_length=64)
    whole = np.concatenate([piece.ids for piece in items])
    assert np.array_equal(whole, encode(long, tokenizer).ids) and not dropped
    with pytest.raises(DataError, match="a single token"):
        encode_all([Example(text="t")], _without_end(tokenizer), max_length=4)


def _without_end(tokenizer: Any) -> Any:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    return bare


def test_each_epoch_holds_every_item_once_in_a_new_order() -> None:
    items = [item(2 + n % 7, n) for n in range(23)]
    batches = Batches(items, batch_size=4, accumulation=2, seed=1)
    assert batches.steps_per_epoch == 3
    epochs = [
        [int(i.ids[0]) for step in range(3 * e, 3 * e + 3) for batch in batches(step) for i in batch] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
    assert epochs[0] != epochs[1]
    assert [len(batches(step)) for step in range(3)] == [2, 2, 2]


def test_smaller_batches_with_more_accumulation_make_the_same_steps() -> None:
    items = [item(2 + n % 7, n) for n in range(23)]
    whole, parts = Batches(items, 8, 1, seed=1), Batches(items, 2, 4, seed=1)
    for step in range(7):
        assert [[i.ids[0] for b in batches(step) for i in b] for batches in (whole, parts)] == [
            [i.ids[0] for i in whole(step)[0]]
        ] * 2
        assert all(len(batch) <= 2 for batch in parts(step))


def test_batches_depend_on_the_step_alone() -> None:
    items = [item(2 + n % 7, n) for n in range(23)]
    first, second = Batches(items, 4, 2, 1), Batches(items, 4, 2, 1)
    forward = [[[i.ids[0] for i in batch] for batch in first(step)] for step in range(9)]
    backward = [[[i.ids[0] for i in batch] for batch in second(step)] for step in reversed(range(9))]
    assert forward == backward[::-1]
    assert [[[i.ids[0] for i in batch] for batch in Batches(items, 4, 2, 2)(step)] for step in range(9)] != forward


def test_batches_hold_items_of_similar_length() -> None:
    random = np.random.default_rng(0)
    items = [item(int(length)) for length in random.integers(2, 100, 1600)]
    batches = Batches(items, 16)

    padding = tokens = 0
    for step in range(batches.steps_per_epoch):
        lengths = [len(i.ids) for i in batches(step)[0]]
        padding += sum(max(lengths) - length for length in lengths)
        tokens += sum(lengths)
    assert padding / tokens < 0.05  # at random it would be near 0.9: the longest of 16 is near 94, the mean is 51


def test_collate_pads_right_and_masks() -> None:
    first = Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True]), label=1)
    second = Encoded(np.array([8], np.int32), np.array([True]), label=0)
    arrays = collate([first, second], pad=9, classify=False)
    assert arrays["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert arrays["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert collate([first, second], pad=9, classify=True)["labels"].tolist() == [1, 0]
