"""Which GPU a process takes, without any."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.place import Place
from nanochat_pl.training import machine
from tests.processes import run


@pytest.mark.parametrize(
    ("place", "found", "index"),
    [((1, 2, 1, 2), 2, 1), ((9, 16, 1, 8), 8, 1), ((3, 4, 3, 4), 1, 0), ((0, 1, 0, 1), 8, None)],
    ids=["two of two", "the second node", "each sees its own", "alone"],
)
def test_the_gpu_of_a_process(
    place: tuple[int, int, int, int], found: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(machine, "launched_place", lambda: Place(*place))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert machine.own_device("auto") == torch.device("cuda", index)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(machine, "launched_place", lambda: Place(2, 4, 2, 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine where PyTorch sees 2 GPUs") as error:
        machine.own_device("auto")
    assert error.value.fix == "Start 2 processes, or use trainer.accelerator=cpu."
    with pytest.raises(UserError, match="or use accelerator=cpu") as error:  # as evaluate has it
        machine.own_device("auto", "accelerator")
    assert "trainer." not in str(error.value)


def asked(numbers: list[str], visible: list[str]) -> str:
    """What is said where the processes see GPUs of these numbers."""
    rank = machine.launched_place().rank
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=numbers[rank]))
        patched.setenv("CUDA_VISIBLE_DEVICES", visible[rank])
        try:
            machine.require_own_gpus(torch.device("cuda", 0))
        except UserError as error:
            return str(error)
    return ""


def test_processes_that_share_a_gpu_are_refused_on_all() -> None:
    assert run(3, asked, ["a", "b", "c"], ["0", "0", "0"]) == [""] * 3, "each in a container of its own"
    assert run(3, asked, ["a", "a", "a"], ["MIG-1", "MIG-2", "MIG-3"]) == [""] * 3, "parts of one"
    for said in run(3, asked, ["a", "b", "b"], ["0", "1", "1"]):
        assert said.startswith("Processes 1 and 2 have the same GPU")
