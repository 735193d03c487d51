"""transformers' tokenizer of an export: the ids of texts and of conversations are ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.huggingface.tokenizer import read_tokenizer, write_tokenizer
from nanochat_pl.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.helpers.exports import transformers_at
from tests.reference.golden_tokenizer import load_golden_tokenizer

GUARD = "\ufdd0"


@pytest.fixture(scope="module")
def ours(golden: Path) -> Tokenizer:
    return load_golden_tokenizer(golden)


@pytest.fixture(scope="module")
def folder(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made, ours, 10_000)
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[Any]:
    with transformers_at(folder / "modules") as transformers:
        yield transformers.AutoTokenizer.from_pretrained(folder)


def render(theirs: Any, messages: list[Any], **options: Any) -> list[int]:
    return list(theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def test_conversations_of_the_golden_values(golden: Path, theirs: Any) -> None:
    """One of them has a special token typed by the user."""
    cases = json.loads((golden / "conversations.json").read_text(encoding="utf-8"))
    for case in cases:
        messages = case["conversation"]["messages"]
        assert render(theirs, messages)[: case.get("max_tokens", 2048)] == case["ids"]
        if "completion_prompt_ids" in case:
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            assert render(theirs, asked, add_generation_prompt=True) == case["completion_prompt_ids"]


def test_special_tokens_that_people_type_are_text(ours: Tokenizer, theirs: Any) -> None:
    texts = [f"{name} a<{name}>" for name in SPECIAL_TOKENS]
    texts += [f"<{GUARD}|bos|>", f"<{GUARD}{GUARD}|bos|>{GUARD}", f"<{GUARD}x", "<<|<|bos|>", "<", "|bos|>", ""]
    for text in texts:
        parts = [{"type": kind, "text": text} for kind in ("text", "python", "python_output", "text")]
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
        ]
        assert render(theirs, messages) == ours.render_conversation({"messages": messages})[0]


def test_ids_of_texts(golden: Path, ours: Tokenizer, theirs: Any) -> None:
    """Outside of conversations transformers finds special tokens in a text, unless it is asked not to."""
    for case in json.loads((golden / "encodings.json").read_text(encoding="utf-8")):
        assert theirs.encode(case["text"], split_special_tokens=True) == case["ids"]
        assert theirs.decode(case["ids"]) == ours.decode(case["ids"])
    assert theirs.encode("<|bos|>") == [ours.bos_id]
    # The one text that differs, and that only outside of conversations: nothing but a program writes it.
    assert theirs.encode(f"<{GUARD}|") == ours.encode("<|")


def test_contents_as_parts(ours: Tokenizer, theirs: Any) -> None:
    """Servers write a text as a list of one part, whoever's message it is in."""
    messages = [{"role": role, "content": f"{role} <|bos|>"} for role in ("system", "user", "assistant")]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert render(theirs, parts) == ours.render_conversation({"messages": messages})[0]


def test_names_of_special_tokens(ours: Tokenizer, theirs: Any) -> None:
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|bos|>", "<|assistant_end|>", "<|bos|>")
    assert [theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == list(ours.special_ids.values())
    assert theirs.decode([ours.bos_id, *ours.encode("Hi")], skip_special_tokens=True) == "Hi"
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"role": "system", "content": "a"}], "no user message"),
        ([{"role": "assistant", "content": "a"}], "take turns"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "take turns"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "take turns"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": "b"}]}],
            "text, python or python_output",
        ),
        # Ours encodes each part by itself; one text would merge, or make a special token, across the seam.
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "<"}, {"type": "text", "text": "|bos|>"}]},
            ],
            "join them",
        ),
    ],
)
def test_conversations_that_the_template_refuses(theirs: Any, messages: list[Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        render(theirs, messages)


def test_read_back(folder: Path, ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    found = read_tokenizer(folder)
    assert found is not None and found.fingerprint == ours.fingerprint
    theirs.save_pretrained(tmp_path)
    again = read_tokenizer(tmp_path)
    assert again is not None and again.fingerprint == ours.fingerprint
    assert read_tokenizer(tmp_path / "nothing") is None


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    assert f"{tmp_path / 'tokenizer.json'}: is no tokenizer of nanochat_pl" in caught.value.problems[0]
    assert "to import the model without a tokenizer" in caught.value.fix
