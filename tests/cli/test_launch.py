"""A command that starts its own processes, one for each device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nanochat_pl.cli import launch
from nanochat_pl.cli.launch import processes_to_start
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.parametrize(
    ("accelerator", "devices", "number"),
    [("auto", "auto", 8), ("gpu", "auto", 8), ("cuda", 2, 2), ("cpu", "auto", 1), ("cpu", 2, 2)],
)
@pytest.mark.usefixtures("eight_gpus")
def test_all_gpus_or_as_many_as_were_asked_for(accelerator: str, devices: int | str, number: int) -> None:
    assert processes_to_start(accelerator, devices) == number  # type: ignore[arg-type]


def test_no_more_processes_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 of them on two cores made the machine unusable for minutes."""
    monkeypatch.setattr("nanochat_pl.common.device.usable_cpus", lambda: 4)
    assert processes_to_start("cpu", 4) == 4
    with pytest.raises(UserError, match=r"^devices=99: this program may use 4 CPUs") as error:
        processes_to_start("cpu", 99)
    assert error.value.fix == "Use devices=4 or fewer."
    monkeypatch.setattr("nanochat_pl.common.device.usable_cpus", lambda: 1)
    assert processes_to_start("cpu", 2) == 2, "two can be tried on any machine"


def test_one_process_where_there_is_no_gpu() -> None:
    assert processes_to_start("auto", "auto") == 1
    with pytest.raises(UserError, match="no GPU"):
        processes_to_start("gpu", "auto")


@pytest.mark.usefixtures("eight_gpus")
def test_idle_gpus_are_said_and_missing_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    processes_to_start("auto", 2, prefix="trainer.")
    assert "trainer.devices=2: 6 of the machine's 8 GPUs stay idle." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"trainer\.devices=9: PyTorch sees 8 CUDA devices") as error:
        processes_to_start("auto", 9, prefix="trainer.")
    assert error.value.fix == "Use trainer.devices=auto."


@pytest.mark.usefixtures("eight_gpus")
def test_several_machines_need_a_launcher() -> None:
    with pytest.raises(UserError, match="num_nodes=2") as error:
        processes_to_start("auto", "auto", 2, "trainer.")
    assert re.search(r"torchrun --nnodes 2 .*--nproc-per-node 8 .*sbatch --nodes 2", error.value.fix)


@pytest.mark.usefixtures("eight_gpus")
def test_under_a_launcher_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch_env", lambda: LaunchEnv(9, 16, 1, 8))
    assert processes_to_start("auto", "auto") == processes_to_start("auto", 8, 2) == 1
    with pytest.raises(UserError, match="devices=4: the launcher has started 8"):
        processes_to_start("auto", 4)
    with pytest.raises(UserError, match="num_nodes=3: the launcher has started processes on 2 machines"):
        processes_to_start("auto", 8, 3)


def test_a_launcher_that_started_one_process_is_a_launcher_too(
    eight_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torchrun --nproc-per-node 1``, or one task of ``srun``, on a machine with eight GPUs: eight more processes."""
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "8")
            assert processes_to_start("auto", "auto") == 1


def test_a_process_that_failed_in_its_stop_gives_the_exit_code(tmp_path: Path) -> None:
    for rank, code in enumerate((138, 2, 138)):
        (tmp_path / str(rank)).write_text(str(code), encoding="utf-8")
    assert launch._failed_stop(tmp_path) == 2
    (tmp_path / "1").write_text("138", encoding="utf-8")
    assert launch._failed_stop(tmp_path) == 0
