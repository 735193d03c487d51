"""How much of a prompt is read."""

from __future__ import annotations

import pytest

from nanochat_pl.evaluation.truncation import max_tokens_read, shortened


def test_an_answer_has_room_or_half_of_the_positions() -> None:
    assert [max_tokens_read(100, max_tokens) for max_tokens in (1, 30, 50, 51, 1000)] == [99, 70, 50, 50, 50]
    assert max_tokens_read(1, 256) == 1


@pytest.mark.parametrize(("most", "kept"), [(5, [0, 1, 2, 3, 4]), (4, [0, 2, 3, 4]), (2, [0, 4]), (1, [0])])
def test_what_is_too_much_is_cut_behind_bos(most: int, kept: list[int]) -> None:
    assert shortened(range(5), most) == (kept, most < 5)
