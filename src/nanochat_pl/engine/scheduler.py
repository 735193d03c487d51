"""The scheduler: many answers at the same time in the slots of one cache; requests join and leave at any step.

A step first reads prompts, at most one chunk of them while others are generated, then gives each running request its
next token. Running requests are in the first slots, so that a forward works on views of the cache, not on copies. What
a finished request leaves in its slot stays there until the slot is needed: a prompt that begins with the same tokens
does not read them again, and prompts of running requests are copied.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.engine.events import Event
from nanochat_pl.engine.request import MAX_TOP_LOGPROBS, Handle, Request, check_prompts
from nanochat_pl.engine.sampling import Sampler
from nanochat_pl.model.loss import log_normaliser

if TYPE_CHECKING:
    from nanochat_pl.engine.engine import Engine

# Tokens of prompts read in one step: while others wait for their next token, and while none does, where it bounds the
# memory of activations.
PREFILL_CHUNK = 256
PREFILL_POSITIONS = 16_384
# Prompts are read with others of nearly their length: a forward more costs as much as so many positions of padding.
MAX_PADDING = 96
# Fewer tokens than this are read again rather than copied, unless they are all that a prompt needs.
MIN_SHARED = 16


class Scheduler:
    """Generates for many requests with a fixed pool of cache slots.

    Not for several threads at once, except that :meth:`submit` and ``Handle.cancel`` may be called from any.

    Args:
        engine: what computes.
        num_slots: requests that are generated at the same time.
        max_context: most tokens of a prompt and its answer together.
        prefill_chunk: positions of prompts that are read in a step while others are generated.

    Attributes:
        num_steps: steps that were taken.
        last_step: when the last one ended, of ``time.monotonic``.
        num_prompt_tokens, num_cached_tokens: of all prompts so far, and those of them that were not read again.
        num_generated_tokens: of all answers so far.
        before_choice: called after each forward, before its tokens are chosen: on a CPU most of its cores have nothing
            to do then, and on a GPU the forward may still be running.
    """

    before_choice: Callable[[], None] | None = None

    def __init__(self, engine: Engine, num_slots: int, max_context: int, prefill_chunk: int = PREFILL_CHUNK) -> None:
        if num_slots < 1:
            raise UserError(f"num_slots={num_slots}: must be at least 1.")
        if prefill_chunk < 1:
            raise UserError(f"prefill_chunk={prefill_chunk}: must be at least 1.")
        self._engine = engine
        self._cache = engine.new_cache(num_slots, max_context)
        self.prefill_chunk = prefill_chunk
        self._waiting: deque[Handle] = deque()
        self._decoding: list[Handle] = []  # number i in slot i
        self._partial: Handle | None = None  # its prompt is read in part; in the slot behind them
        # The tokens of each slot, also those of a prompt that are still to be read, -1 behind them; how many of them
        # the cache holds, it says itself.
        self._tokens = np.full((num_slots, max_context), -1, dtype=np.int64)
        self._last_used = np.zeros(num_slots, dtype=np.int64)
        self._sampler: tuple[list[Handle], Sampler] | None = None
        self._weights = engine.weights_version
        self.num_steps = 0
        self.last_step = time.monotonic()
        self.num_prompt_tokens = self.num_cached_tokens = self.num_generated_tokens = 0

    @property
    def num_slots(self) -> int:
        return len(self._tokens)

    @property
    def max_context(self) -> int:
        return self._tokens.shape[1]

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._decoding) + (self._partial is not None)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """Share of the cache's positions that running requests hold, 0 … 1."""
        return float(self._held[: self.num_running].sum()) / self._tokens.size

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._decoding or self.has_unread)

    @property
    def has_unread(self) -> bool:
        """Whether there is a prompt that is still to be read, or the rest of one."""
        return bool(self._waiting) or self._partial is not None

    def submit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            UserError: the prompt is empty, has no room, or ids that the model lacks; so has ``stop_ids``.
        """
        asked = self.max_context if request.max_context is None else request.max_context
        most, config = min(self.max_context, asked), self._engine.net.config
        end = "the model's positions end at" if most == config.rotary_reach else "the context is"
        check_prompts([request.prompt], most, config.vocab_size, "prompt", end)
        handle = Handle(request, self._engine.stop_ids(request.stop_ids), most, self._engine.tokenizer)
        self._waiting.append(handle)
        return handle

    def run(self, handles: Iterable[Handle]) -> None:
        """Take steps until these are finished."""
        for handle in handles:
            while handle.finish_reason is None:
                self.step()

    def step(self) -> None:
        """Read a chunk of prompts, then give each running request its next token.

        A request whose logits are not finite ends with an error; the others go on.
        """
        self.release_finished()
        self._prefill()
        self.release_finished()
        if self._decoding:
            self._decode()
            self.release_finished()
        self.num_steps += 1
        self.last_step = time.monotonic()

    def _decode(self) -> None:
        rows = self._decoding
        new, held = [row.ids[-1] for row in rows], self._held[: len(rows)]
        self._tokens[np.arange(len(rows)), held] = new
        try:
            logits = self._engine.logits(self._cache.rows(0, len(rows)), [[each] for each in new])
            self._accept(rows, logits, held)
        except BaseException:
            # Broken off between the two, the last token would be read a second time.
            for slot, row in enumerate(rows):
                held[slot] = min(held[slot], len(row.prompt) + len(row.ids) - 1)
            raise

    def release_finished(self) -> None:
        """Take out what is finished or cancelled. Called by every step; in between it frees slots at once."""
        for handle in [each for each in list(self._waiting) if each.cancel_requested]:
            handle.finish("cancelled")
            self._waiting.remove(handle)
        if (partial := self._partial) is not None and partial.cancel_requested:
            partial.finish("cancelled")
            self._partial = None
        for slot in reversed(range(len(self._decoding))):
            handle = self._decoding[slot]
            if handle.cancel_requested:
                handle.finish("cancelled")
            if handle.finish_reason is not None:
                self._leave(slot)
        if not self._decoding:
            self._sampler = None  # it knows its rows

    @property
    def _held(self) -> np.ndarray:
        """How many tokens the cache holds of each slot, int64 (S,): a view, so always what the cache says."""
        return self._cache.positions.numpy()

    def _leave(self, slot: int) -> None:
        """The last of the running requests takes a slot's place, so that theirs stay the first ones."""
        last = len(self._decoding) - 1
        self._last_used[slot] = self.num_steps
        if self._decoding[slot].error is not None:
            self._cache.erase(slot)
            self._tokens[slot] = -1
        self._swap(slot, last)
        self._decoding[slot] = self._decoding[last]
        self._decoding.pop()
        if self._partial is not None:
            self._swap(last, last + 1)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._cache.swap_slots(one, other)
            for array in (self._tokens, self._last_used):
                array[[one, other]] = array[[other, one]]

    # Prompts.

    def _prefill(self) -> None:
        """Read as much of the waiting prompts as a step may."""
        first = len(self._decoding)
        if self._waiting and self._weights != (version := self._engine.weights_version):
            # What other weights have made of prompts that are gone is of no use.
            self._weights = version
            self._cache.reset(range(self.num_running, self.num_slots))
        budget = self.prefill_chunk if self._decoding else PREFILL_POSITIONS
        rows, lengths = [], []
        if self._partial is not None:
            rows, lengths = [self._partial], [min(budget, self._unread(self._partial, first))]
        for handle in list(self._waiting):
            slot = first + len(rows)
            # Only a prompt that is read alone is read in part: it stays behind those that are generated.
            if slot == self.num_slots or (rows and lengths[0] < self._unread(rows[0], first)):
                break
            if not self._place(handle, slot, first):
                continue
            unread = self._unread(handle, slot)
            if rows and sum(lengths) + unread > budget:
                break
            self._waiting.remove(handle)
            rows.append(handle)
            lengths.append(min(unread, budget))
        if rows:
            self._read_in_groups(rows, lengths, first)

    def _unread(self, handle: Handle, slot: int) -> int:
        return len(handle.prompt) - int(self._held[slot])

    def _place(self, handle: Handle, slot: int, first: int) -> bool:
        """Give a request the slot behind the running ones, with as much of its prompt in it as some slot holds.

        Args:
            slot: the first free one.
            first: of those that are being read in this step.

        Returns:
            False: a prompt that is being read in this step has more of it, so it is cheaper to wait for that.
        """
        prompt = np.asarray(handle.prompt)
        known = self._tokens[:, : len(prompt)] == prompt
        equal = np.where(known.all(axis=1), len(prompt), known.argmin(axis=1))
        # The last token is always read: the next one follows from what the model makes of it.
        usable = np.minimum(equal, np.minimum(self._held, len(prompt) - 1))
        source = int(usable.argmax())
        wanted, coming = len(prompt) - 1, int(np.minimum(equal[first:slot], len(prompt) - 1).max(initial=0))
        if coming > usable[source] and (coming == wanted or coming - usable[source] >= MIN_SHARED):
            return False
        length = int(usable[source])
        free = np.arange(slot, self.num_slots)
        if source >= slot and (length == self._held[source] or len(free) == 1):
            target = source  # all that this slot holds is the beginning of the prompt
        else:
            target = int(free[self._last_used[free].argmin()])
        if target != source and length < MIN_SHARED and length < wanted:
            length = int(usable[target])
        elif target != source:
            self._cache.copy_slot(source, target, length)
        self._cache.truncate(target, length)
        self._swap(target, slot)
        self._tokens[slot] = -1
        self._tokens[slot, : len(prompt)] = prompt
        handle.cached_tokens = length
        return True

    def _read_in_groups(self, rows: list[Handle], lengths: list[int], first: int) -> None:
        """Read the next so many tokens of each prompt, in the slots from ``first`` on, those of like lengths together.

        Where that fails, those that were not read wait again, in their order.
        """
        done = 0
        try:
            for start, stop in groups_of_like(lengths):
                self._read(rows[start:stop], lengths[start:stop], first + start)
                done = stop
        except BaseException:
            self._waiting.extendleft(row for row in reversed(rows[done:]) if not row.ids)
            raise

    def _read(self, rows: list[Handle], lengths: list[int], first: int) -> None:
        """Read the next so many tokens of each prompt in one forward, in the slots from ``first`` on."""
        starts = self._held[first : first + len(rows)].tolist()
        new = [row.prompt[start : start + n] for row, start, n in zip(rows, starts, lengths, strict=True)]
        self._partial = None
        try:
            logits = self._engine.logits(self._cache.rows(first, first + len(rows)), new)
            self._last_used[first : first + len(rows)] = self.num_steps
            if starts[0] + lengths[0] < len(rows[0].prompt):
                self._partial = rows[0]
            else:
                self._accept(rows, logits, self._held[first : first + len(rows)])
                self._decoding += rows
        except BaseException:
            # What was read of their prompts is still in the slots.
            self._decoding += [row for row in rows if row.ids]
            raise
        for row, start in zip(rows, starts, strict=True):
            if start == row.cached_tokens:
                self.num_prompt_tokens += len(row.prompt)
                self.num_cached_tokens += start

    # Tokens.

    @torch.inference_mode()
    def _accept(self, rows: list[Handle], logits: Tensor, positions: np.ndarray) -> None:
        """Give each row its next token, at its position: a pending forced one, or one drawn from its logits (B, V)."""
        if self.before_choice is not None:
            self.before_choice()
        finite = logits.amax(dim=-1).isfinite()  # the maximum is NaN where any of them is
        if not finite.all():
            for row, is_finite in zip(rows, finite.tolist(), strict=True):
                if not is_finite:
                    row.finish("error", NotFiniteError())
            logits = logits.nan_to_num(0.0, 0.0, 0.0)
        sampler = self._sampler_of(rows)
        vocab_size = logits.size(-1)
        seen = [rows[index].seen(vocab_size, logits.device) for index in sampler.penalised]
        ids, scores = sampler.draw(logits, positions, seen)
        if any(row.pending for row in rows):
            forced = torch.tensor([row.pending[0] if row.pending else -1 for row in rows], device=ids.device)
            ids = torch.where(forced >= 0, forced, ids)
        normaliser = log_normaliser(logits)
        raw = logits.gather(-1, ids[:, None])[:, 0] - normaliser
        sampled = sampler.logprobs(scores, ids, raw)
        top = _top_logprobs(rows, logits, normaliser)
        found = zip(rows, ids.tolist(), raw.tolist(), sampled.tolist(), top, strict=True)
        for row, token_id, logprob, sampled_logprob, most_likely in found:
            if row.finish_reason is None:
                row.accept(token_id, logprob, sampled_logprob, most_likely)
                self.num_generated_tokens += 1

    def _sampler_of(self, rows: list[Handle]) -> Sampler:
        if self._sampler is None or self._sampler[0] != rows:
            settings = [row.request.sampling for row in rows]
            self._sampler = list(rows), Sampler(settings, self._engine.net.config.vocab_size, self._engine.net.device)
        return self._sampler[1]


def groups_of_like(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours (start, stop) that are read in one forward, padded to the longest of them where that is little."""
    start = 0
    for index in range(len(lengths)):
        group = lengths[start : index + 1]
        if len(group) * max(group) - sum(group) > MAX_PADDING:
            yield start, index
            start = index
    yield start, len(lengths)


def events_of(scheduler: Scheduler, handle: Handle) -> Iterator[Event]:
    """The events of an answer while it is generated; where nobody reads on, it is cancelled."""
    try:
        while handle.finish_reason is None:
            scheduler.step()
            if handle.error is not None:
                raise handle.error
            yield from handle.read_events()
    finally:
        handle.cancel()
        scheduler.release_finished()


def _top_logprobs(
    rows: Sequence[Handle], logits: Tensor, normaliser: Tensor
) -> Sequence[list[tuple[int, float]] | None]:
    """Of each row that asks for them its most likely tokens with their log-probabilities."""
    most = max(row.request.top_logprobs for row in rows)
    if not most:
        return [None] * len(rows)
    # Always so many, and in an order of their own: which of several equal ones are found, and in which order,
    # depends on the number.
    best = logits.topk(min(MAX_TOP_LOGPROBS, logits.size(-1)), dim=-1)
    found = zip(rows, best.indices.tolist(), (best.values - normaliser[:, None]).tolist(), strict=True)
    return [
        sorted(zip(tokens, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))[: row.request.top_logprobs]
        if row.request.top_logprobs
        else None
        for row, tokens, logprobs in found
    ]
