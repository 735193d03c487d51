"""What a source of documents is, and the settings of the config group ``data``.

A source has two splits, ``train`` and ``val``. A split is a list of shards, and a shard gives its documents in a fixed
order. Both splits may come from the same files: which documents belong to which is the source's own rule, and never
depends on which files happen to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import setting

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DataSettings:
    """Where the text comes from, what is held out, and how rows are packed."""

    name: Literal["python_docs", "local"] = setting(
        "python_docs", "python_docs: docstrings found on this machine; local: files under data.path."
    )
    path: str | None = setting(None, "File, folder (searched recursively) or glob: parquet, jsonl, jsonl.gz or txt.")
    text_column: str = setting("text", "Column of parquet files, key of JSON lines, that holds the text.")
    txt_document_chars: int = setting(
        8_000, "A txt file is cut at blank lines into documents of at most this many characters.", at_least=1
    )
    validation_fraction: float = setting(
        0.05,
        "Share of the documents of data.path held out (at least one), chosen by a hash of the text.",
        above=0,
        at_most=0.5,
    )
    validation_path: str | None = setting(
        None, "Files to validate on; then all of data.path is trained on and validation_fraction is not used."
    )
    long_documents: Literal["split", "crop"] = setting(
        "split", "split: documents longer than a row are cut into pieces, each with bos; crop: as the reference does."
    )
    shuffle: bool = setting(True, "Each epoch in a seeded order of its own; false: all in the order of the source.")
    pack_buffer_documents: int = setting(1_000, "Documents among which the packer finds the best fit.", at_least=1)
    pack_refill_documents: int = setting(128, "Documents that are added to that buffer at a time.", at_least=1)
    seed: int = setting(0, "Seed of the order of documents.", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        problems = []
        if self.name == "local" and not self.path:
            problems.append("path: is missing: data=local needs data.path=FILE, FOLDER or GLOB.")
        for key in ("path", "validation_path"):
            value = getattr(self, key)
            if self.name != "local" and value is not None:
                problems.append(f"{key}={value!r}: has no meaning for data={self.name}; say data=local.")
        if problems:
            raise UserError(problems)


@dataclass(frozen=True)
class Shard:
    """A part of one split that is tokenised, kept and verified as a whole.

    Attributes:
        name: unique within its source and split; part of a row's address. May hold slashes.
        split: which split it belongs to.
        fingerprint: changes whenever the documents or their order do; the same text elsewhere has the same one.
        read: gives the documents from the first; every call the same ones. Empty ones may occur.
    """

    name: str
    split: Split
    fingerprint: str
    read: Callable[[], Iterator[str]]

    def documents(self) -> Iterator[str]:
        """The shard's documents, in order."""
        return self.read()


class Source(Protocol):
    """Documents in two splits, for as long as nobody changes the files under it."""

    @property
    def name(self) -> str:
        """What users call it, e.g. ``python_docs``."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any document of any split does: the corpus hash that figures are quoted with."""

    def describe(self) -> str:
        """One line for people: what it holds, and its hash."""

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, in an order that does not change while the text stays the same."""
