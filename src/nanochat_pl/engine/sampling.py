"""From logits to token ids: greedy, or drawn, each row with settings and a seed of its own.

A draw takes the token whose ``logit / temperature + noise`` is largest. The noise (Gumbel's distribution, which makes
this a draw from the softmax) is a hash of the row's seed, the position of the token in the text and the token's id, so
it depends on nothing else: not on the other rows, and not on what was drawn before.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.loss import by_rows

# Multipliers of the mixing functions (Steele, Lea and Flood 2014; Wellons 2018), the 32-bit ones as signed numbers.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SPREAD, _FIRST, _SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32

NOISE_BLOCK = 2**16  # numbers that a CPU makes at a time
TOP_P_TOKENS = 256
MIN_SCORE = torch.finfo(torch.float32).min  # of what can be drawn
MIN_TEMPERATURE = 1e-30  # what is below divides by this: the same draws, and numbers that float32 has


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    The settings work in this order: repetition penalty, temperature, min-p, top-k, top-p.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it before the softmax.
        top_k: only the k most likely tokens can be drawn (and those as likely as the last of them); None, 0 or more
            than V: all of them.
        top_p: only the most likely tokens that together have this probability can be drawn.
        min_p: only tokens with at least this share of the probability of the most likely one can be drawn.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely: their logits are divided by
            it where they are positive, else multiplied.
        seed: any whole number. The same prompt with the same settings and seed gives the same answer.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        problems = [
            f"{name}={value!r}: must be a number."
            for name in numbers
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, (int, float, np.integer))
            if not (name == "top_k" and value is None)
        ]
        if problems:
            raise UserError(problems)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature!r}: must be a finite number, 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 0:
            problems.append(f"top_k={self.top_k!r}: must be 0 (all tokens) or above.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p!r}: must be above 0 and at most 1 (all tokens).")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p!r}: must be 0 (all tokens) … 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            problems.append(f"repetition_penalty={self.repetition_penalty!r}: must be above 0; 1 is none.")
        if problems:
            raise UserError(problems)

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0

    @property
    def unchanged(self) -> bool:
        """Whether tokens are drawn from the model's own probabilities."""
        no_filter = not self.top_k and self.top_p == 1 and self.min_p == 0
        return self.temperature == 1 and no_filter and self.repetition_penalty == 1


def seed_of(*parts: object) -> int:
    """A seed of 64 bits for each key, as a prompt's place in a list: no two keys share one."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


class Sampler:
    """Draws one token for each of B rows.

    Args:
        rows: the settings of each row.
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, rows: Sequence[Sampling], vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self.greedy = all(row.greedy for row in rows)
        # A greedy row is drawn from what it is without a temperature, with no noise.
        self._temperatures = self._column(
            [max(row.temperature, MIN_TEMPERATURE) if row.temperature else 1.0 for row in rows]
        )
        self._noisy = self._column([float(not row.greedy) for row in rows])
        self._seeds = np.array([seed_of(row.seed) for row in rows], dtype=np.uint64)
        drawn = [(index, row) for index, row in enumerate(rows) if not row.greedy]
        self._min_p = [(index, row.min_p) for index, row in drawn if row.min_p > 0]
        self._top_k = [(index, row.top_k) for index, row in drawn if row.top_k and row.top_k < vocab_size]
        self._top_p = [(index, row.top_p) for index, row in drawn if row.top_p < 1]
        self._has_filter = bool(self._min_p or self._top_k or self._top_p)
        self._penalties = [(index, row.repetition_penalty) for index, row in enumerate(rows)]
        self.penalised = [index for index, penalty in self._penalties if penalty != 1]
        self._unchanged = torch.tensor([row.unchanged for row in rows], device=device)
        self._all_unchanged = all(row.unchanged for row in rows)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]

    def draw(
        self, logits: Tensor, positions: Sequence[int] | np.ndarray, seen: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """The tokens, int64 (B,), and the scores that they were drawn from, float32 (B, V): up to a constant of each
        row the log-probabilities, -inf where a token cannot be drawn.

        Args:
            logits: (B, V), finite or -inf.
            positions: of the new tokens in their texts.
            seen: of each of the ``penalised`` rows the tokens that it has, bool (V,).
        """
        logits = self._penalised(logits.float().contiguous(), seen)
        if self.greedy:
            return argmax(logits), logits
        # The maximum is taken off first, so that a tiny temperature gives 1 and 0 and no infinities.
        scores = (logits - logits.amax(dim=-1, keepdim=True)) / self._temperatures
        self._filter(scores)
        return argmax(self._with_noise(scores, noise_keys(self._seeds, positions))), scores

    def logprobs(self, scores: Tensor, ids: Tensor, raw: Tensor) -> Tensor:
        """Log-probabilities, float32 (B,), of the distributions that tokens are drawn from; a greedy choice has 0.

        Args:
            scores: as :meth:`draw` gives them.
            ids: int64 (B,); -inf for a forced token that could not have been drawn.
            raw: float32 (B,): under the model's own distribution, which is that of rows that change nothing.
        """
        if self._all_unchanged:
            return raw
        if self.greedy:
            return torch.zeros_like(raw)
        of_ids = scores.gather(-1, ids[:, None])[:, 0] - _normaliser(scores)
        return torch.where(self._unchanged, raw, of_ids * self._noisy[:, 0])

    def _with_noise(self, scores: Tensor, keys: Tensor) -> Tensor:
        """Scores (B, V) with each token's noise."""
        if self._has_filter and (places := _few(scores, MIN_SCORE)) is not None:
            # No noise is made for what cannot be drawn.
            rows, ids = places // scores.size(1), places % scores.size(1)
            noise = scores.new_empty(len(ids), 1)
            _fill_with_noise(noise, keys[rows], (ids.int() * _SPREAD)[:, None])
            noisy = torch.full_like(scores, -torch.inf)
            noisy.view(-1)[places] = noise.mul_(self._noisy[rows])[:, 0].add_(scores.view(-1)[places])
            return noisy
        return gumbel_noise(keys, self._vocab_size, self._device).mul_(self._noisy).add_(scores)

    def _penalised(self, logits: Tensor, seen: Sequence[Tensor]) -> Tensor:
        if not self.penalised:
            return logits
        logits = logits.clone()
        for index, mask in zip(self.penalised, seen, strict=True):
            row, penalty = logits[index], self._penalties[index][1]
            logits[index] = torch.where(mask, torch.where(row > 0, row / penalty, row * penalty), row)
        return logits

    def _filter(self, scores: Tensor) -> None:
        """Set scores (B, V), of which the highest of a row is 0, to -inf where a token must not be drawn."""
        if self._min_p:
            self._drop_below(scores, self._min_p, lambda chosen, values: values.log())
        if self._top_k:
            self._drop_below(scores, self._top_k, _least_of_top_k)
        if self._top_p:
            self._drop_below(scores, self._top_p, _least_of_top_p)

    def _drop_below(
        self, scores: Tensor, settings: Sequence[tuple[int, float]], least: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Drop the tokens of the rows that have a setting whose scores (b, V) are below what ``least`` makes of these
        and of the settings (b, 1)."""
        indices, values = zip(*settings, strict=True)
        rows = slice(None) if len(indices) == len(scores) else torch.tensor(indices, device=self._device)
        chosen = scores[rows]
        bounds = least(chosen, self._column(values))
        if (places := _few(chosen, bounds)) is not None:
            kept = chosen.view(-1)[places]
            chosen.fill_(-torch.inf)
            chosen.view(-1)[places] = kept
        else:
            chosen.masked_fill_(chosen < bounds, -torch.inf)
        if not isinstance(rows, slice):
            scores[rows] = chosen


def _few(scores: Tensor, bounds: Tensor | float) -> Tensor | None:
    """Where scores (b, V) are not below bounds, (b, 1) or one for all, as places in all of them, int64 (n,).

    None where these are more than a quarter, or on a GPU. A CPU fills by a mask of all slowly.
    """
    if scores.device.type != "cpu":
        return None
    kept = scores.numpy() >= (bounds.numpy() if isinstance(bounds, Tensor) else bounds)
    return torch.from_numpy(np.flatnonzero(kept)) if 4 * np.count_nonzero(kept) <= kept.size else None


def _least_of_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # NumPy finds the last one of k without the others, in half of the time
        places = scores.size(-1) - top_k.long()
        ordered = np.partition(scores.numpy(), sorted({*places[:, 0].tolist()}), axis=-1)
        return torch.from_numpy(ordered).gather(-1, places)
    best = scores.topk(int(top_k.max()), dim=-1).values
    return best.gather(-1, top_k.long() - 1)


def _least_of_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    normaliser, vocab_size = _normaliser(scores)[:, None], scores.size(-1)
    for count in (min(TOP_P_TOKENS, vocab_size), vocab_size):  # sorting all takes long, and mostly a few are enough
        ordered = scores.topk(count, dim=-1).values
        cumulative = (ordered - normaliser).exp().cumsum(dim=-1)
        if (cumulative[:, -1:] >= top_p).all():
            break
    kept = 1 + (cumulative[:, :-1] < top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(-1, kept - 1)


def _normaliser(scores: Tensor) -> Tensor:
    """Logarithm of the sum of the exponentials of scores (b, V) of which the highest of a row is 0: float32 (b,)."""
    # A CPU takes twenty times as long for the exponential of -inf; that of -80 is nothing beside 1 as well.
    return by_rows(lambda rows: rows.clamp(min=-80).exp().sum(dim=-1).log(), scores)


def argmax(scores: Tensor) -> Tensor:
    """The place of the first maximum of each row, int64 (B,), of (B, V). On a CPU by NumPy, which is much faster."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def noise_keys(seeds: np.ndarray, positions: Sequence[int] | np.ndarray) -> Tensor:
    """int32 (B, 2): two hashes of each row's seed, uint64 (B,), and the position of its next token."""
    mixed = seeds + np.asarray(positions, dtype=np.uint64) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy(mixed.view(np.int32).reshape(-1, 2))


@functools.lru_cache(maxsize=4)
def _spread_ids(vocab_size: int, device: torch.device) -> Tensor:
    return torch.arange(vocab_size, dtype=torch.int32, device=device) * _SPREAD


def gumbel_noise(keys: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """Noise of Gumbel's distribution, float32 (B, V), for each row's key, int32 (B, 2), and each token."""
    keys, noise = keys.to(device), torch.empty(len(keys), vocab_size, device=device)
    # A few rows at a time, so that a CPU does all of it in its cache.
    count = max(1, NOISE_BLOCK // vocab_size) if device.type == "cpu" else len(keys)
    memory = torch.empty(2, min(count, len(keys)), vocab_size, dtype=torch.int32, device=device)
    for rows, out in zip(keys.split(count), noise.split(count), strict=True):
        _fill_with_noise(out, rows, _spread_ids(vocab_size, device), memory[:, : len(rows)])
    return noise


def _fill_with_noise(noise: Tensor, keys: Tensor, spread_ids: Tensor, memory: Tensor | None = None) -> None:
    """noise float32 (b, n) for keys int32 (b, 2) and the tokens' ids times ``_SPREAD``, int32 (n,) or (b, n), in memory
    to work in, int32 (2, b, n)."""
    mixed, shifted = noise.new_empty(2, *noise.shape, dtype=torch.int32) if memory is None else memory

    def mix(shift: int, mask: int) -> None:  # a shift of signed numbers draws copies of the sign in
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        mixed.bitwise_xor_(shifted.bitwise_and_(mask))

    torch.bitwise_xor(spread_ids, keys[:, :1], out=mixed)
    mix(16, 0xFFFF)
    mixed.mul_(_FIRST).add_(keys[:, 1:])
    mix(15, 0x1FFFF)
    mixed.mul_(_SECOND)
    mix(16, 0xFFFF)
    # Minus a uniform number in (0, 1), fine near 0: there are the rare large values that let an unlikely token win.
    noise.copy_(mixed.bitwise_and_(0x7FFFFFFF)).mul_(-(2.0**-31) * (1 - 2.0**-24)).sub_(2.0**-32)
    noise.log1p_().neg_().log_().neg_()
