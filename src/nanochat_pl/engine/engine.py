"""The engine: continues many different prompts at once, with a key-value cache.

Shapes: B rows of one forward, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.engine.batch import write_all
from nanochat_pl.engine.events import Event, visible_text
from nanochat_pl.engine.sampling import Sampling, choose, log_probabilities
from nanochat_pl.engine.sequence import FinishReason, Limits, Sequence
from nanochat_pl.engine.session import Session
from nanochat_pl.model.counts import kv_cache_bytes
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.tokenizer import Tokenizer

# Rows that are decoded together unless the caller says otherwise: so many, or as many as this cache has room for.
DEFAULT_MAX_BATCH = 64
DEFAULT_CACHE_BYTES = 4 * 2**30
# Wrong prompts named in one message.
MAX_PROBLEMS = 10


class Model(Protocol):
    """What the engine needs of a bundle."""

    @property
    def net(self) -> GPT: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclass(frozen=True)
class Result:
    """The continuation of one prompt.

    Attributes:
        ids: the new tokens; with finish reason "stop" the last is the stop token, or completes a stop text.
        text: what a reader sees: no special tokens, tool calls or tool results.
        logprobs: log-probability of each token under the model's plain softmax (temperature 1, all tokens), however
            it was chosen; of forced tokens too.
        forced: which tokens were put in by the tool; the model did not choose them.
        finish_reason: "stop", "length" (``max_tokens``) or "context" (the end of the model's positions).
    """

    ids: list[int]
    text: str
    logprobs: list[float]
    forced: list[bool]
    finish_reason: FinishReason


class Engine:
    """Writes with a model.

    Args:
        bundle: has ``net`` (in eval mode) and ``tokenizer``.

    Raises:
        UserError: the bundle has no tokenizer, or that of another model.
    """

    def __init__(self, bundle: Model) -> None:
        if bundle.tokenizer is None:
            raise UserError(
                "This bundle has no tokenizer, so nothing can be written with its model.",
                fix="Add the tokenizer.json that the model was trained with.",
            )
        self.net = bundle.net
        self.tokenizer = bundle.tokenizer
        if self.tokenizer.vocab_size != self.net.config.vocab_size:
            raise UserError(
                f"The tokenizer has {self.tokenizer.vocab_size:,} ids, the model {self.net.config.vocab_size:,}.",
                fix="Use the tokenizer that the model was trained with.",
            )

    def generate(
        self,
        prompts: Iterable[list[int]],
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        tools: bool = True,
        max_batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        stop_texts: Iterable[str] = (),
        indices: Iterable[int] | None = None,
    ) -> list[Result]:
        """Continue each prompt.

        Up to ``max_batch`` prompts are written at the same time; when one is finished, a waiting one takes its place.
        A result does not depend on its neighbours (beyond the rounding of a matrix product's shape): each prompt draws
        from its own generator, seeded with ``seed`` and its index, and the same prompt given twice is drawn twice.

        Args:
            prompts: token ids, at least one each, of any lengths.
            max_tokens: most new tokens of each, forced ones included.
            temperature: 0 is greedy.
            top_k: draw from the k most likely tokens only; None, 0 or more than V: from all.
            seed: any whole number.
            stop_ids: tokens that end an answer; assistant_end and bos by default.
            tools: whether the calculator answers expressions between python_start and python_end.
            max_batch: rows decoded together; memory and time only. By default 64, fewer where the cache would be huge.
            progress: called with (prompts finished, all prompts) when some have finished.
            stop_texts: texts that end an answer as well; they are part of it.
            indices: of the prompts in a longer list that several processes share; their places in this one by default.

        Returns:
            one result per prompt, in their order.

        Raises:
            UserError: a prompt that is empty, too long for the model's positions or has ids that it lacks; a setting
                out of bounds; the model's outputs are not finite.
        """
        prompts = [list(prompt) for prompt in prompts]
        sampling = Sampling(temperature, top_k, seed)
        texts = tuple(text.encode("utf-8", "surrogatepass") for text in stop_texts)
        limits = Limits(max_tokens, self.net.config.rotary_reach, self.stop_ids(stop_ids), texts)
        if max_batch is not None and max_batch < 1:
            raise UserError(f"max_batch={max_batch}: must be at least 1.")
        self._check(prompts, limits.max_context)
        numbered = zip(range(len(prompts)) if indices is None else indices, prompts, strict=True)
        rows = [Sequence(prompt, i, limits, sampling, self.tokenizer, tools) for i, prompt in numbered]
        for num_finished in write_all(self, rows, max_batch or self._default_batch(rows), sampling):
            if progress is not None:
                progress(num_finished, len(rows))
        return [self._result(row) for row in rows]

    def stream(
        self,
        prompt: list[int],
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        tools: bool = True,
    ) -> Iterator[Event]:
        """Continue one prompt, token by token; as :meth:`generate` does, but seen while it is written.

        Raises:
            UserError: as :meth:`generate`, at once.
        """
        sampling = Sampling(temperature, top_k, seed)
        limits = Limits(max_tokens, self.net.config.rotary_reach, self.stop_ids(stop_ids))
        self._check([prompt], limits.max_context)
        session = Session(self, min(len(prompt) + max_tokens, limits.max_context))
        return session.continue_ids(list(prompt), limits, sampling, tools)

    def session(self, max_context: int | None = None, system: str = "") -> Session:
        """A conversation that keeps its cache between turns.

        Args:
            max_context: most tokens of the conversation: the length that the model was trained on by default, at most
                the end of its positions.
            system: the system prompt, empty for none.
        """
        reach = self.net.config.rotary_reach
        if max_context is not None and not 1 <= max_context <= reach:
            raise UserError(f"max_context={max_context}: must be 1 … {reach:,}, the positions that the model has.")
        return Session(self, max_context or self.net.config.sequence_len, system)

    def stop_ids(self, given: Iterable[int] | None) -> frozenset[int]:
        """The ids that end an answer: those given, or assistant_end and bos."""
        if given is None:
            given = (self.tokenizer.special_ids["<|assistant_end|>"], self.tokenizer.bos_id)
        return frozenset(given)

    def new_cache(self, num_slots: int, max_len: int) -> KVCache:
        """An empty cache on the model's device, in its compute type."""
        return KVCache(self.net.config, num_slots, max_len, self.net.device, self.net.compute_dtype)

    @torch.inference_mode()
    def logits(self, cache: KVCache, rows: list[list[int]]) -> Tensor:
        """Add tokens to each slot; float32 (B, V): the logits after each row's last token.

        Args:
            cache: as many slots as rows.
            rows: new ids, at least one each, of any lengths.
        """
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.net.device)
        return self.net(ids, cache, None if min(lengths) == longest else lengths, last_only=True)

    @torch.inference_mode()
    def advance(self, rows: list[Sequence], logits: Tensor, sampling: Sampling) -> None:
        """Give each row its next token: a pending forced one, or one chosen from its logits (B, V).

        Raises:
            NotFiniteError: there is nothing to choose from.
        """
        if not logits.amax(dim=-1).isfinite().all():  # the maximum is NaN where any of them is
            raise NotFiniteError
        uniforms = [] if sampling.greedy else [row.generator.random() for row in rows]
        ids = choose(logits, sampling, uniforms)
        if any(row.pending for row in rows):
            forced = torch.tensor([row.pending[0] if row.pending else -1 for row in rows], device=ids.device)
            ids = torch.where(forced >= 0, forced, ids)
        logprobs = log_probabilities(logits, ids)
        for row, token_id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.accept(token_id, logprob)

    def _default_batch(self, rows: list[Sequence]) -> int:
        longest = max((row.max_context_asked for row in rows), default=1)
        slot = kv_cache_bytes(self.net.config, 1, longest, self.net.config.compute_dtype)
        return max(1, min(DEFAULT_MAX_BATCH, DEFAULT_CACHE_BYTES // slot))

    def _check(self, prompts: list[list[int]], max_context: int) -> None:
        """Refuse prompts that the model cannot continue, all of them at once."""
        vocab_size = self.net.config.vocab_size
        problems = []
        for index, prompt in enumerate(prompts):
            if not prompt:
                problems.append(f"prompts[{index}] is empty; bos alone is the shortest prompt.")
            elif len(prompt) >= max_context:
                problems.append(
                    f"prompts[{index}] has {len(prompt):,} tokens; the model's positions end at {max_context:,}."
                )
            elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
                problems.append(f"prompts[{index}] has ids outside 0 … {vocab_size - 1:,}, the model's vocabulary.")
        if problems:
            raise UserError(problems[:MAX_PROBLEMS])

    def _result(self, row: Sequence) -> Result:
        assert row.finish_reason is not None
        return Result(row.ids, visible_text(self.tokenizer, row.ids), row.logprobs, row.forced, row.finish_reason)
