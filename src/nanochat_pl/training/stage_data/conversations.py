"""What a stage on conversations trains with: rendered, packed with padding, each as often as asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.common.console import by_difference, progress, rank_zero_print
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.cache.conversations import ConversationCache, LossMask, build_conversation_cache
from nanochat_pl.data.packing.packer import Shuffle
from nanochat_pl.data.packing.row_index import RowIndex
from nanochat_pl.data.packing.rows import Rows, packed_rows
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture
from nanochat_pl.tasks.published.conversations import ConversationSet
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.stage_data.parent import load_parent
from nanochat_pl.training.stages.registry import StageContext, StageData

FEW_STEPS = 20  # with fewer, what is learnt is hardly seen
PADDED_BUFFER = 100  # conversations among which the packer finds the best fit: the recipe's
VALIDATION_SEED = 0  # what is validated on depends on no setting of the training


def prepare_conversations(context: StageContext) -> StageData:
    """Conversations, padded; model, tokenizer and what is not given from the parent stage.

    Raises:
        UserError: there is no finished parent; or what the tasks say.
    """
    config, cache = context.config, context.cache
    parent = load_parent(context)
    model, tokenizer = parent.model, parent.tokenizer
    tasks = TaskContext(cache, config.data.max_bad_fraction, config.paths.hub_folder, run_corpus=context.corpus)
    mixture = build_mixture(config.mixture, "train", tasks)
    held_out = build_mixture(config.mixture, "test", tasks)
    _announce_files(mixture)
    if mixture.num_joined:
        rank_zero_print(mixture.describe_joined())
    capacity = model.sequence_len + 1
    loss_mask = config.stage.effective_loss_mask
    train_cache = _rendered(mixture, "train", tokenizer, capacity, cache, loss_mask)
    fixed = held_out_rows(held_out, tokenizer, model.sequence_len, cache, loss_mask)
    padded = _padded(tokenizer, model.sequence_len, cache)
    shuffle: Shuffle = "none" if mixture.in_sequence else "global"
    train_rows = partial(padded, train_cache, mode=config.mixture.packing, seed=config.seed, shuffle=shuffle)
    rows = rows_of_epochs(train_rows, config.stage.num_epochs)
    plan = parent.plan(context, num_rows=len(rows))
    if config.max_steps is not None or config.flops_budget is not None:
        num_rows = plan["num_steps"] * plan["rows_per_step"]
        rows = train_rows(num_rows=num_rows, epochs=num_rows)  # an epoch has a row at least
    if mixture.in_sequence:
        _announce_sequence(mixture, rows)
    _announce_rows(mixture, train_cache, rows)
    if plan["num_steps"] < FEW_STEPS and config.max_steps is None and config.flops_budget is None:
        repeats = [f"{task.key}.repeat or " for task in _file_tasks(mixture).values()][:1]
        rank_zero_print(
            f"Only {plan['num_steps']:,} steps, which teach little: raise {''.join(repeats)}stage.num_epochs for more."
        )
    return StageData(
        plan=plan,
        rows=rows,
        validation=Validation.of_rows(
            fixed, min(plan["validation_rows"], len(fixed)), tokenizer, plan["device_batch_size"]
        ),
        data=_record(mixture, held_out, train_cache, rows) | context.corpus.chosen(),
        **parent.start(context),
    )


def held_out_rows(
    held_out: Mixture, tokenizer: Tokenizer, sequence_len: int, cache: Path, loss_mask: LossMask = "assistant"
) -> Rows:
    """Held-out conversations as rows to validate on, each once."""
    rendered = _rendered(held_out, "test", tokenizer, sequence_len + 1, cache, loss_mask)
    return _padded(tokenizer, sequence_len, cache)(rendered, mode="pad", seed=VALIDATION_SEED, epochs=1)


def _padded(tokenizer: Tokenizer, sequence_len: int, cache: Path) -> Callable[..., Rows]:
    return partial(
        packed_rows,
        sequence_len=sequence_len,
        bos_id=tokenizer.bos_id,
        cache_dir=cache,
        buffer_documents=PADDED_BUFFER,
        refill_documents=1,
    )


def rows_of_epochs(packed: Callable[..., Rows], num_epochs: float) -> Rows:
    """The rows of so many epochs, all of each: every conversation is in them as often as there are epochs.

    Of a last epoch that is not whole, the first rows. How many rows an epoch has depends on its order, so the last one
    has to be packed before its share of rows is known.

    Args:
        packed: :func:`~nanochat_pl.data.packing.rows.packed_rows` without ``epochs`` and ``num_rows``.
        num_epochs: above 0.
    """
    whole = math.ceil(num_epochs)
    rows = packed(epochs=whole)
    assert isinstance(rows.index, RowIndex)
    before_last = int(rows.index.epoch_starts[-1])
    share = num_epochs - (whole - 1)
    wanted = before_last + math.ceil(round(share * (len(rows) - before_last), 6))
    return rows if wanted == len(rows) else packed(epochs=whole, num_rows=wanted)


def _rendered(
    mixture: Mixture, split: str, tokenizer: Tokenizer, capacity: int, cache: Path, loss_mask: LossMask
) -> ConversationCache:
    with progress(f"rendering conversations, {split}", len(mixture), "conversations") as advance:
        key = f"{split} {mixture.fingerprint}"
        name = f"{', '.join(mixture.tasks)} ({split} part)"
        report = by_difference(advance)
        return build_conversation_cache(mixture, tokenizer, capacity, cache, key, report, loss_mask, name)


def _file_tasks(mixture: Mixture) -> dict[str, ConversationSet]:
    return {name: task for name, task in mixture.tasks.items() if isinstance(task, ConversationSet)}


def _announce_files(mixture: Mixture) -> None:
    for task in _file_tasks(mixture).values():
        for line in task.describe():
            rank_zero_print(line)


def _announce_sequence(mixture: Mixture, rows: Rows) -> None:
    """Say in which order the tasks come, and which ones are not reached."""
    names = list(mixture.tasks)
    _, pieces = rows.index.pieces_of(np.arange(len(rows)))
    last = names.index(mixture.place(int(pieces[:, 0].max()))[0])
    not_reached = f"; not reached: {', '.join(names[last + 1 :])}" if names[last + 1 :] else ""
    rank_zero_print(f"In sequence: {', '.join(names[: last + 1])}{not_reached}.")


def _announce_rows(mixture: Mixture, cache: ConversationCache, rows: Rows) -> None:
    stats, rendering = rows.index.stats, cache.rendering
    rank_zero_print(
        f"Conversations: {len(mixture):,} ({cache.num_tokens:,} tokens, {rendering.num_targets / cache.num_tokens:.0%} "
        f"of them trained on), {stats.placed_tokens / cache.num_tokens:.2f} epochs in {len(rows):,} rows, "
        f"{_padded_share(rows):.1%} padding; {rendering.num_cut:,} cut ({rendering.num_cut_tokens:,} tokens dropped), "
        f"{rendering.num_without_target:,} left out for having nothing to learn."
    )


def _padded_share(rows: Rows) -> float:
    """Share of the places of the rows that hold nothing."""
    return rows.index.stats.padded_places / (len(rows) * rows.index.row_capacity)


def _record(mixture: Mixture, held_out: Mixture, cache: ConversationCache, rows: Rows) -> dict[str, Any]:
    """What a stage was trained on, for its bundle."""
    return {
        "mixture": {name: len(task) for name, task in mixture.tasks.items()},
        "fingerprint": mixture.fingerprint,
        "conversations": len(mixture),
        "joined": {"conversations": mixture.num_joined, "turns": mixture.num_turns},
        "held_out_conversations": len(held_out),
        "train_tokens": cache.num_tokens,
        "rendering": asdict(cache.rendering),
        "packing": to_plain(rows.index.stats),
        "padded_share": _padded_share(rows),
        "files": {name: asdict(task.audit) for name, task in _file_tasks(mixture).items()},
    }
