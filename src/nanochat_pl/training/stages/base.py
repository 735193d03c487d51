"""From settings to what a fit needs: plan, model, rows, validation. One function a stage; they give the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.data.cache.disk_space import bytes_to_make, require_cache_room
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.data.packing.streamed_index import StreamedIndex
from nanochat_pl.data.sources.base import Source
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.open import open_source, read_chosen, write_chosen
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.config import GPTConfig, resolve_model
from nanochat_pl.planning import Plan
from nanochat_pl.planning.estimates import add_step_memory
from nanochat_pl.planning.gpus import detected_device
from nanochat_pl.planning.horizon import MAX_EPOCHS
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.config import TrainConfig, memory_knobs
from nanochat_pl.training.device import Machine
from nanochat_pl.training.stages.base_plan import Target, base_plan, bounding_tokens, refuse_unasked
from nanochat_pl.training.stages.memory_check import require_room
from nanochat_pl.training.stages.tokenizer import tokenizer_for
from nanochat_pl.training.text_datamodule import (
    announce_empty,
    parts_with_settings,
    rows_of_parts,
    tokenized_parts,
    validation_of_text,
)


@dataclass(frozen=True)
class StageData:
    """All that a stage trains with.

    Attributes:
        plan: the derived values.
        model: the architecture.
        tokenizer: what made the ids.
        rows: at least as many as the plan's steps take.
        validation: fixed rows.
        weights, moments: what a stage that has a parent starts from, by name.
        parents: stage, step and SHA-256 of the weights of each earlier stage.
        data: what it is trained on, for the record.
    """

    plan: Plan
    model: GPTConfig
    tokenizer: Tokenizer
    rows: Rows | MixedRows
    validation: Validation
    data: dict[str, Any]
    weights: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None
    parents: tuple[dict[str, Any], ...] = ()


def prepare_base(
    config: TrainConfig,
    folder: StageFolder,
    cache: Path,
    machine: Machine,
    resuming: bool = False,
    corpus: RunCorpus | None = None,
) -> StageData:
    """Pretraining: documents, packed.

    Args:
        resuming: whether there is a resume file: the stage keeps to the files of data sets that it was begun with.
        corpus: the run's, see :func:`~nanochat_pl.training.stages.source.corpus_of_stage`; None: of what is installed.

    Raises:
        UserError: the plan's own horizon is longer than anybody would want here; or what the data says.
    """
    corpus = corpus or RunCorpus(cache)
    # First what can be known without reading any text.
    first_plan = _base_plan(config, machine, config.tokenizer.vocab_size, None)
    model = resolve_model(config.model, config.tokenizer.vocab_size, machine.compute_dtype)
    num_files = config.trainer.keep_last + config.trainer.keep_best
    require_room(model, machine.device, folder.path, num_files, memory_knobs(config))
    num_tokens = first_plan["num_steps"] * first_plan["total_batch_tokens"]
    source = open_source(
        config.data,
        cache,
        num_tokens,
        # Another process than the main one comes after it, when more may be here.
        read_chosen(folder.chosen_files) if resuming or not collectives.is_rank_zero() else None,
        corpus,
    )
    if not resuming and collectives.is_rank_zero():
        write_chosen(folder.chosen_files, source)
    rank_zero_print(source.describe())
    tokenizer = tokenizer_for(config, folder, source, cache, corpus)
    _require_cache_room(config, source, tokenizer, cache, num_tokens, first_plan["sequence_len"])
    parts = tokenized_parts(source, config.data, tokenizer, cache)
    at_hand = bounding_tokens(config.data, tokenizer.vocab_size, cache, corpus)
    plan = _base_plan(config, machine, tokenizer.vocab_size, at_hand)
    sequence_len = plan["sequence_len"]
    rows = rows_of_parts(source, parts, tokenizer, cache, sequence_len, plan["num_steps"] * plan["rows_per_step"])
    validation = validation_of_text(
        source, tokenizer, cache, sequence_len, plan["validation_rows"], plan["device_batch_size"]
    )
    rows.wait_for(plan["rows_per_step"])
    _announce_rows(rows, plan)
    return StageData(
        plan=plan,
        model=resolve_model(config.model, tokenizer.vocab_size, machine.compute_dtype),
        tokenizer=tokenizer,
        rows=rows,
        validation=validation,
        data={
            "source": source.name,
            "fingerprint": source.fingerprint,
            "validation_tokens": validation.num_tokens,
            **corpus.chosen(),
        },
    )


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


def target_of(machine: Machine) -> Target:
    """What a plan for this machine's processes is made for."""
    device, here = detected_device(machine.device), launch_env().local_world_size
    return Target.here(device, machine.compute_dtype, collectives.world_size(), here, machine.compile)
