"""Bugs of files that one program writes and another cannot read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_does_not_know_is_never_written(value: float, tmp_path: Path) -> None:
    """A best loss of Infinity went into a checkpoint's metadata, which no other JSON reader could then open."""
    write_json(tmp_path / "a.json", {"best": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"best": value})
    assert read_json(tmp_path / "a.json") == {"best": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ['{"best": Infinity}', '{"best": -Infinity}', '{"best": NaN}'])
def test_a_number_that_json_does_not_know_is_refused_when_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json.*JSON"):
        read_json(tmp_path / "a.json")
