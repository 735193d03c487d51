"""Rows: what is in them, where it comes from, and that nothing but their number decides."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.cache.conversations import build_conversation_cache
from nanochat_pl.data.cache.tokens import TokenCache, build_token_cache
from nanochat_pl.data.packing.packer import Mode, pack
from nanochat_pl.data.packing.row_index import RowIndex
from nanochat_pl.data.packing.rows import Rows, packed_rows, validation_rows
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.model.packed_rows import PackedRows
from tests.helpers.fake_data import BOS, ByteTokenizer, ListSource
from tests.helpers.models import tiny_config
from tests.reference.packer import crop_rows, pad_rows

T = 64


def random_texts(seed: int, count: int) -> list[str]:
    random = np.random.RandomState(seed)
    return [bytes(random.randint(97, 122, random.randint(0, 150)).tolist()).decode() for _ in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    shards = {"one": random_texts(0, 80), "two/b": random_texts(1, 50)}
    return build_token_cache(ListSource(shards), "train", ByteTokenizer(), tmp_path)


class GivenIds:
    """Conversations that are rendered already."""

    vocab_size, fingerprint = 2**16, "given"

    def render_conversations(self, conversations: list[dict], max_tokens: int, num_threads: int) -> list[tuple]:
        return [(c["ids"][:max_tokens], c["mask"][:max_tokens]) for c in conversations]


def test_conversations_give_the_golden_inputs_and_targets(golden: Path, tmp_path: Path) -> None:
    case = json.loads((golden / "packing_pad.json").read_text(encoding="utf-8"))
    expected = load_file(golden / "packing_pad.safetensors")
    said = {"messages": [{"role": "user", "content": ""}]}
    conversations = [conversation | said for conversation in case["conversations"]]
    cache = build_conversation_cache(conversations, GivenIds(), case["T"] + 1, tmp_path, "golden")
    kept = cache.lengths > 0
    index = pack(
        # The reference packs conversations without a target too.
        np.array([len(conversation["ids"]) - 1 for conversation in conversations]),
        case["T"] + 1,
        "pad",
        num_rows=expected["inputs"].reshape(-1, case["T"]).shape[0],
        buffer_documents=case["buffer_size"],
        refill_documents=1,
        shuffle="none",
    )
    assert kept.all()
    inputs, targets = Rows(cache, index, case["T"], case["bos"]).read(range(index.num_rows))
    assert np.array_equal(inputs, expected["inputs"].reshape(inputs.shape))
    assert np.array_equal(targets, expected["targets"].reshape(targets.shape))


def test_documents_give_the_rows_of_the_reference(cache: TokenCache) -> None:
    documents = [[BOS, *cache.tokens(i).tolist()] for i in range(cache.num_documents) if len(cache.tokens(i))]
    expected = np.array(crop_rows(documents, T + 1, 300, 30, 8))
    index = pack(cache.lengths, T + 1, "crop", num_rows=300, buffer_documents=30, refill_documents=8, shuffle="none")
    inputs, targets = Rows(cache, index, T, BOS).read(range(300))
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(inputs, expected[:, :-1]) and np.array_equal(targets, expected[:, 1:])


def test_conversation_rows_are_those_of_the_reference(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:60]}]}
        for text in random_texts(2, 200)
        if len(text) > 9
    ]
    cache = build_conversation_cache(talks, ByteTokenizer(), T + 1, tmp_path, "talks")
    settings = {"buffer_documents": 100, "refill_documents": 1}
    rows = packed_rows(cache, T, BOS, "pad", tmp_path, num_rows=50, shuffle="none", **settings)
    rendered = ByteTokenizer().render_conversations(talks, T + 1)
    inputs, targets = pad_rows(rendered, T + 1, 50, 100, BOS)
    assert np.array_equal(rows.read(range(50))[0], inputs)
    assert np.array_equal(rows.read(range(50))[1], targets)
    epoch = packed_rows(cache, T, BOS, "pad", tmp_path, epochs=1, **settings)
    trained = (epoch.read(range(len(epoch)))[1] != IGNORE_INDEX).sum()
    assert trained == sum(sum(mask) for _, mask in rendered)


def test_a_row_depends_on_its_number_alone(cache: TokenCache, tmp_path: Path) -> None:
    """A regression: loaders that pack differently, lose their place at an epoch's end, or drop their buffer."""
    settings = {"buffer_documents": 20, "refill_documents": 4}
    rows = packed_rows(cache, T, BOS, "split", tmp_path, num_rows=700, **settings)
    assert rows.index.stats.epochs >= 3
    assert 2 < rows.epochs_after(700) == pytest.approx(rows.index.stats.placed_tokens / cache.num_tokens)
    assert rows.epochs_after(350) == pytest.approx(rows.epochs_after(700) / 2)
    inputs, targets = rows.read(range(700))
    elsewhere = packed_rows(cache, T, BOS, "split", tmp_path / "elsewhere", num_rows=400, **settings)
    for numbers in ([5], [399, 0, 17], list(range(130, 390, 7))):
        for source in (rows, elsewhere):
            assert np.array_equal(source.read(numbers)[0], inputs[numbers])
            assert np.array_equal(source.read(np.array(numbers))[1], targets[numbers])


def test_an_address_leads_to_the_text(cache: TokenCache, tmp_path: Path) -> None:
    texts = {"one": random_texts(0, 80), "two/b": random_texts(1, 50)}
    rows = packed_rows(cache, T, BOS, "split", tmp_path, epochs=1)
    shards = set()
    for number in range(len(rows)):
        ids = [id for p in rows.address(number) for id in [BOS, *texts[p.shard][p.document].encode()[p.start : p.stop]]]
        ids = [id + 1 if i and id else id for i, id in enumerate(ids)]
        shards |= {piece.shard for piece in rows.address(number)}
        assert rows.read([number])[0][0].tolist()[: len(ids)] == ids[:T]
    assert shards == {"one", "two/b"}


def test_rows_past_the_end_are_refused(cache: TokenCache, tmp_path: Path) -> None:
    rows = packed_rows(cache, T, BOS, "split", tmp_path, num_rows=3)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            rows.read([number])
    assert rows.read([])[0].shape == (0, T)


def test_validation_rows_are_all_of_the_text_and_depend_on_no_setting_of_training(
    cache: TokenCache, tmp_path: Path
) -> None:
    rows = validation_rows(cache, T, BOS, tmp_path, num_rows=10**6)
    inputs, targets = rows.read(range(len(rows)))
    assert (targets != IGNORE_INDEX).sum() >= cache.num_tokens
    assert np.isin(targets[targets > BOS], np.concatenate([s.tokens for s in cache.shards])).all()
    assert (targets > BOS).sum() == cache.num_tokens
    few = validation_rows(cache, T, BOS, tmp_path, num_rows=5)
    assert len(few) == 5 and np.array_equal(few.read(range(5))[0], inputs[:5])


def test_rows_reach_the_workers_of_a_loader_without_what_is_on_the_disk(cache: TokenCache, tmp_path: Path) -> None:
    rows = packed_rows(cache, T, BOS, "split", tmp_path, num_rows=100)
    parcel = pickle.dumps(rows)
    assert cache.shards[0].tokens.tobytes() not in parcel
    assert isinstance(rows.index, RowIndex) and rows.index.pieces.tobytes() not in parcel
    assert np.array_equal(pickle.loads(parcel).read(range(100))[0], rows.read(range(100))[0])


def test_real_text_goes_all_the_way(shared: Path, tmp_path: Path) -> None:
    settings = DataSettings(name="local", path=str(shared / "data" / "text_tiny"))
    source = open_source(settings, tmp_path)
    caches = {split: build_token_cache(source, split, ByteTokenizer(), tmp_path) for split in ("train", "val")}
    assert caches["train"].num_tokens + caches["val"].num_tokens == 862_810 + 838_271 + 869_679
    rows = packed_rows(caches["train"], 256, BOS, settings.long_documents, tmp_path, num_rows=12_000)
    assert rows.index.stats.trained_share == 1 and rows.index.stats.epochs == 2
    inputs, targets = rows.read(range(11_900, 12_000))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1]) and (targets != IGNORE_INDEX).all()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="says what memory is of files")
def test_reading_leaves_no_memory_behind(cache: TokenCache, tmp_path: Path) -> None:
    """Pages of mapped files are the system's to drop; of memory that is ours, 10,000 rows take none."""

    def own_memory() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    rows = packed_rows(cache, T, BOS, "split", tmp_path, num_rows=11_000)
    for first in range(0, 1_000, 25):
        rows.read(range(first, first + 25))
    before = own_memory()
    for first in range(1_000, 11_000, 25):
        rows.read(range(first, first + 25))
    assert own_memory() - before < 2_000, "kB"


@pytest.mark.parametrize("mode", ["crop", "split", "stream", "pad", "pad_one"])
def test_bos_tells_where_documents_begin(mode: Mode, cache: TokenCache, tmp_path: Path) -> None:
    """What keeps documents apart in a row looks at the ids alone: they say what the index knows."""
    lengths = cache.lengths if not mode.startswith("pad") else np.minimum(cache.lengths, T)
    index = pack(lengths, T + 1, mode, num_rows=60, buffer_documents=20, refill_documents=4)
    rows = Rows(cache, index, T, BOS)
    config = tiny_config(vocab_size=BOS + 9, document_start_id=BOS)
    found = PackedRows(torch.as_tensor(rows.read(range(60))[0]), config).documents.numbers.numpy()
    for row, numbers in enumerate(found):
        pieces = index.pieces_of(np.array([row]))[1].tolist()
        expected = np.repeat(range(len(pieces)), [length + with_bos for _, _, length, with_bos in pieces])[:T]
        filled = numbers[: len(expected)]
        assert np.array_equal(filled - filled[0], expected)
        assert (numbers[len(expected) :] > filled[-1]).all(), "padding belongs to no document"
