"""What the tests and the table of mistakes ask of the training: the same questions, cached where nothing is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import islice

from tests.fidelity.bands import (
    curve_metrics,
    gradient_metrics,
    outside,
    stored,
    update_metrics,
    wrong_float32_losses,
    wrong_float32_norms,
)
from tests.fidelity.setting import NUM_STEPS, SEEDS, Gradients, Training, gradients, updates

HOW = "bfloat16 eager"


@functools.cache
def exact_gradients(seed: int) -> Gradients:
    """Those of float32, without a mistake."""
    return gradients(seed, "float32")


def wrong_gradients(seeds: Sequence[int]) -> list[str]:
    """What is out of its band in the bfloat16 gradients of these seeds, taken together."""
    return outside([gradient_metrics(gradients(seed, "bfloat16"), exact_gradients(seed)) for seed in seeds], HOW)


def wrong_losses(seeds: Sequence[int], num_steps: int = NUM_STEPS) -> list[str]:
    """What is out of its band in the first bfloat16 losses of these seeds, taken together."""
    exact = stored()["float32_losses"]
    curves = {seed: list(islice(Training(seed, "bfloat16").losses(), num_steps)) for seed in seeds}
    return outside([curve_metrics(curve, exact[str(seed)]) for seed, curve in curves.items()], HOW)


def wrong_exact_gradients(seed: int = 0) -> list[str]:
    """What is not as stored in the float32 gradients of a seed."""
    return wrong_float32_norms(gradients(seed, "float32"), seed)


def wrong_exact_losses(seed: int = 0) -> list[str]:
    """What is not as stored in the float32 losses of a seed. Stops at the first wrong one."""
    losses: list[float] = []
    for loss in Training(seed, "float32").losses():
        losses.append(loss)
        if found := wrong_float32_losses(losses, seed):
            return found
    return []


def wrong_updates(seeds: Sequence[int]) -> list[str]:
    """What is out of its band between the bfloat16 and the float32 model's optimizers, given the same gradients."""
    metrics = [update_metrics(updates(seed, "bfloat16"), updates(seed, "float32")) for seed in seeds]
    return outside(metrics, "bfloat16 optimizer")


# What a mistake is looked for with.
WAYS: dict[str, Callable[[], list[str]]] = {
    "gradients": lambda: wrong_gradients([0]),
    "updates": lambda: wrong_updates([0]),
    "first losses": lambda: wrong_losses([0], 3),
    "losses": lambda: wrong_losses([0]),
    "gradients of five seeds": lambda: wrong_gradients(SEEDS),
    "updates of five seeds": lambda: wrong_updates(SEEDS),
    "losses of five seeds": lambda: wrong_losses(SEEDS),
    "float32 losses": wrong_exact_losses,
    "float32 gradients": wrong_exact_gradients,
}


def warm_up(seeds: Sequence[int] = SEEDS) -> None:
    """Compute what is kept, so that a mistake that is made afterwards has no part in it."""
    for seed in seeds:
        exact_gradients(seed)
        updates(seed, "float32")
