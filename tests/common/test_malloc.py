"""Freed memory stays with the process, so that no page of it is taken from the system a second time."""

import subprocess
import sys

import pytest

from nanochat_pl.common.malloc import keep_freed_memory

CHILD = """
import ctypes, resource
from nanochat_pl.common.malloc import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = bytearray(64 * 2**20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = new_pages()
print(keep_freed_memory())
new_pages()
print(first, new_pages())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_large_blocks_are_taken_from_the_system_once() -> None:
    result = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    could, pages = result.stdout.splitlines()
    if could != "True":
        pytest.skip("another C library than glibc")
    before, after = map(int, pages.split())
    assert before > 4 * 10_000 and after < 1_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_what_is_free_already_is_given_back() -> None:
    """Below a block that stays: without being asked, glibc gives back only what lies at the end."""
    program = """
from nanochat_pl.common.malloc import keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

blocks = [bytearray(2**16) for _ in range(2_000)]
del blocks[:-1]
before = resident()
print(keep_freed_memory(), before - resident())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    could, kib = result.stdout.split()
    if could != "True":
        pytest.skip("another C library than glibc")
    assert int(kib) > 60_000, "half of 125 MiB"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_environment_that_sets_it_itself_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
