"""Small tables as a mirror of the hub has them, and tasks opened on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.schema import build
from nanochat_pl.tasks.base import Split
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.base import TableTask
from nanochat_pl.tasks.registry import all_tasks


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def opened(name: str, split: Split, cache: Path, hub: Path | None = None, **settings: Any) -> TableTask:
    """A task by its name, made as a mixture makes it."""
    kind = all_tasks()[name]
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    task = kind.cls.from_settings(build(kind.settings, plain, name), split, TaskContext(cache, hub=hub))
    return cast(TableTask, task)


def problem(number: int) -> dict[str, str]:
    """A row of GSM8K, with the answer ``number``."""
    return {
        "question": f"How many is {number}?",
        "answer": f"It is 1*{number}=<<1*{number}={number}>>{number}.\n#### {number}",
    }
