"""Text from a class of the user's own: ``data=custom data.target=package.module.Class data.options.KEY=VALUE``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import getattr_static
from typing import Any, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.import_class import import_class
from nanochat_pl.common.user_code import user_code
from nanochat_pl.data.sources.base import Shard, Source, SourceSettings, Split, place_by_hash

T = TypeVar("T")


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
        read = partial(self._of_split, split)  # which, unlike a lambda, can be sent to another process
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
            if not isinstance(text, str):
                raise TypeError(f"documents() gives {type(text).__name__}, no text (str)")
            content = text.encode("utf-8")
            digest.update(hashlib.sha256(content).digest())
            lowest, count, size = min(lowest, place_by_hash(content)), count + 1, size + len(content)
        return _Facts(digest.hexdigest(), max(self.validation_fraction, lowest), count, size)


class _CheckedSource:
    """A source of the user's: what it raises, or gives in place of what was asked for, is said with the key."""

    def __init__(self, source: Source, where: str) -> None:
        self._source, self._where = source, where

    @property
    def name(self) -> str:
        return self._given("name", str)

    @property
    def fingerprint(self) -> str:
        return self._given("fingerprint", str)

    def describe(self) -> str:
        return self._given("describe", str)

    def shards(self, split: Split) -> list[Shard]:
        return [
            replace(self._checked("shards", shard, Shard), read=partial(self._documents, shard))
            for shard in self._given("shards", list, split)
        ]

    def _given(self, name: str, kind: type[T], *arguments: Any) -> T:
        with user_code(f"{self._where} fails in {name}"):
            value = getattr(self._source, name)
            value = value(*arguments) if callable(value) else value
        return self._checked(name, value, kind)

    def _documents(self, shard: Shard) -> Iterator[str]:
        with user_code(f"{self._where} fails in documents of the shard {shard.name!r}"):
            for text in shard.documents():
                yield self._checked("documents", text, str)

    def _checked(self, name: str, value: Any, kind: type[T]) -> T:
        if not isinstance(value, kind):
            raise UserError(f"{self._where}: {name} gives {type(value).__name__} where {kind.__name__} is needed.")
        return value


def open_custom(settings: SourceSettings, key: str) -> Source:
    """Make the source that ``target`` names.

    Args:
        settings: with ``target`` and ``options``.

    Raises:
        UserError: there is no such class, it is no source, or it does not take the options. Its methods raise nothing
            else, either.
    """
    assert settings.target is not None, "checked by the settings"
    cls = import_class(settings.target, f"{key}.target")
    with user_code(f"{key}: {settings.target} with {settings.options} cannot be opened"):
        source: Source = cls(**settings.options)
        if isinstance(source, TextSource):
            source.validation_fraction = settings.validation_fraction
    # What is there is not asked for its value: that may fail of something else.
    missing = [n for n in ("name", "fingerprint", "describe", "shards") if getattr_static(source, n, None) is None]
    if missing:
        raise UserError(
            f"{key}.target={settings.target!r}: is no source: it has no {', '.join(missing)}.",
            "Make it a subclass of nanochat_pl.data.sources.custom.TextSource, with a method documents().",
        )
    checked = _CheckedSource(source, f"{key}.target={settings.target!r}")
    _ = checked.fingerprint  # reads the documents
    return checked
