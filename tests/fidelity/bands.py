"""What is held against what: the stored losses of float32, and bands for how far bfloat16 may be from float32.

A band has a centre and a spread: mean and standard deviation of a figure over the seeds that it was measured with
(each a new draw of all roundings). The mean of a figure over n seeds must be within
``MARGIN * spread * sqrt(1 / n + 1 / number of measured seeds)`` of the centre.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fidelity.setting import NUM_STEPS, Gradients

FILE = Path(__file__).with_name("bands.json")
MARGIN = 5.0
# Of float32 losses, in nats, and of the norms of float32 gradients by role, as a share. Other orders of summation,
# instruction sets, threads and the compiler made up to 1e-6 of losses. Of norms they made up to 3e-4: of those of the
# residual factors, whose sums nearly cancel.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-3
# Steps whose spreads are one: a step that happened to be alike for all seeds is not held to that.
NEIGHBOURS = 2
TINY = 1e-12

Metrics = dict[str, float]
Band = dict[str, float]


@functools.cache
def stored() -> dict[str, Any]:
    """The contents of bands.json."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def curve_metrics(losses: Sequence[float], float32_losses: Sequence[float]) -> Metrics:
    """Differences of two curves of the same seed, in nats: at each step, and on the average of all."""
    differences = [other - exact for other, exact in zip(losses, float32_losses, strict=False)]
    metrics = {f"loss at step {step}": difference for step, difference in enumerate(differences)}
    if len(losses) == NUM_STEPS:
        metrics["loss of all steps"] = statistics.mean(differences)
    return metrics


def gradient_metrics(other: Gradients, exact: Gradients) -> Metrics:
    """How far losses of tokens and gradients are from float32's."""
    distance = (other.token_losses - exact.token_losses).square().mean().sqrt().item()
    return {"token losses": math.log10(max(distance, TINY))} | _by_role("gradient", other.by_role, exact.by_role)


def update_metrics(other: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Metrics:
    """How far the optimizer's updates are from those of float32."""
    return _by_role("update", other, exact)


def _by_role(what: str, other: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Metrics:
    """For each role the logarithm of 1 - cosine, and the ratio of the norms less 1."""
    metrics = {}
    for role, one in other.items():
        two = exact[role]
        ratio, cosine = one.norm() / two.norm(), torch.dot(one, two) / one.norm() / two.norm()
        metrics[f"{what} of {role}: 1 - cosine"] = math.log10(max(1 - cosine.item(), TINY))
        metrics[f"{what} of {role}: norm"] = ratio.item() - 1
    return metrics


def bands_of(metrics: Sequence[Metrics]) -> dict[str, Band]:
    """Bands from the metrics of many seeds."""
    if not metrics:
        return {}
    centre = {name: statistics.mean(one[name] for one in metrics) for name in metrics[0]}
    spread = {name: statistics.stdev(one[name] for one in metrics) for name in metrics[0]}
    widest = {name: max([spread[name], *(spread.get(other, 0.0) for other in _near(name))]) for name in spread}
    return {name: {"centre": centre[name], "spread": widest[name], "seeds": len(metrics)} for name in centre}


def _near(name: str) -> list[str]:
    if not name.startswith("loss at step "):
        return []
    step = int(name.rsplit(" ", 1)[1])
    return [f"loss at step {step + by}" for by in range(-NEIGHBOURS, NEIGHBOURS + 1)]


def outside(metrics: Sequence[Metrics], how: str) -> list[str]:
    """A line for each figure whose mean over these seeds is not in the band of ``how``, e.g. "bfloat16 eager"."""
    bands: Mapping[str, Band] = stored()["bands"][how]
    lines = []
    for name in metrics[0]:
        mean, band = statistics.mean(one[name] for one in metrics), bands[name]
        width = half_width(band, len(metrics))
        if abs(mean - band["centre"]) > width:
            lines.append(f"{how}, {name}: {mean:.3g}, not {band['centre']:.3g} ± {width:.2g}")
    return lines


def half_width(band: Band, num_seeds: int) -> float:
    """How far from the centre the mean of so many seeds may be."""
    return MARGIN * band["spread"] * math.sqrt(1 / num_seeds + 1 / band["seeds"])


def wrong_float32_losses(losses: Sequence[float], seed: int) -> list[str]:
    """A line for each step whose float32 loss is not the stored one."""
    return [
        f"float32 loss at step {step}: {loss:.6f}, not {expected:.6f}"
        for step, (loss, expected) in enumerate(zip(losses, stored()["float32_losses"][str(seed)], strict=False))
        if abs(loss - expected) > LOSS_TOLERANCE
    ]


def wrong_float32_norms(gradients: Gradients, seed: int) -> list[str]:
    """A line for each role whose float32 gradient has not the stored norm."""
    expected = stored()["float32_gradient_norms"][str(seed)]
    return [
        f"float32 gradient of {role}: norm {gradient.norm():.6g}, not {expected[role]:.6g}"
        for role, gradient in gradients.by_role.items()
        if abs(gradient.norm().item() / expected[role] - 1) > NORM_TOLERANCE
    ]
