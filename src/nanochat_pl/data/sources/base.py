"""What a source of documents is, and the settings of the config group ``data``.

A source has two splits, ``train`` and ``val``. A split is a list of shards, and a shard gives its documents in a fixed
order. Both splits may come from the same files: which documents belong to which is the source's own rule, and never
depends on which files happen to be there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import UserGlob, setting
from nanochat_pl.data.packing.packer import Mode

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
MAX_BAD_FRACTION = 0.01
# More than this is not tokenized as a whole before the training begins, nor held out as a whole: bytes of text.
MAX_TEXT_AT_ONCE = 20e9
MIN_SHARE = 1e-5
# Metrics of the log have these names: train/loss_smoothed, train/tokens_per_second, val/bpb_stderr.
_NAMES_OF_FIGURES = ("smoothed", "per_second", "stderr")


@dataclass(frozen=True)
class SourceSettings:
    """One source: where its text comes from, what is held out, and how rows are packed."""

    name: Literal["python_docs", "local", "hub", "climbmix", "fineweb_edu", "custom"] = setting(
        "python_docs",
        "python_docs: docstrings found on this machine; local: files under data.path; hub: the data set data.repo;"
        " custom: the class data.target.",
    )
    path: UserGlob | None = setting(
        None, "File, folder (searched recursively) or glob: parquet, jsonl, jsonl.gz, jsonl.zst or txt."
    )
    target: str | None = setting(
        None, "Of custom: a class with the text, package.module.Class; see nanochat_pl.data.sources.custom."
    )
    options: dict[str, Any] = setting(factory=dict, doc="Of custom: arguments of that class.")
    repo: str | None = setting(None, "Data set on the hub: OWNER/NAME. It is fetched by nanochat-pl download.")
    revision: str | None = setting(
        None, "Branch, tag or commit of data.repo; null: main. The commit that it means is looked up once, and kept."
    )
    files: str | None = setting(None, "Glob for the files of data.repo; null: all that hold documents.")
    num_shards: int | None = setting(
        None, "Training files of data.repo, from the first; null: all that are here.", at_least=1
    )
    download: bool | None = setting(
        None,
        "Fetch what is missing of data.repo while the training runs, which begins when the first file is here; "
        "null: with data=auto.",
    )
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
    validation_path: UserGlob | None = setting(
        None,
        "Files to validate on; then all of data.path is trained on and validation_fraction is not used.",
    )
    long_documents: Literal["split", "crop"] = setting(
        "split", "split: documents longer than a row are cut into pieces, each with bos; crop: as the reference does."
    )
    packing: Literal["best_fit", "stream"] = setting(
        "best_fit",
        "How documents become rows. best_fit: each begins with bos and is filled with what fits best (long_documents "
        "says what becomes of the rest); stream: documents end to end, cut into rows anywhere, nothing dropped.",
    )
    shuffle: Literal["global", "shards", "none"] = setting(
        "global",
        "Order of the documents. global: all of them in a seeded order of its own for each epoch, which needs all of "
        "them tokenized first (of more than 20 GB of text it is as shards); shards: shard after shard, those of each "
        "in a seeded order, so the training begins with the first ones while the others are tokenized; none: the order "
        "of the source, from the first ones too.",
    )
    pack_buffer_documents: int = setting(1_000, "Documents among which the packer finds the best fit.", at_least=1)
    pack_refill_documents: int = setting(128, "Documents that are added to that buffer at a time.", at_least=1)
    seed: int = setting(0, "Seed of the order of documents.", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        problems = []
        if self.name == "local" and not self.path:
            problems.append(f"path: is missing: {self._said('local')} needs {self._key('path')}=FILE, FOLDER or GLOB.")
        if self.name == "custom" and not self.target:
            needs = f"{self._said('custom')} needs {self._key('target')}=package.module.Class."
            problems.append(f"target: is missing: {needs}")
        if self.is_on_hub and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo or ""):
            needs = f"{self._said(self.name)} needs the data set's name: {self._key('repo')}=OWNER/NAME."
            problems.append(f"repo={self.repo!r}: {needs}")
        for key, fits, source in (
            ("path", self.name == "local", "local"),
            ("validation_path", self.name == "local", "local"),
            ("target", self.name == "custom", "custom"),
            ("options", self.name == "custom", "custom"),
            *((key, self.is_on_hub, "hub") for key in ("repo", "revision", "files")),
            *((key, self.is_on_hub or self.name == "auto", "hub") for key in ("num_shards", "download")),
        ):
            value = getattr(self, key)
            if not fits and value not in (None, False, {}):
                problems.append(
                    f"{key}={value!r}: has no meaning for {self._said(self.name)}; say {self._said(source)}."
                )
        if problems:
            raise UserError(problems)

    @property
    def packing_mode(self) -> Mode:
        """What the packer does with the documents."""
        return "stream" if self.packing == "stream" else self.long_documents

    @property
    def is_on_hub(self) -> bool:
        """Whether the documents are those of ``repo``."""
        return self.name not in ("auto", "python_docs", "local", "custom", "mixture")

    def _said(self, name: str) -> str:
        """How a person chooses a source."""
        return f"name={name}"

    def _key(self, key: str) -> str:
        return key


@dataclass(frozen=True, kw_only=True)
class WeightedSource(SourceSettings):
    """A source of a mixture: its keys are those of ``data``, and its weight."""

    weight: float = setting(
        doc="Its share of the tokens that are trained on, against the weights of the others; any positive number.",
        above=0,
    )


@dataclass(frozen=True)
class DataSettings(SourceSettings):
    """Where the text comes from, what is held out, and how rows are packed."""

    name: Literal["auto", "python_docs", "local", "hub", "climbmix", "fineweb_edu", "custom", "mixture"] = setting(  # type: ignore[assignment]
        "python_docs",
        "auto: python_docs where it is text enough for the plan, else climbmix; python_docs: docstrings found on this "
        "machine; local: files under data.path; hub: the data set data.repo; custom: the class data.target; mixture: "
        "several of these, data.sources.",
    )
    sources: dict[str, WeightedSource | None] = setting(
        factory=dict,
        doc="Of data=mixture, by a name of yours: data.sources.NAME.weight=0.3 and the keys of data; null: left out.",
    )
    max_bad_fraction: float = setting(
        MAX_BAD_FRACTION,
        "Share of the rows of a set of conversations that may be bad: they are left out; more of them stop the run.",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        if self.name != "mixture":
            if self.sources:
                raise UserError(f"sources: have no meaning for data={self.name}; say data=mixture.")
            return super().__post_init__()
        if problems := [*self._problems_of_own_keys(), *self._problems_of_sources()]:
            raise UserError(problems)

    @property
    def parts(self) -> dict[str, WeightedSource]:
        """The sources of a mixture that are not left out, in the order of their names; of anything else none."""
        return {name: source for name, source in sorted(self.sources.items()) if source is not None}

    @property
    def opened(self) -> list[SourceSettings]:
        """The data sets that are opened for these settings: those of a mixture, or the one that this is."""
        return [*self.parts.values()] or [self]

    @property
    def own_paths(self) -> list[str]:
        """The places on this machine that the settings name, to read text there."""
        return [source.path for source in (self, *self.parts.values()) if source.path is not None]

    @property
    def own_classes(self) -> list[str]:
        """The classes that the settings name, which are imported to read text."""
        return [source.target for source in (self, *self.parts.values()) if source.target is not None]

    def without_download(self) -> DataSettings:
        """The same, and nothing is fetched."""
        parts = {name: replace(part, download=False) if part.download else part for name, part in self.parts.items()}
        download = False if self.name == "auto" or self.download else self.download
        return replace(self, download=download, sources=dict(parts))

    def _problems_of_own_keys(self) -> Iterator[str]:
        for field in fields(SourceSettings):
            value = getattr(self, field.name)
            if (
                field.name != "name" and value != field.default and value not in (False, {})
            ):  # nothing is fetched anyway
                yield (
                    f"{field.name}={value!r}: has no meaning for data=mixture; each of its sources has its own: "
                    f"data.sources.NAME.{field.name}=…"
                )

    def _problems_of_sources(self) -> Iterator[str]:
        if not self.parts:
            yield "sources: data=mixture needs some: data.sources.NAME.name=…, data.sources.NAME.weight=… and so on."
        total = sum(part.weight for part in self.parts.values())
        seen: dict[tuple[object, ...], str] = {}
        for name, part in self.parts.items():
            if not re.fullmatch(r"\w[\w-]{0,63}", name, re.ASCII):
                yield f"sources.{name}: names have letters, digits, _ and -, 64 at most."
            if name in _NAMES_OF_FIGURES:
                yield f"sources.{name}: a metric of the log has that name; take another one."
            if part.weight / total < MIN_SHARE:
                yield f"sources.{name}.weight={part.weight:g}: is less than {MIN_SHARE:g} of all weights."
            options = json.dumps(part.options, sort_keys=True, default=str)
            own = part.target or (part.name if part.name == "python_docs" else None), options
            text = part.path, part.repo, part.revision, part.files, part.text_column, own
            if text in seen:
                yield f"sources.{name}: is the same text as sources.{seen[text]}; give one of them both weights."
            seen.setdefault(text, name)

    def _said(self, name: str) -> str:
        return f"data={name}"

    def _key(self, key: str) -> str:
        return f"data.{key}"


def is_much(shards: Sequence[Shard]) -> bool:
    """Whether these shards hold more text than is worked through before a training begins."""
    return sum(shard.text_bytes or 0 for shard in shards) > MAX_TEXT_AT_ONCE


def all_at_once(settings: SourceSettings, shards: Sequence[Shard]) -> bool:
    """Whether all of the text to train on is tokenized before the training begins; else shard by shard beside it."""
    return settings.shuffle == "global" and not is_much(shards)


def place_by_hash(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone, evenly spread over contents: low ones are held out."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Shard:
    """A part of one split that is tokenized, kept and verified as a whole.

    Attributes:
        name: unique within its source and split; part of a row's address. May hold slashes.
        fingerprint: changes whenever the documents or their order do; the same text elsewhere has the same one.
        contents: a hash of all that its documents are chosen from. Shards with the same one share text, whichever
            split they belong to and by whatever rule; of nothing at all it is "".
        read: gives the documents from the first; every call the same ones. Blank ones are "", and keep their place.
        fetch: has what is read on the disk; called ahead, so that nobody waits for it. Reading fetches it too.
        text_bytes: about how many bytes of text it was chosen from; None: not known, and not many.
    """

    name: str
    split: Split
    fingerprint: str
    contents: str
    read: Callable[[], Iterator[str]]
    fetch: Callable[[], object] | None = None
    text_bytes: float | None = None

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
        """Changes whenever any document of any split does: the corpus hash that metrics are quoted with."""

    def describe(self) -> str:
        """One line for people: what it holds, and its hash."""

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, in an order that does not change while the text stays the same."""


def too_little_text(source: Source, split: Split) -> UserError:
    """What is said of a source that has no document with a token in a split."""
    return UserError(
        f"{source.name}: there is too little text: nothing of it is left for the {split} split.",
        fix="Give more text (data.path=…), or say what to validate on (data.validation_path=…).",
    )
