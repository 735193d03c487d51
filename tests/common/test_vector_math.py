"""What several threads must not call first."""

import subprocess
import sys

PROGRAM = """
import torch
called = []
for name in ("tanh", "exp", "expm1", "log", "log1p", "sqrt", "sin", "cos"):
    def counted(x, name=name, function=getattr(torch, name)):
        called.append((name, x.dtype, x.numel()))
        return function(x)
    setattr(torch, name, counted)
import nanochat_pl.{module}
print(sorted({{name for name, dtype, count in called if dtype == torch.float32 and count == 1}}))
"""


def test_functions_of_mkl_are_called_once_before_a_model_computes():
    """The first call chooses their code, and threads that make it together got a wrong one (pytorch#188792)."""
    for module in ("model.gpt", "engine"):
        command = [sys.executable, "-c", PROGRAM.format(module=module)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert found.strip() == str(sorted(["tanh", "exp", "expm1", "log", "log1p", "sqrt", "sin", "cos"]))
