"""The prompts of a stage rl by number: row n of the stage is an answer to prompt n // G of a seeded order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.tasks.base import Conversation, Task
from nanochat_pl.tasks.mixture import Mixture
from nanochat_pl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        task: its name.
        conversation: as the task's reward takes it; its last message is the reference answer.
        ids: what the answer follows on.
    """

    task: str
    conversation: Conversation
    ids: list[int]


class Prompts:
    """The prompts of a mixture, epoch after epoch, each in an order of its own (that of the mixture in a sequence).

    Args:
        mixture: of tasks.
        tokenizer: renders them.
        most_tokens: longer prompts are left out.
        num_needed: an epoch has no more.
        samples_per_prompt: G.
        seed: of the orders.

    Attributes:
        num_rows: of the stage, once it is planned: steps times answers of a step.
        num_left_out: prompts that are too long.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        most_tokens: int,
        num_needed: int,
        samples_per_prompt: int,
        seed: int,
    ) -> None:
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.samples_per_prompt, self.num_rows = samples_per_prompt, 0
        self._places: list[int] = []
        self.num_left_out = 0
        for place in self._order(range(len(mixture)), 0):
            if len(self._places) == num_needed:
                break
            if len(self._ids(place)) <= most_tokens:
                self._places.append(place)
            else:
                self.num_left_out += 1
        self._kept = 0, self._places  # the epoch at hand, and its order

    @property
    def tasks(self) -> dict[str, Task]:
        """By their names."""
        return self.mixture.tasks

    @property
    def num_prompts(self) -> int:
        """Of an epoch."""
        return len(self._places)

    def __len__(self) -> int:
        return self.num_rows

    def prompt(self, number: int) -> Prompt:
        """A prompt by its number, which goes on from epoch to epoch."""
        epoch, index = divmod(number, len(self._places))
        place = self._epoch(epoch)[index]
        task, conversation = self.mixture.places(place)[-1]  # of several turns the last one is answered
        return Prompt(task, self.tasks[task][conversation], self._ids(place))

    def prompt_of_row(self, row: int) -> tuple[Prompt, int]:
        """The prompt that row ``row`` answers, and which of its answers it is."""
        number, sample = divmod(row, self.samples_per_prompt)
        return self.prompt(number), sample

    def epochs_after(self, num_rows: int) -> float:
        """Passes over the prompts after the first so many rows."""
        return num_rows / self.samples_per_prompt / len(self._places)

    def record(self) -> dict[str, Any]:
        """What the rows are made of, for the record of a stage."""
        return {"prompts": self.num_prompts, "prompts_left_out": self.num_left_out}

    is_streamed = False

    def wait_for(self, num_rows: int, check: Callable[[], None] = lambda: None) -> None:
        """They are there."""

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows as they are before anything is answered: no more is known of them where data is loaded.

        Returns:
            inputs, zeros int64 (R, 1), and targets, of which none is to be learnt.
        """
        inputs = np.zeros((len(row_numbers), 1), dtype=np.int64)
        return inputs, np.full_like(inputs, IGNORE_INDEX)

    def _ids(self, place: int) -> list[int]:
        return self.tokenizer.render_for_completion(self.mixture[place])

    def _epoch(self, epoch: int) -> list[int]:
        if self._kept[0] != epoch:
            self._kept = epoch, self._order(self._places, epoch)
        return self._kept[1]

    def _order(self, places: Sequence[int], epoch: int) -> list[int]:
        ordered = list(places)
        if not self.mixture.in_sequence:
            Random(f"prompts/{self.seed}/{epoch}").shuffle(ordered)
        return ordered
