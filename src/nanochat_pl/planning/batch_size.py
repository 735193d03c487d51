"""How many rows are in memory at once, and how many are validated on: what the machine says to a plan."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.model.config import GPTConfig
from nanochat_pl.planning.gpus import CPU, Device
from nanochat_pl.planning.memory import MARGIN, NO_KNOBS, MemoryKnobs, largest_device_batch_size
from nanochat_pl.planning.plan import Plan

VALIDATION_SHARE = 0.01  # of the training time
MIN_VALIDATION_ROWS = 32
MAX_SHARE_OF_SHORT_RUN = 0.25  # rows of all its validations, of those that it trains on
MAX_VALIDATION_TOKENS = 80 * 2**19

# Tokens of a micro-batch where more are no faster; on a GPU memory alone decides.
MICRO_BATCH_TOKENS = {"cpu": 2**12, "mps": 2**13}


@dataclass(frozen=True)
class RowOptions:
    """What the plan of the rows depends on besides the model.

    Attributes:
        num_devices: data parallel: each takes its share of the rows of a step.
        device_batch_size, validation_rows: the user's, or null for the plan's.
        validation_tokens: the user's, in place of ``validation_rows``.
        evaluate_every_steps: steps between validations; 0: one, at the end.
    """

    device: Device = CPU
    knobs: MemoryKnobs = NO_KNOBS
    num_devices: int = 1
    device_batch_size: int | None = None
    validation_rows: int | None = None
    validation_tokens: int | None = None
    evaluate_every_steps: int = 250


def plan_rows_in_memory(plan: Plan, config: GPTConfig, options: RowOptions) -> None:
    """Add ``rows_per_device`` and ``device_batch_size``."""
    formula = "rows_per_step / num_devices, rounded up"
    if options.num_devices > 1:
        plan.derive("num_devices", options.num_devices, "num_devices: each takes a share of every step's rows")
        most = -(-plan["rows_per_step"] // options.num_devices)
        plan.derive("rows_per_device", most, formula, ("rows_per_step", "num_devices"))
    else:
        most = plan["rows_per_step"]
    rows, formula = _micro_batch(config, options, most)
    given = options.device_batch_size
    plan.derive(
        "device_batch_size",
        rows,
        f"{formula}; at most those of a step; memory, not results",
        ("sequence_len", "rows_per_step"),
        (f"device_batch_size={given}", None if given is None else min(given, most)),
    )


def rows_of_device(plan: Plan) -> int:
    """Rows of a step that are one device's."""
    return int(plan["rows_per_device"] if "rows_per_device" in plan else plan["rows_per_step"])


def rows_that_fit(config: GPTConfig, options: RowOptions, at_most: int, knobs: MemoryKnobs) -> int | None:
    """The most rows whose step fits into the memory of the device, 0 where not even one does; None: it is not known."""
    device = options.device
    if device.memory_bytes is None:
        return None
    return largest_device_batch_size(
        config,
        device.memory_bytes,
        on_cpu=device.type == "cpu",
        knobs=knobs,
        at_most=at_most,
        processes=options.num_devices,
        gpu_memory=device.gpu_memory,
    )


def _micro_batch(config: GPTConfig, options: RowOptions, most: int) -> tuple[int, str]:
    device, row = options.device, config.sequence_len
    tokens = MICRO_BATCH_TOKENS.get(device.type)
    known = rows_that_fit(config, options, most, options.knobs)
    fit = most if known is None else known
    if tokens is None:
        return evenly(most, max(1, fit)), f"rows whose step fits into {1 - MARGIN:.0%} of the memory of {device.name}"
    wanted = max(1, tokens // row)
    if fit < min(wanted, most):
        return max(1, fit), f"rows whose step fits into {1 - MARGIN:.0%} of the memory of {device.name}"
    return evenly(most, wanted), f"rows of about {tokens:,} tokens ({device.type})"


def evenly(rows: int, at_most: int) -> int:
    """Rows of a micro-batch: the most that divide ``rows`` into equal ones.

    Where such would be less than half of ``at_most``: those that leave least of the last one to be filled up.
    """
    at_most = min(rows, at_most)
    divisor = next(each for each in range(at_most, 0, -1) if rows % each == 0)
    if 2 * divisor >= at_most:
        return divisor
    return min(range(at_most, at_most // 2, -1), key=lambda each: -rows % each)


def plan_validation(plan: Plan, options: RowOptions) -> None:
    """Add ``evaluate_every_steps`` and ``validation_rows``."""
    every, num_steps, row = options.evaluate_every_steps, plan["num_steps"], plan["sequence_len"]
    plan.derive("evaluate_every_steps", every, "evaluation.every_steps; one more at the end")
    num_evaluations = 1 + ((num_steps - 1) // every if every else 0)
    # A forward pass is a third of a training step.
    trained = num_steps * plan["rows_per_step"]
    rows = int(3 * VALIDATION_SHARE * trained / num_evaluations)
    # A short run does not validate for longer than it trains, whatever set its length.
    least = min(MIN_VALIDATION_ROWS, max(2, int(MAX_SHARE_OF_SHORT_RUN * trained / num_evaluations)))
    plan.derive(
        "validation_rows",
        max(1, min(max(rows, least), MAX_VALIDATION_TOKENS // row)),
        f"all validations take {VALIDATION_SHARE:.0%} of the training FLOPs; at least {MIN_VALIDATION_ROWS} rows, of a"
        f" short run {MAX_SHARE_OF_SHORT_RUN:.0%} of those trained on, at most {MAX_VALIDATION_TOKENS:,} tokens",
        ("num_steps", "rows_per_step", "evaluate_every_steps", "sequence_len"),
        _given_validation(plan, options),
    )


def _given_validation(plan: Plan, options: RowOptions) -> tuple[str, int | None]:
    """What the user set: rows, or tokens in whole batches of all devices, as the recipe counts them."""
    if (tokens := options.validation_tokens) is None:
        return f"evaluation.num_rows={options.validation_rows}", options.validation_rows
    batch = plan["device_batch_size"] * options.num_devices
    num_batches = max(1, tokens // (batch * plan["sequence_len"]))
    how = (
        f"evaluation.num_tokens={tokens}: num_tokens // (device_batch_size * sequence_len * num_devices) whole batches"
    )
    return how, num_batches * batch
