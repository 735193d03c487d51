"""The engine: continues many different prompts at once, with a key-value cache.

Shapes: B rows of one forward, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.events import Event, visible_text
from nanochat_pl.engine.request import FinishReason, Handle, Request, check_prompts
from nanochat_pl.engine.sampling import Sampling, seed_of
from nanochat_pl.engine.scheduler import PREFILL_CHUNK, PREFILL_POSITIONS, Scheduler, events_of
from nanochat_pl.engine.session import Session
from nanochat_pl.model.compiled_decode import CompiledDecode
from nanochat_pl.model.config import Quantize
from nanochat_pl.model.counts import count_linear_weights, kv_cache_bytes
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.graph_decode import GraphDecode
from nanochat_pl.model.inference import InferenceGPT, inference_net
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.tokenizer import Tokenizer

# Rows that are decoded together unless the caller says otherwise: so many, or as many as this cache has room for.
DEFAULT_MAX_BATCH = 64
DEFAULT_CACHE_BYTES = 4 * 2**30
# Multiplications of a step on a CPU up to which one thread does it: a chat with the demo's model is twice as fast so.
SMALL_STEP = 2**24


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
        text: what a reader sees: no special tokens, tool calls or tool results, and nothing from a stop text on.
        logprobs: log-probability of each token under the model's own distribution (temperature 1, all tokens), however
            it was chosen; of forced tokens too.
        forced: which tokens were put in by the tool; the model did not choose them.
        finish_reason: "stop", "length" (``max_tokens``) or "context" (the end of the model's positions).
        sampled_logprobs: log-probability of each token under the distribution that it was drawn from, after
            temperature and all filters; 0 where the choice was greedy.
        top_logprobs: of each token the most likely ones with their log-probabilities, as in ``logprobs``; empty unless
            asked for.
        cached_tokens: tokens of the prompt that were not read again, as another one begins with them.
    """

    ids: list[int]
    text: str
    logprobs: list[float]
    forced: list[bool]
    finish_reason: FinishReason
    sampled_logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    cached_tokens: int


class Engine:
    """Writes with a model.

    Args:
        bundle: has ``net`` (in eval mode) and ``tokenizer``. Its weights may change later, between two answers.
        quantize: int8: faster for one stream on a CPU, and less exact; not for what is compared or trained on.

        compile: compile the step that gives each row one more token on a CPU, after some seconds for the compiler;
            on an NVIDIA GPU make CUDA graphs of it. Faster; its results differ in the last digits from those of the
            training. Not for what is compared or trained on, and not with ``quantize``.

    Raises:
        UserError: the bundle has no tokenizer, or that of another model; ``quantize`` on a GPU, ``compile`` on another
            device than a CPU or an NVIDIA GPU, or both together.
    """

    def __init__(self, bundle: Model, quantize: Quantize | None = None, compile: bool = False) -> None:
        if bundle.tokenizer is None:
            raise UserError(
                "This bundle has no tokenizer, so nothing can be written with its model.",
                fix="Add the tokenizer.json that the model was trained with.",
            )
        if compile and quantize is not None:
            raise UserError(f"compile=true, quantize={quantize}: one excludes the other.", fix="Leave one of them out.")
        self.net = inference_net(bundle.net, quantize, for_compiling=compile)
        self._compiled = _compiled(self.net) if compile and isinstance(self.net, InferenceGPT) else None
        self.tokenizer = bundle.tokenizer
        if self.tokenizer.vocab_size != self.net.config.vocab_size:
            raise UserError(
                f"The tokenizer has {self.tokenizer.vocab_size:,} ids, the model {self.net.config.vocab_size:,}.",
                fix="Use the tokenizer that the model was trained with.",
            )

        self._num_products = count_linear_weights(self.net.config)

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
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seeds: Iterable[int] | None = None,
        top_logprobs: int = 0,
    ) -> list[Result]:
        """Continue each prompt.

        Up to ``max_batch`` prompts are generated at the same time; when one is finished, a waiting one takes its place.
        Prompts that begin alike are read once. A result does not depend on the others: in bfloat16 on a CPU not by a
        bit, elsewhere up to the rounding of a matrix product's shape. The same prompt given twice is drawn twice.

        Args:
            prompts: token ids, at least one each, of any lengths.
            max_tokens: most new tokens of each, forced ones included.
            temperature, top_k, top_p, min_p, repetition_penalty: see :class:`~nanochat_pl.engine.sampling.Sampling`.
            seed: any whole number; with a prompt's index it makes that prompt's own seed.
            stop_ids: tokens that end an answer; assistant_end and bos by default.
            tools: whether the calculator answers expressions between python_start and python_end.
            max_batch: rows decoded together; memory and time only. By default 64, fewer where the cache would be huge.
            progress: called with (prompts finished, all prompts) when some have finished.
            stop_texts: texts that end an answer as well: its ids hold them, its text ends before.
            indices: of the prompts in a longer list that several processes share; their places in this one by default.
            seeds: of each prompt, in place of ``seed`` and ``indices``.
            top_logprobs: of each new token, how many of the most likely tokens are given with their log-probabilities.

        Returns:
            one result per prompt, in their order.

        Raises:
            UserError: a prompt that is empty, too long for the model's positions or has ids that it lacks; a setting
                out of bounds; the model's outputs are not finite.
        """
        prompts = [list(prompt) for prompt in prompts]
        if max_batch is not None and max_batch < 1:
            raise UserError(f"max_batch={max_batch}: must be at least 1.")
        if seeds is None:
            seeds = [seed_of(seed, index) for index in (range(len(prompts)) if indices is None else indices)]
        seeds = list(seeds)
        if len(seeds) != len(prompts):
            raise UserError(f"seeds or indices: {len(seeds)} for {len(prompts)} prompts; each prompt has one.")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        general = Request([], max_tokens, sampling, self.stop_ids(stop_ids), _texts(stop_texts), tools, top_logprobs)
        reach = self.net.config.rotary_reach
        check_prompts(prompts, reach, self.net.config.vocab_size)
        requests = [
            replace(general, prompt=prompt, sampling=replace(sampling, seed=own))
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        if not requests:
            return []
        longest = min(max(map(len, prompts)) + max_tokens, reach)
        num_slots = min(max_batch or self._default_batch(longest), len(requests))
        scheduler = Scheduler(self, num_slots, longest, prefill_chunk=PREFILL_POSITIONS)
        # Longest first: prompts read together pad each other least, and what is too large for the memory fails at once.
        order = sorted(range(len(requests)), key=lambda index: -len(prompts[index]))
        handles = {index: scheduler.submit(requests[index]) for index in order}
        num_finished = 0
        while not scheduler.idle:
            scheduler.step()
            still = scheduler.num_running + scheduler.num_waiting
            if len(handles) - still > num_finished:
                num_finished = len(handles) - still
                if progress is not None:
                    progress(num_finished, len(handles))
        return [self._result(handles[index]) for index in range(len(requests))]

    def stream(
        self,
        prompt: list[int],
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        tools: bool = True,
        stop_texts: Iterable[str] = (),
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> Iterator[Event]:
        """Continue one prompt, token by token; as :meth:`generate` does, but seen while it is generated.

        Raises:
            UserError: as :meth:`generate`, at once.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed_of(seed, 0))
        request = Request(list(prompt), max_tokens, sampling, self.stop_ids(stop_ids), _texts(stop_texts), tools)
        reach = self.net.config.rotary_reach
        check_prompts([prompt], reach, self.net.config.vocab_size)
        scheduler = Scheduler(self, 1, min(len(prompt) + max_tokens, reach))
        return events_of(scheduler, scheduler.submit(request))

    def scheduler(
        self, num_slots: int, max_context: int | None = None, prefill_chunk: int = PREFILL_CHUNK
    ) -> Scheduler:
        """A pool of slots, for requests that come and go.

        Args:
            num_slots: requests that are generated at the same time.
            max_context: most tokens of a prompt and its answer: the length that the model was trained on by default.
            prefill_chunk: positions of prompts that are read in a step while others are generated.
        """
        return Scheduler(self, num_slots, self._max_context(max_context), prefill_chunk)

    def session(self, max_context: int | None = None, system: str = "") -> Session:
        """A conversation that keeps its cache between turns.

        Args:
            max_context: most tokens of the conversation: the length that the model was trained on by default, at most
                the end of its positions.
            system: the system prompt, empty for none.
        """
        return Session(self, self._max_context(max_context), system)

    def _max_context(self, given: int | None) -> int:
        reach = self.net.config.rotary_reach
        if given is not None and not 1 <= given <= reach:
            raise UserError(f"max_context={given}: must be 1 … {reach:,}, the positions that the model has.")
        return given or self.net.config.sequence_len

    @property
    def is_compiled(self) -> bool:
        """Whether the decode step is compiled."""
        return self._compiled is not None

    def refresh(self) -> None:
        """Take the network's weights as they are now. Changes in place are noticed without it."""
        if isinstance(self.net, InferenceGPT):
            self.net.refresh()
        if isinstance(self._compiled, GraphDecode):
            self._compiled.forget()  # graphs know weights by their addresses

    @property
    def weights_version(self) -> list[int]:
        """Equal as long as the weights are the same."""
        return self.net.weights_version if isinstance(self.net, InferenceGPT) else []

    def stop_ids(self, given: Iterable[int] | None) -> frozenset[int]:
        """The ids that end an answer: those given, or assistant_end and bos.

        Raises:
            UserError: the model has no such ids.
        """
        if given is None:
            given = (self.tokenizer.special_ids["<|assistant_end|>"], self.tokenizer.bos_id)
        ids, vocab_size = frozenset(given), self.net.config.vocab_size
        if unknown := [each for each in ids if not 0 <= each < vocab_size]:
            raise UserError(f"stop_ids: {unknown[0]} is outside 0 … {vocab_size - 1:,}, the model's vocabulary.")
        return ids

    def new_cache(self, num_slots: int, max_len: int) -> KVCache:
        """An empty cache on the model's device, in its compute type."""
        if isinstance(self._compiled, GraphDecode):
            self._compiled.forget()  # else the memory of the last cache would be held while there is a new one
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
        with self._threads(longest * len(rows)):
            if self._compiled is not None and longest == 1 and self._compiled.fits(cache):
                return self._compiled.logits(cache, [row[0] for row in rows])
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.net.device)
            return self.net(ids, cache, None if min(lengths) == longest else lengths, last_only=True)

    @contextlib.contextmanager
    def _threads(self, num_tokens: int) -> Iterator[None]:
        """One thread for a step so small that several would wait for each other longer than they work."""
        before = torch.get_num_threads()
        if before == 1 or self.net.device.type != "cpu" or num_tokens * self._num_products > SMALL_STEP:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _default_batch(self, max_context: int) -> int:
        slot = kv_cache_bytes(self.net.config, 1, max_context, self.net.config.compute_dtype)
        return max(1, min(DEFAULT_MAX_BATCH, DEFAULT_CACHE_BYTES // slot))

    def _result(self, handle: Handle) -> Result:
        if handle.error is not None:
            raise handle.error
        assert handle.finish_reason is not None
        text = visible_text(self.tokenizer, handle.ids, handle.request.stop_texts)
        return Result(
            handle.ids,
            text,
            handle.logprobs,
            handle.forced,
            handle.finish_reason,
            handle.sampled_logprobs,
            handle.top_logprobs,
            handle.cached_tokens,
        )


def _compiled(net: InferenceGPT) -> CompiledDecode | GraphDecode:
    """The decode step made faster for the network's device."""
    kinds: dict[str, type[CompiledDecode] | type[GraphDecode]] = {"cpu": CompiledDecode, "cuda": GraphDecode}
    if (kind := kinds.get(net.device.type)) is None:
        raise UserError(
            f"compile=true: is for CPUs and NVIDIA GPUs, and the model is on {net.device.type}.",
            fix="Leave it out, or set accelerator=cpu.",
        )
    return kind(net)


def _texts(given: Iterable[str]) -> tuple[str, ...]:
    """As a request has them; it refuses one text in the place of several."""
    return given if isinstance(given, str) else tuple(given)  # type: ignore[return-value]
