"""``data=mixture``: several sources side by side, each with its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.packing.mixture import MixtureSchedule
from nanochat_pl.data.sources.base import Shard, Source, Split

MAX_READS = 4  # of a source, for a tokenizer


@dataclass(frozen=True)
class NamedSource:
    """A source under the name that a person gave it."""

    name: str
    source: Source

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def describe(self) -> str:
        return self.source.describe()

    def shards(self, split: Split) -> list[Shard]:
        return self.source.shards(split)


class MixedSource:
    """Several sources and their weights. As a :class:`~nanochat_pl.data.sources.base.Source` it has the shards of all.

    Attributes:
        turns: which share each has, in the same order.

    Raises:
        UserError: two of them share a file, or have files with the same contents.
    """

    name = "mixture"

    def __init__(self, parts: Mapping[str, Source], turns: MixtureSchedule) -> None:
        self.parts = {name: NamedSource(name, part) for name, part in parts.items()}
        self.turns = turns
        _refuse_shared_text(self.parts)

    @property
    def fingerprint(self) -> str:
        sources = [[name, part.fingerprint] for name, part in self.parts.items()]
        return fingerprint_of(sources, list(self.turns.weights))

    def describe(self) -> str:
        """For people: a line for each source with its share, and the hash of the whole."""
        lines = [
            f"{name}, {share:.4g} of the tokens: {part.describe()}"
            for (name, part), share in zip(self.parts.items(), self.turns.shares, strict=True)
        ]
        return "\n".join([*lines, f"mixture: {self.fingerprint[:12]}"])

    def shards(self, split: Split) -> list[Shard]:
        """The shards of all sources, one source after the other, named SOURCE/SHARD."""
        return [
            replace(shard, name=f"{name}/{shard.name}")
            for name, part in self.parts.items()
            for shard in part.shards(split)
        ]

    def documents(self, document_chars: int) -> Iterator[str]:
        """Training documents, at any time of each source its share of the characters, or a document more.

        A source that has ended is read again, as the training will do. It ends when each has been read once, or one of
        them MAX_READS times: more of the others would need more of that one than helps.

        Args:
            document_chars: after so many each document is cut.

        Raises:
            UserError: a source has no text.
        """
        weights, given = self.turns.weights, [0] * len(self.parts)
        streams = [_documents(part) for part in self.parts.values()]
        reads = [0] * len(streams)
        while min(reads) == 0 and max(reads) < MAX_READS:
            # The one whose characters are fewest for its weight; among equals the first.
            source = min(range(len(streams)), key=lambda each: given[each] / weights[each])
            text = next(streams[source], None)
            if text is not None:
                given[source] += len(text[:document_chars])
                yield text[:document_chars]
                continue
            name, part = list(self.parts.items())[source]
            if not given[source]:
                raise UserError(f"data.sources.{name}: no training document of it has any text.")
            reads[source] += 1
            streams[source] = _documents(part)


def _documents(source: Source) -> Iterator[str]:
    return (text for shard in source.shards("train") for text in shard.documents())


def _refuse_shared_text(parts: Mapping[str, Source]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for name, part in parts.items():
        for shard in [*part.shards("train"), *part.shards("val")]:
            first, its_name = seen.setdefault(shard.contents, (name, shard.name))
            if shard.contents and first != name:
                raise UserError(
                    f"data.sources.{name}: {shard.name} is the same text as {its_name} of data.sources.{first}: "
                    "one would train on what the other holds out, or both on the same.",
                    fix="Leave it to one of them; a greater weight lets a source be trained on more often.",
                )
