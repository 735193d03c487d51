"""Fine-tuning trains on every conversation exactly as often as asked, and every step has something to learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.cache.conversations import ConversationCache, build_conversation_cache
from nanochat_pl.data.packing.rows import Rows, packed_rows
from nanochat_pl.training.datamodule import StepRows
from nanochat_pl.training.stage_data.conversations import rows_of_epochs
from tests.helpers.fake_data import ByteTokenizer

T = 48


def talk(question: str, *more: str) -> dict[str, Any]:
    contents = (question, *more)
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


@pytest.fixture
def cache(tmp_path: Path) -> ConversationCache:
    """Of many lengths: one in ten is longer than a row, and some of those have no answer before the cut."""
    chance = np.random.RandomState(0)
    talks = []
    for number in range(150):
        sizes = chance.randint(1, 18, 2) if number % 10 else chance.randint(20, 400, 2)
        talks.append(talk("q" * sizes[0], f"{number}" + "a" * sizes[1]))
    return build_conversation_cache(talks, ByteTokenizer(), T + 1, tmp_path, "talks")


@pytest.fixture
def packed(cache: ConversationCache, tmp_path: Path) -> Callable[..., Rows]:
    return partial(
        packed_rows, cache, T, ByteTokenizer().bos_id, "pad", tmp_path, buffer_documents=10, refill_documents=1
    )


def trained(rows: Rows, rows_per_step: int) -> tuple[Counter[int], list[int]]:
    """How often each conversation is in the steps of a run, and the targets of each step."""
    num_steps = -(-len(rows) // rows_per_step)
    steps = StepRows(rows, rows_per_step)
    seen: Counter[int] = Counter()
    for row in range(len(rows)):
        seen.update(address.document for address in rows.address(row))
    batches = [steps[step] for step in range(num_steps)]
    assert sum(len(batch.inputs) for batch in batches) == len(rows), "no row is left over and none comes twice"
    return seen, [batch.num_targets for batch in batches]


@pytest.mark.parametrize("rows_per_step", [1, 7, 16])
@pytest.mark.parametrize("num_epochs", [1, 2, 3])
def test_every_conversation_is_trained_on_once_an_epoch(
    num_epochs: int, rows_per_step: int, cache: ConversationCache, packed: Callable[..., Rows]
) -> None:
    rows = rows_of_epochs(packed, num_epochs)
    seen, targets = trained(rows, rows_per_step)
    with_targets = np.flatnonzero(cache.lengths).tolist()
    assert seen == dict.fromkeys(with_targets, num_epochs)
    assert sum(targets) == num_epochs * cache.rendering.num_targets and min(targets) > 0


@pytest.mark.parametrize("num_epochs", [0.3, 1.25, 2.5])
def test_of_a_fraction_of_an_epoch_the_first_rows_are_trained_on(
    num_epochs: float, cache: ConversationCache, packed: Callable[..., Rows]
) -> None:
    rows, whole = rows_of_epochs(packed, num_epochs), int(num_epochs)
    seen, _ = trained(rows, 4)
    counts = np.array([seen[document] for document in np.flatnonzero(cache.lengths).tolist()])
    assert set(counts.tolist()) == {whole, whole + 1}, "none twice in the last epoch"
    assert counts.mean() == pytest.approx(num_epochs, abs=0.05)
    numbers = np.arange(len(rows))
    longer = rows_of_epochs(packed, whole + 1)
    assert np.array_equal(rows.read(numbers)[0], longer.read(numbers)[0]), "a longer run begins with the shorter one"


def test_conversations_longer_than_a_row_clog_nothing(cache: ConversationCache, packed: Callable[..., Rows]) -> None:
    """Elsewhere they stayed in the packer's buffer until rows were all padding, whose loss is NaN."""
    assert cache.rendering.num_cut == 15 and cache.rendering.num_without_target > 2
    rows = rows_of_epochs(packed, 3)
    _, targets = rows.read(np.arange(len(rows)))
    per_row = (targets != IGNORE_INDEX).sum(axis=1)
    assert per_row.min() > 0
    third = len(rows) // 3
    assert rows.index.stats.padded_places < 0.25 * len(rows) * (T + 1)
    assert abs(per_row[:third].mean() - per_row[-third:].mean()) < 3, "the last rows are as full as the first"
