"""Writing answers: many prompts at once, one as a stream, or a conversation that keeps its cache between turns.

All names are imported on first use: a command that only reads the settings (:mod:`nanochat_pl.engine.settings`) answers
a wrong key without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_pl.engine.engine import Engine, Result
    from nanochat_pl.engine.events import Event, readable, visible_text
    from nanochat_pl.engine.request import Handle, Request
    from nanochat_pl.engine.sampling import Sampling
    from nanochat_pl.engine.scheduler import Scheduler
    from nanochat_pl.engine.session import Session

__all__ = [
    "Engine",
    "Event",
    "Handle",
    "Request",
    "Result",
    "Sampling",
    "Scheduler",
    "Session",
    "readable",
    "visible_text",
]

if not TYPE_CHECKING:
    _PUBLIC = {
        "Engine": "engine",
        "Event": "events",
        "Handle": "request",
        "Request": "request",
        "Result": "engine",
        "Sampling": "sampling",
        "Scheduler": "scheduler",
        "Session": "session",
        "readable": "events",
        "visible_text": "events",
    }

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        if name in _PUBLIC.values():
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
