"""A compiler that is quick and counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


class CountingCompiler:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return graph


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingCompiler]:
    """torch.compile with a backend that counts; nothing stays compiled after the test."""
    counting, compile_ = CountingCompiler(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **kwargs, backend=counting))
    torch.compiler.reset()
    yield counting
    torch.compiler.reset()
