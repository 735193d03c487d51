"""Run folders: names, statuses, candidates, and one writer at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import (
    check_name,
    finished_stage,
    fresh_run,
    fresh_stage_folder,
    list_runs,
    newest_stage,
    only_run_with,
    require_outside,
    stage_folder,
)


def make(runs: Path, run: str, stage: str, finished: bool = True) -> None:
    folder = stage_folder(runs, run, stage)
    folder.create()
    with folder.locked():
        if finished:
            write_json(folder.path / "finished.json", {"step": 3})


@pytest.mark.parametrize("name", ["d4", "demo-2", "a.b_c+1", "lr-matrix_lr0.01", "Größe"])
def test_names_that_are_fine(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a=1", "a,b", "../up", "a/b", ".hidden", "-m", "x" * 201, "a\n", "\x00"]
)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a valid run name"):
        stage_folder(tmp_path, name, "base")


@pytest.mark.parametrize("name", ["doctor", "base", "evaluation"])
def test_names_of_the_programs_own_folders_are_reserved(name: str, tmp_path: Path) -> None:
    """The doctor's reports lie in RUNS/doctor: a run of that name shared the folder, and was deleted with them."""
    with pytest.raises(UserError, match=f"run={name}: is not a valid run name: it is one of the program's own"):
        stage_folder(tmp_path, name, "base")
    (tmp_path / name / "base").mkdir(parents=True)  # of an older version
    (tmp_path / name / "base" / "lock").touch()
    assert list(list_runs(tmp_path)) == [name], "it is still listed"


def test_status_follows_the_last_file_written(tmp_path: Path) -> None:
    folder = stage_folder(tmp_path, "d4", "base")
    assert folder.status == "absent"
    folder.create()
    assert folder.status == "unfinished"
    write_json(folder.path / "finished.json", {"step": 3})
    assert folder.status == "finished"
    assert folder.finished() == {"step": 3}


def test_never_resume_takes_the_next_free_name_and_remembers_its_parent(tmp_path: Path) -> None:
    assert fresh_stage_folder(tmp_path, "d4", "sft").run == "d4"
    make(tmp_path, "d4", "base")
    make(tmp_path, "d4", "sft")
    fresh = fresh_stage_folder(tmp_path, "d4", "sft")
    assert fresh.run == "d4-2"
    fresh.create()
    again = stage_folder(tmp_path, "d4-2", "sft")
    assert again.parent("base").path == tmp_path / "d4" / "base"
    assert fresh_stage_folder(tmp_path, "d4", "sft").run == "d4-3"


def test_a_new_run_has_nothing_of_another(tmp_path: Path) -> None:
    """sft begun anew went to a d4-2 with a base of its own, and was trained from the base of d4."""
    make(tmp_path, "d4", "base")
    assert fresh_run(tmp_path, "d4") == "d4-2"
    assert fresh_stage_folder(tmp_path, "d4", "sft").run == "d4", "nothing of it is there yet"
    make(tmp_path, "d4", "sft")
    make(tmp_path, "d4-2", "base")
    fresh = fresh_stage_folder(tmp_path, "d4", "sft")
    assert (fresh.run, fresh.parent("base").run) == ("d4-3", "d4")


def test_runs_are_listed_with_their_stages_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, "b", "sft", finished=False)
    make(tmp_path, "b", "base")
    make(tmp_path, "a", "tokenizer")
    (tmp_path / "a" / "report").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "project" / "tokenizer").mkdir(parents=True)  # of somebody else: it has no records
    (tmp_path / "file").touch()
    found = {name: [folder.stage for folder in stages] for name, stages in list_runs(tmp_path).items()}
    assert found == {"a": ["tokenizer"], "b": ["base", "sft"]}
    assert list_runs(tmp_path / "nowhere") == {}


def test_a_stage_of_anybodys_own_stands_behind_that_which_it_started_from(tmp_path: Path) -> None:
    """By the chain that its bundle tells; without one, at the end."""

    def own(name: str, *chain: str) -> None:
        make(tmp_path, "b", name)
        (tmp_path / "b" / name / "overrides.txt").touch()
        if chain:
            bundle = tmp_path / "b" / name / "bundle"
            bundle.mkdir()
            write_json(bundle / "stage.json", {"parents": [{"stage": stage} for stage in chain]})

    for name in ("tokenizer", "sft", "base"):
        make(tmp_path, "b", name)
    own("zero", "base")
    own("after", "base", "zero")
    assert newest_stage(tmp_path, "b").stage == "sft"
    own("begun")
    own("polish", "base", "sft")
    (tmp_path / "b" / "notes").mkdir()
    names = [folder.stage for folder in list_runs(tmp_path)["b"]]
    assert names == ["tokenizer", "base", "zero", "after", "sft", "polish", "begun"]
    assert finished_stage(tmp_path, "b", "zero").stage == "zero"


def test_the_stage_that_is_meant(tmp_path: Path) -> None:
    make(tmp_path, "b", "tokenizer")
    with pytest.raises(UserError, match="run=b: has no finished stage with a model"):
        newest_stage(tmp_path, "b")
    make(tmp_path, "b", "base")
    make(tmp_path, "b", "sft", finished=False)
    assert newest_stage(tmp_path, "b").stage == "base"
    assert finished_stage(tmp_path, "b", "base").stage == "base"
    with pytest.raises(UserError, match="sft: is not finished"):
        finished_stage(tmp_path, "b", "sft")
    with pytest.raises(UserError, match=r"stage=rl: .*b has no such stage; it has tokenizer, base, sft"):
        finished_stage(tmp_path, "b", "rl")
    # The advice was to remove the tokenizer and to train it again.
    with pytest.raises(UserError, match="stage=tokenizer: has no model; valid: base, sft") as error:
        finished_stage(tmp_path, "b", "tokenizer")
    assert "stage=" in error.value.fix
    with pytest.raises(UserError, match="run=bb: there is no such run"):
        newest_stage(tmp_path, "bb")


def test_the_only_candidate_is_taken_and_several_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run has a finished stage base"):
        only_run_with(tmp_path, "base")
    make(tmp_path, "a", "base")
    make(tmp_path, "c", "base", finished=False)
    assert only_run_with(tmp_path, "base") == "a"
    make(tmp_path, "b", "base")
    with pytest.raises(UserError, match="several runs have a finished stage base: a, b"):
        only_run_with(tmp_path, "base")


def test_a_folder_under_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = stage_folder(tmp_path / "file" / "runs", "d4", "base")
    for attempt in (folder.create, lambda: folder.locked().__enter__()):
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            attempt()


HOLDER = """
import sys, time
from pathlib import Path
from nanochat_pl.common.run_dir import stage_folder
with stage_folder(Path(sys.argv[1]), "d4", "base").locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_kept_out_until_the_first_is_gone_even_by_kill_9(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    folder = stage_folder(tmp_path, "d4", "base")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"base: is in use by process {holder.pid} on "), folder.locked(0.2):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    for _ in range(2):
        with folder.locked(0.2):
            pass


@pytest.mark.parametrize("look", [lambda runs: stage_folder(runs, "d4", "base").status, list_runs])
def test_a_folder_that_cannot_be_looked_into_is_said(look: Callable[[Path], object], tmp_path: Path) -> None:
    """The system refuses a name that long to everybody; a folder without rights it does not refuse to root."""
    with pytest.raises(UserError, match=r"cannot be looked at: .*\n.*paths\.runs"):
        look(tmp_path / ("x" * 300))


def test_a_folder_that_is_somebody_elses_is_refused_by_name(tmp_path: Path) -> None:
    """A training wrote into it, and where it was refused, or when it was done, removed what had been there."""
    folder = stage_folder(tmp_path, "d4", "base")
    (folder.path / "bundle").mkdir(parents=True)
    with pytest.raises(UserError, match=r"d4/base: is no folder of a stage, and is not empty: bundle\."):
        folder.create()
    (tmp_path / "linked").mkdir()
    (folder.path.parent / "sft").symlink_to(tmp_path / "linked")
    stage_folder(tmp_path, "d4", "sft").create()  # an empty one may be anywhere


def test_a_refused_start_takes_back_what_it_wrote_and_no_more(tmp_path: Path) -> None:
    """It removed the whole folder: also the bundle of a stage of which finished.json had been deleted."""
    folder = stage_folder(tmp_path, "d4", "tokenizer")
    for begun_before in (False, True):
        kept: dict[Path, bytes] = {}
        if begun_before:
            make(tmp_path, "d4", "tokenizer", finished=False)
            write_json(folder.path / "about.json", "then")
            write_json(folder.bundle / "tokenizer.json", {})
            kept = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
        folder.create()
        with folder.locked(), pytest.raises(UserError, match="refused"), folder.undone_on_error():
            write_json(folder.path / "about.json", "now")
            write_json(folder.path / "new" / "data.json", {})
            raise UserError("refused")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
        assert (tmp_path / "d4").exists() == begun_before


def test_a_training_that_has_begun_is_kept_whatever_ends_it(tmp_path: Path) -> None:
    folder = stage_folder(tmp_path, "d4", "base")
    folder.create()
    with pytest.raises(UserError, match="refused"), folder.undone_on_error():
        (folder.path / "metrics.csv").touch()
        raise UserError("refused")
    assert (folder.path / "metrics.csv").exists()


@pytest.mark.parametrize("to", ["base", "base/mine", "base/bundle", "base/bundle/sub/deep"])
def test_nothing_else_is_written_into_a_stage(to: str, tmp_path: Path) -> None:
    """evaluate wrote its results into the folder of a stage, and export a folder into the bundle that it read."""
    make(tmp_path, "d4", "base")
    write_json(tmp_path / "d4" / "base" / "bundle" / "stage.json", {})
    with pytest.raises(UserError, match=r"is (a bundle|the folder of a stage), which nothing else is written into"):
        require_outside(tmp_path / "d4" / to)
    require_outside(tmp_path / "d4" / "evaluation" / "base")
    write_json(tmp_path / "bundle" / "stage.json", {})
    require_outside(tmp_path / "beside-a-bundle")


def test_a_start_that_may_be_undone_keeps_its_lock(tmp_path: Path) -> None:
    """To read the lock's file let go of it: two trainings could write into one folder."""
    folder = stage_folder(tmp_path, "r", "base")
    other = (
        "import sys; from pathlib import Path; from nanochat_pl.common.run_dir import stage_folder\n"
        "with stage_folder(Path(sys.argv[1]), 'r', 'base').locked(0.1): pass"
    )
    with folder.locked(), folder.undone_on_error():
        done = subprocess.run([sys.executable, "-c", other, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "is in use by process" in done.stderr


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path) -> None:
    """Who waited for it held a file that was not there any more, and a third one the new file."""
    folder = stage_folder(tmp_path, "r", "base")
    place = tmp_path / "r" / "base" / "lock"
    with folder.locked():
        first = place.stat().st_ino
        held = place.rename(tmp_path / "elsewhere")  # as if it had been removed while it was waited for
        with folder.locked():
            assert place.stat().st_ino != first == held.stat().st_ino


def test_metrics_of_an_earlier_start_do_not_keep_what_is_refused(tmp_path: Path) -> None:
    folder = stage_folder(tmp_path, "r", "base")
    folder.create()
    (folder.path / "metrics.csv").write_text("step\n1\n2\n", encoding="utf-8")
    (folder.path / "config.yaml").write_text("old", encoding="utf-8")
    with pytest.raises(UserError), folder.undone_on_error():
        (folder.path / "config.yaml").write_text("new", encoding="utf-8")
        (folder.path / "plan.json").write_text("{}", encoding="utf-8")
        raise UserError("refused")
    assert (folder.path / "config.yaml").read_text(encoding="utf-8") == "old"
    assert not (folder.path / "plan.json").exists() and (folder.path / "metrics.csv").exists()
