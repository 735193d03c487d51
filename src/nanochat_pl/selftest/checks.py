"""What a check of the self-test is, what it is made on, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nanochat_pl.common.device import ComputeDType

Result = Literal["ok", "FAILED", "left out"]


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    result: Result
    figure: str
    tolerance: str = ""


@dataclass(frozen=True)
class Bench:
    """What is tested: a device as this process uses it.

    Attributes:
        device: of this process.
        dtype: in which it would train.
        accelerator: the setting that the device was chosen by.
        runs: the folder in which resume files would be.
        caches: the folder of the data caches.
    """

    device: torch.device
    dtype: ComputeDType
    accelerator: str
    runs: Path
    caches: Path


@dataclass(frozen=True)
class Check:
    """A function that finds something out, and whether the processes speak to each other in it."""

    name: str
    function: Callable[[Bench], Sequence[Finding]]
    together: bool = False


def within(check: str, error: float, tolerance: float, what: str = "") -> Finding:
    """A finding by a number that must not be above another (NaN is)."""
    return Finding(check, "ok" if error <= tolerance else "FAILED", f"{error:.1e}{what}", f"{tolerance:.0e}")


def exact(check: str, wrong: Sequence[str], figure: str) -> Finding:
    """A finding by what should have been and was not: ``wrong`` in words."""
    return Finding(check, "FAILED" if wrong else "ok", "; ".join(wrong) or figure, "exact")
