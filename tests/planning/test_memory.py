"""Predicted memory: what autograd keeps, to the byte; the optimizer's state; what fits."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.counts import count_parameters
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.planning import HorizonSettings, RowOptions, make_plan
from nanochat_pl.planning.batch_size import evenly
from nanochat_pl.planning.estimates import add_memory
from nanochat_pl.planning.gpus import CPU, named_device
from nanochat_pl.planning.memory import (
    MARGIN,
    MemoryKnobs,
    largest_device_batch_size,
    loss_piece_bytes,
    optimizer_state_bytes,
    resume_copy_bytes,
    step_memory,
)
from tests.helpers.processes import run

ROWS, VOCAB = 2, 500
OLDEST = {"smear_channels": 0, "backout": False, "residual_lambdas": False, "value_embeddings": False}


def small(dtype: str = "float32", **keys: Any) -> GPTConfig:
    settings = {"depth": 3, "aspect_ratio": 32, "head_dim": 32, "sequence_len": 200, **keys}
    return resolve_model(ModelSettings(**settings), VOCAB, dtype)


def kept_by_autograd(config: GPTConfig, checkpointing: bool) -> int:
    """Bytes of all storages that the forward up to the head keeps, but for parameters and rotary tables."""
    net = init_weights(GPT(config).materialise())
    net.activation_checkpointing = checkpointing
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), net.cos, net.sin]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(VOCAB, (ROWS, config.sequence_len), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.hidden(ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small("bfloat16"),
        small(depth=1),
        small(depth=2, num_kv_heads=1),
        small("bfloat16", depth=4, num_kv_heads=2),
        small(sequence_len=1100, depth=2),
        small("bfloat16", sequence_len=1100, num_kv_heads=1),
        small(**OLDEST),
        small("bfloat16", **OLDEST),
        small(smear_channels=0, backout=False),
        small(document_mask=True),
        small("bfloat16", sequence_len=1100, document_mask=True),
    ],
    ids=lambda config: f"{config.compute_dtype}-{config.num_layers}-{config.sequence_len}-{config.num_kv_heads}",
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(config: GPTConfig, checkpointing: bool) -> None:
    """Within a hundredth: the targets are not seen here, and some scalars not counted. The keys of a single head stay
    views, which the formula counts as the copies that they are with more heads."""
    memory = step_memory(config, ROWS, on_cpu=True, knobs=MemoryKnobs(checkpointing))
    tolerance = 0.05 if config.num_kv_heads == 1 else 0.01
    assert memory.activations == pytest.approx(kept_by_autograd(config, checkpointing), rel=tolerance)


def test_positions_that_begin_again_keep_tables_for_each_row() -> None:
    """Under checkpointing they are kept, too, where hooks do not see them: as what a layer is computed again from."""
    config = small("bfloat16", document_mask=True, restart_positions=True)
    memory = step_memory(config, ROWS, on_cpu=True)
    assert memory.activations == pytest.approx(kept_by_autograd(config, False), rel=0.01)


@pytest.mark.parametrize("keys", [{}, {"num_kv_heads": 1}, OLDEST])
def test_the_optimizers_state(keys: dict[str, Any]) -> None:
    config = small(**keys)
    net = init_weights(GPT(config).materialise())
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    state = optimizer.moments_by_name()
    counted = sum(moment.nbytes for name, moment in state.items() if not name.endswith(".step"))
    assert optimizer_state_bytes(config) == counted
    assert resume_copy_bytes(config) == counted + sum(parameter.nbytes for parameter in net.parameters())


def state_of_a_share(num_layers: int) -> int:
    """Bytes of this process's moments."""
    config = small(depth=num_layers)
    net = init_weights(GPT(config).materialise())
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    shards = [shard for group in optimizer._shards for shard in group]
    return sum(moment.nbytes for shard in shards for moment in shard.moments.values() if moment.ndim)


@pytest.mark.parametrize("num_layers", [2, 5])
def test_the_largest_share_of_the_optimizers_state(num_layers: int) -> None:
    """Groups of few matrices cannot be divided evenly: more than a third. Not all are largest on the same process."""
    shares = run(3, state_of_a_share, num_layers)
    formula, whole = (optimizer_state_bytes(small(depth=num_layers), processes) for processes in (3, 1))
    assert whole / 3 < max(shares) <= formula * 1.01 <= max(shares) * 1.2


def test_each_knob_saves_and_the_peak_is_the_largest_phase() -> None:
    config = resolve_model(ModelSettings(depth=4, sequence_len=1024), 2**16, "float32")
    plain = step_memory(config, 16, on_cpu=True, knobs=MemoryKnobs(False, 2**40))
    chunked = step_memory(config, 16, on_cpu=True, knobs=MemoryKnobs(False, 128))
    checkpointed = step_memory(config, 16, on_cpu=True, knobs=MemoryKnobs(True, 128))
    assert checkpointed.above_model < chunked.above_model < plain.above_model
    assert chunked.activations == plain.activations > 4 * checkpointed.activations
    assert plain.phases[plain.peak_phase] == max(plain.phases.values())
    assert plain.total == plain.weights + plain.rotary + plain.above_model
    assert plain.weights == plain.gradients == 4 * count_parameters(config)["total"]
    accumulated = step_memory(config, 16, on_cpu=True, micro_batches=2)
    assert accumulated.phases["loss"] - accumulated.gradients == step_memory(config, 16, on_cpu=True).phases["loss"]


def test_embeddings_in_bfloat16_take_half_and_are_updated_in_float32() -> None:
    config = small()
    half = dataclasses.replace(config, embedding_dtype="bfloat16")
    one, other = (step_memory(each, 1, on_cpu=True) for each in (config, half))
    embeddings = count_parameters(config)["wte"] + count_parameters(config)["value_embeds"]
    assert one.weights - other.weights == one.gradients - other.gradients == 2 * embeddings
    assert one.optimizer_state == other.optimizer_state


def test_a_piece_of_the_loss_has_no_more_tokens_than_there_are() -> None:
    config = small()
    assert loss_piece_bytes(config, 10, 128, on_cpu=True) == 10 * VOCAB * 8
    assert loss_piece_bytes(config, 1000, 128, on_cpu=True) == 125 * VOCAB * 12
    assert loss_piece_bytes(small("bfloat16"), 10, None, on_cpu=True) == 10 * VOCAB * 12


def test_the_largest_batch_fits_and_one_more_row_does_not() -> None:
    config = small()
    memory = 400 * 2**20

    def needed(rows: int, micro_batches: int) -> int:
        step = step_memory(config, rows, on_cpu=True, micro_batches=micro_batches)
        return step.total + resume_copy_bytes(config)

    most = largest_device_batch_size(config, memory, on_cpu=True, knobs=MemoryKnobs(), at_most=10**6)
    assert needed(most, 2) <= (1 - MARGIN) * memory < needed(most + 1, 2)
    # All rows of a step at once need no gradients beside the forward.
    assert largest_device_batch_size(config, memory, on_cpu=True, knobs=MemoryKnobs(), at_most=3) == 3
    assert largest_device_batch_size(config, 2**20, on_cpu=True, knobs=MemoryKnobs(), at_most=10**6) == 0


def test_a_thousand_layers_of_long_rows_are_planned_at_once() -> None:
    config = resolve_model(ModelSettings(depth=1000, sequence_len=2**20), 2**15, "bfloat16")
    assert largest_device_batch_size(config, 2**60, on_cpu=False, knobs=MemoryKnobs(True), at_most=10**6) > 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the largest resident size is read from /proc")
def test_the_predicted_peak_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of some 700 MB in a fresh process; the benchmark has more sizes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bench = importlib.import_module("bench_plan_memory")
    shape = bench.StepShape(depth=6, sequence_len=512, vocab_size=2048, rows=5)
    measured = bench.peak_memory(shape, num_threads=1).peak
    assert measured > 500e6
    assert bench.predicted(shape).above_model == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("depth", "vocab_size", "compiled", "rows"),
    [(20, 2**15, True, 32), (26, 2**15, True, 16), (32, 2**15, True, 8), (32, 2**16, True, 4)],
)
def test_rows_at_once_on_eight_gpus_count_the_sharded_optimizer(
    depth: int, vocab_size: int, compiled: bool, rows: int
) -> None:
    """Counted as if one GPU had all of its state, it was half of these (d26: 8)."""
    options = RowOptions(device=named_device("h100"), num_devices=8, knobs=MemoryKnobs(compiled=compiled))
    settings = ModelSettings(depth=depth)
    plan = make_plan(
        settings,
        HorizonSettings(),
        OptimSettings(),
        vocab_size=vocab_size,
        compute_dtype="bfloat16",
        options=options,
    )
    assert plan["device_batch_size"] == rows
    memory = add_memory(plan, resolve_model(settings, vocab_size, "bfloat16"), options)
    assert memory.total <= 0.9 * named_device("h100").memory_bytes
    assert plan["largest_batch_chunked_loss"] >= rows


@pytest.mark.parametrize(
    ("rows", "at_most", "chosen"),
    [
        (64, 30, 16),
        (64, 64, 64),
        (48, 30, 24),
        (22, 15, 11),
        (50, 18, 10),
        (53, 18, 18),
        (7, 4, 4),
        (1, 9, 1),
        (96, 40, 32),
    ],
)
def test_micro_batches_of_equal_size_and_no_power_of_two(rows: int, at_most: int, chosen: int) -> None:
    assert evenly(rows, at_most) == chosen


def test_micro_batches_of_a_cpu_are_of_equal_size_too() -> None:
    """20 rows of 256 in micro-batches of 16 would be 32 rows of work."""
    horizon = HorizonSettings(total_batch_tokens=5120, max_steps=1)
    options = RowOptions(device=CPU)
    settings = ModelSettings(depth=4, sequence_len=256)
    plan = make_plan(settings, horizon, OptimSettings(), vocab_size=4096, compute_dtype="float32", options=options)
    assert (plan["rows_per_step"], plan["device_batch_size"]) == (20, 10)
