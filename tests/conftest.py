"""Fixtures for all tests. ``golden`` is the one way to the golden values, ``shared`` that to real data."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys

# Read when torch is loaded. Models here are tiny: one thread is faster than two, and bits do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# With AMX, products in bfloat16 give a row other bits beside other rows (docs/generation.md).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# torch asks the DNS for the name of each process that it connects to: one that does not answer costs 1 s, not 5.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forked import SAME_FOR_ALL, run_children_as_copies, share_server

SHARED_MISSING = "real data not found: set NANOCHAT_PL_SHARED or put it in ../shared"


def pytest_configure(config: pytest.Config) -> None:
    """The processes that run the tests share what they fork programs from."""
    if getattr(config.option, "numprocesses", None):
        share_server()
    run_children_as_copies()
    gc.disable()  # what is imported stays; going through it again and again is a tenth of the collection of tests


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and failed inputs: NANOCHAT_PL_SHARED, else ../shared beside the checkout."""
    given = os.environ.get("NANOCHAT_PL_SHARED")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(SHARED_MISSING)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values; its README says what each is."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own as the current one, where `runs/` is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A test run in the background of a shell inherits that Ctrl-C is ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
_freeze, _unfreeze = gc.freeze, gc.unfreeze


def pytest_collection_finish() -> None:
    """What a training does for its own good and takes long here: it waits for the disk, where no power cut is tested,
    its first garbage collection goes through all that there is, a third of a second for all that is imported, and it
    reads its own source and asks git."""
    if (run_record := sys.modules.get("nanochat_pl.cli.run_record")) is not None:
        for name in SAME_FOR_ALL:
            setattr(run_record, name, functools.cache(getattr(run_record, name)))
    os.fsync = lambda file: None  # type: ignore[assignment]
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # else the first training thaws it


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The garbage collector as elsewhere: nothing is frozen."""
    _unfreeze()
    with monkeypatch.context() as patch:
        patch.setattr(gc, "freeze", _freeze)
        patch.setattr(gc, "unfreeze", _unfreeze)
        yield
    _freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test has 25 minutes unless it says otherwise: without AVX-512 some take five and more."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1500))
