"""What a chat model is trained and examined on: tasks that make conversations and judge answers."""

from nanochat_pl.tasks.base import Task

__all__ = ["Task"]
