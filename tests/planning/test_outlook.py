"""Memory, time, cost and text of a plan on a device; what is not known stays unknown."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_pl.common.text_amounts import shards_for
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.counts import count_linear_weights
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.planning import HorizonSettings, Plan, RowOptions, make_plan
from nanochat_pl.planning.estimates import ASSUMED_MFU, add_memory, add_time, device_remarks
from nanochat_pl.planning.gpus import KNOWN_GPUS, Device, named_device
from nanochat_pl.planning.memory import MARGIN, MemoryKnobs, step_memory
from nanochat_pl.planning.text import TextFacts, add_text

MODEL = ModelSettings(depth=12)
UNKNOWN_GPU = Device("Some GPU", "cuda", memory_bytes=24 * 2**30, bfloat16=True)


def planned(device: Device, model: ModelSettings = MODEL, **keys: Any) -> tuple[Plan, RowOptions]:
    options = RowOptions(device=device, **keys)
    dtype = "bfloat16" if device.bfloat16 else "float32"
    plan = make_plan(model, HorizonSettings(), OptimSettings(), vocab_size=32768, compute_dtype=dtype, options=options)
    return plan, options


def timed(device: Device, mfu: float | None = None, price: float | None = None, **keys: Any) -> Plan:
    plan, options = planned(device, **keys)
    config = resolve_model(MODEL, 32768, "bfloat16" if device.bfloat16 else "float32")
    add_memory(plan, config, options)
    add_time(plan, config, options, 2, None if mfu is None else (f"mfu={mfu}", mfu), price)
    return plan


@pytest.mark.parametrize("gpu", [gpu.name for gpu in KNOWN_GPUS])
def test_on_every_known_gpu_the_planned_rows_fit_and_twice_as_many_do_not(gpu: str) -> None:
    device = named_device(gpu)
    assert device.memory_bytes is not None
    plan, _ = planned(device)
    rows, most = plan["device_batch_size"], plan["rows_per_step"]
    config = resolve_model(MODEL, 32768, "bfloat16" if device.bfloat16 else "float32")
    room = (1 - MARGIN) * device.memory_bytes
    assert rows & (rows - 1) == 0
    assert step_memory(config, rows, on_cpu=False, micro_batches=2).total <= room
    assert 2 * rows > most or step_memory(config, 2 * rows, on_cpu=False, micro_batches=2).total > room


def test_checkpointing_gives_more_rows_and_a_given_number_is_taken() -> None:
    device = named_device("l4")
    plain, _ = planned(device)
    checkpointed, _ = planned(device, knobs=MemoryKnobs(activation_checkpointing=True))
    given, _ = planned(device, device_batch_size=3)
    assert checkpointed["device_batch_size"] > plain["device_batch_size"]
    assert given["device_batch_size"] == 3
    assert given.values["device_batch_size"].overridden_by == "device_batch_size=3"
    assert given.values["device_batch_size"].by_formula == plain["device_batch_size"]


def test_a_cpu_takes_4096_tokens_unless_memory_forbids() -> None:
    assert planned(Device("CPU", "cpu", memory_bytes=2**40))[0]["device_batch_size"] == 2
    small = Device("CPU", "cpu", memory_bytes=7 * 2**30)
    assert planned(small)[0]["device_batch_size"] == 1
    assert "memory of CPU" in planned(small)[0].values["device_batch_size"].formula
    assert planned(Device("CPU", "cpu"))[0]["device_batch_size"] == 2, "memory not known"


def test_several_devices_share_the_rows_and_the_time() -> None:
    one, eight = timed(named_device("h100"), price=3.0), timed(named_device("h100"), price=3.0, num_devices=8)
    assert eight["rows_per_device"] == one["rows_per_step"] // 8
    assert eight["device_batch_size"] <= eight["rows_per_device"]
    assert eight["training_seconds"] == pytest.approx(one["training_seconds"] / 8)
    assert eight["cost"] == pytest.approx(one["cost"])
    uneven, _ = planned(named_device("h100"), num_devices=7)
    assert uneven["rows_per_device"] == -(-uneven["rows_per_step"] // 7)


def test_time_is_flops_over_peak_times_mfu() -> None:
    plan = timed(named_device("h100"), mfu=0.5)
    assert plan["training_seconds"] == pytest.approx(plan["total_flops"] / (989.4e12 * 0.5))
    assert plan.values["mfu"].overridden_by == "mfu=0.5" and plan.values["mfu"].by_formula == ASSUMED_MFU
    model = resolve_model(MODEL, 32768, "bfloat16")
    read = 2 * count_linear_weights(model) + plan["chat_cache_bytes"]
    assert plan["chat_tokens_per_second"] == named_device("h100").bandwidth / read, "weights as they are computed with"
    assert "cost" not in plan, "prices change: there is none unless it is given"
    cpu = timed(Device("CPU", "cpu", memory_bytes=2**34))
    assert cpu["training_seconds"] == cpu["total_flops"] / (2 * 50e9)


def test_of_a_stranger_peak_and_time_are_unknown() -> None:
    plan = timed(UNKNOWN_GPU, mfu=0.5, price=1.0)
    for name in ("device_peak_flops", "training_seconds", "tokens_per_second", "cost"):
        assert plan[name] is None and "unknown" in plan.explain(name)
    assert "chat_tokens_per_second" not in plan
    nothing = Device("Some GPU", "cuda", bfloat16=True)
    plan, options = planned(nothing)
    memory = add_memory(plan, resolve_model(MODEL, 32768, "bfloat16"), options)
    assert plan["largest_batch_both"] is None
    assert "is not known" in device_remarks(plan, memory, nothing)[0]


def test_text_shards_and_epochs() -> None:
    plan, _ = planned(UNKNOWN_GPU)
    tokens = plan["total_tokens"]
    add_text(plan, TextFacts("x", 4.0, shard_bytes=1e9, num_shards=100, tokens_at_hand=tokens // 2, crops=False))
    assert plan["text_bytes"] == 4 * tokens
    assert plan["shards_needed"] == -(-4 * tokens // 10**9)
    assert plan["epochs"] == pytest.approx(2.0)
    plan, _ = planned(UNKNOWN_GPU)
    add_text(plan, TextFacts("x", 4.0, crops=True))
    assert plan["text_bytes"] == pytest.approx(4 * tokens / 0.65), "a third of what is read is dropped"
    assert "shards_needed" not in plan and plan["epochs"] is None


def test_cropping_counts_in_shards_and_epochs_and_the_cache() -> None:
    """train counted 101 files for what plan called 155: it had left out what cropping drops."""
    assert shards_for(100, False, [30.0] * 9) == 4 and shards_for(65, True, [30.0] * 9) == 4
    assert shards_for(10**6, True, [30.0] * 9) == 9 and shards_for(1, True, []) == 0
    plan, _ = planned(UNKNOWN_GPU)
    tokens = plan["total_tokens"]
    add_text(plan, TextFacts("x", 4.0, 1e9, 100, tokens_at_hand=tokens, crops=True, streamed=True))
    assert plan["epochs"] == pytest.approx(1 / 0.65)
    assert plan["shards_needed"] == -(-round(4 * tokens / 0.65) // 10**9)
    per_token = plan["token_cache_bytes"] / tokens
    assert 2 < per_token < 2.1, "two bytes an id, and the index: all that is at hand, read more than once"
    plan, _ = planned(UNKNOWN_GPU)
    add_text(plan, TextFacts("x", 4.0, tokens_at_hand=100 * tokens, crops=True, streamed=True))
    assert plan["token_cache_bytes"] == pytest.approx(per_token * tokens / 0.65), "no more than is read"
    plan, _ = planned(UNKNOWN_GPU)
    add_text(plan, TextFacts("x", 4.0, tokens_at_hand=100 * tokens))
    assert plan["token_cache_bytes"] == pytest.approx(per_token * 100 * tokens), "all of it, before it begins"
