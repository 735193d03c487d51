"""Text from a class of the user's own: ``data=custom data.target=package.module.Class data.options.KEY=VALUE``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.import_class import import_class
from nanochat_pl.data.sources.base import Shard, Source, SourceSettings, Split, place_by_hash


@dataclass(frozen=True)
class _Facts:
    fingerprint: str
    held_out: float  # documents whose place by hash is at most this are for validation
    num_documents: int
    text_bytes: int


class TextSource:
    """A source of one's own: subclass it and give ``documents``, which must be the same ones at each call.

    They are read once to hash them, so that a change is noticed, and again where they are tokenized. A share
    of them is held out, chosen by a hash of each text. A source with parts and splits of its own implements
    :class:`~nanochat_pl.data.sources.base.Source` instead; nothing else is asked of it.

    Attributes:
        validation_fraction: share of the documents that is held out, at least one of them (of the settings).
    """

    validation_fraction = 0.05

    def documents(self) -> Iterator[str]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return type(self).__name__

    @property
    def fingerprint(self) -> str:
        return self._facts.fingerprint

    def describe(self) -> str:
        facts = self._facts
        size = f"{facts.num_documents:,} documents ({facts.text_bytes / 1e6:.1f} MB)"
        return f"{self.name} {facts.fingerprint[:12]}: {size}, {facts.held_out:.2%} of them held out"

    def shards(self, split: Split) -> list[Shard]:
        """One shard a split."""
        facts = self._facts
        share = facts.held_out if split == "val" else 1 - facts.held_out
        fingerprint = f"{facts.fingerprint} {split} {facts.held_out}"
        read = lambda: self._of_split(split)  # noqa: E731
        return [Shard(self.name, split, fingerprint, facts.fingerprint, read, text_bytes=facts.text_bytes * share)]

    def _of_split(self, split: Split) -> Iterator[str]:
        held_out = self._facts.held_out
        for text in self.documents():
            is_held_out = place_by_hash(text.encode("utf-8")) <= held_out
            if is_held_out == (split == "val"):
                yield text

    @cached_property
    def _facts(self) -> _Facts:
        digest, lowest, count, size = hashlib.sha256(), 1.0, 0, 0
        for text in self.documents():
            content = text.encode("utf-8")
            digest.update(hashlib.sha256(content).digest())
            lowest, count, size = min(lowest, place_by_hash(content)), count + 1, size + len(content)
        return _Facts(digest.hexdigest(), max(self.validation_fraction, lowest), count, size)


def open_custom(settings: SourceSettings, key: str) -> Source:
    """Make the source that ``target`` names.

    Args:
        settings: with ``target`` and ``options``.

    Raises:
        UserError: there is no such class, it is no source, or it does not take the options.
    """
    assert settings.target is not None, "checked by the settings"
    cls = import_class(settings.target, f"{key}.target")
    try:
        source: Source = cls(**settings.options)
        if isinstance(source, TextSource):
            source.validation_fraction = settings.validation_fraction
        missing = [name for name in ("name", "fingerprint", "describe", "shards") if not hasattr(source, name)]
        if missing:
            raise UserError(
                f"{key}.target={settings.target!r}: is no source: it has no {', '.join(missing)}.",
                "Make it a subclass of nanochat_pl.data.sources.custom.TextSource, with a method documents().",
            )
        _ = source.fingerprint  # reads the documents
    except UserError:
        raise
    except Exception as error:  # whatever the code of others raises
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{key}: {settings.target} with {settings.options} cannot be opened: {words}") from error
    return source
