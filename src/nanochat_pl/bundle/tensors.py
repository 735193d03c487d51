"""Files of tensors (safetensors): written atomically; their headers judged before a single number is read.

They are written here and not by the package, tensor by tensor, so that never more than one is held in host memory. The
bytes are those that ``safetensors.torch.save_file`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanochat_pl.common.errors import UserError, listed
from nanochat_pl.common.files import FREE_SPACE, free_bytes, write_atomically
from nanochat_pl.common.text_files import require_regular

# Types in which weights and moments are stored, as the header names them.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored(NamedTuple):
    """A tensor as the header of its file says it is."""

    shape: tuple[int, ...]
    dtype: str


class TensorStream(NamedTuple):
    """Float32 tensors that are put together one at a time, while they are written.

    Attributes:
        shapes: of each, by name.
        tensors: names and tensors in any order, each once.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, torch.Tensor]]


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor] | TensorStream, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, on any device, into one file.

    Raises:
        UserError: the disk is full or refuses.
    """
    if isinstance(tensors, TensorStream):
        stored, given = {name: Stored(shape, "F32") for name, shape in tensors.shapes.items()}, tensors.tensors
    else:
        names = {dtype: name for name, dtype in DTYPES.items()}
        stored = {name: Stored(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()}
        given = tensors.items()
    head, begins, needed = _layout(stored, metadata)

    def write(temporary: Path) -> None:
        missing = set(stored)
        with temporary.open("wb") as file:
            file.write(head)
            for name, tensor in given:
                missing.remove(name)
                assert tuple(tensor.shape) == stored[name].shape, name
                file.seek(begins[name])
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one comes
        assert not missing, missing

    if needed > free_bytes(path.parent):
        raise UserError(
            f"{path}: needs {needed / 2**20:,.0f} MiB, the disk has {free_bytes(path.parent) / 2**20:,.0f} MiB free.",
            fix=FREE_SPACE,
        )
    write_atomically(path, write)


def _layout(stored: Mapping[str, Stored], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """The head of a file, the place in the file where each tensor begins, and the length of the file, in bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    sizes = {name: DTYPES[each.dtype].itemsize for name, each in stored.items()}
    for name in sorted(stored, key=lambda name: (-sizes[name], name)):
        offsets[name], end = end, end + sizes[name] * prod(stored[name].shape)
        place = [offsets[name], end]
        header[name] = {"dtype": stored[name].dtype, "shape": list(stored[name].shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end


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
