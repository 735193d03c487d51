"""Bugs that are kept out of the source as a whole, whoever writes the next file."""

from __future__ import annotations

import ast
import functools
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "src").rglob("*.py"), ROOT / "train.py"])
TEXT_METHODS = {"read_text": 0, "write_text": 1}


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree; parsed once for all tests."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a file, with the name of what is called (of a method: its last part)."""
    for node in nodes(path):
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


def test_every_text_file_is_opened_as_utf8() -> None:
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
def test_what_the_guard_of_encodings_sees(source: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert [opens_text_without_encoding(*found) for found in calls(tmp_path / "a.py")] == [expected]


# The one file that runs foreign code, in an isolated process that was started for it.
IN_THE_JAIL = "tools/sandbox/processes.py"


def test_nothing_is_evaluated() -> None:
    """Code in a calculator's input ran with the rights of whoever opened it; alarms fired outside the main thread."""
    forbidden = {"eval", "exec", "alarm", "setitimer"}
    found = [
        f"{path}:{call.lineno}: {name}"
        for path in FILES
        for call, name in calls(path)
        # net.eval() takes no argument; eval(text) does.
        if name in forbidden and (isinstance(call.func, ast.Name) or name != "eval")
        if not (name == "exec" and path.as_posix().endswith(IN_THE_JAIL))
    ]
    assert found == []


INSTRUCTIONS = frozenset(name for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes))
PICKLES = ("pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib")
# Every use of such a module, by file, and why it runs nothing of what it reads.
ALLOWED_PICKLES = {
    "convert/nanochat/safe_unpickle.py": {
        "pickle.Unpickler": "its find_class knows one name, and gives a class of ours for it",
        "pickle.UnpicklingError": "an exception",
        "pickle.dumps": "writes",
    }
}


def uses_of_pickle(path: Path) -> set[str]:
    """What a file takes of the modules that read programs, and readers of torch and numpy that would run one."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PICKLES:
            found.add(f"from {node.module}")
        if isinstance(node, ast.Import):
            found |= {f"{alias.name} as" for alias in node.names if alias.name in PICKLES and alias.asname}
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in PICKLES:
            # The names of a pickle's instructions, which are bytes and do nothing.
            found |= {ast.unparse(node)} - {f"pickle.{name}" for name in INSTRUCTIONS}
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_torch = ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True"
            if is_torch or keywords.get("allow_pickle", "False") != "False":
                found.add(ast.unparse(node))
    return found


def test_nothing_is_unpickled_but_by_the_reader_that_runs_nothing() -> None:
    """A pickle is a program, and it was read with pickle.load, torch.load and numpy.load alike."""
    package = ROOT / "src" / "nanochat_pl"
    found = {path.relative_to(package).as_posix(): uses_of_pickle(path) for path in FILES if package in path.parents}
    allowed = {name: set(uses) for name, uses in ALLOWED_PICKLES.items()}
    assert {name: uses for name, uses in found.items() if uses} == allowed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle\npickle.loads(b)", {"pickle.loads"}),
        ("import pickle as p\np.loads(b)", {"pickle as"}),
        ("from pickle import loads", {"from pickle"}),
        ("torch.load(p)", {"torch.load(p)"}),
        ("torch.load(p, weights_only=False)", {"torch.load(p, weights_only=False)"}),
        ("torch.load(p, weights_only=True)", set()),
        ("np.load(p, allow_pickle=True)", {"np.load(p, allow_pickle=True)"}),
        ("np.load(p, allow_pickle=False)", set()),
    ],
)
def test_what_the_guard_of_pickles_and_evals_sees(source: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert uses_of_pickle(tmp_path / "a.py") == expected
