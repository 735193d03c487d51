"""How probable a model finds given tokens: many candidates at once, what they share read once.

Shapes: B rows, T positions, C model width, V vocabulary, N positions whose logits are wanted.

A question's candidates (the choices of a test item, say) mostly begin alike. That beginning is read once into a cache,
and only the rests are read per candidate. Logits are the largest part of a small model's work and are made only where a
token is scored. Rows of a forward are alike in length. None of this changes a score by more than float32 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.accounting import kv_cache_bytes
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.loss import default_chunk_tokens

# The cache of what is shared takes at most this many bytes, and the copies for the candidates as many again.
CACHE_BYTES = 2**30
# Fewer positions than this are not worth a cache and a second forward.
LEAST_SAVED = 16
# A batch with positions enough to keep the cores busy ends before rows shorter than this share of its longest.
LEAST_SHARE, BUSY_POSITIONS = 0.7, 1024


@dataclass(frozen=True)
class Candidate:
    """Tokens to score behind a beginning.

    Attributes:
        ids: all tokens, the beginning included.
        start, end: the scored ones are ``ids[start:end]``, 1 <= start <= end <= len(ids). What follows is not read.
    """

    ids: Sequence[int]
    start: int
    end: int


@dataclass(frozen=True)
class Score:
    """What a model says of a candidate.

    Attributes:
        nats: summed over the scored tokens; 0 where there are none.
        num_tokens: of the scored span.
        greedy: whether every scored token is the most probable one (of equals the one with the lowest id).
    """

    nats: float
    num_tokens: int
    greedy: bool


def score(
    net: GPT,
    questions: Sequence[Sequence[Candidate]],
    *,
    max_positions: int = 16_384,
    progress: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Score the candidates of each question.

    Args:
        net: the model.
        questions: candidates, in groups that may begin alike.
        max_positions: most positions of one forward, padding included. Memory and time only.
        progress: called with the number of questions just finished.

    Returns:
        scores, arranged as the questions are.

    Raises:
        UserError: a candidate is longer than the model's positions, has ids that the model lacks, or its span does not
            lie within it.
    """
    return _Scoring(net, questions, max_positions, progress).run()


def batches_by_length(lengths: Sequence[int], max_positions: int) -> list[list[int]]:
    """Put rows of like length together.

    Args:
        lengths: of the rows.
        max_positions: a batch has at most this many positions, padding included (but at least one row).

    Returns:
        the numbers of the rows of each batch, longest first: what is too large for the memory fails at once.
    """
    batches: list[list[int]] = []
    longest = real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        sparse = real >= BUSY_POSITIONS and lengths[index] < LEAST_SHARE * longest
        if not batches or padded > max_positions or sparse:
            batches.append([])
            longest, real = lengths[index], 0
        batches[-1].append(index)
        real += lengths[index]
    return batches


@dataclass(frozen=True)
class _Unit:
    """Candidates that are read together: the length of what they share, and behind it their rests, if any."""

    members: list[int]
    shared: int


@dataclass(frozen=True)
class _Row:
    """Tokens ``begin`` … ``stop`` - 1 of a candidate, which score tokens of each member that begins like them."""

    source: int
    begin: int
    stop: int
    members: list[int]


class _Scoring:
    """One call of :func:`score`. Candidates of all questions are numbered in order: these numbers are the members."""

    def __init__(
        self,
        net: GPT,
        questions: Sequence[Sequence[Candidate]],
        max_positions: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._net, self._progress = net, progress
        self._questions = questions
        self._candidates = [candidate for question in questions for candidate in question]
        _check(self._candidates, net.config.rotary_reach, net.config.vocab_size)
        self._max_positions = max(1, min(max_positions, CACHE_BYTES // kv_cache_bytes(net.config, 1, 1)))
        self._nats = torch.zeros(len(self._candidates), dtype=torch.float64)
        self._misses = torch.zeros(len(self._candidates), dtype=torch.int64)
        self._num_open = [len(question) for question in questions]
        self._question_of = [q for q, question in enumerate(questions) for _ in question]

    @torch.inference_mode()
    def run(self) -> list[list[Score]]:
        alone, together = self._units()
        for units, read in ((together, self._read_together), (alone, self._read_alone)):
            for batch in batches_by_length([self._longest(unit) for unit in units], self._max_positions):
                read([units[index] for index in batch])
                self._tell([member for index in batch for member in units[index].members])
        rows = zip(self._candidates, self._nats.tolist(), self._misses.tolist(), strict=True)
        scores = iter([Score(nats, each.end - each.start, not misses) for each, nats, misses in rows])
        return [[next(scores) for _ in question] for question in self._questions]

    def _units(self) -> tuple[list[_Unit], list[_Unit]]:
        """Candidates that are read alone, and those of questions where sharing saves enough."""
        alone: list[_Unit] = []
        together: list[_Unit] = []
        first = 0
        for question in self._questions:
            members = list(range(first, first + len(question)))
            first += len(question)
            shared = _common_length(question)
            if (len(question) - 1) * shared >= LEAST_SAVED:
                together.append(_Unit(members, shared))
            else:
                alone += [_Unit([member], _read_length(self._candidates[member])) for member in members]
        return alone, together

    def _longest(self, unit: _Unit) -> int:
        return max(_read_length(self._candidates[member]) for member in unit.members)

    def _read_alone(self, units: list[_Unit]) -> None:
        self._read([_Row(unit.members[0], 0, unit.shared, unit.members) for unit in units])

    def _read_together(self, units: list[_Unit]) -> None:
        net = self._net
        cache = KVCache(net.config, len(units), max(map(self._longest, units)), net.device, net.compute_dtype)
        self._read([_Row(unit.members[0], 0, unit.shared, unit.members) for unit in units], cache)
        rests = [
            (slot, _Row(member, unit.shared, length, [member]))
            for slot, unit in enumerate(units)
            for member in unit.members
            if (length := _read_length(self._candidates[member])) > unit.shared
        ]
        for batch in batches_by_length([rest.stop for _, rest in rests], self._max_positions):
            chosen = [rests[index] for index in batch]
            self._read([rest for _, rest in chosen], cache.select([slot for slot, _ in chosen]))

    def _read(self, rows: list[_Row], cache: KVCache | None = None) -> None:
        """One forward, and its share of the scores. A cache holds what stands before each row."""
        lengths = [row.stop - row.begin for row in rows]
        width = max(lengths)
        if width == 0:
            return
        tokens = [list(self._candidates[row.source].ids[row.begin : row.stop]) for row in rows]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=self._net.device)
        hidden = self._net.hidden(ids, cache, lengths if cache is not None and min(lengths) < width else None)
        places: list[int] = []
        targets: list[int] = []
        members: list[int] = []
        for n, row in enumerate(rows):
            for member in row.members:
                candidate = self._candidates[member]
                first, last = max(candidate.start - 1, row.begin), min(candidate.end - 1, row.stop)
                if first < last:
                    places += range(n * width + first - row.begin, n * width + last - row.begin)
                    targets += candidate.ids[first + 1 : last + 1]
                    members += [member] * (last - first)
        if places:
            nats, misses = token_scores(self._net, hidden.flatten(0, 1), torch.tensor(places), torch.tensor(targets))
            index = torch.tensor(members)
            self._nats.index_add_(0, index, nats)
            self._misses.index_add_(0, index, misses)

    def _tell(self, members: list[int]) -> None:
        finished = 0
        for member in members:
            question = self._question_of[member]
            self._num_open[question] -= 1
            finished += not self._num_open[question]
        if self._progress is not None and finished:
            self._progress(finished)


def token_scores(net: GPT, hidden: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of tokens, and whether another token was more probable.

    Args:
        hidden: (B·T, C), what the head reads.
        places: int64 (N,) on the CPU: the row of ``hidden`` that predicts each token; it may come several times.
        targets: int64 (N,) on the CPU: the tokens.

    Returns:
        On the CPU: nats float64 (N,) and misses int64 (N,), 0 or 1.
    """
    wanted, order = places.unique(return_inverse=True)
    nats, misses = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.int64)
    size = default_chunk_tokens(net.config.vocab_size, net.device.type == "cpu")
    for start in range(0, len(wanted), size):
        logits = net.head(hidden[wanted[start : start + size].to(hidden.device)])
        mine = ((order >= start) & (order < start + size)).nonzero()[:, 0]
        row, target = (each[mine].to(hidden.device) for each in (order - start, targets))
        nats[mine] = (logits.logsumexp(dim=-1)[row] - logits[row, target]).cpu().double()
        misses[mine] = (logits.argmax(dim=-1)[row] != target).cpu().long()
    return nats, misses


def _read_length(candidate: Candidate) -> int:
    """Tokens that have to be read: the last scored one is only predicted, and nothing is where nothing is scored."""
    return candidate.end - 1 if candidate.end > candidate.start else 0


def _common_length(question: Sequence[Candidate]) -> int:
    """Tokens that all candidates of a question begin with, of those that have to be read."""
    if not question:
        return 0
    first = list(question[0].ids[: max(map(_read_length, question))])
    for candidate in question[1:]:
        pairs = enumerate(zip(first, candidate.ids, strict=False))
        same = min(len(first), len(candidate.ids))
        first = first[: next((n for n, (one, other) in pairs if one != other), same)]
    return len(first)


def _check(candidates: Sequence[Candidate], reach: int, vocab_size: int) -> None:
    for candidate in candidates:
        ids = candidate.ids
        if not 1 <= candidate.start <= candidate.end <= len(ids):
            raise UserError(f"scored tokens {candidate.start} … {candidate.end} of {len(ids):,}: no span of them.")
        if candidate.end - 1 > reach:
            raise UserError(f"{len(ids):,} tokens to score; the model's positions end at {reach:,}.")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UserError(f"ids to score lie outside 0 … {vocab_size - 1:,}, the model's vocabulary.")
