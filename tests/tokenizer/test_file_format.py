"""tokenizer.json: other libraries read it and give the same ids; a wrong or hostile file gives one clear error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat_pl.tokenizer.file_format import spell, unspell
from tests.tokenizer.test_bpe import ODD_TEXTS, random_texts, real_texts  # noqa: F401

BYTES = [bytes([value]) for value in range(256)]


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_a_saved_tokenizer_is_the_same_again(tokenizer: Tokenizer, saved: Path) -> None:
    loaded = Tokenizer.load(saved)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.encode("They'll pay $1,234.56 🌍") == tokenizer.encode("They'll pay $1,234.56 🌍")
    loaded.save(saved.with_name("again.json"))
    assert saved.with_name("again.json").read_bytes() == saved.read_bytes()


def test_the_file_is_json(saved: Path) -> None:
    document = json.loads(saved.read_text(encoding="utf-8"))
    assert document["model"]["vocab"]["Ġthe"] >= 256


def assert_tokenizers_agrees(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    other = tokenizers.Tokenizer.from_file(str(path))
    assert other.get_vocab_size() == tokenizer.vocab_size
    assert [other.token_to_id(name) for name in SPECIAL_TOKENS] == list(tokenizer.special_ids.values())
    other.encode_special_tokens = True  # as ordinary text
    for text in texts:
        ids = tokenizer.encode(text)
        assert other.encode(text).ids == ids, repr(text[:100])
        assert other.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizers_library_gives_the_same_ids(tokenizer: Tokenizer, saved: Path) -> None:
    assert_tokenizers_agrees(saved, tokenizer, ODD_TEXTS + random_texts(300))


def test_the_tokenizers_library_gives_the_same_ids_on_real_texts(
    golden_tokenizer: Tokenizer,
    tmp_path: Path,
    real_texts: list[str],  # noqa: F811
) -> None:
    golden_tokenizer.save(tmp_path / "tokenizer.json")
    assert_tokenizers_agrees(tmp_path / "tokenizer.json", golden_tokenizer, real_texts)


@pytest.mark.slow
def test_the_tokenizers_library_gives_the_same_ids_for_every_character(tokenizer: Tokenizer, saved: Path) -> None:
    other = tokenizers.Tokenizer.from_file(str(saved))
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for template in ("a%s1", " '%s\n"):
        spelled = [template % character for character in characters]
        texts = ["".join(spelled[at : at + 64]) for at in range(0, len(spelled), 64)]  # a text by itself costs more
        assert [encoded.ids for encoded in other.encode_batch(texts)] == tokenizer.encode_batch(texts), template


def test_transformers_reads_it(tokenizer: Tokenizer, saved: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (an extra)")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved))
    for text in ["They'll pay $1,234.56 🌍", "", "  x\n\n\ty"]:
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert other.convert_tokens_to_ids("<|bos|>") == tokenizer.bos_id
    assert len(other) == tokenizer.vocab_size


def test_every_byte_has_a_spelling() -> None:
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    assert spell(b" \n\x00A") == "ĠĊĀA"
    with pytest.raises(ValueError, match="stands for no byte"):
        unspell("a b")


def test_a_token_out_of_reach_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not made of two earlier tokens"):
        Tokenizer([*BYTES, b"abc"], SPLIT_PATTERN).save(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def edit(*path: str | int, value: Any = None, drop: bool = False) -> Callable[[dict], None]:
    """A change of one place in a document."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        if drop:
            del document[path[-1]]
        else:
            document[path[-1]] = value

    return change


def rename_token(document: dict) -> None:
    vocab = document["model"]["vocab"]
    vocab["A "] = vocab.pop("A")


def swap_merges(document: dict) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def swap_bytes_with_merges(document: dict) -> None:
    vocab = document["model"]["vocab"]
    names = {index: name for name, index in vocab.items()}
    vocab[names[255]], vocab[names[256]] = 256, 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("version", value="2.0"), "version is '2.0'"),
        (edit("version", drop=True), "'version' is missing"),
        (edit("more", value=1), "'more' is not expected"),
        (edit("_target_", value="os.system"), "'_target_' is not expected"),
        (edit("model", value=[]), "'model' is missing or of the wrong type"),
        (edit("model", "dropout", value=0.1), "model.dropout is 0.1"),
        (edit("model", "fuse_unk", value=0), "model.fuse_unk is 0"),
        (edit("model", "vocab", value=None), "'vocab' is missing"),
        (edit("model", "vocab", value={}), "model.merges has 55 entries"),
        (edit("model", "vocab", "A", value=10**12), "gives the id 1000000000000 to 'A'"),
        (edit("model", "vocab", "A", value=-1), "gives the id -1 to 'A'"),
        (edit("model", "vocab", "A", value="65"), "gives the id '65' to 'A'"),
        (edit("model", "vocab", "A", value=True), "gives the id True to 'A'"),
        (edit("model", "vocab", "A", value=66), "gives the id 66 to"),
        (edit("model", "vocab", "A", drop=True), "ids must be 0 …"),
        (rename_token, "' ', which stands for no byte"),
        (swap_bytes_with_merges, "model.merges"),
        (swap_merges, "does not make"),
        (edit("model", "merges", 0, value="Ġ t"), "model.merges[0]='Ġ t'"),
        (edit("model", "merges", 0, value=["Ġ"]), "model.merges[0]"),
        (edit("model", "merges", 0, value=[1, 2]), "model.merges[0]"),
        (edit("model", "merges", value=[]), "model.merges has 0 entries"),
        (edit("pre_tokenizer", "pretokenizers", value=[]), "'pattern' is missing"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", value={"String": "a"}), "'Regex' is missing"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value="("), "no regular expression"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value="a" * 5000), "5,000 characters"),
        (edit("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value=r"\p{L}+"), "loses parts"),
        (edit("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True), "add_prefix_space is True"),
        (edit("pre_tokenizer", "type", value="Split"), "pre_tokenizer.type is 'Split'"),
        (edit("normalizer", value={"type": "NFC"}), "normalizer is {'type': 'NFC'}, not None"),
        (edit("decoder", drop=True), "'decoder' is missing"),
        (edit("added_tokens", value=[]), "added_tokens has 0 entries, not 9"),
        (edit("added_tokens", 0, "id", value=5), "added_tokens[0].id is 5"),
        (edit("added_tokens", 0, "content", value="<|boss|>"), "added_tokens[0].content is '<|boss|>'"),
    ],
)
def test_a_changed_file_is_refused(saved: Path, change: Callable[[dict], None], words: str) -> None:
    document = json.loads(saved.read_text(encoding="utf-8"))
    before = json.dumps(document)
    change(document)
    assert json.dumps(document) != before
    saved.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Tokenizer.load(saved)
    assert len(caught.value.problems) == 1
    assert str(saved) in caught.value.problems[0]
    assert words in caught.value.problems[0]
    assert len(caught.value.problems[0]) < 500 + len(str(saved))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"12", b"\x80\x04pickle", b'{"model": NaN}', b"[" * 10**5]
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_truncated_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for share in (0.1, 0.5, 0.99):
        saved.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        Tokenizer.load(tmp_path / "none.json")


def test_long_hostile_tokens_cost_no_time(tmp_path: Path, saved: Path) -> None:
    """Encoding with a token of a million characters would take the square of its length."""
    document = json.loads(saved.read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    token = "a"
    for _ in range(21):
        document["model"]["merges"].append([token, token])
        token += token
        vocab[token] = len(vocab)
    for added in document["added_tokens"]:
        added["id"] += 21
    saved.write_text(json.dumps(document), encoding="utf-8")
    start = time.perf_counter()
    with pytest.raises(UserError):
        Tokenizer.load(saved)
    assert time.perf_counter() - start < 60  # or hours
