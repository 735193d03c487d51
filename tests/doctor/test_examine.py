"""The metrics of the doctor, on documents of which each metric is known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanochat_pl.data.cache.tokens import TokenCache, build_token_cache
from nanochat_pl.data.packing.rows import packed_rows
from nanochat_pl.doctor.documents import Documents, both_ends, shortened
from nanochat_pl.doctor.examine import Found, examine, num_reads
from nanochat_pl.doctor.findings import row_metrics
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.bpe import SPLIT_PATTERN
from tests.helpers.fake_data import ListSource

BYTES = Tokenizer([bytes([value]) for value in range(256)], SPLIT_PATTERN)  # a token a byte


def words(first: int, count: int) -> str:
    """So many words, w1 w2 …, all different."""
    return " ".join(f"w{number}" for number in range(first, first + count))


def documents_of(folder: Path, texts: list[str], per_shard: int = 100) -> Documents:
    return Documents({"": cache_of(folder, texts, per_shard)}, BYTES)


def cache_of(folder: Path, texts: list[str], per_shard: int = 100) -> TokenCache:
    shards = {f"s{n}": texts[n : n + per_shard] for n in range(0, len(texts), per_shard)}
    return build_token_cache(ListSource(shards), "train", BYTES, folder)


def found_in(folder: Path, train: list[str], validation: list[str], max_documents: int = 1000) -> Found:
    parts = documents_of(folder, train, per_shard=3), documents_of(folder, validation)
    done: list[int] = []
    found = examine(*parts, {}, max_documents, advance=done.append)
    copies = found.duplicates.copies + found.train.empty  # of which no text is read
    assert sum(done) <= num_reads(parts, max_documents) <= sum(done) + copies
    return found


def test_lengths_and_odd_text(tmp_path: Path) -> None:
    train = ["aaaa", "", "bb", "é\ufffd", "menu\nmenu\nmenu\ntext"]
    found = found_in(tmp_path, train, ["val"])
    assert (found.train.documents, found.train.empty, found.train.distinct) == (5, 1, 4)
    # Tokens are bytes: 4, 2, 2 + 3, 19.
    assert (found.train.tokens.total, found.train.tokens.longest, found.train.tokens.median) == (30, 19, 4.5)
    assert (found.train.characters.total, found.train.characters.longest) == (27, 19)
    assert found.train.bytes_per_token == 1.0
    assert found.train.non_ascii_share == pytest.approx(2 / 27)
    assert (found.train.replaced, found.train.repeating) == (1, 1)
    assert found.train.longest[0] == ("s3, document 1", 19, "'menu menu menu text'")
    assert found.validation.documents == 1


def test_exact_copies_are_counted_and_shown(tmp_path: Path) -> None:
    once, twice = words(0, 30), words(100, 30)
    found = found_in(tmp_path, [twice, once, "", twice, twice, ""], [words(200, 30), once])
    duplicates = found.duplicates
    assert (duplicates.copies, duplicates.validation_copies) == (2, 1)  # empty documents are no copies of each other
    share = 2 * len(twice) / (len(once) + 3 * len(twice))
    assert duplicates.copied_tokens == pytest.approx(share)
    assert duplicates.examples["copy"].startswith("s0, document 0 = s3, document 0: 'w100 w101")
    assert duplicates.examples["copy in validation"].startswith("s0, document 1 = s0, document 1: 'w0 w1")
    assert found.train.distinct == 2 == found.train.sampled


def test_validation_is_an_evaluation_set(tmp_path: Path) -> None:
    """Found through the tokens: the words of a document that was cut into tokens and put together again."""
    found = found_in(tmp_path, [words(0, 60)], [words(300, 20) + " " + words(10, 13), words(400, 13)])
    (overlap,) = found.overlaps
    assert (overlap.name, overlap.items, overlap.overlapping) == ("validation", 2, 1)
    assert overlap.gram_share == pytest.approx(1 / (33 - 12 + 1))
    assert overlap.example == words(10, 13) and overlap.example_place == "s0, document 0"


def test_a_sample_is_even_and_copies_are_no_part_of_it(tmp_path: Path) -> None:
    train = [words(100 * n, 20) for n in range(10)]
    found = found_in(tmp_path, [train[0], *train], ["v"], max_documents=5)
    assert (found.train.documents, found.train.distinct, found.train.sampled) == (11, 10, 5)
    assert found.train.tokens.total == sum(map(len, [train[0], *train]))
    assert found.duplicates.copies == 1  # of everything, sampled or not


def test_marks_of_conversations_are_no_words(tmp_path: Path) -> None:
    start, end = (BYTES.special_ids[name] for name in ("<|user_start|>", "<|user_end|>"))

    class Marked:
        """A cache of one conversation."""

        lengths, masked, num_tokens = np.array([7]), False, 7

        def tokens(self, number: int) -> np.ndarray:
            return np.array([start, *b"one", end, *b"2!"])

    assert Documents({"": Marked()}, BYTES).text(0) == "one\n2!"  # type: ignore[dict-item]


def test_documents_of_several_sources(tmp_path: Path) -> None:
    caches = {name: cache_of(tmp_path / name, texts) for name, texts in (("one", ["short", "b"]), ("two", ["", "xyz"]))}
    joined = Documents(caches, BYTES)
    assert joined.lengths.tolist() == [5, 1, 0, 3]
    assert [joined.place(number) for number in (0, 3)] == ["one/s0, document 0", "two/s0, document 1"]
    assert joined.text(3) == "xyz" and joined.content(3) != joined.content(0)
    found = examine(joined, documents_of(tmp_path / "val", ["v"]), {}, 10)
    assert found.train.longest[0] == ("one/s0, document 0", 5, "'short'")


def test_cropping_and_documents_in_no_row_are_counted(tmp_path: Path) -> None:
    """While a shorter one waits in the buffer, a document that is longer than a row is never placed."""
    cache = cache_of(tmp_path, ["x" * 40, "aa", "bb", "cc"])
    rows = packed_rows(
        cache, 4, BYTES.bos_id, "crop", tmp_path, num_rows=5, buffer_documents=8, refill_documents=1, shuffle="none"
    )
    metrics = row_metrics(rows, 1.0, 5)
    assert metrics.never_placed == 1
    # Each row is as bos a a bos b: one token of the second document is dropped.
    assert (metrics.cropped_tokens, metrics.padded_share) == (5, 0.0)
    assert metrics.trained_share == pytest.approx(15 / (15 + 5 + 40))
    assert metrics.epochs == pytest.approx(20 / 46)
    assert metrics.target_share == 1.0


def test_splitting_trains_on_everything_and_padding_is_counted(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, ["x" * 40, "aa", "bb", "cc"])
    rows = packed_rows(cache, 4, BYTES.bos_id, "split", tmp_path, epochs=1, shuffle="none")
    metrics = row_metrics(rows, 1.0, 2 * len(rows))
    assert (metrics.trained_share, metrics.never_placed, metrics.cropped_tokens) == (1.0, 0, 0)
    assert metrics.epochs == pytest.approx(2.0)
    places = len(rows) * 5
    filled = 46 + rows.index.stats.pieces
    assert metrics.padded_share == pytest.approx((places - filled) / places)
    targets = int((rows.read(range(len(rows)))[1] >= 0).sum())
    assert metrics.target_share == pytest.approx(targets / (len(rows) * 4))


def test_text_is_shortened_to_a_line() -> None:
    assert shortened("a\n  b") == "'a b'"
    assert shortened("x" * 100, 10) == f"'{'x' * 10}…'"
    assert both_ends("begin " + "x" * 500 + " end", 20) == "'begin xxxx … xxxxxx end'"
