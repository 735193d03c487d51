"""README and docs say what is so: commands compose, keys, targets and files exist, code runs.

The log (docs/LOG.md) tells what was done at a date; commands in it may be of their time. Only its links are checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from nanochat_pl import LMModule
from tests.helpers.docs_checks import check_links, read_page, validation_errors
from tests.helpers.forked import run_forked
from tests.helpers.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "docs" / "LOG.md"
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path != LOG)]


@pytest.fixture
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of a user's own that pages name in commands."""

    class Mine(Callback):
        def __init__(self, word: str = "") -> None:
            self.word = word

    module: Any = types.ModuleType("own_code")
    module.Mine, module.LabelSmoothing = Mine, type("LabelSmoothing", (LMModule,), {})
    monkeypatch.setitem(sys.modules, "own_code", module)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_says_is_so(path: Path, own_code: None) -> None:
    assert validation_errors(read_page(path), ROOT) == []


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_shell_blocks_are_read_by_bash_and_zsh(path: Path) -> None:
    """zsh takes ``key=[a,b]`` and ``key=a*`` for globs, and ends where they match nothing."""
    for block in read_page(path).blocks:
        if block.language != "sh":
            continue
        checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert not checked.stderr, f"{path.name}:{block.line}: {checked.stderr}"
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|(^|(?<=\s))#.*|\$\([^)]*\)", "", block.text, flags=re.MULTILINE)
        unquoted = re.findall(r"\S*[][()*?]\S*", bare)
        assert not unquoted, f"{path.name}:{block.line}: to be quoted: {unquoted}"


def test_links_of_the_log_resolve() -> None:
    assert list(check_links(read_page(LOG), ROOT)) == []


def test_the_readme_shows_the_two_commands() -> None:
    commands = [" ".join(words) for words in read_page(ROOT / "README.md").commands()]
    assert "make demo" in commands
    assert "make test" in commands


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_marked_runnable_run(path: Path, tmp_path: Path) -> None:
    """In one process a page, in a folder with a finished run named demo."""
    blocks = list(read_page(path).runnable())
    if not blocks:
        return
    make_tiny_run(tmp_path / "runs" / "demo")
    program = tmp_path / "page.py"
    program.write_text("\n".join(block.text for block in blocks), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = run_forked([str(program)], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


WRONG = {
    "a command that is not there": ("```sh\nnanochat-pl trian stage=base\n```", "trian"),
    "a key that is not there": ("```sh\npython train.py model.dpeth=4\n```", "dpeth"),
    "a wrong choice": ("Run `nanochat-pl train stage=bsae`.", "bsae"),
    "the second of two commands": ("```sh\ncd x && nanochat-pl runs delte=a\n```", "delte"),
    "a command over two lines": ("```sh\n$ nanochat-pl train \\\n    model.depht=3\n```", "depht"),
    "a make target": ("Then `make dmeo`.", "dmeo"),
    "a key in prose": ("Set `model.hight=` to something.", "model.hight"),
    "a link": ("See [there](docs/nowhere.md).", "nowhere.md"),
    "a heading": ("See [below](#nothing).", "#nothing"),
    "a file in prose": ("See `src/nanochat_pl/nowhere.py`.", "nowhere.py"),
    "Python that does not compile": ("```python\ndef f(:\n```", "line 1"),
    "source that has changed": (
        "<!-- source: src/nanochat_pl/common/errors.py:did_you_mean -->\n```python\ndef did_you_mean(): ...\n```",
        "did_you_mean",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, tmp_path: Path) -> None:
    text, expected = WRONG[name]
    (tmp_path / "page.md").write_text(text + "\n", encoding="utf-8")
    problems = validation_errors(read_page(tmp_path / "page.md"), ROOT)
    assert len(problems) == 1
    assert expected in problems[0]


def test_what_is_right_passes(tmp_path: Path) -> None:
    errors = (ROOT / "src/nanochat_pl/common/errors.py").read_text(encoding="utf-8")
    function = errors[errors.index("def did_you_mean") :]
    (tmp_path / "page.md").write_text(
        "# A page\n\n[up](#a-page), `model.depth=…`, `data.path=`, `src/nanochat_pl/common/`, `errors.py`\n"
        "\n```sh\npython train.py stage=base model.depth=4 data=python_docs max_steps=20  # a comment\n"
        'nanochat-pl chat run=demo prompt="What\'s {17} * 23?"\n'
        "nanochat-pl plan model.depth=20 explain=steps\nnanochat-pl train -m model.depth=2,4\nnanochat-pl\n```\n\n"
        f"<!-- source: src/nanochat_pl/common/errors.py:did_you_mean -->\n```python\n{function}```\n",
        encoding="utf-8",
    )
    page = read_page(tmp_path / "page.md")
    assert len(list(page.commands())) == 5
    assert validation_errors(page, ROOT) == []
