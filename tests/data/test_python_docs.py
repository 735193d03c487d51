"""The embedded corpus: read without importing, free of near duplicates, split by package, always the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.near_duplicates import shares_seen_before
from nanochat_pl.data.sources.docstrings import (
    Package,
    docstrings_of_source,
    installed_packages,
    python_files,
    read_packages,
)
from nanochat_pl.data.sources.python_docs import MAX_SHARE_SEEN, VALIDATION_PACKAGES, open_python_docs

SENTENCE = "the model reads a row of tokens and learns which one follows from what stood before it in the text"
WORDS = SENTENCE.split()


def prose(seed: int, length: int = 30) -> str:
    return " ".join(f"{WORDS[(seed * 7 + n * (seed % 5 + 1)) % len(WORDS)]}{seed}x{n}" for n in range(length))


def write_package(folder: Path, name: str, seed: int, shared: str = "") -> Package:
    root = folder / name
    (root / "inner").mkdir(parents=True)
    (root / "tests").mkdir()
    module = f'"""Module of {name}: {prose(seed)}"""\n'
    for n in range(4):
        module += f'def function_{n}(data, *rest, key=None, **more):\n    """Function {prose(seed + 10 + n)}"""\n'
    (root / "__init__.py").write_text(module, encoding="utf-8")
    inner = f'class Thing:\n    """A thing {prose(seed + 20)}"""\n'
    inner += f'    def method(self, a, *, b):\n        """{shared or prose(seed + 21)}"""\n        def local():\n'
    inner += f'            """{prose(seed + 22)}"""\n'
    (root / "inner" / "part.py").write_text(inner, encoding="utf-8")
    (root / "inner" / "empty.py").write_text('def f():\n    """Short."""\n', encoding="utf-8")
    (root / "inner" / "broken.py").write_text("print 'Python 2'\n", encoding="utf-8")
    (root / "tests" / "case.py").write_text(f'"""{prose(seed + 23)}"""\n', encoding="utf-8")
    return Package(name, "1.0", root)


@pytest.fixture()
def packages(tmp_path) -> list[Package]:
    folder = tmp_path / "site"
    shared = prose(999, 60)
    return [
        write_package(folder, "alpha", 100, shared),
        write_package(folder, "beta", 200, "As always: " + shared),
        write_package(folder, "rich", 300, shared + " indeed."),
    ]


def texts(source, split):
    return [text for shard in source.shards(split) for text in shard.documents()]


def test_docstrings_of_a_file():
    source = '''
"""Module."""
if True:
    def public(a, b=1, *args, c: int, **kwargs) -> None:
        """Do
            it.
        """
try:
    class Box:
        """A box."""
        def open(self, how, *, wide): "Open it."
        @classmethod
        async def make(cls, /): "Make one."
        def silent(self): pass
except ImportError:
    def fallback(): "Instead."
def half(): "\\ud800"
def escape(): "\\d"
'''
    found = [(d.name, d.kind, d.parameters, d.text) for d in docstrings_of_source(source, "pkg", "pkg.mod")]
    assert found == [
        ("pkg.mod", "module", "", "Module."),
        ("pkg.mod.public", "function", "a, b, *args, c, **kwargs", "Do\nit."),
        ("pkg.mod.Box", "class", "", "A box."),
        ("pkg.mod.Box.open", "method", "how, *, wide", "Open it."),
        ("pkg.mod.Box.make", "method", "", "Make one."),
        ("pkg.mod.fallback", "function", "", "Instead."),
        ("pkg.mod.escape", "function", "", "\\d"),
    ]
    for bad in ("print 'x'", b"\xff\xfe", "x = 1\x00", "(" * 5_000):
        assert docstrings_of_source(bad, "pkg", "pkg.mod") == []


def test_corpus_of_a_few_packages(packages, tmp_path):
    progress = []
    source = open_python_docs(tmp_path / "cache", packages, 1, lambda done, total: progress.append((done, total)))
    train, val = texts(source, "train"), texts(source, "val")
    assert len(train) == 7 + 6 and len(val) == 6  # beta's and rich's copies of one docstring are dropped
    assert f"alpha.function_0(data, *rest, key, **more)\n\nFunction {prose(110)}" in train
    assert f"rich.inner.part.Thing\n\nA thing {prose(320)}" in val
    assert all(document.package == "rich" for document in source.documents("val"))
    assert not any("tests" in text or "local" in text or "Short" in text for text in train + val)
    assert [document.text for document in source.documents("train")] == train
    assert progress[-1] == (12, 12)
    assert "13 documents" in source.describe() and source.fingerprint[:12] in source.describe()


def test_corpus_depends_on_nothing_but_the_text(packages, tmp_path, monkeypatch):
    """Neither on processes, nor on where packages lie, nor on the order in which the file system lists files."""
    first = open_python_docs(tmp_path / "one", packages, 1)
    moved = [Package(p.name, p.version, tmp_path / "elsewhere" / p.name) for p in packages]
    shutil.copytree(tmp_path / "site", tmp_path / "elsewhere")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((f, d, sorted(n)[::-1]) for f, d, n in walk(top)))
    second = open_python_docs(tmp_path / "two", moved, 2)
    assert first.fingerprint == second.fingerprint
    assert first.folder.name == second.folder.name
    for split in ("train", "val"):
        assert texts(first, split) == texts(second, split)
        assert [s.fingerprint for s in first.shards(split)] == [s.fingerprint for s in second.shards(split)]


def test_reading_in_two_processes_gives_the_same(packages):
    many = packages * 5  # more files than one process takes at a time
    assert read_packages(many, 2) == read_packages(many, 1)


def test_program_from_a_pipe_can_read_too(packages):
    """New processes import the main program, and cannot where it has no file: then one process reads it all."""
    program = (
        "from pathlib import Path\n"
        "from nanochat_pl.data.sources.docstrings import Package, read_packages\n"
        f"packages = [Package('alpha', '1', Path({str(packages[0].root)!r}))] * 20\n"
        "print(len(read_packages(packages, 2)))\n"
    )
    finished = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, check=True)
    assert int(finished.stdout) == 20 * len(read_packages(packages[:1], 1))


def test_corpus_is_kept_and_made_anew_when_packages_change(packages, tmp_path):
    cache = tmp_path / "cache"
    first = open_python_docs(cache, packages, 1)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    assert (open_python_docs(cache, packages, 1).folder / "manifest.json").stat().st_mtime_ns == stamp
    newer = [*packages[:2], Package("rich", "1.1", packages[2].root)]
    assert open_python_docs(cache, newer, 1).folder != first.folder
    assert open_python_docs(cache, packages[::2], 1).fingerprint != first.fingerprint
    # An edited file under an unchanged version, as in an editable installation.
    path = packages[0].root / "inner" / "part.py"
    path.write_text(path.read_text(encoding="utf-8").replace("A thing", "Some thing"), encoding="utf-8")
    assert open_python_docs(cache, packages, 1).fingerprint != first.fingerprint
    names = {entry.name for entry in (cache / "python_docs").iterdir()}
    assert len(names) == 4 and not any(name.startswith("building") for name in names)


def test_a_killed_build_leaves_no_corpus(packages, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        open_python_docs(tmp_path, packages, 1)
    monkeypatch.undo()
    assert not list((tmp_path / "python_docs").iterdir())
    assert texts(open_python_docs(tmp_path, packages, 1), "val")


def test_problems_are_said(packages, tmp_path):
    with pytest.raises(UserError, match="val split"):
        open_python_docs(tmp_path / "a", packages[:2], 1)
    source = open_python_docs(tmp_path / "b", packages, 1)
    (source.folder / "train-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="Delete"):
        texts(source, "train")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="file"):
        open_python_docs(tmp_path / "file", packages, 1)


def test_docstrings_of_the_standard_library_are_kept_whole(packages, tmp_path):
    stdlib = Package("alpha", "3", packages[0].root, is_stdlib=True)
    source = open_python_docs(tmp_path, [stdlib, *packages[1:]], 1)
    kept = source.stdlib_docstrings
    assert {docstring.package for docstring in kept} == {"alpha"}
    assert "Short." in {docstring.text for docstring in kept}, "short ones too: tasks ask about them"


def test_shares_seen_before():
    first = "One two three four five six seven eight nine ten."
    shares = shares_seen_before(
        [first, first.upper() + "!", first + " " + prose(1, 30), prose(2, 30), "", "...", "short", "short", first]
    )
    assert shares[0] == 0 and shares[3] == 0
    assert shares[1] == 1, "case and punctuation do not count"
    assert shares[2] == pytest.approx(3 / 40), "of its grams, those inside the copied sentence"
    assert list(shares[4:6]) == [0, 0] and list(shares[6:8]) == [0, 1] and shares[8] == 1


def test_grams_do_not_reach_over_the_end_of_a_text():
    words = [f"w{n}" for n in range(16)]
    halves = [" ".join(words[:8]), " ".join(words[8:])]
    assert shares_seen_before([" ".join(words), *halves])[1] == pytest.approx(1 / 8)
    assert list(shares_seen_before([*halves, " ".join(words)])) == pytest.approx([0, 0, 9 / 16])


def test_installed_packages_are_in_a_fixed_order_without_machine_paths_in_names():
    packages, absent = installed_packages()
    names = [package.name for package in packages]
    assert {"statistics", "torch", "numpy"} <= set(names) and len(names) == len(set(names))
    assert not {"idlelib", "test", "this"} & set(names)
    assert not set(absent) & set(names)
    statistics = next(package for package in packages if package.name == "statistics")
    assert [module for module, _ in python_files(statistics)] == ["statistics"]


def grams(document):
    """The 8-grams of words of a document's docstring."""
    words = re.findall(r"\w+", document.split("\n\n", 1)[1].lower())
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


@pytest.mark.slow
def test_the_real_corpus(tmp_path):
    source = open_python_docs(tmp_path)
    train, val = texts(source, "train"), texts(source, "val")
    assert len(train) > 10_000 and len(val) > 500
    assert len(set(train)) == len(train) and not set(train) & set(val)
    assert set(source.manifest["splits"]["val"]["packages"]) <= VALIDATION_PACKAGES
    # Nothing held out shares most of its 8-grams with what is trained on.
    held_out = [grams(text) for text in val]
    wanted = set().union(*held_out)
    seen = set().union(*(wanted & grams(text) for text in train))
    assert max(len(own & seen) / len(own) for own in held_out if own) <= MAX_SHARE_SEEN
    manifest = json.dumps(source.manifest)
    assert str(Path.home()) not in manifest and "site-packages" not in manifest
