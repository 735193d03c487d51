"""Settings of the tasks of lm-evaluation-harness. Light to import: every evaluation has them."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.common.schema import UserPath, setting


@dataclass(frozen=True)
class HarnessSettings:
    """Tasks of lm-evaluation-harness."""

    tasks: list[str] = setting(
        factory=list, doc="Names of its tasks, groups or tags, or YAML files of tasks.", max_length=1000
    )
    include_path: UserPath | None = setting(
        None,
        "Folder of further tasks (YAML). Python functions that they name are run: give one that you trust.",
    )
    num_fewshot: int | None = setting(
        None, "Solved examples before each question; null, or where a task insists on 0: as the task says.", at_least=0
    )
    limit: int | None = setting(None, "Most problems of a task, a seeded choice; null: all.", at_least=1)
    metric: str | None = setting(None, "The metric that counts, for instance acc_norm; null: each task's first.")
    chat: bool = setting(False, "Ask in the form of a conversation; for models that were trained on conversations.")
    download: bool = setting(False, "Fetch data sets that are not here.")
