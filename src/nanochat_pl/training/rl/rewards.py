"""The reward of an answer: the task's, or a class or function of the user's own."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.import_class import import_callable
from nanochat_pl.common.user_code import user_code
from nanochat_pl.tasks.base import Completion, Conversation, Task
from nanochat_pl.tasks.registry import tasks_with_reward
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.rl.prompts import Prompt

Reward = Callable[[Conversation, Completion], float]
KEY = "rl.reward"


class Rewards:
    """Gives each answer its reward.

    Args:
        target: ``rl.reward``; None: each task has its own.

    Raises:
        UserError: there is no such reward.
    """

    def __init__(self, target: str | None) -> None:
        self.target = target
        self._own: Reward | None = None if target is None else open_reward(target)

    def require(self, tasks: dict[str, Task]) -> None:
        """Refuse tasks whose answers get no reward. Raises :class:`UserError` that names each with its key."""
        problems = [
            f"mixture.tasks.{name}: {_why_not(task)}."
            for name, task in tasks.items()
            if not (task.has_reward if self._own is None else task.kind == "generative")
        ]
        if problems:
            fix = (
                "Take it out of the mixture (mixture.tasks.NAME=null), or write rl.reward=…. These tasks have a reward:"
                f" {', '.join(tasks_with_reward())}."
            )
            raise UserError(problems, fix)

    def try_out(self, task: Task, prompt: Prompt, tokenizer: Tokenizer) -> None:
        """Reward the reference answer to a prompt: what cannot be called so is known before anything is trained."""
        ids, _ = tokenizer.render_conversation(prompt.conversation)
        ids = ids[len(tokenizer.render_for_completion(prompt.conversation)) :]
        self.reward(task, prompt, Completion(tokenizer.parse_assistant(ids), ids))

    def reward(self, task: Task, prompt: Prompt, completion: Completion) -> float:
        """What an answer is worth.

        Raises:
            UserError: it fails, or is no finite number.
        """
        if self._own is None:
            value: Any = task.reward(prompt.conversation, completion)
            where = f"the reward of {task.name}"
        else:
            where = f"{KEY}={self.target}"
            with user_code(f"{where} fails"):
                value = self._own(prompt.conversation, completion)
        with user_code(f"{where}: what it gives cannot be read as a number"):
            number = _finite_number(value)
            if number is None:
                shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
                raise UserError(f"{where} gives {reprlib.repr(value)}{shape}: it must be a finite number.")
            return number


def open_reward(target: str) -> Reward:
    """A reward of the user's own, by its dotted name: a function, or an object of a class.

    Raises:
        UserError: there is none, its class cannot be made without arguments, or it cannot be called.
    """
    found: Any = import_callable(target, KEY)
    if isinstance(found, type):
        with user_code(f"{KEY}={target}: cannot be made without arguments"):
            found = found()
    if not callable(found):
        raise UserError(f"{KEY}={target}: its objects cannot be called.", "Give it __call__(conversation, completion).")
    return found


def _finite_number(value: Any) -> float | None:
    """A number as a float, also one of numpy or torch or an array of one element; None: it is no finite number."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _why_not(task: Task) -> str:
    if task.kind == "categorical":
        return "its answers are chosen, not written, so there is nothing to draw"
    return "nobody can tell what a right answer is there, so it has no reward"
