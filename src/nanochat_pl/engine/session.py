"""A conversation, or one streamed continuation, that keeps its key-value cache: only new tokens are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.events import Event
from nanochat_pl.engine.request import Handle, Request
from nanochat_pl.engine.sampling import Sampling, seed_of
from nanochat_pl.engine.scheduler import Scheduler, events_of

if TYPE_CHECKING:
    from nanochat_pl.engine.engine import Engine


_ROOM_SHARE = 4  # one part in so many of the context is kept for an answer, where there are turns to drop for it


class Session:
    """One conversation of a person with the model.

    Where a message and its answer have no room left in the context, the oldest turns are dropped: the model reads the
    rest as a conversation that begins there.

    Attributes:
        max_context: most tokens of the conversation.
        system: the system prompt, empty for none. It is part of the first message, so another one has no effect before
            :meth:`clear`. Where turns are dropped it moves to the first one that is kept.
        num_dropped: turns, a message and its answer each, that have been dropped.
        answer: the last one, with its ids and log-probabilities; None: there is none.
    """

    def __init__(self, engine: Engine, max_context: int, system: str = "") -> None:
        self._engine = engine
        self.max_context = max_context
        self.system = system
        self._scheduler = Scheduler(engine, num_slots=1, max_context=max_context)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.answer: Handle | None = None
        self._num_answers = 0
        self._turns: list[int] = []  # where in the ids each begins
        self.num_dropped = 0

    @property
    def ids(self) -> list[int]:
        """All tokens so far, from bos on, the last answer closed, without the turns that were dropped: what a model
        without a cache would have to read.

        The cache holds the keys and values of a beginning of them.
        """
        return [] if self.answer is None else [*self.answer.prompt, *self._closed(self.answer)]

    def send(
        self,
        message: str,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        tools: bool = True,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> Iterator[Event]:
        """Add a message of the person and return the answer as events, the last of them "finished".

        Closing the iterator, or :meth:`stop`, ends the answer early. What was written stays in the conversation.
        Each answer of a conversation has its own seed, made of ``seed`` and its number.

        Raises:
            UserError: at once, the conversation unchanged: a setting is out of bounds, or the message alone does not
                fit.
        """
        ids = self.ids or [self._engine.tokenizer.bos_id]
        is_first = self.answer is None
        added = self._render(message, is_first)
        system = self._engine.tokenizer.encode(f"{self.system}\n\n") if self.system else []
        alone = 1 + len(added) + (0 if is_first else len(system))  # the first message has it already
        if alone >= self.max_context:
            trained = self._engine.net.config.sequence_len
            larger = f", or give a larger max_context (the model was trained on {trained:,})"
            raise UserError(
                f"The context is full: it has {self.max_context:,} tokens, and this message alone needs "
                f"{alone:,} and some for the answer.",
                fix=f"Write less{larger if self.max_context < trained else ''}.",
            )
        dropped = self._turns_to_drop(len(ids), len(added), len(system), max_tokens)
        begins = [*self._turns, len(ids)]
        kept = [ids[0], *ids[begins[dropped] :]] if dropped else ids
        turns = [begin - (len(ids) - len(kept)) for begin in begins[dropped:]]
        if dropped and system:  # behind the mark with which the first message begins
            if len(kept) > 1:
                kept = [*kept[:2], *system, *kept[2:]]
                turns = [turns[0], *(begin + len(system) for begin in turns[1:])]
            else:
                added = [added[0], *system, *added[1:]]
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed_of(seed, self._num_answers))
        request = Request([*kept, *added], max_tokens, sampling, tools=tools)
        if self.answer is not None:  # one that nobody read to its end
            self.answer.cancel()
        # The scheduler finds what its cache holds of the conversation, and reads the rest.
        self.answer = self._scheduler.submit(request)
        self._num_answers += 1
        self.num_dropped += dropped
        self._turns = turns
        return events_of(self._scheduler, self.answer)

    def _turns_to_drop(self, taken: int, added: int, system: int, max_tokens: int) -> int:
        """How many of the oldest turns have to go for a message and its answer."""
        room = self.max_context - added - min(max_tokens, self.max_context // _ROOM_SHARE)
        ends = [*self._turns[1:], taken]
        # Without the first n turns, bos and the others are left, and the system prompt, which was in the first one.
        left = [taken, *(1 + system + taken - end for end in ends)] if self._turns else [taken]
        return next((number for number, tokens in enumerate(left) if tokens <= room), len(left) - 1)

    def stop(self) -> None:
        """End the answer that is being written after its current token. May be called from a signal handler."""
        if self.answer is not None:
            self.answer.cancel()

    def _render(self, message: str, first: bool) -> list[int]:
        """The ids that a message adds, up to where the answer begins."""
        messages = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        if first and self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        ids = self._engine.tokenizer.render_for_completion({"messages": messages})
        return ids[1:]  # bos stands at the beginning only

    def _closed(self, answer: Handle) -> list[int]:
        """An answer as it stands in the conversation: ended as in training, wherever it was broken off."""
        tokenizer = self._engine.tokenizer
        ids = list(answer.ids)
        if answer.finish_reason == "stop":
            ids.pop()
        ids += answer.pending
        if answer.tool is not None and answer.tool.open:
            ids.append(tokenizer.special_ids["<|python_end|>"])
        return [*ids, tokenizer.special_ids["<|assistant_end|>"]]
