"""A request for an answer, and its handle: what was chosen so far, what must come next, why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.events import Event, EventReader
from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.engine.tool import ToolUse
from nanochat_pl.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context", "cancelled", "error"]
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most new tokens, forced ones included: finish reason "length".
        sampling: how tokens are chosen.
        stop_ids: tokens that end the answer and are its last token: "stop"; None: assistant_end and bos.
        stop_texts: texts that end it as well; its last token is the one that completes one of them, and the text ends
            before it.
        tools: whether the calculator answers expressions between python_start and python_end.
        top_logprobs: of each new token the log-probabilities of so many most likely tokens are kept.
        max_context: most tokens of prompt and answer together: "context"; None: all positions that there are.
        begun: so many tokens at the end of the prompt are the answer's beginning: its events begin with theirs, a
            character or an expression that is open there goes on, and a result that is due is forced. They are not
            in the handle's ``ids``.

    Raises:
        UserError: a setting is out of bounds.
    """

    prompt: list[int]
    max_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] | None = None
    stop_texts: tuple[str, ...] = ()
    tools: bool = True
    top_logprobs: int = 0
    max_context: int | None = None
    begun: int = 0

    def __post_init__(self) -> None:
        if not _is_whole(self.max_tokens) or self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens!r}: must be a whole number, at least 1.")
        if isinstance(self.stop_texts, str) or not all(isinstance(text, str) for text in self.stop_texts):
            raise UserError(f"stop_texts={self.stop_texts!r}: must be a list of texts.")
        if not all(self.stop_texts):
            raise UserError("stop_texts: an empty one would end every answer.")
        if not _is_whole(self.top_logprobs) or not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UserError(f"top_logprobs={self.top_logprobs!r}: must be 0 … {MAX_TOP_LOGPROBS}.")
        if self.max_context is not None and (not _is_whole(self.max_context) or self.max_context < 1):
            raise UserError(f"max_context={self.max_context!r}: must be a whole number, at least 1.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Handle:
    """An answer while it is generated, and after. What it has depends on no other request.

    Attributes:
        request: what was asked for.
        ids: the new tokens so far, the stop token included.
        logprobs: their log-probabilities under the model's own distribution (temperature 1, all tokens), of forced
            tokens too.
        sampled_logprobs: under the distribution that they were drawn from, after temperature and all filters; 0 where
            the choice was greedy, -inf for a forced token that could not have been drawn.
        top_logprobs: of each new token the most likely tokens with their log-probabilities, as in ``logprobs``.
        forced: which tokens were put in by the tool and not chosen by the model.
        pending: forced tokens that are still to come.
        cached_tokens: tokens of the prompt that were in the cache already and were not read again.
        finish_reason: None while it is generated.
        error: where the finish reason is "error", what happened.
    """

    def __init__(self, request: Request, stop_ids: frozenset[int], max_context: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.prompt = request.prompt
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.forced: list[bool] = []
        self.pending: deque[int] = deque()
        self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cancel_requested = False
        self.tool = ToolUse(tokenizer) if request.tools else None
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stops = tuple(text.encode("utf-8", "surrogatepass") for text in request.stop_texts)
        self._tail = b""  # of the text so far, as much as a stop text may begin in
        self._in_text = True  # and not in a call or its result
        self._reader = EventReader(tokenizer, request.stop_texts)
        self._begun_events: list[Event] = []
        self._num_read = 0
        self._seen: Tensor | None = None
        # The number of new tokens after which it ends at the latest, and why.
        room = max_context - len(self.prompt)
        self._most = min(request.max_tokens, room)
        self._max_reason: FinishReason = "length" if request.max_tokens <= room else "context"
        for token_id in self.prompt[len(self.prompt) - request.begun :]:
            self._begin_with(token_id)

    def cancel(self) -> None:
        """Ask for its end: it gets no further token. May be called from any thread and from a signal handler."""
        self.cancel_requested = True

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End it, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error

    def accept(
        self, token_id: int, logprob: float, sampled_logprob: float = 0.0, top: list[tuple[int, float]] | None = None
    ) -> None:
        """Add the next token: the first pending one where there is one, else the model's choice."""
        is_forced = bool(self.pending)
        if is_forced:
            self.pending.popleft()
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        self.forced.append(is_forced)
        if top is not None:
            self.top_logprobs.append(top)
        if self._seen is not None:
            self._seen[token_id] = True
        if (token_id in self._stop_ids and not is_forced) or self._completes_stop_text(token_id):
            self.finish_reason = "stop"
        elif len(self.ids) >= self._most:
            self.finish_reason = self._max_reason
        if self.tool is not None and not is_forced:
            self.pending.extend(self.tool.observe(token_id))

    def read_events(self) -> list[Event]:
        """What became visible since the last call; "finished" is the last event of all.

        Text that may turn out to be the beginning of a stop text is held back.
        """
        events: list[Event] = []
        reason = self.finish_reason  # before the tokens: another thread may add the last one and it meanwhile
        if self.ids or reason is not None:
            events, self._begun_events = self._begun_events, []
        new = self.ids[self._num_read :]
        self._num_read += len(new)
        events += self._reader.read(new)
        if reason is not None and not self._reader.ended:
            events += [*self._reader.end(), Event("finished", reason)]
        return events

    def _begin_with(self, token_id: int) -> None:
        """Take note of a token that the answer begins with."""
        self._begun_events += self._reader.read([token_id])
        self._completes_stop_text(token_id)
        if self.pending and self.pending[0] == token_id:
            self.pending.popleft()
            return
        self.pending.clear()  # another token stands in the result's place
        if self.tool is not None:
            self.pending.extend(self.tool.observe(token_id))

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens prompt and answer have, bool (V,)."""
        if self._seen is None:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor([*self.prompt, *self.ids], device=device)] = True
        return self._seen

    def _completes_stop_text(self, token_id: int) -> bool:
        tokens, special = self._tokenizer.tokens, self._tokenizer.special_ids
        if not self._stops:
            return False
        if token_id >= len(tokens):  # a special token is no text; around a call and its result it ends one
            opens, closes = (
                {special[f"<|{part}_{edge}|>"] for part in ("python", "output")} for edge in ("start", "end")
            )
            if self.tool is not None and token_id in opens | closes:
                self._in_text, self._tail = token_id in closes, b""
            return False
        if not self._in_text:
            return False
        text = self._tail + tokens[token_id]
        self._tail = text[-max(map(len, self._stops)) :]
        return any(stop in text for stop in self._stops)


def check_prompts(
    prompts: Iterable[list[int]],
    most: int,
    vocab_size: int,
    name: str = "prompts[{}]",
    end: str = "the model's positions end at",
) -> None:
    """Refuse prompts that a model cannot continue, all of them at once.

    Args:
        most: positions that there are.
        name: of a prompt, for messages, with its number put in.
        end: what ends there, for messages.

    Raises:
        UserError: one is empty, too long, or has ids that the model lacks.
    """
    problems = []
    for index, prompt in enumerate(prompts):
        which = name.format(index)
        if not prompt:
            problems.append(f"{which} is empty; bos alone is the shortest prompt.")
        elif len(prompt) >= most:
            problems.append(f"{which} has {len(prompt):,} tokens; {end} {most:,}.")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            problems.append(f"{which} has ids outside 0 … {vocab_size - 1:,}, the model's vocabulary.")
    if problems:
        raise UserError(problems[:10])
