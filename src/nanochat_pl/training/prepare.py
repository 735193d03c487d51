"""From settings to what a fit needs: plan, model, rows, validation. One function a stage; they give the same thing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_pl.bundle.bundle import MODEL, load_config, load_moments, load_stage_info, load_tokenizer, load_weights
from nanochat_pl.common.console import by_difference, progress, say
from nanochat_pl.common.files import sha256_of_file
from nanochat_pl.common.run_folder import StageFolder
from nanochat_pl.common.settings import to_plain
from nanochat_pl.data.conversation_cache import ConversationCache, build_conversation_cache
from nanochat_pl.data.opening import open_source
from nanochat_pl.data.rows import Rows, packed_rows, validation_rows
from nanochat_pl.data.sources import Source, Split
from nanochat_pl.data.token_cache import TokenCache, build_token_cache
from nanochat_pl.model.config import GPTConfig, resolve_model
from nanochat_pl.planning import Inherited, Plan, check_horizon, estimate_cpu_seconds, make_finetune_plan, make_plan
from nanochat_pl.planning.devices import detected_device
from nanochat_pl.tasks.mixture import build_mixture
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.evaluation import Validation
from nanochat_pl.training.inherit import parent_folder
from nanochat_pl.training.limits import require_room
from nanochat_pl.training.machine import Machine
from nanochat_pl.training.settings import TrainConfig, row_options
from nanochat_pl.training.tokenizer_stage import tokenizer_for

SPLITS: tuple[Split, Split] = ("train", "val")
PADDED_BUFFER = 100  # conversations among which the packer finds the best fit: the recipe's


@dataclass(frozen=True)
class Prepared:
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
    rows: Rows
    validation: Validation
    data: dict[str, Any]
    weights: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None
    parents: tuple[dict[str, Any], ...] = ()


def prepare_base(config: TrainConfig, folder: StageFolder, cache: Path, machine: Machine) -> Prepared:
    """Pretraining: documents, packed.

    Raises:
        UserError: the plan's own horizon is longer than anybody would want here; or what the data says.
    """
    # First what can be known without reading any text.
    first_plan = _base_plan(config, machine, config.tokenizer.vocab_size, None)
    model = resolve_model(config.model, config.tokenizer.vocab_size, machine.compute_dtype)
    require_room(model, machine.device, folder.path, config.trainer.keep_last)
    source = open_source(config.data, cache, first_plan["num_steps"] * first_plan["total_batch_tokens"])
    say(source.describe())
    tokenizer = tokenizer_for(config, folder, source)
    train, held_out = (_tokenise(source, split, tokenizer, cache) for split in SPLITS)
    plan = _base_plan(config, machine, tokenizer.vocab_size, train.num_tokens)
    sequence_len, bos = plan["sequence_len"], tokenizer.bos_id
    rows = packed_rows(
        train,
        sequence_len,
        bos,
        config.data.long_documents,
        cache,
        num_rows=plan["num_steps"] * plan["rows_per_step"],
        buffer_documents=config.data.pack_buffer_documents,
        refill_documents=config.data.pack_refill_documents,
        shuffle=config.data.shuffle,
        seed=config.data.seed,
    )
    fixed = validation_rows(held_out, sequence_len, bos, cache, plan["validation_rows"])
    stats = rows.index.stats
    say(
        f"Rows: {len(rows):,} of {sequence_len:,} tokens for {plan['num_steps']:,} steps, "
        f"{stats.placed_tokens / train.num_tokens:.2f} epochs of {train.num_tokens:,} tokens"
        + (f"; {stats.cropped_tokens:,} tokens cropped." if stats.cropped_tokens else ".")
    )
    return Prepared(
        plan=plan,
        model=resolve_model(config.model, tokenizer.vocab_size, machine.compute_dtype),
        tokenizer=tokenizer,
        rows=rows,
        validation=Validation(fixed, len(fixed), tokenizer, plan["device_batch_size"]),
        data={
            "source": source.name,
            "fingerprint": source.fingerprint,
            "train_tokens": train.num_tokens,
            "validation_tokens": held_out.num_tokens,
            "packing": to_plain(stats),
        },
    )


def prepare_sft(config: TrainConfig, folder: StageFolder, cache: Path, machine: Machine) -> Prepared:
    """Fine-tuning: conversations, padded; model, tokenizer and what is not given from the parent stage.

    Raises:
        UserError: there is no finished parent; or what the tasks say.
    """
    parent = parent_folder(config, folder)
    assert parent is not None, "the settings of a stage that is fine-tuned name its parent"
    parent_name, info, model = parent.stage, load_stage_info(parent.bundle), load_config(parent.bundle)
    require_room(model, machine.device, folder.path, config.trainer.keep_last)
    inherited = Inherited.from_plain(info.plan, f"{parent.bundle}/stage.json: plan")
    tokenizer = load_tokenizer(parent.bundle)
    conversations = build_mixture(config.mixture, "train", cache)
    held_out = build_mixture(config.mixture, "test", cache)
    capacity = model.sequence_len + 1
    train_cache = build_conversation_cache(
        conversations, tokenizer, capacity, cache, f"train {conversations.fingerprint}"
    )
    test_cache = build_conversation_cache(held_out, tokenizer, capacity, cache, f"test {held_out.fingerprint}")

    def padded_rows(conversations: ConversationCache, epochs: int) -> Rows:
        return packed_rows(
            conversations,
            model.sequence_len,
            tokenizer.bos_id,
            "pad",
            cache,
            epochs=epochs,
            buffer_documents=PADDED_BUFFER,
            refill_documents=1,
            seed=config.seed,
        )

    one_epoch = padded_rows(train_cache, 1)
    plan = make_finetune_plan(
        model,
        config,
        config.optim,
        num_rows=len(one_epoch),
        num_epochs=config.stage.num_epochs,
        parent=inherited.hyperparameters,
        parent_batch_tokens=inherited.total_batch_tokens,
        parent_name=parent_name,
        options=row_options(config, detected_device(machine.device)),
    )
    _announce_inherited(plan)
    epochs = math.ceil(plan["num_steps"] * plan["rows_per_step"] / len(one_epoch))
    rows, fixed = padded_rows(train_cache, epochs), padded_rows(test_cache, 1)
    stats = one_epoch.index.stats
    places = stats.placed_tokens + stats.pieces + stats.padded_places
    say(
        f"Conversations: {len(conversations):,} ({train_cache.num_tokens:,} tokens) in {len(one_epoch):,} rows, "
        f"{stats.padded_places / places:.1%} padding, {train_cache.num_cut:,} cut, "
        f"{train_cache.num_without_target:,} left out for having nothing to learn."
    )
    weights_hash = sha256_of_file(parent.bundle / MODEL)
    return Prepared(
        plan=plan,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        validation=Validation(fixed, min(plan["validation_rows"], len(fixed)), tokenizer, plan["device_batch_size"]),
        weights=load_weights(parent.bundle),
        moments=load_moments(parent.bundle) if config.stage.warm_start else None,
        parents=(*info.parents, {"stage": parent_name, "step": info.step, "sha256": weights_hash}),
        data={
            "mixture": {name: len(task) for name, task in conversations.tasks.items()},
            "fingerprint": conversations.fingerprint,
            "conversations": len(conversations),
            "train_tokens": train_cache.num_tokens,
            "packing": to_plain(stats),
            "cut": train_cache.num_cut,
        },
    )


def _base_plan(config: TrainConfig, machine: Machine, vocab_size: int, tokens_at_hand: int | None) -> Plan:
    """The plan of pretraining. Raises :class:`UserError` for one that is wrong, or longer than anybody would want."""
    plan = make_plan(
        config.model,
        config,
        config.optim,
        vocab_size=vocab_size,
        compute_dtype=machine.compute_dtype,
        schedule=config.schedule,
        tokens_at_hand=tokens_at_hand,
        options=row_options(config, detected_device(machine.device)),
    )
    seconds = estimate_cpu_seconds(plan["total_flops"], os.cpu_count() or 1) if machine.device.type == "cpu" else None
    check_horizon(plan, tokens_at_hand, seconds)
    return plan


def _tokenise(source: Source, split: Split, tokenizer: Tokenizer, cache: Path) -> TokenCache:
    with progress(f"tokenising {source.name}, {split}", len(source.shards(split)), "shards") as advance:
        report = by_difference(advance)
        return build_token_cache(source, split, tokenizer, cache, lambda done, total, tokens: report(done, total))


def _announce_inherited(plan: Plan) -> None:
    for name, derived in plan.values.items():
        if derived.overridden_by and derived.overridden_by.startswith("inherited"):
            say(f"{name} = {derived.value:g}, {derived.overridden_by}.")
