"""Docstrings of installed Python packages, read with ``ast``: nothing is imported, nothing is run.

Only the standard library is used here, so that the processes which read start in a moment.
"""

from __future__ import annotations

import ast
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import usable_cpus
from nanochat_pl.common.text_files import is_unicode

Progress = Callable[[int, int], None]  # (files read, files in all)

# Folders and files that repeat what is elsewhere (copies of other projects) or hold next to no prose (tests).
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "tests", "test", "_internal", "_vendor", "vendor", "third_party", "externals", "benchmarks")
)
_SKIPPED_STDLIB = frozenset(
    ("antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo")
)
# Distribution → top-level package, of what the project depends on, itself or through others, on every platform.
DEPENDENCIES = {
    "absl-py": "absl",
    "aiohttp": "aiohttp",
    "attrs": "attr",
    "click": "click",
    "contourpy": "contourpy",
    "filelock": "filelock",
    "fonttools": "fontTools",
    "fsspec": "fsspec",
    "grpcio": "grpc",
    "huggingface_hub": "huggingface_hub",
    "hydra-core": "hydra",
    "jinja2": "jinja2",
    "lightning": "lightning",
    "markdown": "markdown",
    "markdown-it-py": "markdown_it",
    "matplotlib": "matplotlib",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "packaging": "packaging",
    "pillow": "PIL",
    "platformdirs": "platformdirs",
    "pyarrow": "pyarrow",
    "pygments": "pygments",
    "pyparsing": "pyparsing",
    "python-dateutil": "dateutil",
    "requests": "requests",
    "rich": "rich",
    "safetensors": "safetensors",
    "sympy": "sympy",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
    "urllib3": "urllib3",
    "werkzeug": "werkzeug",
}
_FILES_A_TASK = 24


@dataclass(frozen=True)
class Package:
    """A package to read: its import name, its version, and its folder or its one file."""

    name: str
    version: str
    root: Path
    is_stdlib: bool = False


@dataclass(frozen=True)
class Docstring:
    """One documented module, class, function or method.

    Attributes:
        package: the top-level package, e.g. ``statistics``.
        name: the qualified name, e.g. ``statistics.NormalDist.mean``.
        kind: ``module``, ``class``, ``function`` or ``method``.
        parameters: names of the parameters as one would write them in a call, e.g. ``data, *, n``; no annotations.
    """

    package: str
    name: str
    kind: str
    parameters: str
    text: str


def installed_packages() -> tuple[list[Package], list[str]]:
    """The modules of the standard library, then :data:`DEPENDENCIES`; and the names of those that are not installed."""
    stdlib_folder = Path(sysconfig.get_paths()["stdlib"])
    packages, absent = [], []
    for name in sorted(sys.stdlib_module_names - _SKIPPED_STDLIB):
        roots = [root for root in (stdlib_folder / name, stdlib_folder / f"{name}.py") if root.exists()]
        if roots:  # the others are built in, or not part of this installation
            packages.append(Package(name, platform.python_version(), roots[0], is_stdlib=True))
    for distribution_name, name in sorted(DEPENDENCIES.items(), key=lambda item: item[1].lower()):
        try:
            distribution = importlib.metadata.distribution(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        root = Path(str(distribution.locate_file(name)))
        if root.is_dir():
            packages.append(Package(name, distribution.version, root))
        else:
            absent.append(name)
    return packages, absent


def python_files(package: Package) -> list[tuple[str, Path]]:
    """The package's source files as (module name, path), sorted by module name."""
    if package.root.is_file():
        return [(package.name, package.root)]
    found = []
    for folder, subfolders, files in os.walk(package.root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        inside = Path(folder).relative_to(package.root).parts
        for file in files:
            if file.endswith(".py") and not file.startswith(("test_", "conftest")):
                last = () if file == "__init__.py" else (file.removesuffix(".py"),)
                found.append((".".join((package.name, *inside, *last)), Path(folder) / file))
    return sorted(found)


def read_packages(
    packages: Sequence[Package], num_processes: int | None = None, progress: Progress | None = None
) -> list[Docstring]:
    """All docstrings of the packages, in their order, by module name, then in the order of the file.

    Args:
        num_processes: processes that read side by side; as many as there are usable CPUs by default. The result does
            not depend on it.
        progress: called with (files read, files in all) as the reading goes on.

    Raises:
        UserError: a file is there but cannot be read.
    """
    files = [(package.name, *file) for package in packages for file in python_files(package)]
    tasks = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
    if num_processes is None:
        num_processes = usable_cpus()
    num_processes = min(num_processes, len(tasks))
    if num_processes <= 1:
        return _collect(map(_read_files, tasks), len(files), progress)
    # spawn: a fork of a process with threads (torch has some) may hang.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            return _collect(pool.map(_read_files, tasks), len(files), progress)
    except BrokenProcessPool:
        # A new process imports the main program first, and dies if that comes from a pipe or calls this unguarded.
        return _collect(map(_read_files, tasks), len(files), progress)


def _collect(results: Iterator[list[Docstring]], num_files: int, progress: Progress | None) -> list[Docstring]:
    found: list[Docstring] = []
    for number, result in enumerate(results, start=1):
        found.extend(result)
        if progress is not None:
            progress(min(number * _FILES_A_TASK, num_files), num_files)
    return found


def _read_files(files: Sequence[tuple[str, str, Path]]) -> list[Docstring]:
    found: list[Docstring] = []
    for package, module, path in files:
        try:
            source = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        found.extend(docstrings_of_source(source, package, module))
    return found


def docstrings_of_source(source: bytes | str, package: str, module: str) -> list[Docstring]:
    """The docstrings of one file; none where it is no Python of this version (templates, files for Python 2)."""
    with warnings.catch_warnings():
        # Wrong escapes in other people's source are theirs: "\d" in a plain string.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []  # MemoryError is what the parser raises for brackets nested too deeply
    found = [Docstring(package, module, "module", "", ast.get_docstring(tree) or "")]
    found.extend(_definitions(tree.body, package, module, in_class=False))
    return [docstring for docstring in found if docstring.text and is_unicode(docstring.text)]


def _definitions(body: Sequence[ast.AST], package: str, prefix: str, in_class: bool) -> Iterator[Docstring]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kind = "method" if in_class else "function"
            text = ast.get_docstring(node) or ""
            yield Docstring(package, f"{prefix}.{node.name}", kind, _parameters(node.args, in_class), text)
        elif isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            yield Docstring(package, name, "class", "", ast.get_docstring(node) or "")
            yield from _definitions(node.body, package, name, in_class=True)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for branch in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(getattr(node, branch, ()), package, prefix, in_class)


def _parameters(arguments: ast.arguments, in_class: bool) -> str:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if in_class and names[:1] in (["self"], ["cls"]):
        names = names[1:]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names.extend(argument.arg for argument in arguments.kwonlyargs)
    if arguments.kwarg is not None:
        names.append(f"**{arguments.kwarg.arg}")
    return ", ".join(names)
