"""The packer against the golden rows, the slow reference, and what it promises."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.packing.packer import pack
from nanochat_pl.data.packing.row_index import RowIndex, kept_index
from tests.reference.packer import crop_rows, pad_rows, stream_rows

BOS = 0


def rows_of(index: RowIndex, documents: list[list[int]]) -> list[list[int]]:
    """The rows without padding; documents have no bos."""
    rows = []
    for first, last in itertools.pairwise(index.row_starts):
        pieces = index.pieces_of(np.array([len(rows)]))[1].tolist()
        assert len(pieces) == last - first
        rows.append([id for d, start, length, bos in pieces for id in [*[BOS] * bos, *documents[d][start:][:length]]])
    return rows


def lengths_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([len(document) for document in documents])


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    random = np.random.RandomState(seed)
    lengths = np.minimum(np.exp(random.normal(np.log(longest) - 1.5, 1.2, count)).astype(int), longest)
    return [random.randint(1, 1000, length).tolist() for length in lengths]


def test_crop_gives_the_golden_rows(golden: Path) -> None:
    case = json.loads((golden / "packing_crop.json").read_text(encoding="utf-8"))
    expected = load_file(golden / "packing_crop.safetensors")["rows"].reshape(-1, case["T"] + 1)
    index = pack(
        lengths_of(case["documents"]),
        case["T"] + 1,
        "crop",
        num_rows=len(expected),
        buffer_documents=case["buffer_size"],
        refill_documents=case["documents_per_refill"],
        shuffle="none",
    )
    assert rows_of(index, case["documents"]) == expected.tolist()


def test_pad_gives_the_golden_inputs(golden: Path) -> None:
    case = json.loads((golden / "packing_pad.json").read_text(encoding="utf-8"))
    expected = load_file(golden / "packing_pad.safetensors")["inputs"].reshape(-1, case["T"])
    conversations = [conversation["ids"][1:] for conversation in case["conversations"]]
    index = pack(
        lengths_of(conversations),
        case["T"] + 1,
        "pad",
        num_rows=len(expected),
        buffer_documents=case["buffer_size"],
        refill_documents=1,
        shuffle="none",
    )
    padded = [(row + [BOS] * (case["T"] + 1))[: case["T"]] for row in rows_of(index, conversations)]
    assert padded == expected.tolist()


def test_reference_gives_the_golden_rows(golden: Path) -> None:
    case = json.loads((golden / "packing_crop.json").read_text(encoding="utf-8"))
    expected = load_file(golden / "packing_crop.safetensors")["rows"].reshape(-1, case["T"] + 1)
    documents = [[BOS, *document] for document in case["documents"]]
    rows = crop_rows(documents, case["T"] + 1, len(expected), case["buffer_size"], case["documents_per_refill"])
    assert rows == expected.tolist()

    case = json.loads((golden / "packing_pad.json").read_text(encoding="utf-8"))
    arrays = load_file(golden / "packing_pad.safetensors")
    conversations = [(conversation["ids"], conversation["mask"]) for conversation in case["conversations"]]
    num_rows = arrays["inputs"].reshape(-1, case["T"]).shape[0]
    inputs, targets = pad_rows(conversations, case["T"] + 1, num_rows, case["buffer_size"], BOS)
    assert inputs == arrays["inputs"].reshape(-1, case["T"]).tolist()
    assert targets == arrays["targets"].reshape(-1, case["T"]).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_crop_equals_the_reference_on_random_lengths(seed: int) -> None:
    random = np.random.RandomState(seed)
    documents = [document for document in random_documents(seed, random.randint(1, 60), 120) if document]
    capacity, buffer, refill = int(random.randint(2, 80)), int(random.randint(1, 40)), int(random.randint(1, 50))
    index = pack(
        lengths_of(documents),
        capacity,
        "crop",
        num_rows=60,
        buffer_documents=buffer,
        refill_documents=refill,
        shuffle="none",
    )
    expected = crop_rows([[BOS, *document] for document in documents], capacity, 60, buffer, refill)
    assert rows_of(index, documents) == expected


@pytest.mark.parametrize("seed", range(4))
def test_pad_equals_the_reference_on_random_lengths(seed: int) -> None:
    random = np.random.RandomState(seed)
    documents = [document for document in random_documents(seed, random.randint(1, 60), 40) if document]
    buffer = int(random.randint(1, 30))
    index = pack(
        lengths_of(documents), 41, "pad", num_rows=40, buffer_documents=buffer, refill_documents=1, shuffle="none"
    )
    conversations = [([BOS, *document], [1] * (len(document) + 1)) for document in documents]
    inputs, _ = pad_rows(conversations, 41, 40, buffer, BOS)
    assert [(row + [BOS] * 41)[:40] for row in rows_of(index, documents)] == inputs


@pytest.mark.parametrize("mode", ["crop", "split"])
def test_rows_to_pretrain_on_are_full(mode: str) -> None:
    documents = random_documents(3, 200, 300)
    index = pack(lengths_of(documents), 65, mode, num_rows=900, buffer_documents=50, refill_documents=16)
    assert {len(row) for row in rows_of(index, documents)} == {65}
    assert index.stats.padded_places == 0 and index.stats.epochs > 1
    assert index.stats.placed_tokens + index.stats.pieces == 900 * 65


def test_an_epoch_split_into_pieces_drops_nothing() -> None:
    documents = random_documents(4, 300, 500)
    index = pack(lengths_of(documents), 65, "split", epochs=1, buffer_documents=50)
    seen = [np.zeros(len(document), dtype=int) for document in documents]
    for document, start, length in index.pieces.tolist():
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    assert index.stats.cropped_tokens == 0 and index.stats.trained_share == 1
    assert {len(row) for row in rows_of(index, documents)[:-1]} == {65}


@pytest.mark.parametrize("mode", ["crop", "split", "pad"])
def test_fewer_rows_are_the_beginning_of_more(mode: str) -> None:
    documents = [document for document in random_documents(6, 120, 60) if document]
    settings = {"buffer_documents": 30, "refill_documents": 8, "seed": 7}
    few = pack(lengths_of(documents), 65, mode, num_rows=37, **settings)
    many = pack(lengths_of(documents), 65, mode, num_rows=400, **settings)
    assert many.stats.epochs > few.stats.epochs
    assert np.array_equal(few.row_starts, many.row_starts[:38])
    assert np.array_equal(few.pieces, many.pieces[: len(few.pieces)])


def test_each_epoch_has_its_own_seeded_order() -> None:
    lengths = np.full(50, 9)
    orders = [pack(lengths, 10, "pad", epochs=2, seed=seed).pieces[:, 0].reshape(2, 50) for seed in (0, 0, 1)]
    assert all(sorted(epoch.tolist()) == list(range(50)) for order in orders for epoch in order)
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0][0], orders[0][1])


def test_epochs_do_not_share_a_row_and_their_length_is_known() -> None:
    documents = [document for document in random_documents(8, 70, 30) if document]
    index = pack(lengths_of(documents), 65, "pad", epochs=3, buffer_documents=10, refill_documents=1)
    bounds = [*index.epoch_starts.tolist(), index.num_rows]
    assert len(bounds) == 4
    for first, last in itertools.pairwise(bounds):
        pieces = index.pieces[index.row_starts[first] : index.row_starts[last]]
        assert sorted(pieces[:, 0].tolist()) == list(range(len(documents)))
    assert index.stats.padded_places == index.num_rows * 65 - 3 * sum(len(d) + 1 for d in documents)


def test_rows_and_epochs_end_at_whichever_comes_first() -> None:
    lengths = np.full(10, 9)
    assert pack(lengths, 10, "pad", num_rows=4, epochs=1).num_rows == 4
    assert pack(lengths, 10, "pad", num_rows=40, epochs=2).num_rows == 20


def test_empty_documents_are_left_out() -> None:
    index = pack(np.array([0, 3, 0, 4]), 10, "split", epochs=1, shuffle="none")
    assert index.pieces[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_is_an_error_and_no_endless_loop(lengths: list[int]) -> None:
    with pytest.raises(UserError, match="nothing to pack"):
        pack(np.array(lengths, dtype=int), 10, "split", num_rows=1)


def test_an_index_is_kept_and_damage_is_found(tmp_path: Path) -> None:
    lengths = np.array([5, 9, 30, 2] * 20)
    calls = []

    def make() -> RowIndex:
        calls.append(1)
        return pack(lengths, 17, "split", num_rows=20)

    first = kept_index(tmp_path / "index", {"a": 1}, make)
    again = kept_index(tmp_path / "index", {"a": 1}, make)
    assert len(calls) == 1
    assert again.stats == first.stats == make().stats
    assert np.array_equal(again.pieces, make().pieces)

    content = bytearray((tmp_path / "index" / "pieces.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "index" / "pieces.npy").write_bytes(bytes(content))
    calls.clear()
    repaired = kept_index(tmp_path / "index", {"a": 1}, make)
    assert len(calls) == 1
    assert np.array_equal(repaired.pieces, make().pieces)


@pytest.mark.parametrize("rows_of_batch", [1, 2, 5])
@pytest.mark.parametrize("capacity", [2, 3, 9])
def test_a_stream_is_all_documents_end_to_end(capacity: int, rows_of_batch: int) -> None:
    """Documents shorter and longer than rows; rows that end with a bos, with a document, in one."""
    for seed in range(4):
        documents = random_documents(seed, 12, 20)
        index = pack(lengths_of(documents), capacity, "stream", num_rows=60, shuffle="none", stream_rows=rows_of_batch)
        filled = [[BOS, *document] for document in documents if document]  # empty ones are left out
        assert rows_of(index, documents) == stream_rows(filled, capacity, rows_of_batch, 60)
        assert (index.stats.cropped_tokens, index.stats.padded_places) == (0, 0)


def test_a_stream_of_one_epoch_ends_with_padding() -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10]]

    def packed(epochs: int = 1, rows_of_batch: int = 2) -> RowIndex:
        return pack(lengths_of(documents), 5, "stream", epochs=epochs, shuffle="none", stream_rows=rows_of_batch)

    whole = [[0, 1, 2, 3, 0], [0, 4, 0, 5, 6], [7, 8, 9, 0, 10]]
    assert rows_of(packed(), documents) == whole, "the last border is no row of its own"
    assert (packed().stats.pieces, packed().stats.padded_places) == (5, 0)
    documents[-1].append(11)
    twice = packed(epochs=2)
    assert rows_of(twice, documents) == [*whole, [10, 11]] * 2
    assert (twice.epoch_starts.tolist(), twice.stats.padded_places) == ([0, 4], 6)
    apart = [[0, 1, 2, 3, 0], [4, 0, 5, 6, 7], [8, 9, 0, 10, 11]]
    assert rows_of(packed(rows_of_batch=1), documents) == apart
    documents[-1].append(12)
    assert rows_of(packed(rows_of_batch=1), documents) == apart, "behind a single place there is nothing to predict"


def test_the_index_of_a_stream_for_few_rows_begins_that_for_more_and_is_kept(tmp_path: Path) -> None:
    lengths = lengths_of(random_documents(3, 50, 30))
    few, many = (pack(lengths, 8, "stream", num_rows=count, seed=1) for count in (40, 100))
    assert np.array_equal(few.pieces, many.pieces[: len(few.pieces)])
    kept = kept_index(tmp_path / "rows", {"of": "a test"}, lambda: many)
    assert np.array_equal(kept.pieces_of(np.arange(100))[1], many.pieces_of(np.arange(100))[1])


def test_one_conversation_to_a_row() -> None:
    documents = [[1, 2], [], [3, 4, 5], [6]]
    index = pack(lengths_of(documents), 6, "pad_one", epochs=2, shuffle="none")
    assert rows_of(index, documents) == [[0, 1, 2], [0, 3, 4, 5], [0, 6]] * 2
    assert index.stats.padded_places == 2 * (3 + 2 + 4) and index.epoch_starts.tolist() == [0, 3]
