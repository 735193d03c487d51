"""What a stage on text trains with: plan, model, rows, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.disk_space import bytes_to_make, require_cache_room
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.data.packing.streamed_index import StreamedIndex
from nanochat_pl.data.sources.base import Source
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.open import open_source, read_chosen, write_chosen
from nanochat_pl.data.sources.token_counts import tokens_at_hand
from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import resolve_model
from nanochat_pl.planning import Plan
from nanochat_pl.planning.estimates import add_step_memory
from nanochat_pl.planning.horizon import MAX_EPOCHS
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.device import Machine
from nanochat_pl.training.stage_data.base_plan import base_plan, bounding_tokens, refuse_unasked, target_of
from nanochat_pl.training.stage_data.memory_check import require_room_for
from nanochat_pl.training.stage_data.tokenizer import tokenizer_for
from nanochat_pl.training.stages.registry import StageContext, StageData
from nanochat_pl.training.text_datamodule import (
    announce_empty,
    parts_with_settings,
    rows_of_parts,
    tokenized_parts,
    validation_of_text,
)


def prepare_pretraining(context: StageContext) -> StageData:
    """Pretraining from random weights: documents, packed.

    Raises:
        UserError: the plan's own horizon is longer than anybody would want here; or what the data says.
    """
    config, machine, cache = context.config, context.machine, context.cache
    # First what can be known without reading any text.
    first_plan = _base_plan(config, machine, config.tokenizer.vocab_size, None)
    model = resolve_model(config.model, config.tokenizer.vocab_size, machine.compute_dtype)
    require_room_for(context, model)
    num_tokens = first_plan["num_steps"] * first_plan["total_batch_tokens"]
    source = open_text(context, num_tokens)
    tokenizer = tokenizer_for(config, context.folder, source, cache, context.corpus)
    _require_cache_room(config, source, tokenizer, cache, num_tokens, first_plan["sequence_len"])
    at_hand = bounding_tokens(config.data, tokenizer.vocab_size, cache, context.corpus)
    plan = _base_plan(config, machine, tokenizer.vocab_size, at_hand)
    return StageData(
        plan=plan,
        model=resolve_model(config.model, tokenizer.vocab_size, machine.compute_dtype),
        tokenizer=tokenizer,
        **rows_of_text(context, source, tokenizer, plan),
    )


def open_text(context: StageContext, num_tokens: int | None = None) -> Source:
    """Open the text of ``data``, and record the files of data sets that a stage is begun with.

    Args:
        num_tokens: that the plan trains on; of a data set of a hub, the files for so many are taken.
    """
    # Another process than the main one comes after it, when more may be here.
    begun = context.resuming or not collectives.is_rank_zero()
    chosen = read_chosen(context.folder.chosen_files) if begun else None
    source = open_source(context.config.data, context.cache, num_tokens, chosen, context.corpus)
    if not begun:
        write_chosen(context.folder.chosen_files, source)
    rank_zero_print(source.describe())
    return source


def num_rows_of_text(context: StageContext, tokenizer: Tokenizer, sequence_len: int) -> int:
    """About how many rows ``stage.num_epochs`` passes over the text of ``data`` have: what a stage without a horizon of
    its own trains on."""
    config = context.config
    tokens = tokens_at_hand(config.data, context.cache, tokenizer.vocab_size, context.corpus)
    if tokens is None and config.max_steps is None:
        raise UserError("max_steps: how much text there is, is not known before the training.", "Set max_steps=….")
    return max(1, round(config.stage.num_epochs * (tokens or 0) / sequence_len))


def rows_of_text(context: StageContext, source: Source, tokenizer: Tokenizer, plan: Plan) -> dict[str, Any]:
    """The rows that a plan takes of a text, with those to validate on: the fields of :class:`StageData` of these names,
    and ``data``."""
    cache, sequence_len = context.cache, plan["sequence_len"]
    parts = tokenized_parts(source, context.config.data, tokenizer, cache)
    rows = rows_of_parts(source, parts, tokenizer, cache, sequence_len, plan["num_steps"] * plan["rows_per_step"])
    validation = validation_of_text(
        source, tokenizer, cache, sequence_len, plan["validation_rows"], plan["device_batch_size"]
    )
    rows.wait_for(plan["rows_per_step"])
    _announce_rows(rows, plan)
    data = {
        "source": source.name,
        "fingerprint": source.fingerprint,
        "validation_tokens": validation.num_tokens,
        **context.corpus.chosen(),
    }
    return {"rows": rows, "validation": validation, "data": data}


def _require_cache_room(
    config: TrainConfig, source: Source, tokenizer: Tokenizer, cache: Path, num_tokens: int, sequence_len: int
) -> None:
    shares = source.turns.shares if isinstance(source, MixedSource) else [1.0]
    require_cache_room(
        cache,
        sum(
            bytes_to_make(
                part,
                settings,
                tokenizer,
                cache,
                num_tokens=num_tokens * share,
                sequence_len=sequence_len,
            )
            for (part, settings), share in zip(parts_with_settings(source, config.data).values(), shares, strict=True)
        ),
    )


def _announce_rows(rows: Rows | MixedRows, plan: Plan) -> None:
    line = f"Rows: {len(rows):,} of {plan['sequence_len']:,} tokens for {plan['num_steps']:,} steps"
    if isinstance(rows, Rows):
        rank_zero_print(f"{line}, {_what_of(rows)}.")
        return
    rank_zero_print(f"{line}:")
    for (name, part), count in zip(rows.parts().items(), rows.turns.counts(len(rows)), strict=True):
        rank_zero_print(f"- {name}: {count:,} of them, {_what_of(part)}.")


def _what_of(rows: Rows) -> str:
    if isinstance(rows.index, StreamedIndex):
        return f"{rows.index.num_ready:,} of them are there; the others are packed while the training runs"
    stats, num_tokens = rows.index.stats, rows.cache.num_tokens
    epochs = stats.placed_tokens / num_tokens
    return (
        f"{epochs:.2f} epochs of {num_tokens:,} tokens"
        + (f"; {stats.cropped_tokens:,} tokens cropped" if stats.cropped_tokens else "")
        + (f"; more than {MAX_EPOCHS:g} epochs teach little that is new" if epochs > MAX_EPOCHS else "")
    )


def announce_streamed(prepared: StageData) -> None:
    """Say what was left out of text that was packed while the training ran; of other text it was said before."""
    rows = prepared.rows
    if not isinstance(rows, Rows | MixedRows):
        return
    source = prepared.data.get("source", "rows")  # conversations have many, and are never streamed
    for name, part in (rows.parts() if isinstance(rows, MixedRows) else {source: rows}).items():
        if isinstance(part.index, StreamedIndex):
            announce_empty(f"{name}, train", part.cache.shards[: part.index.num_segments])
            if (stats := part.index.stats).cropped_tokens:
                share = f"{stats.trained_share:.0%} of what was taken is in a row"
                rank_zero_print(f"{name}: {stats.cropped_tokens:,} tokens cropped, {share}.")


def _base_plan(config: TrainConfig, machine: Machine, vocab_size: int, at_hand: int | None) -> Plan:
    """The plan of pretraining. Raises :class:`UserError` for one that is wrong, or longer than anybody would want."""
    target = target_of(machine)
    plan = base_plan(config, target, vocab_size, at_hand)
    refuse_unasked(config, plan, target, at_hand)
    model = resolve_model(config.model, vocab_size, machine.compute_dtype)
    add_step_memory(plan, model, target.row_options(config))
    return plan
