"""What a plan costs: memory on a device, time and money, text. Every figure says what it comes from.

What is not known stays null and is shown as unknown: the memory or the peak of a device that is in no table, the tokens
of text that nobody has counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.model.accounting import DTYPE_BYTES, count_parameters, kv_cache_bytes, weight_bytes
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.planning.devices import Device
from nanochat_pl.planning.horizon import ASSUMED_FLOPS_PER_CORE, estimate_cpu_seconds
from nanochat_pl.planning.memory import MARGIN, MemoryKnobs, StepMemory, largest_device_batch_size, step_memory
from nanochat_pl.planning.plan import Plan, show
from nanochat_pl.planning.rows import RowOptions

# Share of the peak that a GPU is taken to reach where nobody says: what well-tuned training of such models in bfloat16
# reaches. Small models stay below it.
ASSUMED_MFU = 0.4
# Of the recipe's packing with crop at 2,048 positions.
CROPPED_SHARE = 0.35


@dataclass(frozen=True)
class TextFacts:
    """What is known of the text that is trained on; null where it is not.

    Attributes:
        name: of the source.
        bytes_per_token: assumed of the tokenizer.
        shard_bytes: of text in one shard.
        num_shards: training shards that there are.
        tokens_at_hand: about how many tokens lie on this machine.
        crops: whether the packer drops the rest of documents that do not fit.
    """

    name: str
    bytes_per_token: float
    shard_bytes: float | None = None
    num_shards: int | None = None
    tokens_at_hand: int | None = None
    crops: bool = False


def add_memory(plan: Plan, config: GPTConfig, options: RowOptions) -> StepMemory:
    """Add the section on memory: what a step takes, and the largest micro-batch with and without the knobs."""
    device, rows = options.device, plan["device_batch_size"]
    most = plan["rows_per_device"] if "rows_per_device" in plan else plan["rows_per_step"]
    memory = step_memory(
        config,
        rows,
        on_cpu=device.type == "cpu",
        knobs=options.knobs,
        micro_batches=-(-most // rows),
        gpu_memory=device.gpu_memory,
    )
    plan.section = f"Memory on {device.name}"
    plan.derive("weights_bytes", memory.weights, "parameters in float32, embeddings in model.embedding_dtype")
    plan.derive("gradients_bytes", memory.gradients, "as the weights")
    plan.derive("optimizer_state_bytes", memory.optimizer_state, "float32: two moments in AdamW, one in Muon")
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
    cache = kv_cache_bytes(config, 1, config.sequence_len, config.compute_dtype)
    plan.derive("chat_cache_bytes", cache, "keys and values of one chat of sequence_len tokens", ("sequence_len",))
    plan.derive("device_memory_bytes", device.memory_bytes, f"of {device.name}")
    for name, knobs, what in _knob_choices():
        fit = None
        if device.memory_bytes is not None:
            fit = largest_device_batch_size(
                config,
                device.memory_bytes,
                on_cpu=device.type == "cpu",
                knobs=knobs,
                at_most=most,
                gpu_memory=device.gpu_memory,
            )
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
    plan: Plan, config: GPTConfig, options: RowOptions, num_cores: int, mfu: float | None, price_per_hour: float | None
) -> None:
    """Add the section on time and cost.

    Args:
        num_cores: of this machine, for a CPU.
        mfu: share of the peak that is reached, or null for an assumed one.
        price_per_hour: of one device, in any currency; null: no cost.
    """
    device, num_devices = options.device, options.num_devices
    plan.section = "Time and cost"
    if device.type == "cpu":
        per_core = ASSUMED_FLOPS_PER_CORE
        plan.derive("num_cores", num_cores, "of this machine")
        seconds: float | None = estimate_cpu_seconds(plan["total_flops"], num_cores)
        formula = f"total_flops / (num_cores * {per_core:g} FLOP/s)"
        inputs: tuple[str, ...] = ("total_flops", "num_cores")
    else:
        peak = device.peaks.get(config.compute_dtype)
        plan.derive("device_peak_flops", peak, f"FLOP/s of dense products in {config.compute_dtype}, its data sheet's")
        formula = "share of the peak; 0.4 is well-tuned training of large models, assumed and not measured here"
        share = plan.derive("mfu", ASSUMED_MFU, formula, (), (f"mfu={mfu}", mfu))
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
        parameters = count_parameters(config)
        read = weight_bytes(config) - _embedding_bytes(config, parameters) + plan["chat_cache_bytes"]
        formula = "at most, one chat: bandwidth / bytes of all linears and of a full cache, read once a token"
        plan.derive("chat_tokens_per_second", device.bandwidth / read, formula)


def _embedding_bytes(config: GPTConfig, parameters: dict[str, int]) -> int:
    return DTYPE_BYTES[config.embedding_dtype] * (parameters["wte"] + parameters["value_embeds"])


def add_text(plan: Plan, text: TextFacts) -> None:
    """Add the section on data: the text that the horizon takes, shards, and epochs over what is at hand."""
    plan.section = "Data"
    kept = 1 - CROPPED_SHARE if text.crops else 1.0
    formula = f"total_tokens * {text.bytes_per_token:g} bytes a token"
    formula += f" / {kept:g}, as data.long_documents=crop drops the rest" if text.crops else ""
    needed = plan.derive("text_bytes", plan["total_tokens"] * text.bytes_per_token / kept, formula, ("total_tokens",))
    if text.shard_bytes is not None:
        formula = f"text_bytes / {text.shard_bytes / 1e6:g} million, rounded up; {text.name} has {text.num_shards:,}"
        plan.derive("shards_needed", -int(-needed // text.shard_bytes), formula, ("text_bytes",))
    how = "about, on this machine" if text.tokens_at_hand is not None else "not known before it has been read once"
    plan.derive("tokens_at_hand", text.tokens_at_hand, f"{text.name}: {how}")
    epochs = None if text.tokens_at_hand is None else plan["total_tokens"] / kept / max(text.tokens_at_hand, 1)
    plan.derive("epochs", epochs, "total_tokens / tokens_at_hand", ("total_tokens", "tokens_at_hand"))


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
        remarks.append("Memory on a GPU is predicted by the formula that was measured on CPUs; it is for eager mode.")
    return remarks
