"""The jobs of a sweep, none of which is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nanochat_pl.cli import _sweep
from nanochat_pl.cli._sweep import Job
from nanochat_pl.config import hydra_app


def jobs_of(arguments: Sequence[str], command: str = "train") -> list[Job]:
    """What ``-m`` with these arguments would do."""
    jobs: list[Job] = []
    named = _sweep.jobs_of

    def only_name(*given: Any) -> list[Job]:
        jobs.extend(named(*given))
        raise _sweep.Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sweep, "jobs_of", only_name)
        _sweep.run_sweep(command, hydra_app.parse(["-m", *arguments]))
    return jobs
