"""Schedules: pure functions of the optimizer step (0-based), for every stage.

Sources: golden/plan.json, golden/era_*/schedules.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from nanochat_pl.common.schema import setting


@dataclass(frozen=True)
class ScheduleSettings:
    """Shape of the learning rate, the Muon momentum and the Muon weight decay over a stage.

    The defaults are the base stage's; those of other stages and of older recipes are in configs/schedule.
    """

    warmup_steps: int = setting(40, "Optimizer steps of linear warm-up of the learning rate.", at_least=0)
    warmup_ratio: float | None = setting(
        None, "Share of the steps of that warm-up, in place of warmup_steps; null: warmup_steps.", at_least=0, at_most=1
    )
    warmdown_ratio: float = setting(0.65, "Share of the steps, at the end, over which it falls.", at_least=0, at_most=1)
    warmdown: Literal["linear", "cosine"] = setting(
        "linear", "How it falls there: in a straight line, or as half a cosine."
    )
    initial_lr_fraction: float = setting(1.0, "Multiplies every learning rate of the stage.", at_least=0, at_most=1)
    final_lr_fraction: float = setting(
        0.05, "Share of the learning rate that is left at the end.", at_least=0, at_most=1
    )
    momentum_start: float = setting(0.85, "Muon momentum at step 0.", at_least=0, at_most=1)
    momentum_peak: float = setting(0.97, "Muon momentum after the ramp.", at_least=0, at_most=1)
    momentum_end: float = setting(0.90, "Muon momentum at the end of the warmdown.", at_least=0, at_most=1)
    momentum_ramp_steps: int = setting(400, "Steps from momentum_start to momentum_peak.", at_least=0)
    weight_decay: Literal["half_cosine", "linear", "constant", "none"] = setting(
        "half_cosine", "Muon weight decay: from full to 0 over half a cosine or in a straight line, constant, or none."
    )

    def warmup_length(self, num_steps: int) -> int:
        """Optimizer steps of the warm-up, the first ones of ``num_steps``."""
        return self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * num_steps)

    def fitted(self, num_steps: int) -> ScheduleSettings:
        """The same with a warm-up that leaves room for the warmdown; that of a very short run would not end in it."""
        room = max(0, num_steps - self.warmdown_steps(num_steps))
        if self.warmup_length(num_steps) <= room:
            return self
        return replace(self, warmup_steps=room, warmup_ratio=None)

    def warmdown_steps(self, num_steps: int) -> int:
        """Optimizer steps of the warmdown, the last ones of ``num_steps``."""
        return round(self.warmdown_ratio * num_steps)


@dataclass(frozen=True)
class StepValues:
    """What the schedules give for one optimizer step.

    ``lr_multiplier`` and ``weight_decay_multiplier`` multiply each group's own learning rate and the Muon groups'
    weight decay; ``muon_momentum`` is the momentum itself.
    """

    lr_multiplier: float
    muon_momentum: float
    weight_decay_multiplier: float


def schedule_values(settings: ScheduleSettings, step: int, num_steps: int) -> StepValues:
    """The schedules at optimizer step ``step`` (0-based) of ``num_steps``. From ``num_steps`` on: the end values."""
    assert step >= 0 and num_steps >= 1, (step, num_steps)
    step = min(step, num_steps)
    return StepValues(
        lr_multiplier=settings.initial_lr_fraction * _lr(settings, step, num_steps),
        muon_momentum=_momentum(settings, step, num_steps),
        weight_decay_multiplier=_weight_decay(settings, step, num_steps),
    )


def _lr(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    """Warm-up, flat, warmdown; where a short run makes them overlap, the warm-up wins."""
    if step < (warmup_steps := settings.warmup_length(num_steps)):
        return (step + 1) / warmup_steps
    steps_left = num_steps - step
    warmdown_steps = settings.warmdown_steps(num_steps)
    if steps_left >= warmdown_steps:
        return 1.0
    left = steps_left / warmdown_steps
    if settings.warmdown == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return left + (1 - left) * settings.final_lr_fraction


def _momentum(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    """Ramp, flat, then back over the warmdown; where they overlap, the ramp wins."""
    if step < settings.momentum_ramp_steps:
        done = step / settings.momentum_ramp_steps
        return (1 - done) * settings.momentum_start + done * settings.momentum_peak
    warmdown_steps = settings.warmdown_steps(num_steps)
    into_warmdown = step - (num_steps - warmdown_steps)
    if into_warmdown <= 0:
        return settings.momentum_peak
    done = into_warmdown / warmdown_steps
    return settings.momentum_peak * (1 - done) + settings.momentum_end * done


def _weight_decay(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    if settings.weight_decay == "none":
        return 0.0
    if settings.weight_decay == "constant":
        return 1.0
    if settings.weight_decay == "linear":
        return 1 - step / num_steps
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))
