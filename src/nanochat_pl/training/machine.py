"""The machine that a stage trains on: what was chosen, and what the arithmetic therefore depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nanochat_pl.common.console import say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.hardware import ComputeDType, choose_compute_dtype, choose_device, device_name
from nanochat_pl.common.place import launched_place
from nanochat_pl.planning.devices import peak_flops
from nanochat_pl.training.settings import TrainConfig


@dataclass(frozen=True)
class Machine:
    """Device, type of the activations, and whether the model is compiled."""

    device: torch.device
    name: str
    compute_dtype: ComputeDType
    compile: bool

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device could reach; None where that is not known: then no MFU is shown."""
        return peak_flops(self.name, self.compute_dtype)

    def choices(self) -> dict[str, Any]:
        """What may change the bits of a result; a resumed run says where they differ."""
        return {
            "device": self.device.type,
            "compute_dtype": self.compute_dtype,
            "compile": self.compile,
            "num_threads": torch.get_num_threads(),
        }


def prepare_machine(config: TrainConfig) -> Machine:
    """Choose the device and how to compute on it, as the settings say; say what was chosen."""
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    device, place = own_device(config.trainer.accelerator), launched_place()
    dtype = choose_compute_dtype(config.model.compute_dtype, device)
    compiled = config.trainer.compile
    if compiled == "auto":
        compiled = compiler_works(device)
    machine = Machine(device, device_name(device), dtype, compiled)
    many = f"{place.world_size} processes, each on " if place.world_size > 1 else ""
    say(f"Training on {many}{machine.name} in {dtype}, {'compiled' if compiled else 'eager'}.")
    return machine


def own_device(accelerator: str) -> torch.device:
    """The device of this process that a setting means: of several GPUs the one with its number on this machine.

    Raises:
        UserError: there is none.
    """
    device, place = choose_device(accelerator), launched_place()
    if device.type != "cuda" or place.world_size == 1:
        return device
    if place.local_rank >= (found := torch.cuda.device_count()):
        raise UserError(
            f"{place.local_world_size} processes on a machine where PyTorch sees {found} GPUs: each needs one.",
            fix=f"Start {found} processes, or use trainer.accelerator=cpu.",
        )
    return torch.device("cuda", place.local_rank)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile gives a function that runs here: a small one is compiled to find out."""
    if device.type == "mps":
        return False
    try:
        x = torch.ones(8, device=device)
        return bool((torch.compile(lambda x: x * 2 + 1, dynamic=False)(x) == 3).all())
    except Exception as error:  # whatever a missing compiler, header or library makes of it
        say(f"torch.compile does not run here ({str(error).strip().splitlines()[0][:160]}): training eagerly.")
        return False
