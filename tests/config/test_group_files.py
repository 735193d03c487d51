"""The files of config groups show every key with its default and its meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nanochat_pl.config.config_dir import config_folder
from tests.helpers.group_files import default_files


def test_the_default_files_say_what_the_settings_classes_say() -> None:
    for path, expected in default_files().items():
        assert path.read_text(encoding="utf-8") == expected, "python -m tests.helpers.group_files writes them anew"


@pytest.mark.parametrize(
    "path", sorted(config_folder().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_no_file_is_empty_or_without_a_word_on_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.removeprefix("# @package _global_\n").startswith("# ")
    assert yaml.safe_load(text)
