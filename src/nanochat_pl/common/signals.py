"""Signals that ask a process to stop."""

from __future__ import annotations

import signal

from nanochat_pl.common.constants import STOP_SIGNALS


def heeded_signals() -> list[signal.Signals]:
    """The signals that ask for a stop; what this process was told to ignore (nohup) stays ignored."""
    return [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
