"""Whether a compiled loss runs on this machine and gives what the uncompiled one does, found out with a tiny model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.bundle.stage_info import library_versions, source_hash
from nanochat_pl.common.device import cpu_model, device_name
from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.data.cache.content_cache import fingerprint_of, read_sealed, write_sealed
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import GPTConfig, ModelSettings, num_heads, resolve_model, window_sizes
from nanochat_pl.model.fp8 import Fp8Backend
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.training.tiny_steps import NUM_POSITIONS, NUM_ROWS, TOLERANCE, VOCABULARY, distance, rows, tiny_net

# A value at the edge between two FP8 numbers goes to the other one if its last bit of bfloat16 is another.
FP8_TOLERANCE = 0.1


def why_not_compiled(
    device: torch.device, dtype: ComputeDType, settings: ModelSettings, fp8: Fp8Backend | None = None
) -> str | None:
    """What speaks against compiling a model of these settings on a device, in a few words; None: nothing."""
    if device.type == "mps":
        return "it is not used on Apple GPUs"
    try:
        net = tiny_net(device, TORCH_DTYPES[dtype], config=config_of_its_kind(settings, dtype))
        if fp8 is not None:
            net.enable_fp8(fp8)
        far = distance_of_compiled(net)
    except Exception as error:  # whatever a missing compiler, header or library makes of it
        return f"it does not run here: {first_line(error)[:160]}"
    most = tolerance(dtype, fp8 is not None)
    return None if far <= most else f"its gradients of a tiny model are {far:.1e} off, more than {most:.0e}"


def why_not_compiled_here(
    cache: Path, device: torch.device, dtype: ComputeDType, settings: ModelSettings, fp8: Fp8Backend | None = None
) -> str | None:
    """As :func:`why_not_compiled`, which takes seconds: that nothing speaks against it is remembered in a cache folder,
    for as long as processor or GPU, compilers, libraries, this package and the kind of model are the same."""
    kind = dataclasses.asdict(config_of_its_kind(settings, dtype))
    path = cache / "compiler_works" / f"{fingerprint_of(_circumstances(device), dtype, fp8, kind)[:32]}.json"
    with contextlib.suppress(UserError):
        read_sealed(path)
        return None
    reason = why_not_compiled(device, dtype, settings, fp8)
    if reason is None:
        with contextlib.suppress(UserError):  # a disk that cannot be written to: it is tried again the next time
            write_sealed(path, {"works": True})
    return reason


def _circumstances(device: torch.device) -> list[Any]:
    """What compiled code and its arithmetic depend on, besides the model."""
    names = ("CXX", "CC", "CUDA_HOME", "TRITON", "TORCHINDUCTOR", "TORCHDYNAMO", "TORCH_")
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}
    compilers: list[Any] = []
    for name in (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang"):
        if name and (path := shutil.which(name)):
            found = Path(path).stat()
            compilers.append([str(Path(path).resolve()), found.st_size, found.st_mtime_ns])
    header = Path(sysconfig.get_path("include"), "Python.h").exists()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    hardware = [device.type, device_name(device), capability, torch.version.cuda, torch.version.hip, cpu_model()]
    return [hardware, torch.get_num_threads(), variables, compilers, header, library_versions(), source_hash()]


def tolerance(dtype: ComputeDType, fp8: bool = False) -> float:
    """The largest distance of compiled from uncompiled metrics, relative."""
    return FP8_TOLERANCE if fp8 else 3 * TOLERANCE[TORCH_DTYPES[dtype]]


def config_of_its_kind(settings: ModelSettings, dtype: ComputeDType) -> GPTConfig:
    """The least model of the same kind: one layer with all that a layer of the settings may have (a short window, a
    value embedding, grouped queries), and heads of their width. Each graph more takes seconds to compile."""
    grouped = settings.num_kv_heads not in (None, num_heads(settings))
    least = dataclasses.replace(
        settings,
        depth=1,
        aspect_ratio=(1 + grouped) * settings.head_dim,
        num_kv_heads=1 if grouped else None,
        sequence_len=NUM_POSITIONS,
        short_window_multiple=None,
        vocab_multiple=1,
    )
    config = resolve_model(least, VOCABULARY, dtype)
    return dataclasses.replace(config, windows=(min(window_sizes(dataclasses.replace(least, depth=settings.depth))),))


def distance_of_compiled(net: GPT) -> float:
    """Relative distance of the compiled loss of a tiny model and of its gradients from the uncompiled ones."""
    inputs, targets = (tensor.to(net.device) for tensor in rows())
    expected = loss_and_gradients(net.loss_by_row, net, inputs, targets)
    return distance(loss_and_gradients(CompiledLoss(net), net, inputs, targets), expected)


def loss_and_gradients(
    loss_by_row: Callable[..., tuple[Tensor, Tensor]], net: GPT, inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """The mean loss, and its gradients by all parameters."""
    loss = loss_by_row(inputs, targets)[0] / (NUM_ROWS * NUM_POSITIONS)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
