"""The site: its generated pages have every key, and it builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from nanochat_pl.cli.help import describe_key
from nanochat_pl.cli.main import COMMANDS, module_of
from nanochat_pl.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: mkdocs")


def hook(name: str) -> ModuleType:
    """A hook of mkdocs, loaded as mkdocs does."""
    spec = importlib.util.spec_from_file_location(f"docs_build_{name}", ROOT / "docs_build" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_key_is_described_with_default_bounds_and_choices() -> None:
    depth = describe_key(TrainConfig, "model.depth")
    assert (depth.type, depth.default, depth.bounds) == ("whole number", "12", "at least 1, at most 1,000")
    assert "the one dial" in depth.meaning
    assert describe_key(TrainConfig, "counted_parameters").type == "scaling | all"
    assert describe_key(TrainConfig, "model").default is None
    assert describe_key(TrainConfig, "optim.matrix_lr").default == "null"


@needs_mkdocs
def test_the_reference_has_every_key_of_every_command() -> None:
    configuration = hook("configuration")
    commands, settings = configuration.commands_page(), configuration.settings_page()
    for command in COMMANDS:
        section = commands[commands.index(f"\n## {command}\n") :]
        schema = importlib.import_module(module_of(command)).Config
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            if not configuration.is_group(hints[field.name]):
                assert f"<code>{field.name}</code>" in section, f"{command}: {field.name}"
    described = set(re.findall(r"<code>([\w.]+)</code>", settings))
    assert {"model.depth", "optim.muon.beta2", "mixture.tasks.arithmetic.size", "data.sources.NAME.path"} <= described
    anchors = re.findall(r"\{ #([\w-]+) \}", settings)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"settings\.md#([\w-]+)", commands)) <= set(anchors)


@needs_mkdocs
def test_words_for_a_cell_are_no_markup() -> None:
    configuration: Any = hook("configuration")
    assert configuration.text("a|b <c> *d* e_f `x|y`") == r"a&#124;b &lt;c> \*d\* e\_f <code>x&#124;y</code>"
    assert configuration.text("see :class:`~a.b.Name` here") == "see <code>Name</code> here"


def test_the_picture_has_every_package_above_what_it_imports() -> None:
    packages: Any = hook("packages")
    graph = packages.imports()
    level = packages.levels(graph)
    assert {"common", "model", "cli"} <= set(graph) and level["common"] == 0
    assert all(level[name] > level[other] for name, others in graph.items() for other in others)
    direct = packages.direct({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert direct == {"a": {"b"}, "b": {"c"}, "c": set()}
    drawn = packages.svg_of(graph)
    assert all(f">{name}</text>" in drawn for name in graph)
    assert packages.MARK in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorial/index.html", "reference/settings/index.html", "LOG/index.html"} <= set(pages)
    assert "load_bundle" in pages["reference/api/index.html"].read_text(encoding="utf-8")
    assert "aria-label" in pages["architecture/index.html"].read_text(encoding="utf-8")
    loaded = r"""<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+rel="?(?:stylesheet|preconnect)[^>]+https?:"""
    assert [name for name, path in pages.items() if re.search(loaded, path.read_text(encoding="utf-8"))] == []
