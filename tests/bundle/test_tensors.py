"""Files of tensors: the bytes of the package's own writer, and one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl.bundle.tensors import TensorStream, save_tensors
from tests.helpers.alive_bytes import AliveBytes


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"who": 'é "quoted"\n'}])
def test_the_bytes_are_those_of_the_package(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "h.10": torch.ones(()),
        "h.9": torch.randn(2, 2).half(),
        "empty": torch.ones(0, 3),
        "é": torch.randn(4, 6).t(),
    }
    save_tensors(tmp_path / "mine", tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_of_nothing_too(tmp_path: Path) -> None:
    save_tensors(tmp_path / "mine", {})
    save_file({}, tmp_path / "theirs")
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_that_come_one_at_a_time_in_any_order(tmp_path: Path) -> None:
    names = [f"h.{number}" for number in range(12)]
    made = ((name, torch.full((10, 10), float(name[2:]))) for name in reversed(names))
    with AliveBytes() as alive:
        save_tensors(tmp_path / "file", TensorStream(dict.fromkeys(names, (10, 10)), made))
    assert alive.peak <= 2 * 400
    found = load_file(tmp_path / "file")
    assert found.keys() == set(names) and all((found[name] == float(name[2:])).all() for name in names)


def test_a_tensor_that_does_not_come_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b"):
        save_tensors(tmp_path / "file", TensorStream({"a": (1,), "b": (1,)}, [("a", torch.ones(1))]))
    assert list(tmp_path.iterdir()) == []
