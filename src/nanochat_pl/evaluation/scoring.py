"""How probable a model finds given tokens: many candidates at once, what they share read once.

Shapes: N tokens of a forward, M scored tokens, C model width, V vocabulary.

A question's candidates (the choices of a test item, say) mostly begin alike. Such candidates are one row that branches:
the beginning is read once, and only the rests are read per candidate. Logits are the largest part of a small model's
work and are made only where a token is scored. Rows of a forward are alike in length. None of this changes a score by
more than float32 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.evaluation.candidates import Candidate, Score, common_length
from nanochat_pl.model.counts import default_chunk_tokens
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.prefix_tree import PrefixTree, SharedPrefix

# Candidates that share less than this part of their tokens are read apart.
MIN_SHARED = 0.1
# Where more positions than this are in a forward, a CPU is slower: activations no longer fit into its caches.
CPU_POSITIONS = 4096
# A batch with positions enough to keep the cores busy ends before rows shorter than this share of its longest.
MIN_SHARE, BUSY_POSITIONS = 0.7, 1024


def score(
    net: GPT,
    questions: Sequence[Sequence[Candidate]],
    *,
    max_positions: int = 16_384,
    progress: Callable[[int], None] | None = None,
    name: str = "",
) -> list[list[Score]]:
    """Score the candidates of each question.

    Args:
        max_positions: most positions of one forward, padding included. Memory and time only.
        name: what they belong to, for messages.

    Returns:
        scores, arranged as the questions are.

    Raises:
        UserError: a candidate is longer than the model's positions, has ids that the model lacks, or its span does not
            lie within it; or the model's outputs are not finite numbers.
    """
    return _Scoring(net, questions, max_positions, name).run(progress)


def batches_by_length(lengths: Sequence[int], max_positions: int) -> list[list[int]]:
    """Put rows of like length together.

    Args:
        max_positions: a batch has at most this many positions, padding included (but at least one row).

    Returns:
        the numbers of the rows of each batch, longest first: what is too large for the memory fails at once.
    """
    batches: list[list[int]] = []
    longest = real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        sparse = real >= BUSY_POSITIONS and lengths[index] < MIN_SHARE * longest
        if not batches or padded > max_positions or sparse:
            batches.append([])
            longest, real = lengths[index], 0
        batches[-1].append(index)
        real += lengths[index]
    return batches


@dataclass(frozen=True)
class _Unit:
    """A row that branches, and whose tokens it scores: members with the numbers of their branches (0: the trunk)."""

    row: SharedPrefix
    members: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return len(self.row.trunk) + sum(map(len, self.row.branches))


class _Scoring:
    """One call of :func:`score`. Candidates of all questions are numbered in order: these numbers are the members."""

    def __init__(self, net: GPT, questions: Sequence[Sequence[Candidate]], max_positions: int, name: str) -> None:
        self._net, self._questions, self._name = net, questions, name
        self._candidates = [candidate for question in questions for candidate in question]
        _check(self._candidates, net.config.rotary_reach, net.config.vocab_size)
        self._max_positions = min(max_positions, CPU_POSITIONS) if net.device.type == "cpu" else max_positions
        self._nats = torch.zeros(len(self._candidates), dtype=torch.float64)
        self._misses = torch.zeros(len(self._candidates), dtype=torch.int64)

    @torch.inference_mode()
    def run(self, progress: Callable[[int], None] | None) -> list[list[Score]]:
        units = list(self._units())
        question_of = [number for number, question in enumerate(self._questions) for _ in question]
        num_open = [len(question) for question in self._questions]
        for batch in batches_by_length([unit.length for unit in units], self._max_positions):
            self._read([units[index] for index in batch])
            finished = 0
            for member in (member for index in batch for member, _ in units[index].members):
                num_open[question_of[member]] -= 1
                finished += num_open[question_of[member]] == 0
            if progress is not None and finished:
                progress(finished)
        rows = zip(self._candidates, self._nats.tolist(), self._misses.tolist(), strict=True)
        scores = iter([Score(nats, each.end - each.start, not misses) for each, nats, misses in rows])
        return [[next(scores) for _ in question] for question in self._questions]

    def _units(self) -> Iterator[_Unit]:
        """The rows to read. Candidates of a question that are the same are read once."""
        first = 0
        for question in self._questions:
            alike: dict[tuple[int, ...], list[int]] = {}
            for member, candidate in enumerate(question, first):
                alike.setdefault(_tokens_to_read(candidate), []).append(member)
            first += len(question)
            if unread := alike.pop((), None):
                yield _Unit(SharedPrefix(()), [(member, 0) for member in unread])
            shared = common_length(list(alike))
            if (len(alike) - 1) * shared <= MIN_SHARED * sum(map(len, alike)):
                for tokens, members in alike.items():
                    yield _Unit(SharedPrefix(tokens), [(member, 0) for member in members])
            else:
                yield from self._branching(alike, shared)

    def _branching(self, alike: dict[tuple[int, ...], list[int]], shared: int) -> Iterator[_Unit]:
        """Rows of a question's candidates that share a beginning: one, or several where it would be too long."""
        trunk, length = next(iter(alike))[:shared], shared
        branches: list[tuple[int, ...]] = []
        members: list[tuple[int, int]] = []
        for tokens, those in alike.items():
            if branches and length + len(tokens) - shared > self._max_positions:
                yield _Unit(SharedPrefix(trunk, branches), members)
                length, branches, members = shared, [], []
            branches.append(tokens[shared:])
            members += [(member, len(branches)) for member in those]
            length += len(tokens) - shared
        yield _Unit(SharedPrefix(trunk, branches), members)

    def _read(self, units: list[_Unit]) -> None:
        """One forward, and the scores of its members."""
        units = [unit for unit in units if unit.length]
        if not units:
            return
        tree = PrefixTree([unit.row for unit in units], self._net.device)
        places: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for unit, starts in zip(units, tree.starts, strict=True):
            depth = len(unit.row.trunk)
            for member, branch in unit.members:
                candidate = self._candidates[member]
                # The logits that score a token are those of the place before it: in the trunk, or in the branch.
                before = range(candidate.start - 1, candidate.end - 1)
                places += [starts[0] + n if n < depth else starts[branch] + n - depth for n in before]
                targets += candidate.ids[candidate.start : candidate.end]
                owners += [member] * len(before)
        hidden = self._net.hidden_of_tree(tree)[0]
        nats, misses = token_scores(self._net, hidden, torch.tensor(places), torch.tensor(targets))
        if not nats.isfinite().all():
            raise NotFiniteError(self._name)
        index = torch.tensor(owners)
        self._nats.index_add_(0, index, nats)
        self._misses.index_add_(0, index, misses)


def token_scores(net: GPT, hidden: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of tokens, and whether another token was more probable.

    Args:
        hidden: (N, C), what the head reads.
        places: int64 (M,) on the CPU: the row of ``hidden`` that predicts each token; it may come several times.
        targets: int64 (M,) on the CPU: the tokens.

    Returns:
        On the CPU: nats float64 (M,) and misses int64 (M,), 0 or 1.
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


def _tokens_to_read(candidate: Candidate) -> tuple[int, ...]:
    """The last scored token is only predicted, and nothing is read where nothing is scored."""
    return tuple(candidate.ids[: candidate.end - 1]) if candidate.end > candidate.start else ()


def _check(candidates: Sequence[Candidate], reach: int, vocab_size: int) -> None:
    for candidate in candidates:
        ids = candidate.ids
        if not 1 <= candidate.start <= candidate.end <= len(ids):
            raise UserError(f"scored tokens {candidate.start} … {candidate.end} of {len(ids):,}: no span of them.")
        if candidate.end - 1 > reach:
            raise UserError(f"{len(ids):,} tokens to score; the model's positions end at {reach:,}.")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UserError(f"ids to score lie outside 0 … {vocab_size - 1:,}, the model's vocabulary.")
