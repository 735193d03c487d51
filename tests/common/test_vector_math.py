"""What several threads must not call first."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from nanochat_pl.common.vector_math import FUNCTIONS
called = set()
for name in FUNCTIONS:
    def counted(x, name=name, function=getattr(torch, name)):
        called.add((name, x.dtype, x.numel(), x.device.type))
        return function(x)
    setattr(torch, name, counted)
import nanochat_pl.{module}
assert {{"tanh", "exp", "expm1", "log", "log1p", "sqrt", "sin", "cos"}} <= {{*FUNCTIONS}}
for dtype in (torch.float32, torch.float64):
    print(len(FUNCTIONS) - sum((name, dtype, 1, "cpu") in called for name in FUNCTIONS))
"""


@pytest.mark.slow
def test_functions_of_mkl_are_called_once_before_a_model_computes():
    """The first call chooses their code, and threads that make it together got a wrong one (pytorch#188792)."""
    for module in ("model.gpt", "engine.engine"):
        command = [sys.executable, "-c", PROGRAM.format(module=module)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert found.split() == ["0", "0"], "so many were not called"
