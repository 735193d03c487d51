"""Bits per byte: the golden metric, its standard error, and everything that counts as no byte."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat_pl.evaluation.bits_per_byte import BitsPerByte
from tests.helpers.models import golden_net


def test_golden_figure(golden):
    base = golden / "nanochat_base"
    net = golden_net(golden)
    metric = BitsPerByte(torch.load(base / "tokenizer/token_bytes.pt", weights_only=True))
    batches = load_file(golden / "bpb.safetensors")
    with torch.no_grad():
        for i in range(3):
            metric.update(net.losses(batches[f"x.{i}"], batches[f"y.{i}"]), batches[f"y.{i}"])
    expected = json.loads((golden / "bpb.json").read_text(encoding="utf-8"))["bpb"]
    assert metric.compute().bpb == pytest.approx(expected, rel=1e-6)


def made_up(rows: int = 400, length: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 5, (rows, length), generator=generator)
    losses = torch.rand(rows, length, generator=generator) * 3
    return losses, targets


TOKEN_BYTES = np.array([0, 1, 2, 3, 9], dtype=np.int32)


def test_specials_and_ignored_targets_count_on_neither_side():
    losses, targets = torch.tensor([[1.0, 2.0, math.inf, math.nan]]), torch.tensor([[2, 4, 0, -1]])
    metric = BitsPerByte(TOKEN_BYTES)
    metric.update(losses, targets)
    result = metric.compute()
    assert result.bpb == pytest.approx(3.0 / math.log(2) / 11)
    assert (result.num_bytes, result.num_rows, result.stderr) == (11, 1, None)


def test_batches_and_processes_add_up():
    losses, targets = made_up()
    whole = BitsPerByte(TOKEN_BYTES)
    whole.update(losses, targets)
    parts = [BitsPerByte(TOKEN_BYTES) for _ in range(3)]
    for part, rows in zip(parts, torch.arange(400).split([100, 250, 50]), strict=True):
        part.update(losses[rows], targets[rows])
    parts[0].sums = sum(part.sums for part in parts)  # What torchmetrics' sum over processes does.
    assert parts[0].compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_standard_error_is_the_spread_of_repeated_samples():
    losses, targets = made_up(rows=4000)
    losses *= torch.linspace(0.5, 2, 4000)[:, None]  # Rows differ, as documents do.
    results = []
    for seed in range(500):
        rows = torch.randint(0, 4000, (40,), generator=torch.Generator().manual_seed(seed))
        metric = BitsPerByte(TOKEN_BYTES)
        metric.update(losses[rows], targets[rows])
        results.append(metric.compute())
    spread = np.std([result.bpb for result in results])
    assert np.mean([result.stderr for result in results]) == pytest.approx(spread, rel=0.1)
