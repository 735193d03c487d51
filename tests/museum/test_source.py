"""Bugs that are kept out of the source as a whole, whoever writes the next file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "src").rglob("*.py"), ROOT / "train.py"])
TEXT_METHODS = {"read_text": 0, "write_text": 1}


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a file, with the name of what is called (of a method: its last part)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield node, name


def opens_text_without_encoding(call: ast.Call, name: str) -> bool:
    """Whether a call opens a text file and leaves the encoding to the machine."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    texts += [keyword.value.value for keyword in call.keywords if isinstance(keyword.value, ast.Constant)]
    if name == "open":
        named = isinstance(call.func, ast.Name) or any(isinstance(text, str) for text in texts) or not call.args
        is_os = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os"
        return named and not is_os and not any(isinstance(text, str) and "b" in text for text in texts)
    return name in TEXT_METHODS and isinstance(call.func, ast.Attribute) and len(call.args) <= TEXT_METHODS[name]


def test_museum_35_every_text_file_is_opened_as_utf8() -> None:
    """Files opened in the machine's encoding: text of other languages broke on Windows."""
    found = [
        f"{path}:{call.lineno}"
        for path in FILES
        for call, name in calls(path)
        if opens_text_without_encoding(call, name)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open('a')", True),
        ("open(p, 'rb')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('w')", True),
        ("p.open(mode='rb')", False),
        ("p.read_text()", True),
        ("p.write_text(t, encoding='utf-8')", False),
        ("write_text(p, t)", False),
        ("os.open(p, os.O_RDONLY)", False),
    ],
)
def test_what_the_guard_of_museum_35_sees(source: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert [opens_text_without_encoding(*found) for found in calls(tmp_path / "a.py")] == [expected]


def test_museum_34_and_55_nothing_is_evaluated_or_unpickled() -> None:
    """Code in a calculator's input and in a tokenizer's pickle ran with the rights of whoever opened it."""
    forbidden = {"eval", "exec", "alarm", "setitimer"}
    found = [
        f"{path}:{call.lineno}: {name}"
        for path in FILES
        for call, name in calls(path)
        # net.eval() takes no argument; eval(text) does.
        if name in forbidden and (isinstance(call.func, ast.Name) or name != "eval")
    ]
    assert found == []
    for path in FILES:
        imports = [
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        names = {alias.name for node in imports for alias in node.names} | {
            getattr(node, "module", "") for node in imports
        }
        assert not names & {"pickle", "dill", "marshal", "shelve"}, path
