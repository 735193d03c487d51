"""One answer while it is being written: what was chosen, what must come next, when it is finished."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.engine.tool import ToolUse
from nanochat_pl.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_tokens: most new tokens, forced ones included: finish reason "length".
        max_context: most tokens of prompt and answer together: "context".
        stop_ids: tokens that end the answer and are its last token: "stop".
        stop_texts: UTF-8 texts that end it as well; its last token is the one that completes one of them.
    """

    max_tokens: int
    max_context: int
    stop_ids: frozenset[int]
    stop_texts: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens!r}: must be at least 1.")
        if not all(self.stop_texts):
            raise UserError("stop_texts: an empty one would end every answer.")


class Sequence:
    """The state of one answer.

    Attributes:
        ids: the new tokens so far, the stop token included.
        logprobs: their log-probabilities under the model's plain softmax.
        forced: which of them were put in by the tool and not chosen by the model.
        pending: forced tokens that are still to come.
        finish_reason: None while it is being written.
    """

    def __init__(
        self, prompt: list[int], index: int, limits: Limits, sampling: Sampling, tokenizer: Tokenizer, tools: bool
    ) -> None:
        self.prompt = prompt
        self.index = index
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.forced: list[bool] = []
        self.pending: deque[int] = deque()
        self.finish_reason: FinishReason | None = None
        self.tool = ToolUse(tokenizer) if tools else None
        self.generator = sampling.generator(index)
        self._limits = limits
        self._tokens = tokenizer.tokens
        self._tail = b""  # of the text so far, as much as a stop text may begin in
        # The number of new tokens after which it ends at the latest, and why.
        room = limits.max_context - len(prompt)
        self._most = min(limits.max_tokens, room)
        self._max_reason: FinishReason = "length" if limits.max_tokens <= room else "context"

    @property
    def max_context_asked(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.prompt) + self._most

    def accept(self, token_id: int, logprob: float) -> None:
        """Add the next token: the first pending one where there is one, else the model's choice."""
        is_forced = bool(self.pending)
        if is_forced:
            self.pending.popleft()
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        self.forced.append(is_forced)
        if (token_id in self._limits.stop_ids and not is_forced) or self._completes_stop_text(token_id):
            self.finish_reason = "stop"
        elif len(self.ids) >= self._most:
            self.finish_reason = self._max_reason
        if self.tool is not None and not is_forced:
            self.pending.extend(self.tool.observe(token_id))

    def _completes_stop_text(self, token_id: int) -> bool:
        stops = self._limits.stop_texts
        if not stops or token_id >= len(self._tokens):  # a special token is no text
            return False
        text = self._tail + self._tokens[token_id]
        self._tail = text[-max(map(len, stops)) :]
        return any(stop in text for stop in stops)
