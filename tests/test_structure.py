"""Layering: which package may import which, and where certain things may stand."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nanochat_pl"
# A package may import from those before it, and from itself.
PACKAGES = (
    "common",
    "ledger",
    "distributed",
    "tokenizer",
    "model",
    "optim",
    "planning",
    "bundle",
    "data",
    "convert",
    "tools",
    "tasks",
    "engine",
    "serving",
    "evaluation",
    "comparison",
    "training",
    "report",
    "doctor",
    "inspection",
    "selftest",
    "config",
    "cli",
)
# The one package that may import a library.
ONLY_IN = {
    "lightning": "training",
    "pytorch_lightning": "training",
    "hydra": "config",
    "omegaconf": "config",
    "fastapi": "serving",
}
MAX_LINES = 400
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, at_import: bool = False) -> Iterator[str]:
    """Dotted names of all modules (and of names in modules) that a file imports.

    ``at_import``: only those that are imported with the file itself, not inside of functions or for types alone.
    """
    tree = tree_of(path)
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    """The package of a file; empty for the package's own __init__."""
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_folder_is_a_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(PACKAGES)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in FILES:
        allowed = PACKAGES[: PACKAGES.index(package_of(path)) + 1] if package_of(path) else ()
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "nanochat_pl" and len(parts) > 1 and parts[1] in PACKAGES and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_of(path): path for path in FILES}

    def module_behind(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    edges = {
        name: {module_behind(other) for other in imported(path, at_import=True)} & modules.keys()
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_package(library: str) -> None:
    users = {package_of(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= {ONLY_IN[library]}


def test_one_training_loop() -> None:
    """`backward(` stands in one file, in `training` (a regression: loops copied for each stage)."""
    users = [
        path.parent.name
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and "backward" in node.func.attr.split("_")
        if not node.func.attr.startswith(("save_for", "block_backward"))
    ]
    assert users == ["training"]


def test_files_stay_short() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def test_every_import_is_declared() -> None:
    """A library that happened to be installed with another one was imported without being a dependency."""
    lines = re.findall(r'"([A-Za-z0-9_-]+)[>=!<]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {re.sub(r"[-_.]+", "-", name).lower() for name in lines}
    distributions = metadata.packages_distributions()
    used = {name.split(".")[0] for path in FILES for name in imported(path)}
    used -= {"nanochat_pl", *sys.stdlib_module_names}
    homes = {name: {re.sub(r"[-_.]+", "-", d).lower() for d in distributions.get(name, [])} for name in used}
    assert {name: found for name, found in homes.items() if not found & declared} == {}


def test_the_list_with_hashes_has_the_versions_of_the_constraints() -> None:
    """One is written from the other by `make hashes`; torch alone has no hash there."""

    def pins(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==([^ ;\n]+)([^\n]*)", text, re.M)
        return {name.lower().replace("_", "-"): version for name, version, rest in found if '< "3.11"' not in rest}

    hashed = (ROOT / "hashes.txt").read_text(encoding="utf-8")
    expected = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(expected) > 100 and expected.pop("torch")
    assert pins(hashed) == expected
    blocks = re.split(r"^(?=[\w.-]+==)", hashed, flags=re.M)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
