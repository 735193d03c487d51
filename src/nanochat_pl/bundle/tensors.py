"""Files of tensors (safetensors): written atomically; their headers judged before a single number is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanochat_pl.common.errors import UserError, listed
from nanochat_pl.common.files import FREE_SPACE, free_bytes, write_atomically
from nanochat_pl.common.text_files import require_regular

# Types in which weights and moments are stored, as the header names them.
DTYPES = ("F32", "BF16", "F16")


class Stored(NamedTuple):
    """A tensor as the header of its file says it is."""

    shape: tuple[int, ...]
    dtype: str


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, on any device, into one file.

    Raises:
        UserError: the disk is full or refuses.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())
    if needed > free_bytes(path.parent):
        raise UserError(
            f"{path}: needs {needed / 2**20:,.0f} MiB, the disk has {free_bytes(path.parent) / 2**20:,.0f} MiB free.",
            fix=FREE_SPACE,
        )
    try:
        write_atomically(path, lambda temporary: save_file(contiguous, temporary, dict(metadata) if metadata else None))
    except SafetensorError as error:  # what its writer makes of a full disk or a limit on the size of files
        raise UserError(f"{path}: cannot be written: {error}", fix="Free some space, or lift the limit.") from error


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        UserError: it is no safetensors file, or damaged.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: is no readable safetensors file: {error}",
            fix="Copy it again from where it came, or train it again.",
        ) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header :func:`read_header` has read, in the types in which they are stored."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def problems_of_header(
    where: Path, found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]] | None
) -> list[str]:
    """What is wrong with stored tensors, one line each.

    Args:
        where: their file or folder.
        found: what is stored.
        shapes: the shape of every tensor that must be there, by name; None: any.
    """
    problems: list[str] = []
    if shapes is not None:
        problems += _listed(where, "lacks", shapes.keys() - found.keys())
        problems += _listed(where, "has the unknown", found.keys() - shapes.keys())
        problems += [
            f"{where}: {name} has the shape {found[name].shape}; config.json gives {tuple(shape)}."
            for name, shape in shapes.items()
            if name in found and found[name].shape != tuple(shape)
        ]
    wrong = [name for name, stored in sorted(found.items()) if stored.dtype not in DTYPES]
    problems += [f"{where}: {name} is stored as {found[name].dtype}; must be F32, BF16 or F16." for name in wrong[:1]]
    return problems


def _listed(where: Path, action: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [f"{where}: {action} {listed(names, 5)}."] if names else []
