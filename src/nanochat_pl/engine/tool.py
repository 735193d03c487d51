"""The calculator's place in the stream: an expression comes out of the model, its result is forced back in."""

from __future__ import annotations

from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tools.calculator import evaluate


class ToolUse:
    """Follows one row's tokens and says what must come next after a finished expression."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special_ids["<|python_start|>"]
        self._end = tokenizer.special_ids["<|python_end|>"]
        self._before = tokenizer.special_ids["<|output_start|>"]
        self._after = tokenizer.special_ids["<|output_end|>"]
        self._expression: list[int] | None = None

    @property
    def open(self) -> bool:
        """Whether an expression has begun and not ended."""
        return self._expression is not None

    def observe(self, token_id: int) -> list[int]:
        """Take note of a token; return the ids that must follow it: the result between its markers, or none.

        Nothing is forced where the calculator refuses the expression: the model goes on by itself.
        """
        if token_id == self._start:
            self._expression = []
        elif token_id == self._end and self._expression is not None:
            result = evaluate(self._tokenizer.decode(self._expression))
            self._expression = None
            if result is not None:
                return [self._before, *self._tokenizer.encode(result), self._after]
        elif self._expression is not None:
            self._expression.append(token_id)
        return []
