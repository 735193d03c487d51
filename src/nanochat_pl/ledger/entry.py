"""One line of the ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanochat_pl.common.errors import UserError

VERSION = 1
# Of a process that is under way, or was killed, there is only the line of its start.
Exit = Literal["finished", "stopped", "failed", "started"]


@dataclass(frozen=True)
class Entry:
    """What is known of a stage when its process ends, or has begun to train.

    Attributes:
        run, stage: whose it is.
        exit: how it ended; "stopped" by a signal: the same command goes on; "started": no end has been noted.
        time: when, ISO 8601 in UTC.
        error: of a failed one, in a line.
        parent_run: the run that its parent stages are in; None: the same.
        settings: all of them, by dotted keys.
        changed: those of them that differ from the defaults.
        git: ``commit`` and ``dirty`` of the code; empty where it is no repository.
        data, tokenizer: fingerprints of the rows and of the tokenizer.
        machine: ``host``, ``device``, ``processes``, ``threads``, ``torch`` …
        steps, tokens, flops, seconds: of the training until then, all its starts together.
        metrics: the last value of each metric: ``val/bpb``, ``train/loss`` …
        best: of each validation metric the best value.
        errors: standard errors of those metrics that have one, by the same names.
        inference: ``first_token_ms``, ``token_ms``, ``tokens_per_second``, ``cache_bytes_per_token``; empty: not
            measured.
        inference_on: ``host``, ``device``, ``dtype`` … that these were measured with.
        version: of this form.
    """

    run: str
    stage: str
    exit: Exit
    time: str
    error: str | None = None
    parent_run: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    tokenizer: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    inference: dict[str, float] = field(default_factory=dict)
    inference_on: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], where: str) -> Entry:
        """An entry of a line that was read. Keys of later versions are left out.

        Raises:
            UserError: it is none.
        """
        names = {each.name for each in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        if not all(isinstance(known.get(key), str) for key in ("run", "stage", "exit", "time")):
            raise UserError(f"{where}: is no entry of a ledger: run, stage, exit and time must be texts.")
        groups = ("settings", "changed", "git", "machine", "metrics", "best", "errors", "inference", "inference_on")
        if bad := [key for key in groups if not isinstance(known.get(key, {}), dict)]:
            raise UserError(f"{where}: is no entry of a ledger: {bad[0]} is no group of named values.")
        return cls(**known)
