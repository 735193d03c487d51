"""Settings of CORE. Light to import: every training has them."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import UserPath, setting


@dataclass(frozen=True)
class CoreSettings:
    """CORE: which data, how much of it."""

    path: UserPath | None = setting(None, "Folder of the evaluation bundle; null: where nanochat-pl download put it.")
    max_per_task: int | None = setting(
        500, "Problems of each task, the first of a seeded order; null: all.", at_least=1
    )
    tasks: list[str] | None = setting(None, "Tasks by name; null: all that the bundle has.", max_length=1000)
    fix_arc: bool = setting(
        False, "Take the right answers of ARC from the hub's data set: 71 and 20 of the bundle's are wrong."
    )

    def __post_init__(self) -> None:
        if self.tasks is not None and (not self.tasks or len(set(self.tasks)) < len(self.tasks)):
            raise UserError(f"tasks={self.tasks}: must name at least one task, and each once.")
