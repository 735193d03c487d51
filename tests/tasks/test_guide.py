"""The guide in docs/tasks.md is followed: its file is put into a copy of the package, and then the task is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.docs_checks import Block, read_page

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import json, sys
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.tasks.base import Completion, reference_of
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_mixture, only_judged
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer
from nanochat_pl.tokenizer.chat_format import render_conversation
import nanochat_pl
from pathlib import Path

assert str(Path(nanochat_pl.__file__).resolve()).startswith(sys.argv[1]), nanochat_pl.__file__
assert main(["train", "--help", "mixture.tasks.capitals"]) == 0
for wrong in ("sise=3", "size=0", "sentence=perhaps"):
    assert main(["train", "stage=sft", f"mixture.tasks.capitals.{wrong}"]) == 2
config = compose_train(json.loads(sys.argv[2])).config
settings = config.mixture
mixture, held_out = (build_mixture(settings, split, TaskContext(Path(sys.argv[1]))) for split in ("train", "test"))
assert only_judged(settings) == settings
tokenizer = train_tokenizer(["What is the capital of France? It is Paris."], TokenizerSettings(vocab_size=265))
for part in (mixture, held_out):
    for index in range(len(part)):
        conversation, task = part[index], part.tasks["capitals"]
        ids, mask = render_conversation(tokenizer, conversation)
        assert conversation["capital"] in tokenizer.decode(ids) and sum(mask) > 0
        assert task.evaluate(conversation, reference_of(conversation)) and not task.evaluate(conversation, "Nowhere")
        assert task.reward(conversation, Completion("Nowhere")) == 0.0
train, test = (set(part.tasks["capitals"].countries) for part in (mixture, held_out))
assert train and test and not train & test
print("settings:", mixture.repeats["capitals"], settings.tasks.capitals.sentence)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its configs with the file of the guide in it."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns(".*")
    for name in ("src", "configs", "conf_experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src/nanochat_pl/tasks/capitals.py").write_text(guide_file(), encoding="utf-8")
    return folder


def guide_file() -> str:
    (block,) = (block for block in blocks() if block.language == "python")
    return block.text


def blocks() -> tuple[Block, ...]:
    return read_page(ROOT / "docs/tasks.md").blocks


def commands() -> list[list[str]]:
    """The guide's commands with its task, as words behind nanochat-pl."""
    (block,) = (block for block in blocks() if block.language == "text")
    lines = [shlex.split(line) for line in block.text.splitlines()]
    assert all(words[0] == "nanochat-pl" for words in lines)
    return [words[1:] for words in lines]


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_a_task_is_one_file(copy: Path) -> None:
    """Its keys are known, checked and shown; its conversations are rendered and judged; its parts share nothing."""
    (train,) = (words for words in commands() if words[0] == "train" and "--help" not in words)
    done = python(copy, "-c", LOOK, str(copy), json.dumps([*train[1:], "mixture=own"]))
    assert done.returncode == 0, done.stderr
    assert "mixture.tasks.capitals: What is the capital of France?" in done.stdout
    assert "mixture.tasks.capitals.sentence=true" in done.stdout and "settings: 3 False" in done.stdout
    assert "did you mean mixture.tasks.capitals.size?" in done.stderr
    assert "mixture.tasks.capitals.size=0: is below 1" in done.stderr
    assert "mixture.tasks.capitals.sentence='perhaps'" in done.stderr


LOOK_FOR_HELP = (
    "import sys; sys.path.append(sys.argv[1]); from nanochat_pl.cli.main import main; sys.exit(main(sys.argv[2:]))"
)


RUN_ALL = """
import json, sys
from nanochat_pl.cli.main import main
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""


def make_package(folder: Path) -> Path:
    """What an installer leaves of a package whose entry point is the guide's."""
    (entry_points,) = (block.text for block in blocks() if block.language == "toml")
    group, line = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', entry_points).groups()  # type: ignore[union-attr]
    about = folder / "my_package-1.0.dist-info"
    about.mkdir()
    (folder / "my_package").mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    return folder / "my_package/capitals.py"


@pytest.mark.slow
def test_a_task_may_live_in_another_package(tmp_path: Path) -> None:
    make_package(tmp_path).write_text(guide_file(), encoding="utf-8")
    done = python(ROOT, "-c", LOOK_FOR_HELP, str(tmp_path), "train", "--help", "mixture.tasks.capitals")
    assert done.returncode == 0 and "mixture.tasks.capitals.sentence=true" in done.stdout, done.stderr


@pytest.mark.slow
def test_another_package_that_is_broken_is_named(tmp_path: Path) -> None:
    make_package(tmp_path)
    broken = python(ROOT, "-c", LOOK_FOR_HELP, str(tmp_path), "train", "--help", "mixture.tasks")
    assert broken.returncode == 2 and "error: entry point capitals = my_package.capitals of my-package" in broken.stderr
    assert "uninstall it" in broken.stderr and "Traceback" not in broken.stderr


@pytest.mark.slow
def test_a_task_of_ones_own_is_trained_on_and_measured(copy: Path) -> None:
    text = copy / "text.txt"
    text.write_text("\n\n".join(f"The capital number {n} is a town." for n in range(600)), encoding="utf-8")
    places = [f"paths.runs={copy / 'runs'}", f"paths.cache={copy / 'cache'}"]
    keys = [
        "data=local",
        f"data.path={text}",
        "mixture=own",
        "mixture.tasks.capitals={}",
        "run=own",
        "logger=[]",
        "tokenizer.vocab_size=300",
    ]
    commands = [
        ["train", "experiment=tiny", f"stage={stage}", *keys, *places] for stage in ("tokenizer", "base", "sft")
    ]
    commands.append(["evaluate", "experiment=tiny", "run=own", "stage=sft", *places])
    done = python(copy, "-c", RUN_ALL, json.dumps(commands))  # one process, as each would import torch
    assert done.returncode == 0, done.stderr
    (results,) = (copy / "runs/own/evaluation").rglob("results.json")
    assert '"capitals"' in results.read_text(encoding="utf-8")
