"""How fast an engine generates, beside what the machine could: time to the first token, time a token, tokens a second.

Nothing ends an answer before its length, prompts are random and all different, and no tool is called.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.engine import Engine
from nanochat_pl.engine.settings import BenchSettings
from nanochat_pl.model.config import DType
from nanochat_pl.model.counts import count_linear_weights, kv_cache_bytes

COPY_BYTES, PRODUCT_SIZE = 2**26, 1024
# A CPU without bfloat16 takes seconds for a product of that size: there it is measured on a smaller one.
LEAST_PRODUCT_SIZE, MOST_SECONDS = 256, 0.01
LIMIT_REPEATS = 9


@dataclass(frozen=True)
class Spread:
    """Median, least and most of ``n`` measurements."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.least)} … {_digits(self.most)})"


@dataclass(frozen=True)
class Limits:
    """What the machine reaches, measured.

    Attributes:
        bytes_per_second: of a copy of 64 MiB, read and written.
        flops_per_second: of a product of square matrices in the model's compute type: of 1,024 rows, or of 256 or 512
            where that takes more than 10 ms.
    """

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class BatchResult:
    """One batch size.

    Attributes:
        first_token_ms: until all prompts have been read and each answer has its first token.
        token_ms: of a step that gives every answer its next token.
        tokens_per_second: of all answers together, prompts not counted.
        bandwidth_share: what a step has to read (weights of the linear maps, keys and values of the mean length) over
            what the machine copies in that time; above 1 where caches hold it.
        product_share: the products of a step over what the machine multiplies in that time.
    """

    batch_size: int
    first_token_ms: Spread
    token_ms: Spread
    tokens_per_second: Spread
    bandwidth_share: float
    product_share: float


def measure_limits(engine: Engine) -> Limits:
    """The rates of the engine's device."""
    return limits_of(engine.net.device, engine.net.compute_dtype)


def limits_of(device: torch.device, dtype: torch.dtype) -> Limits:
    """The rates of a device, products in a type."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    size, product = LEAST_PRODUCT_SIZE, 0.0
    while size <= PRODUCT_SIZE and product < MOST_SECONDS:
        square = torch.ones(size, size, dtype=dtype, device=device)
        product, flops = _seconds(functools.partial(torch.mm, square, square), device), 2 * size**3
        size *= 2
    return Limits(2 * COPY_BYTES / copy, flops / product)


def measure_batch(engine: Engine, settings: BenchSettings, batch_size: int, limits: Limits) -> BatchResult:
    """One batch size, ``settings.repeats`` times.

    Raises:
        UserError: prompt and answer are longer than the model's positions.
    """
    length, reach = settings.prompt_tokens + settings.new_tokens, engine.net.config.rotary_reach
    if length > reach:
        raise UserError(
            f"prompt_tokens={settings.prompt_tokens}, new_tokens={settings.new_tokens}: together they are longer than"
            f" the model's {reach:,} positions."
        )
    prompts = random_prompts(engine, [settings.prompt_tokens] * batch_size)
    firsts, steps = [], []
    for _ in range(settings.repeats + 1):
        first, whole = (_seconds_of_answers(engine, prompts, count) for count in (1, settings.new_tokens))
        firsts.append(first)
        steps.append(max(whole - first, 1e-9) / (settings.new_tokens - 1))
    firsts, steps = firsts[1:], steps[1:]  # the first one warms up
    step = statistics.median(steps)
    mean_length = settings.prompt_tokens + settings.new_tokens // 2
    return BatchResult(
        batch_size,
        Spread.of([1e3 * seconds for seconds in firsts]),
        Spread.of([1e3 * seconds for seconds in steps]),
        Spread.of([batch_size / seconds for seconds in steps]),
        bytes_of_step(engine, batch_size, mean_length) / step / limits.bytes_per_second,
        2 * count_linear_weights(engine.net.config) * batch_size / step / limits.flops_per_second,
    )


def random_prompts(engine: Engine, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of these lengths, the same at every call. The first tokens are the prompt's number: none is a prefix."""
    vocab_size, generator = engine.net.config.vocab_size, torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    for number, prompt in enumerate(prompts):
        prompt[0] = number % vocab_size
    return prompts


def bytes_of_step(engine: Engine, batch_size: int, length: int) -> int:
    """Bytes that a decode step has to read: each weight of the linear maps once, keys and values of every row."""
    net = engine.net
    weight_bytes = 1 if getattr(net, "quantize", None) else net.compute_dtype.itemsize
    dtype = cast(DType, str(net.compute_dtype).removeprefix("torch."))
    return count_linear_weights(engine.net.config) * weight_bytes + kv_cache_bytes(
        net.config, batch_size, length, dtype
    )


def as_plain(result: BatchResult | Limits) -> dict[str, Any]:
    """For JSON."""
    return asdict(result)


def _seconds_of_answers(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    begin = time.perf_counter()
    results = engine.generate(prompts, max_tokens=new_tokens, stop_ids=(), tools=False, max_batch=len(prompts))
    seconds = time.perf_counter() - begin
    assert all(len(result.ids) == new_tokens for result in results)
    return seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls."""
    seconds = []
    for _ in range(LIMIT_REPEATS + 2):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
