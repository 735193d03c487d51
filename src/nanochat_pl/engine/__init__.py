"""Writing answers: many prompts at once, one as a stream, or a conversation that keeps its cache between turns."""

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
