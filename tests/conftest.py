"""Fixtures for all tests. ``shared`` is the one way to the golden values and the real data."""

from __future__ import annotations

import os

# Read when torch is loaded. Models here are tiny: one thread is faster than two, and bits do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest

SHARED_MISSING = "golden values not found: set NANOCHAT_PL_SHARED or put them in ../shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden values and real data: NANOCHAT_PL_SHARED, else ../shared beside the checkout."""
    given = os.environ.get("NANOCHAT_PL_SHARED")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(SHARED_MISSING)
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The folder of golden values."""
    return shared / "golden"
