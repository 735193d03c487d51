"""A hook of mkdocs: the pages of all commands and of all settings, from the classes that check them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from nanochat_pl.cli.help import KeyDescription, describe_key
from nanochat_pl.cli.main import COMMANDS, module_of
from nanochat_pl.config import config_dir
from nanochat_pl.config.overrides import is_group, without_none

COMMANDS_PAGE, SETTINGS_PAGE = "reference/commands.md", "reference/settings.md"
HEAD = "| key | type | default | meaning |\n|---|---|---|---|"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add both pages to those of docs/."""
    for address, text in ((COMMANDS_PAGE, commands_page()), (SETTINGS_PAGE, settings_page())):
        files.append(File.generated(config, address, content=text))
    return files


def commands_page() -> str:
    """Every command with its own keys; groups of keys are links to the other page."""
    lines = [
        "# Commands\n",
        "`nanochat-pl COMMAND key=value …`. These tables are made from the classes that check the settings; "
        "`nanochat-pl COMMAND --help` prints the same.\n",
    ]
    anchors = {group: anchor(key) for key, _, group in groups_of_all()}
    for command, what in COMMANDS.items():
        module = importlib.import_module(module_of(command))
        hints, extra = get_type_hints(module.Config), getattr(module, "EXTRA_KEYS", {})
        names = [field.name for field in dataclasses.fields(module.Config)]
        keys = [describe_key(module.Config, name) for name in names if not is_group(hints[name])]
        groups = [name for name in names if is_group(hints[name])]
        lines += [f"## {command}\n", f"{text(what)}\n", f"```text\n{inspect.getdoc(module)}\n```\n"]
        lines += [*table(keys, extra), ""]
        links = ", ".join(
            f"[`{name}`](settings.md#{anchors[group]})" if (group := settings_of(hints[name])) else f"`{name}`"
            for name in groups
        )
        lines += [f"Groups of keys: {links}.\n"] if groups else []
    return "\n".join(lines)


def settings_page() -> str:
    """Every group of settings once, under the first key that leads to it."""
    lines = [
        "# Settings\n",
        "Groups of keys, as `model.depth=12` on the command line or as YAML in an experiment. `GROUP=CHOICE` takes "
        "a file of `configs/GROUP`. Values are those of the classes; files and derived values (`nanochat-pl plan`) may "
        "set others.\n",
    ]
    choices = config_dir.groups()
    for key, command, group in groups_of_all():
        name = key.partition(".")[0]
        schema = importlib.import_module(module_of(command)).Config
        lines += [f"{'##' if key == name else '###'} {key} {{ #{anchor(key)} }}\n"]
        lines += [f"{text(paragraph(group))}\n"]
        if key == name and (files := choices.get(name)):
            lines += [f"Choices, `{name}=…`: {', '.join(f'`{file}`' for file in files)}.\n"]
        rows = [describe_key(schema, f"{key}.{field.name}") for field in dataclasses.fields(group)]
        lines += [*table(rows, {}), ""]
    return "\n".join(lines)


def groups_of_all() -> Iterator[tuple[str, str, Any]]:
    """Key, command and class of each group, a class once; those within a group follow it."""
    seen: set[Any] = set()
    for command in COMMANDS:
        schema = importlib.import_module(module_of(command)).Config
        for field in dataclasses.fields(schema):
            if group := settings_of(get_type_hints(schema)[field.name]):
                yield from groups_within(field.name, command, group, seen)


def groups_within(key: str, command: str, group: Any, seen: set[Any]) -> Iterator[tuple[str, str, Any]]:
    """A group and those in it that were not seen before."""
    if group in seen:
        return
    seen.add(group)
    yield key, command, group
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if inner := settings_of(hints[field.name]):
            named = f"{key}.{field.name}" + (".NAME" if get_origin(without_none(hints[field.name])) is dict else "")
            yield from groups_within(named, command, inner, seen)


def settings_of(hint: Any) -> Any:
    """The settings class of a key that is a group, or a dict of such groups; None: it is neither."""
    hint = without_none(hint)
    if get_origin(hint) is dict:
        hint = without_none(get_args(hint)[1])
    return hint if dataclasses.is_dataclass(hint) else None


def table(keys: Iterable[KeyDescription], extra: dict[str, str]) -> list[str]:
    """Rows of a table in Markdown; ``extra``: arguments that are no keys, with their meaning."""
    rows = [f"| {code(key)} | | | {text(meaning)} |" for key, meaning in extra.items()]
    for each in keys:
        meaning = text(each.meaning) + (f" ({each.bounds})" if each.bounds else "")
        default = "" if each.default in (None, "") else code(shortened(str(each.default)))
        rows.append(f"| {code(each.key)} | {text(each.type)} | {default} | {meaning} |")
    return [HEAD, *rows] if rows else []


def shortened(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}…"


def paragraph(thing: Any) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def text(words: str) -> str:
    """Plain words for a cell: what would be markup stands as it is, but for code in backticks."""
    words = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", words).replace("``", "`")
    parts = words.split("`")
    plain = [re.sub(r"([\\*_\[\]])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    marked = [code(part) for part in parts[1::2]]
    joined = [plain[0], *(part for pair in zip(marked, plain[1:], strict=False) for part in pair)]
    return "".join(joined).replace("|", "&#124;") if len(parts) % 2 else re.sub(r"([|`])", r"\\\1", words)


def code(value: str) -> str:
    """A value as code in a cell."""
    return f"<code>{value.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"


def anchor(key: str) -> str:
    return key.lower().replace(".", "-")
