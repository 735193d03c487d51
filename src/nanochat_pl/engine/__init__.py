"""Writing answers: many prompts at once, one as a stream, or a conversation that keeps its cache between turns."""

from nanochat_pl.engine.engine import Engine, Result
from nanochat_pl.engine.events import Event, readable, visible_text
from nanochat_pl.engine.session import Session

__all__ = ["Engine", "Event", "Result", "Session", "readable", "visible_text"]
