"""data=auto: the docstrings of this machine where they are text enough for a plan, else the published data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_amounts import KNOWN_SETS
from nanochat_pl.data.sources import auto
from nanochat_pl.data.sources.auto import choice_of, choose_data, explain_choice, read_choice, with_choice, write_choice
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.python_docs import PythonDocs

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 1_000_000  # of the docstrings


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A corpus of TOKENS tokens, and how often it was built."""
    corpus = SimpleNamespace(manifest={"splits": {"train": {"bytes": TOKENS * 4.8}}})
    calls: list[str] = []

    def build(*_: object, **__: object) -> PythonDocs:
        calls.append("built")
        return cast(PythonDocs, corpus)

    monkeypatch.setattr(auto, "open_python_docs", build)
    monkeypatch.setattr(auto, "built_python_docs", lambda cache_dir: corpus if calls else None)
    monkeypatch.setattr(auto, "installed_packages", lambda: ([], []))
    return calls


def takes(tokens: int) -> Callable[[int | None], int]:
    return lambda at_hand: tokens


def settings(**keys: Any) -> DataSettings:
    return DataSettings(**{"name": "auto", **keys})


@pytest.mark.parametrize(
    ("tokens", "name", "builds"),
    [
        (4 * TOKENS, "python_docs", True),
        (4 * TOKENS + 1, "climbmix", True),
        (5_200_000_000, "climbmix", False),
    ],
)
def test_the_docstrings_are_taken_up_to_four_epochs(
    tokens: int, name: str, builds: bool, built: list[str], tmp_path: Path
) -> None:
    chosen = choose_data(settings(), takes(tokens), tmp_path)
    assert chosen.name == name and bool(built) == builds
    said = explain_choice(chosen, takes(tokens), tmp_path)
    assert said.startswith(f"data=auto: {name}, as the plan's {tokens:,} tokens are ")
    assert ("or less" in said) == (name == "python_docs")


def test_the_batch_that_a_small_text_makes_is_counted(built: list[str], tmp_path: Path) -> None:
    """What is at hand bounds the batch, and whole steps of it the tokens: the plan with it is asked."""
    chosen = choose_data(settings(), lambda at_hand: 4 * TOKENS + (at_hand is None), tmp_path)
    assert chosen.name == "python_docs"


def test_the_data_set_has_the_settings_of_climbmix(tmp_path: Path) -> None:
    """One of them stands in a file that people read and copy, the other in the code that chooses."""
    for name, known in KNOWN_SETS.items():
        group = yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert (group["repo"], group["files"]) == (known.repo, known.files)
    climbmix = DataSettings(**yaml.safe_load((ROOT / "configs/data/climbmix.yaml").read_text(encoding="utf-8")))
    chosen = with_choice(settings(), "web")
    assert chosen == DataSettings(**{**vars(climbmix), "download": True})
    assert with_choice(settings(), "docs") == DataSettings()


def test_what_was_set_holds(built: list[str], tmp_path: Path) -> None:
    given = settings(download=False, num_shards=3, shuffle="none", seed=7)
    web, docs = with_choice(given, "web"), with_choice(given, "docs")
    assert (web.download, web.num_shards, web.shuffle, web.seed) == (False, 3, "none", 7)
    assert (docs.shuffle, docs.seed) == ("none", 7)
    local = DataSettings(name="local", path="x")
    assert choose_data(local, takes(1), tmp_path) is local and built == []


def test_a_choice_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "data_choice.json"
    assert read_choice(record) is None
    for choice in ("docs", "web"):
        write_choice(record, with_choice(settings(), choice))  # type: ignore[arg-type]
        assert read_choice(record) == choice == choice_of(with_choice(settings(), choice))  # type: ignore[arg-type]
    for damaged in ('{"choice": "else"}', "[]"):
        record.write_text(damaged)
        with pytest.raises(UserError, match="does not say which data"):
            read_choice(record)
