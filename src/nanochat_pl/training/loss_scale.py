"""The factor by which a loss in float16 is multiplied, so that its gradients do not vanish (arXiv 1710.03740).

float16 has nothing between 0 and 6e-8, and gradients are that small. So the loss is scaled before the backward and the
gradients are divided by the same power of two after it. Too large a factor overflows to infinity: then the step is
skipped and the factor halved.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

START = 2.0**16
GOOD_STEPS = 2_000  # without an overflow: then the factor is doubled
MOST = 2.0**24  # the gradient of a loss is divided by its number of targets, so more has no use


class LossScale:
    """Scales the loss in float16; in every other type it is 1 and stays so.

    Attributes:
        active: whether it does anything.
        factor: of the next step, a power of two.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.factor, self._good_steps = active, START if active else 1.0, 0

    def of(self, loss: Tensor) -> Tensor:
        """The loss, scaled."""
        return loss * self.factor if self.active else loss

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether these figures of a step tell of an overflow: of the gradients alone, for the loss is not scaled."""
        return self.active and math.isfinite(loss) and not math.isfinite(norm)

    def update(self, overflowed: bool) -> None:
        """After a step."""
        if not self.active:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.factor /= 2
        elif self._good_steps == GOOD_STEPS:
            self.factor, self._good_steps = min(2 * self.factor, MOST), 0

    def state_dict(self) -> dict[str, Any]:
        """For the resume file."""
        return {"active": self.active, "factor": self.factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a resume file; one of a run in another type has no factor to go on with."""
        if self.active and state.get("active"):
            self.factor, self._good_steps = state["factor"], state["good_steps"]
