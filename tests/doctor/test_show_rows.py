"""What the places of rows are for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.doctor.show_rows import kinds_of_places

N = IGNORE_INDEX


def test_padding_prompts_and_answers_are_told_apart() -> None:
    """A row of two conversations, of 3 and 2 tokens behind their bos, and padding; and a full row of text."""
    targets = np.array([[N, 11, 12, N, N, 22, N], [1, 2, 3, 4, 5, 6, 7]])
    pieces = {3: [3, 2], 8: [7]}

    def address(number: int) -> list[Any]:
        return [SimpleNamespace(ids=[0] * size) for size in pieces[number]]

    rows: Any = SimpleNamespace(read=lambda numbers: (None, targets), address=address)
    assert kinds_of_places(rows, [3, 8]).tolist() == [[1, 2, 2, 1, 1, 2, 0], [2] * 7]
