"""Devices, types and peaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanochat_pl.common import hardware
from nanochat_pl.common.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, found",
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 x\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("model name\t: bf16 machine\nflags\t\t: fpu avx2\n", False),
        ("", False),
    ],
)
def test_bfloat16_of_a_processor(tmp_path, text, found):
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert hardware.cpu_has_bfloat16(tmp_path / "cpuinfo") is found
    assert hardware.cpu_has_bfloat16(tmp_path / "missing") is False


def test_compute_dtype(monkeypatch):
    for has, expected in [(True, "bfloat16"), (False, "float32")]:
        monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda has=has: has)
        assert hardware.choose_compute_dtype("auto", CPU) == expected
    assert hardware.choose_compute_dtype("float16", CPU) == "float16"
    with pytest.raises(UserError, match="compute_dtype='fp8'"):
        hardware.choose_compute_dtype("fp8", CPU)


def test_devices():
    assert hardware.choose_device("cpu") == CPU
    assert hardware.choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="device='tpu'"):
        hardware.choose_device("tpu")
    with pytest.raises(UserError, match="CUDA devices"):
        hardware.choose_device("cuda:999")
    assert "CPU" in hardware.device_name(CPU)


def test_nothing_happens_at_import():
    code = "import torch, nanochat_pl.common.hardware, nanochat_pl.model.gpt; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
