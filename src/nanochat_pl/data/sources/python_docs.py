"""The embedded corpus: the docstrings of the standard library and of the installed dependencies, as documents.

It needs no network and is there on every machine that can run the project. What it holds depends on the versions
installed, so metrics are quoted with its hash. It does not depend on the order of files on the disk, on where they
lie, on the number of processes, or on hash seeds.

From docstring to document:

1. A docstring of at least ``MIN_CHARS`` characters becomes a document: its qualified name with its parameters, a blank
   line, its text.
2. A document is dropped where more than ``MAX_SHARE_SEEN`` of the 8-grams of its docstring have occurred in an earlier
   one: the training packages come first, so what is held out is also unlike what is trained on.
3. Whole packages are held out (``VALIDATION_PACKAGES``), never single documents: those of one package resemble each
   other.
4. The documents of each split are shuffled with a fixed seed and written as parquet shards.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, explain_disk_errors
from nanochat_pl.data.cache.content_cache import read_sealed, write_sealed
from nanochat_pl.data.near_duplicates import shares_seen_before
from nanochat_pl.data.sources.base import SPLITS, Shard, Split
from nanochat_pl.data.sources.docstrings import (
    Docstring,
    Package,
    Progress,
    installed_packages,
    python_files,
    read_packages,
)

FOLDER = "python_docs"  # of all corpora, in the cache
BUILDER_VERSION = 1  # counts up whenever the same packages would give other documents
MIN_CHARS = 64
MAX_SHARE_SEEN = 0.5
SHUFFLE_SEED = 20260801
DOCUMENTS_A_SHARD = 4_000
VALIDATION_PACKAGES = frozenset(
    ("asyncio", "email", "filelock", "fsspec", "jinja2", "pyparsing", "requests", "rich", "unittest")
)


@dataclass(frozen=True)
class Document:
    """One document of the corpus; ``text`` is what a model reads, the rest says where it is from."""

    text: str
    package: str
    name: str
    kind: str


class PythonDocs:
    """A built corpus in its folder: a :class:`~nanochat_pl.data.sources.base.Source`.

    Attributes:
        folder: holds the shards and ``manifest.json``, and is named after what the corpus was made of. Whatever is
            derived from the corpus alone may be kept there.
    """

    name = "python_docs"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = read_sealed(folder / "manifest.json")
        except UserError as error:
            raise UserError(error.problems, f"Remove {folder}: the corpus is then built again.") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all documents of both splits in order: the corpus hash that metrics are quoted with."""
        return self.manifest["corpus_hash"]

    def shards(self, split: Split) -> list[Shard]:
        return [
            Shard(entry["file"], split, entry["sha256"], entry["sha256"], partial(_texts, self.folder / entry["file"]))
            for entry in self.manifest["splits"][split]["shards"]
        ]

    def documents(self, split: Split) -> Iterator[Document]:
        """All documents of a split with where they are from, in the order of the shards."""
        for entry in self.manifest["splits"][split]["shards"]:
            for row in _read_table(self.folder / entry["file"]).to_pylist():
                yield Document(**row)

    @cached_property
    def stdlib_docstrings(self) -> list[Docstring]:
        """Every docstring of the standard library's training packages, short ones and copies among them."""
        return [Docstring(**row) for row in _read_table(self.folder / "stdlib.parquet").to_pylist()]

    def describe(self) -> str:
        splits = self.manifest["splits"]
        absent = self.manifest["absent"]
        return (
            f"python_docs {self.fingerprint[:12]}: {splits['train']['documents']:,} documents "
            f"({splits['train']['bytes'] / 1e6:.1f} MB) to train on, {splits['val']['documents']:,} "
            f"({splits['val']['bytes'] / 1e6:.1f} MB) of other packages to validate on"
            + (f"; not installed: {', '.join(absent)}" if absent else "")
        )


def open_python_docs(
    cache_dir: Path,
    packages: Sequence[Package] | None = None,
    num_processes: int | None = None,
    progress: Progress | None = None,
) -> PythonDocs:
    """The corpus of the packages that are installed now: built where it is not in the cache yet (about 10 seconds).

    Args:
        cache_dir: the corpus lies in ``cache_dir/python_docs/KEY``; KEY changes with the packages, their versions and
            files, the version of Python and this builder.
        packages: what to read instead of what is installed.
        num_processes: processes that read; see :func:`~nanochat_pl.data.sources.docstrings.read_packages`.

    Raises:
        UserError: the cache cannot be written, a source file cannot be read, or there is nothing to read.
    """
    absent: list[str] = []
    if packages is None:
        packages, absent = installed_packages()
    folder = cache_dir / FOLDER / _key(packages)
    if not (folder / "manifest.json").exists():
        rank_zero_print("Reading the documentation of the packages on this machine, once: some seconds …")
        ensure_folder(folder.parent)
        docstrings = read_packages(packages, num_processes, progress)
        with (
            explain_disk_errors(folder),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary,
        ):
            built = Path(temporary) / "corpus"
            built.mkdir()
            _write_corpus(built, docstrings, packages, absent)
            _move_into_place(built, folder)
    return PythonDocs(folder)


def built_python_docs(cache_dir: Path) -> PythonDocs | None:
    """The corpus of the packages that are installed now, where it has been built."""
    folder = cache_dir / FOLDER / _key(installed_packages()[0])
    return PythonDocs(folder) if (folder / "manifest.json").exists() else None


def _move_into_place(built: Path, folder: Path) -> None:
    """Rename a finished corpus to its place, unless another process was faster: then theirs is the same."""
    try:
        built.rename(folder)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise


def _key(packages: Sequence[Package]) -> str:
    """What the corpus is made of, as 16 hexadecimal digits. The size of each file is in it: versions may lie."""
    digest = hashlib.sha256()
    rules = [BUILDER_VERSION, MIN_CHARS, MAX_SHARE_SEEN, SHUFFLE_SEED, DOCUMENTS_A_SHARD, sorted(VALIDATION_PACKAGES)]
    digest.update(json.dumps([rules, platform.python_version()]).encode())
    for package in packages:
        sizes = [(module, path.stat().st_size) for module, path in python_files(package)]
        digest.update(json.dumps([package.name, package.version, package.is_stdlib, sizes]).encode())
    return digest.hexdigest()[:16]


def make_documents(docstrings: Sequence[Docstring]) -> dict[Split, list[Document]]:
    """The documents of both splits: long enough, no near duplicates, shuffled.

    Args:
        docstrings: in the order of precedence within each split: of two alike the later is dropped.
    """
    candidates = [docstring for docstring in docstrings if len(docstring.text) >= MIN_CHARS]
    candidates.sort(key=lambda docstring: docstring.package in VALIDATION_PACKAGES)  # stable: training first
    shares = shares_seen_before([docstring.text for docstring in candidates])
    splits: dict[Split, list[Document]] = {"train": [], "val": []}
    for docstring, share in zip(candidates, shares, strict=True):
        if share <= MAX_SHARE_SEEN:
            splits["val" if docstring.package in VALIDATION_PACKAGES else "train"].append(_document(docstring))
    for documents in splits.values():
        random.Random(SHUFFLE_SEED).shuffle(documents)
    return splits


def _document(docstring: Docstring) -> Document:
    callable_ = docstring.kind in ("function", "method")
    title = f"{docstring.name}({docstring.parameters})" if callable_ else docstring.name
    return Document(f"{title}\n\n{docstring.text}", docstring.package, docstring.name, docstring.kind)


def _write_corpus(
    folder: Path, docstrings: Sequence[Docstring], packages: Sequence[Package], absent: Sequence[str]
) -> None:
    splits = make_documents(docstrings)
    for split, fix in (("train", "Install the package's dependencies."), ("val", "Install one of them.")):
        if not splits[split]:  # type: ignore[index]
            problem = f"python_docs: no docstring for its {split} split; packages held out: "
            raise UserError(problem + ", ".join(sorted(VALIDATION_PACKAGES)), fix=fix)
    manifest: dict[str, Any] = {
        "builder_version": BUILDER_VERSION,
        "python": platform.python_version(),
        "packages": {package.name: package.version for package in packages},
        "absent": list(absent),
        "docstrings": len(docstrings),
        "long_enough": sum(len(docstring.text) >= MIN_CHARS for docstring in docstrings),
        "splits": {split: _write_split(folder, split, splits[split]) for split in SPLITS},
    }
    shard_hashes = [shard["sha256"] for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    manifest["corpus_hash"] = hashlib.sha256("".join(shard_hashes).encode()).hexdigest()
    stdlib = {package.name for package in packages if package.is_stdlib} - VALIDATION_PACKAGES
    rows = [asdict(docstring) for docstring in docstrings if docstring.package in stdlib]
    names = ("package", "name", "kind", "parameters", "text")
    _write_table(folder / "stdlib.parquet", rows, names)
    write_sealed(folder / "manifest.json", manifest)


def _write_split(folder: Path, split: Split, documents: Sequence[Document]) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    for start in range(0, len(documents), DOCUMENTS_A_SHARD):
        part = documents[start : start + DOCUMENTS_A_SHARD]
        file = f"{split}-{len(shards):05d}.parquet"
        _write_table(folder / file, [asdict(document) for document in part], ("text", "package", "name", "kind"))
        shards.append({"file": file, "documents": len(part), "sha256": _hash_of_texts([d.text for d in part])})
    num_bytes = sum(len(document.text.encode()) for document in documents)
    packages = sorted({document.package for document in documents})
    return {"documents": len(documents), "bytes": num_bytes, "packages": packages, "shards": shards}


def _hash_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 over texts, each with its length in front, so that no two lists of texts have the same bytes."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _write_table(path: Path, rows: list[dict[str, str]], columns: Sequence[str]) -> None:
    schema = pa.schema([(column, pa.string()) for column in columns])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", row_group_size=1_000)


def _texts(path: Path) -> Iterator[str]:
    for row in _read_table(path, ["text"]).column("text"):
        yield row.as_py()


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        fix = f"Delete {path.parent}: it is made again in seconds."
        raise UserError(f"{path}: a part of the corpus cannot be read: {error}", fix=fix) from error
