"""What a source of documents is, and the settings of the config group ``data``.

A source has two splits, ``train`` and ``val``. A split is a list of shards, and a shard gives its documents in a fixed
order. Both splits may come from the same files: which documents belong to which is the source's own rule, and never
depends on which files happen to be there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import setting

Split = Literal["train", "val"]
MAX_BAD_FRACTION = 0.01


@dataclass(frozen=True)
class DataSettings:
    """Where the text comes from, what is held out, and how rows are packed."""

    name: Literal["python_docs", "local", "hub", "climbmix", "fineweb_edu"] = setting(
        "python_docs",
        "python_docs: docstrings found on this machine; local: files under data.path; hub: the data set data.repo.",
    )
    path: str | None = setting(
        None, "File, folder (searched recursively) or glob: parquet, jsonl, jsonl.gz, jsonl.zst or txt."
    )
    repo: str | None = setting(None, "Data set on the hub: OWNER/NAME. It is fetched by nanochat-pl download.")
    revision: str | None = setting(
        None, "Branch, tag or commit of data.repo; null: main. The commit that it means is looked up once, and kept."
    )
    files: str | None = setting(None, "Glob for the files of data.repo; null: all that hold documents.")
    num_shards: int | None = setting(
        None, "Training files of data.repo, from the first; null: all that are here.", at_least=1
    )
    download: bool = setting(False, "Fetch what is missing of data.repo when the training starts.")
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
    shuffle: Literal["global", "shards", "none"] = setting(
        "global",
        "Order of the documents. global: all of them in a seeded order of its own for each epoch, which needs all of "
        "them tokenised first; shards: shard after shard, those of each in a seeded order, so the training begins with "
        "the first ones while the others are tokenised; none: the order of the source, from the first ones too.",
    )
    pack_buffer_documents: int = setting(1_000, "Documents among which the packer finds the best fit.", at_least=1)
    pack_refill_documents: int = setting(128, "Documents that are added to that buffer at a time.", at_least=1)
    max_bad_fraction: float = setting(
        MAX_BAD_FRACTION,
        "Share of the rows of a set of conversations that may be bad: they are left out; more of them stop the run.",
        at_least=0,
        at_most=1,
    )
    seed: int = setting(0, "Seed of the order of documents.", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        problems = []
        if self.name == "local" and not self.path:
            problems.append("path: is missing: data=local needs data.path=FILE, FOLDER or GLOB.")
        if self.is_on_hub and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo or ""):
            problems.append(f"repo={self.repo!r}: data={self.name} needs the data set's name: data.repo=OWNER/NAME.")
        for key, fits, source in (
            ("path", self.name == "local", "local"),
            ("validation_path", self.name == "local", "local"),
            *((key, self.is_on_hub, "hub") for key in ("repo", "revision", "files", "num_shards", "download")),
        ):
            value = getattr(self, key)
            if not fits and value not in (None, False):
                problems.append(f"{key}={value!r}: has no meaning for data={self.name}; say data={source}.")
        if problems:
            raise UserError(problems)

    @property
    def is_on_hub(self) -> bool:
        """Whether the documents are those of ``repo``."""
        return self.name not in ("python_docs", "local")


@dataclass(frozen=True)
class Shard:
    """A part of one split that is tokenised, kept and verified as a whole.

    Attributes:
        name: unique within its source and split; part of a row's address. May hold slashes.
        split: which split it belongs to.
        fingerprint: changes whenever the documents or their order do; the same text elsewhere has the same one.
        read: gives the documents from the first; every call the same ones. Blank ones are "", and keep their place.
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
