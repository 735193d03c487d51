"""What a sandbox is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.schema import setting

Reason = Literal["passed", "failed", "error", "timeout", "memory", "processes", "output", "escaped"]


@dataclass(frozen=True)
class SandboxSettings:
    """How code from a model is run: with which isolation, and how much it may use."""

    mode: Literal["strict", "weak"] = setting(
        "strict",
        "strict: refuses where an isolation layer is missing; weak: the layers without namespaces, and scores say so.",
    )
    seconds: float = setting(
        5.0,
        "CPU time of a program and its tests, in seconds; it may wait for ten times as long.",
        above=0,
        at_most=3600,
    )
    memory_mb: int = setting(512, "Memory of all its processes together, in MiB.", at_least=64, at_most=1_048_576)
    file_mb: int = setting(16, "Size of its temporary folder, and of any file, in MiB.", at_least=1, at_most=65_536)
    max_processes: int = setting(16, "Processes and threads at once.", at_least=1, at_most=4096)
    output_kb: int = setting(
        256, "What it may print, in KiB: one that prints more is ended.", at_least=1, at_most=65_536
    )


@dataclass(frozen=True)
class Check:
    """A program and how it is judged.

    Attributes:
        program: foreign code that defines ``entry_point``.
        entry_point: the name of the function.
        tests: trusted code that defines ``check(candidate)``, which raises where the function is wrong.
        trusted: trusted code that is executed before ``tests``: the names that they need from the prompt.
    """

    program: str
    entry_point: str
    tests: str
    trusted: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a program came out.

    Attributes:
        passed: the tests passed; of a program without tests: it ended with exit code 0.
        reason: ``failed``: an assertion of the tests; ``error``: an exception, or the program's end before its tests
            were through; ``timeout``, ``memory``, ``processes``, ``output``: more than the settings allow;
            ``escaped``: a forbidden system call, or processes that it left behind.
        message: one short line, safe to print.
        seconds: wall-clock time.
        output: the beginning of what it printed, safe to print.
    """

    passed: bool
    reason: Reason
    message: str
    seconds: float
    output: str = ""
