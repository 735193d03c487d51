"""Our rows in a Trainer as Lightning ships it: its processes share them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.processes import run
from tests.training.stock_trainer import fit_stock, fit_stock_plain


def test_two_ranks_of_stock_ddp_share_the_rows_and_make_the_steps_of_one(tmp_path: Path) -> None:
    """Both trained on all rows of each step, without a word."""
    (tmp_path / "one").mkdir()
    one = fit_stock(str(tmp_path / "one"))
    assert one["rows"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    two = run(2, fit_stock_plain, str(tmp_path), False)
    assert [each["rows"] for each in two] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]
    for name, weights in one["weights"].items():
        for each in two:
            torch.testing.assert_close(each["weights"][name], weights, rtol=1e-4, atol=1e-5, msg=name)


def test_a_sampler_of_lightning_s_is_refused(tmp_path: Path) -> None:
    for answer in run(2, fit_stock_plain, str(tmp_path), True):
        assert "Say Trainer(use_distributed_sampler=False" in answer["refused"]
