"""Element-wise functions on a CPU, made ready before several threads call them at once.

PyTorch calls Intel's MKL for them, which chooses the code for a function when it is called for the first time. Threads
that do so together can meet a choice half made: in some processes out of a hundred one thread's part of the first large
``tanh`` was wrong by 1.6e-5, and right ever after (pytorch/pytorch#188792, MKL 2024.2). A training with another first
step is another training. So each function is called here, by one thread, when what computes with them is loaded.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("sin", "sinh", "sqrt", "tan", "tanh"),
)


def call_each_once() -> None:
    """Call each function with a single number, which takes one thread."""
    for dtype in (torch.float32, torch.float64):
        number = torch.zeros(1, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(number)
