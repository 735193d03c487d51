"""How long to train: what the user may set, and the check that stands before a run nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nanochat_pl.common.durations import rough_duration
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.common.text_amounts import epochs_of

if TYPE_CHECKING:
    from nanochat_pl.planning.plan import Plan

MAX_EPOCHS = 4.0  # beyond, repeated text teaches little more (arXiv 2305.16264)
MAX_CPU_SECONDS = 3600.0

# Bounds far above what anybody trains, so that every metric of a plan is a number.
MAX_STEPS = 10**12
MAX_BATCH_TOKENS = 2**40
MAX_FLOPS = 1e36
MAX_TOKENS_PER_PARAMETER = 1e9

# What one CPU core is taken to reach in training, in FLOP/s: float32 with 256-bit vectors, a small model. Two
# newer cores with bfloat16 units reach three times that. It decides nothing but whether check_horizon asks back.
ASSUMED_FLOPS_PER_CORE = 50e9


@dataclass(frozen=True)
class HorizonSettings:
    """The length of a stage. Precedence: max_steps, flops_budget, tokens_per_parameter."""

    max_steps: int | None = setting(
        None, "Optimizer steps; null: from the FLOPs budget or the ratio.", at_least=1, at_most=MAX_STEPS
    )
    flops_budget: float | None = setting(
        None, "Training FLOPs to spend, e.g. 1e18; null: the ratio sets the length.", above=0, at_most=MAX_FLOPS
    )
    tokens_per_parameter: float | None = setting(
        None,
        "Training tokens per counted parameter; null: 12. 8 is the speedrun's, 20 Chinchilla's.",
        above=0,
        at_most=MAX_TOKENS_PER_PARAMETER,
    )
    counted_parameters: Literal["scaling", "all"] = setting(
        "scaling",
        "Parameters that tokens_per_parameter multiplies. scaling: matrices in the blocks and lm_head; all: embeddings"
        " and scalars too.",
    )
    total_batch_tokens: int | None = setting(
        None,
        "Tokens of one optimizer step over all processes; null: from the horizon.",
        at_least=1,
        at_most=MAX_BATCH_TOKENS,
    )


def estimate_cpu_seconds(total_flops: float, num_cores: int) -> float:
    """Seconds that this many training FLOPs take on a CPU at an assumed rate per core."""
    return total_flops / (num_cores * ASSUMED_FLOPS_PER_CORE)


# What a CPU trains in minutes: said where a plan of hours is refused.
CPU_EXAMPLE = "model.depth=4 max_steps=20"


def check_horizon(
    plan: Plan, tokens_at_hand: int | None, estimated_seconds: float | None = None, crops: bool = False
) -> None:
    """Refuse a horizon that the plan came to by itself and that nobody would want.

    Args:
        plan: of the stage. Where the user set its length, there is nothing to check.
        tokens_at_hand: training tokens that the data has; one epoch. Null: not known yet, nothing is said of epochs.
        estimated_seconds: on a CPU, of :func:`estimate_cpu_seconds`; null: no limit of time.
        crops: whether the packer drops the rest of documents that do not fit.

    Raises:
        UserError: more than four epochs, or more than an hour on a CPU; it names the keys that set another length.
    """
    if plan.horizon_given:
        return
    num_steps, batch_tokens = plan["num_steps"], plan["total_batch_tokens"]
    problems, steps_that_fit = [], [num_steps]
    too_slow = estimated_seconds is not None and estimated_seconds > MAX_CPU_SECONDS
    epochs = 0.0 if tokens_at_hand is None else epochs_of(num_steps * batch_tokens, tokens_at_hand, crops)
    if tokens_at_hand is not None and epochs > MAX_EPOCHS:
        problems.append(
            f"The plan's own horizon, {num_steps:,} steps of {batch_tokens:,} tokens, is {epochs:,.1f} epochs of the"
            f" {tokens_at_hand:,} tokens or so at hand (limit: {MAX_EPOCHS:g})."
        )
        steps_that_fit.append(int(num_steps * MAX_EPOCHS / epochs))
    if estimated_seconds is not None and estimated_seconds > MAX_CPU_SECONDS:
        problems.append(
            f"The plan's own horizon, {num_steps:,} steps, would take about {rough_duration(estimated_seconds)} on"
            f" this CPU (limit: {rough_duration(MAX_CPU_SECONDS)})."
        )
        steps_that_fit.append(int(num_steps * MAX_CPU_SECONDS / estimated_seconds))
    if problems:
        raise UserError(problems, fix=_fix(min(steps_that_fit), batch_tokens, too_slow))


def _fix(steps: int, batch_tokens: int, too_slow: bool) -> str:
    """The keys that set another length. More data makes fewer epochs of the same steps, and no step faster."""
    if steps >= 1:
        example = f"max_steps={steps} fits" + (f", {CPU_EXAMPLE} takes minutes" if too_slow else "")
        how = "flops_budget=… and tokens_per_parameter=… are other ways, total_batch_tokens=… makes steps smaller"
        fix = f"Set the length yourself: {example}; {how}."
    elif too_slow:
        fix = f"Even one step is too much: take a smaller model and set its length; {CPU_EXAMPLE} takes minutes."
    else:
        fix = f"Even one step is too much: set total_batch_tokens below {batch_tokens}, and max_steps."
    other = "" if too_slow else " A smaller model.depth or more data also does it."
    return f"{fix}{other} yes=true trains all the same."
