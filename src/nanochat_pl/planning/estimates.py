"""What a plan costs: memory on a device, time and money, text. Every metric says what it comes from.

What is not known stays null and is shown as unknown: the memory or the peak of a device that is in no table, the tokens
of text that nobody has counted.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nanochat_pl.model.attention import Case, Kernels, attention_backend
from nanochat_pl.model.config import AttentionBackend, GPTConfig
from nanochat_pl.model.counts import DTYPE_BYTES, count_linear_weights, kv_cache_bytes
from nanochat_pl.planning.batch_size import RowOptions, rows_of_device, rows_that_fit
from nanochat_pl.planning.gpus import Device
from nanochat_pl.planning.horizon import ASSUMED_FLOPS_PER_CORE, estimate_cpu_seconds
from nanochat_pl.planning.memory import (
    MARGIN,
    MemoryKnobs,
    StepMemory,
    resume_copy_bytes,
    step_memory,
)
from nanochat_pl.planning.plan import Plan, show

# Share of the peak that a GPU is taken to reach where nobody says: what well-tuned training of such models in bfloat16
# reaches. Small models stay below it.
ASSUMED_MFU = 0.4


def add_machine(
    plan: Plan,
    config: GPTConfig,
    options: RowOptions,
    kernels: Kernels,
    attention: AttentionBackend = "auto",
    fp8: bool = False,
) -> None:
    """Add what the machine comes to: processes, types, compiled or not, attention. Nothing of it is a setting.

    ``attention``: of ``trainer.attention``; ``fp8``: whether the blocks multiply in FP8.
    """
    plan.section = "Machine"
    plan.derive("processes", options.num_devices, "trainer.devices: one process for each device")
    plan.derive("compute_dtype", config.compute_dtype, "model.compute_dtype; auto: what the device multiplies best")
    formula = "trainer.fp8; its time and memory are not known here: they are counted as without, and so is mfu"
    plan.derive("fp8", fp8, formula)
    compiled = "trainer.compile; auto: where a tiny model, compiled, trains as uncompiled"
    plan.derive("compiled", options.knobs.compiled, compiled)
    dtype, length = getattr(torch, config.compute_dtype), config.sequence_len
    traits = (length, config.head_dim, config.document_start_id is not None, options.knobs.compiled)
    backends = {
        window: attention_backend(kernels, Case(dtype, window, *traits), attention)
        for window in sorted({*config.windows})
    }
    said = [f"{backend} (window {window:,})" if len(backends) > 1 else backend for window, backend in backends.items()]
    plan.derive("attention", ", ".join(said), "trainer.attention; auto: by device, type and window")


def add_step_memory(plan: Plan, config: GPTConfig, options: RowOptions) -> StepMemory:
    """Add what a training step takes of a device's memory: what a run's measured peak is held against."""
    device, rows = options.device, plan["device_batch_size"]
    memory = step_memory(
        config,
        rows,
        on_cpu=device.type == "cpu",
        knobs=options.knobs,
        micro_batches=-(-rows_of_device(plan) // rows),
        processes=options.num_devices,
        gpu_memory=device.gpu_memory,
    )
    plan.section = f"Memory on {device.name}"
    plan.derive("weights_bytes", memory.weights, "parameters in float32, embeddings in model.embedding_dtype")
    plan.derive("gradients_bytes", memory.gradients, "as the weights")
    shared = ", of which each device has its share" if options.num_devices > 1 else ""
    moments = f"float32: two moments in AdamW, one in Muon{shared}"
    plan.derive("optimizer_state_bytes", memory.optimizer_state, moments)
    batch = ("device_batch_size", "sequence_len")
    plan.derive("activations_bytes", memory.activations, "kept by autograd from forward to backward", batch)
    plan.derive("logits_bytes", memory.logits, "of one piece of the loss (trainer.loss_chunk_tokens)", batch)
    plan.derive("rotary_bytes", memory.rotary, "cosines and sines of all positions that the tables reach")
    phases = ", ".join(f"{name} {show(size, '_bytes')}" for name, size in memory.phases.items())
    plan.derive(
        "step_peak_bytes",
        memory.total,
        f"weights, rotary tables and the largest phase of a step ({memory.peak_phase}); all phases: {phases}",
        ("weights_bytes", "rotary_bytes", *batch),
    )
    return memory


def add_memory(plan: Plan, config: GPTConfig, options: RowOptions) -> StepMemory:
    """Add the section on memory: what a step takes, and the largest micro-batch with and without the knobs."""
    memory, device = add_step_memory(plan, config, options), options.device
    cache = kv_cache_bytes(config, 1, config.sequence_len, config.compute_dtype)
    plan.derive("chat_cache_bytes", cache, "keys and values of one chat of sequence_len tokens", ("sequence_len",))
    formula = "weights and moments: host memory of the main process while it writes a resume file, and the file's size"
    plan.derive("resume_copy_bytes", resume_copy_bytes(config), formula)
    plan.derive("device_memory_bytes", device.memory_bytes, f"of {device.name}")
    for name, knobs, what in _knob_choices():
        compiled = replace(knobs, compiled=options.knobs.compiled)
        fit = rows_that_fit(config, options, rows_of_device(plan), compiled)
        formula = f"most rows whose step fits into {1 - MARGIN:.0%} of it{what}, at most those of a step"
        plan.derive(name, fit, formula, ("device_memory_bytes", "rows_per_step"))
    return memory


def _knob_choices() -> list[tuple[str, MemoryKnobs, str]]:
    """With and without each knob: name of the value, the knobs, what they are in words."""
    whole = 2**40  # more tokens than there are
    return [
        ("largest_batch_plain", MemoryKnobs(False, whole), ", all logits at once"),
        ("largest_batch_chunked_loss", MemoryKnobs(False, None), ", the loss in pieces (the default)"),
        ("largest_batch_checkpointing", MemoryKnobs(True, whole), ", with activation checkpointing"),
        ("largest_batch_both", MemoryKnobs(True, None), ", with both"),
    ]


def add_time(
    plan: Plan,
    config: GPTConfig,
    options: RowOptions,
    num_cores: int,
    mfu: tuple[str, float] | None,
    price_per_hour: float | None,
) -> None:
    """Add the section on time and cost.

    Args:
        num_cores: of this machine, for a CPU.
        mfu: how it is known which share of the peak is reached, and the share; None for an assumed one.
        price_per_hour: of one device, in any currency; null: no cost.
    """
    device, num_devices = options.device, options.num_devices
    plan.section = "Time and cost"
    if device.type == "cpu":
        plan.derive("num_cores", num_cores, "of this machine")
        seconds: float | None = estimate_cpu_seconds(plan["total_flops"], num_cores)
        formula = f"total_flops / (num_cores * {ASSUMED_FLOPS_PER_CORE:g} FLOP/s)"
        inputs: tuple[str, ...] = ("total_flops", "num_cores")
    else:
        peak = device.peaks.get(config.compute_dtype)
        plan.derive("device_peak_flops", peak, f"FLOP/s of dense products in {config.compute_dtype}, its data sheet's")
        formula = "share of the peak; 0.4 is well-tuned training of large models, assumed and not measured here"
        share = plan.derive("mfu", ASSUMED_MFU, formula, (), mfu)
        seconds = None if peak is None else plan["total_flops"] / (peak * share * num_devices)
        several = ("num_devices",) if num_devices > 1 else ()
        inputs = ("total_flops", "device_peak_flops", "mfu", *several)
        formula = f"total_flops / ({' * '.join(inputs[1:])})"
    plan.derive("training_seconds", seconds, f"{formula}; without evaluation", inputs)
    rate = None if seconds is None else plan["total_tokens"] / seconds
    plan.derive("tokens_per_second", rate, "total_tokens / training_seconds", ("total_tokens", "training_seconds"))
    if price_per_hour is not None:
        plan.derive("price_per_hour", price_per_hour, "price_per_hour of one device")
        cost = None if seconds is None else seconds / 3600 * num_devices * price_per_hour
        formula = "training_seconds / 3600 * price_per_hour" + (" * num_devices" if num_devices > 1 else "")
        plan.derive("cost", cost, formula, ("training_seconds", "price_per_hour"))
    if device.bandwidth is not None:
        weights = count_linear_weights(config) * DTYPE_BYTES[config.compute_dtype]
        read = weights + plan["chat_cache_bytes"]
        formula = "at most, one chat: bandwidth / bytes of all linears and of a full cache, read once a token"
        plan.derive("chat_tokens_per_second", device.bandwidth / read, formula)


def device_remarks(plan: Plan, memory: StepMemory, device: Device) -> list[str]:
    """What a person should know before training this plan on this device."""
    remarks = []
    if device.memory_bytes is None:
        remarks.append(f"The memory of {device.name} is not known: watch the first steps.")
    elif memory.total > device.memory_bytes:
        remarks.append(
            f"A step of device_batch_size={plan['device_batch_size']} takes {show(memory.total, '_bytes')},"
            f" {device.name} has {show(device.memory_bytes, '_bytes')}: take a smaller device_batch_size,"
            " trainer.activation_checkpointing=true, a shorter model.sequence_len or a smaller model.depth."
        )
    if device.type == "cuda":
        remarks.append(
            "Memory on a GPU is predicted by the formula that was measured on CPUs in eager mode; what a compiled model"
            " keeps is estimated. Where it is too much, memory runs out once and device_batch_size is halved."
        )
    return remarks
