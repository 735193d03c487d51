"""The folder that an import or an export makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.output_dir import appears_whole, parents_removed_on_error, require_free


@pytest.mark.parametrize("to", ["", ".", "/", "..", "a/.."])
def test_a_folder_without_a_name(to: str) -> None:
    with pytest.raises(UserError, match="must name the folder to make"):
        require_free(Path(to))


@pytest.mark.parametrize("empty", [True, False])
def test_links_are_refused_before_any_work(tmp_path: Path, empty: bool) -> None:
    if empty:
        (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(UserError, match="link: is a link"):
        require_free(tmp_path / "link")


def test_a_file_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file, no folder"):
        require_free(tmp_path / "file" / "a" / "out")


def test_the_hint_of_a_disk_that_refuses_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "taken meanwhile").touch()
    with (
        pytest.raises(UserError, match=r"out: cannot be written: .*\n.*to=…"),
        appears_whole(tmp_path / "out") as growing,
    ):
        growing.mkdir()


def test_parents_go_after_an_error_and_only_those_that_were_made(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    to = tmp_path / "a" / "b" / "c"
    with pytest.raises(KeyboardInterrupt), appears_whole(to) as growing:
        growing.mkdir(parents=True)
        (growing / "file").touch()
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(ValueError, match="later"), parents_removed_on_error(to):
        to.parent.mkdir()
        (to.parent / "of another").touch()
        raise ValueError("later")
    assert (to.parent / "of another").exists()
    with appears_whole(to) as growing:
        growing.mkdir()
    assert to.is_dir()
