"""What a page claims, taken out of its Markdown and held against the repository."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from nanochat_pl.cli.download import compose_download
from nanochat_pl.cli.help import compose_command
from nanochat_pl.cli.main import COMMANDS, module_of
from nanochat_pl.cli.pipeline import check_all, steps_of
from nanochat_pl.cli.search import study_of
from nanochat_pl.common.errors import UserError
from nanochat_pl.config import hydra_app
from nanochat_pl.config.config_dir import groups
from nanochat_pl.config.overrides import UNKNOWN, is_hydra_key, type_of_key
from tests.helpers.sweeps import jobs_of

SHELL = ("sh", "bash", "shell", "console", "")
# A sign that something was left out for brevity; whatever else the command says is still checked.
ELLIPSIS = "…"
# name=value in code that is an argument of Python or a variable of the shell, and no key of ours.
NOT_OUR_KEYS = frozenset({"weights_only", "temperature", "max_tokens", "device", "dtype", "reduction"})
# The first part of a path in code that must be a file of the repository.
FOLDERS = ("benchmarks", "conf_experiments", "configs", "docs", "notebooks", "src", "tests")
ROOT_FILES = re.compile(r"^[\w.-]+\.(toml|py)$|^(README\.md|(constraints|hashes)\.txt|Makefile|LICENSE|\.ci/\w+)$")
# A block of source that a page prints: <!-- source: src/nanochat_pl/training/module.py:LMModule.training_step -->
SOURCE_MARK = re.compile(r"^<!-- source: (?P<path>[\w./]+):(?P<name>[\w.]+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block, with the HTML comment that stands right before it."""

    language: str
    marks: tuple[str, ...]
    text: str
    comment: str
    line: int


@dataclass(frozen=True)
class Page:
    """What is checked of a Markdown file."""

    path: Path
    blocks: tuple[Block, ...]
    inline: tuple[str, ...]
    links: tuple[str, ...]
    headings: tuple[str, ...]

    def commands(self) -> Iterator[list[str]]:
        """Commands in shell blocks (lines joined at backslashes, a leading $ dropped) and in inline code, as words."""
        lines = [
            line.removeprefix("$ ")
            for block in self.blocks
            if block.language in SHELL
            for line in block.text.replace("\\\n", " ").splitlines()
        ]
        for line in [*lines, *self.inline]:
            for part in re.split(r"&&|;|\||&(?=\s|$)", line):
                words = _words(part)
                if words and (words[0] == "make" or _our_command(words) is not None):
                    yield words

    def runnable(self) -> Iterator[Block]:
        """Python blocks marked ``python run``."""
        return (block for block in self.blocks if block.language == "python" and "run" in block.marks)


def read_page(path: Path) -> Page:
    """Parse a Markdown file."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(path.read_text(encoding="utf-8"))
    blocks, inline, links, headings = [], [], [], []
    for before, token in zip([Token("", "", 0), *tokens], tokens, strict=False):
        if token.type == "fence":
            language, *marks = token.info.split() or [""]
            comment = before.content.strip() if before.type == "html_block" else ""
            blocks.append(Block(language, tuple(marks), token.content, comment, (token.map or [0])[0] + 1))
        for child in token.children or []:
            if child.type == "code_inline":
                inline.append(child.content)
            links += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
        if token.type == "inline" and before.type == "heading_open":
            headings.append(re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-"))
    return Page(path, tuple(blocks), tuple(inline), tuple(links), tuple(headings))


def validation_errors(page: Page, root: Path) -> list[str]:
    """Everything in a page that is not so, as lines."""
    return [f"{page.path.name}: {problem}" for check in CHECKS for problem in check(page, root)]


def check_commands(page: Page, root: Path) -> Iterator[str]:
    """Every command composes; every make target exists."""
    targets = _make_targets(root)
    for words in page.commands():
        shown = " ".join(words)
        if words[0] == "make":
            wanted = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word != ELLIPSIS]
            yield from (f"{shown}: the Makefile has no target {word}" for word in wanted if word not in targets)
            continue
        where = _our_command(words)
        assert where is not None
        verb_and_keys = (["train"] if words[where] == "train.py" else []) + words[where + 1 :]
        try:
            _compose([word for word in verb_and_keys if word != ELLIPSIS])
        except UserError as error:
            yield from (f"{shown}: {problem}" for problem in error.problems)


def _our_command(words: list[str]) -> int | None:
    """Which word is our program, behind what a shell, torchrun or sbatch is told; None: the command is another's."""
    first = words[0]
    for number, word in enumerate(words):
        behind_launcher = first in ("torchrun", "sbatch", "python", "srun") or "=" in first
        ours = word in ("train.py", "nanochat_pl.cli.main") or word.endswith(".sbatch") or word == "nanochat-pl"
        if ours and (number == 0 or behind_launcher):
            return number
    return None


def _compose(words: list[str]) -> None:
    """Compose and check what a command line says, as its command would, without running it."""
    if not words or words[0].startswith("-") or words[0] == "<command>":
        return
    command, arguments = words[0], words[1:]
    if command not in COMMANDS:
        raise UserError(f"{command}: there is no such command")
    if "--help" in arguments:
        return
    options = hydra_app.parse(arguments)
    if options.config_dir is not None or options.shell_completion:
        return  # with files of the reader's own
    arguments = list(options.own_overrides)
    if options.multirun:
        for job in jobs_of(options.overrides, command):
            _compose([command, *job.overrides])
        return
    if command == "pipeline":
        check_all(steps_of(arguments))
    elif command == "search":
        study_of(arguments)
    elif command == "download":
        compose_download(arguments)
    else:
        compose_command(command, arguments)


def check_keys(page: Page, root: Path) -> Iterator[str]:
    """``model.depth=…`` in backticks is a key of a command."""
    schemas = [importlib.import_module(module_of(command)).Config for command in COMMANDS]
    for code in page.inline:
        match = re.match(r"^([a-z_]+(?:\.\w+)*)=", code)
        if not match or match[1] in (*NOT_OUR_KEYS, *groups(), "experiment") or is_hydra_key(match[1]):
            continue
        key = re.sub(r"^stages\.\w+\.", "", match[1])
        if all(type_of_key(schema, key) is UNKNOWN for schema in schemas):
            yield f"`{code}`: no command has such a key"


def check_links(page: Page, root: Path) -> Iterator[str]:
    """Relative links lead to files, and to headings where they name one."""
    for link in page.links:
        if re.match(r"^(https?|mailto|data):", link):
            continue
        address, _, anchor = link.partition("#")
        target = (page.path.parent / address).resolve() if address else page.path
        if not target.exists():
            yield f"{link}: there is no such file"
        elif anchor and target.suffix == ".md" and anchor not in read_page(target).headings:
            yield f"{link}: there is no such heading"


def check_files(page: Page, root: Path) -> Iterator[str]:
    """A path in backticks that begins with one of our folders, or has the name of a file at the root, exists."""
    for code in page.inline:
        if any(sign in code for sign in (" ", ELLIPSIS, "<", "NAME", "{", "=", "(")):
            continue
        path = code.split(":")[0].rstrip("/")
        ours = path.split("/")[0] in FOLDERS and "/" in path
        if (ours or ROOT_FILES.match(path)) and not any(root.glob(path)) and not _inside(root, path):
            yield f"`{code}`: there is no such file"


def check_blocks(page: Page, root: Path) -> Iterator[str]:
    """Python compiles, YAML parses, and printed source is the source."""
    for block in page.blocks:
        try:
            if block.language == "python":
                ast.parse(block.text)
            elif block.language == "yaml":
                yaml.safe_load(block.text)
        except (SyntaxError, yaml.YAMLError) as error:
            yield f"line {block.line}: {' '.join(str(error).split())}"
        if mark := SOURCE_MARK.match(block.comment):
            source = _source(root / mark["path"], mark["name"])
            if source is None or source.strip() != block.text.strip():
                yield f"line {block.line}: is not what {mark['path']} says of {mark['name']}"


CHECKS = (check_commands, check_keys, check_links, check_files, check_blocks)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # an unpaired apostrophe: prose, not a command
        return []


def _make_targets(root: Path) -> set[str]:
    makefile = root / "Makefile"
    return (
        set(re.findall(r"^([\w-]+):", makefile.read_text(encoding="utf-8"), flags=re.M)) if makefile.exists() else set()
    )


def _inside(root: Path, name: str) -> bool:
    """Whether a bare file name is that of a file in the package, which pages may name without its folder."""
    return "/" not in name and any((root / "src").rglob(name))


def _source(path: Path, name: str) -> str | None:
    """The text of a function or class of a file; methods are named Class.method."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    node = None
    for part in name.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno] if node else []
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    return "\n".join(line[indent:] for line in lines)
