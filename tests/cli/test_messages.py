"""The keys that messages tell people to type are keys."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanochat_pl
from nanochat_pl.cli.main import COMMANDS, module_of
from nanochat_pl.config.config_dir import groups
from nanochat_pl.config.overrides import UNKNOWN, type_of_key

PACKAGE = Path(nanochat_pl.__file__).parent
SCHEMAS = [importlib.import_module(module_of(command)).Config for command in COMMANDS]
# Calls whose texts people read.
SPOKEN = {"UserError", "SharedError", "rank_zero_print", "print_from_any_rank", "append", "Finding", "Refused", "Use"}
# Keys of files of others, and arguments of functions.
NOT_OURS = {
    *("n_embd", "n_head", "n_kv_head", "model_type", "rope_theta", "rope_parameters", "dataset_uri", "gold"),
    *("split_special_tokens", "max_batch", "compute_dtype", "token_id", "every_steps", "histograms_every_steps"),
    "repeat",  # of a task that the message names before
}
# A key with a value as it is typed. Behind a letter, a dot or a bracket it is part of something else: code, a file.
KEY = re.compile(r"(?<![\w.(/{}\0-])((?:[a-z][a-z_]*\.)*[a-z][a-z_]*)=(?=[\w\"'\[{…./\0-]|$)")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string in a call that speaks; what is formatted into one is a NUL."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in SPOKEN:
                yield from _strings([*node.args, *(keyword.value for keyword in node.keywords)])


def _strings(nodes: list[ast.expr]) -> Iterator[tuple[int, str]]:
    todo: list[ast.AST] = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
            todo += [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            todo += ast.iter_child_nodes(node)


def unknown_keys(text: str, own: set[str] = NOT_OURS) -> list[str]:
    names = [re.sub(r"^stages\.\w+\.", "", name) for name in KEY.findall(text)]
    return [
        name
        for name in names
        if name not in (*groups(), "experiment", *own)
        and all(type_of_key(schema, name) is UNKNOWN for schema in SCHEMAS)
    ]


def fields_of(tree: ast.AST) -> set[str]:
    """Fields of the classes of a file: what reads settings puts the group before what these say of their own."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    lines = [line for cls in classes for line in cls.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id for line in lines if isinstance(line.target, ast.Name)}


def test_keys_in_messages_are_keys() -> None:
    read, wrong = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = NOT_OURS | fields_of(tree)
        for line, text in texts(tree):
            read += len(KEY.findall(text))
            wrong += [f"{path.relative_to(PACKAGE)}:{line}: {key}=" for key in unknown_keys(text, own)]
    assert wrong == []
    assert read > 150, "the messages are not where they were looked for"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise UserError("x.", "Set model.dpeth=4 or run=NEW.")', ["model.dpeth"]),
        ('raise UserError(f"trainer.acelerator={value}: is none.")', ["trainer.acelerator"]),
        ('rank_zero_print(f"{name}: begin anew with resme=never")', ["resme"]),
        ('problems.append("data.path=x: or " + "data.pth=x")', ["data.pth"]),
        ('UserError("f(x=1), …/step=000100.ckpt, NAME=3")', []),
    ],
)
def test_what_is_no_key_is_found(source: str, found: list[str]) -> None:
    assert [key for _, text in texts(ast.parse(source)) for key in unknown_keys(text)] == found
