"""Made-up requests for every route of the OpenAPI description."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.forked import run_forked

MADE_UP = Path(__file__).with_name("made_up_requests.py")


@pytest.mark.slow
def test_no_request_is_answered_with_a_fault_of_the_server() -> None:
    """In a process of its own: Schemathesis makes its requests up while tests are collected, which takes seconds, and
    each process of a test run collects all tests."""
    done = run_forked(["-m", "pytest", str(MADE_UP), "-p", "no:cacheprovider", "-p", "no:xdist"])
    found = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert done.returncode == 0 and found and int(found[1]) >= 10, done.stdout + done.stderr
