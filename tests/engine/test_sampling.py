"""Drawing from a distribution."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.engine.sampling import Sampling, choose

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 2.5])


def shares(sampling: Sampling, count: int = 10_000) -> torch.Tensor:
    """How often each token comes out when the uniform numbers are spread evenly."""
    uniforms = [(i + 0.5) / count for i in range(count)]
    ids = choose(LOGITS.expand(count, -1), sampling, uniforms)
    return torch.bincount(ids, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_the_softmax(temperature):
    expected = torch.softmax(LOGITS / temperature, dim=0)
    torch.testing.assert_close(shares(Sampling(temperature)), expected, atol=2e-4, rtol=0)


def test_top_k_renormalises():
    expected = torch.softmax(LOGITS.masked_fill(LOGITS < 2, -torch.inf), dim=0)
    torch.testing.assert_close(shares(Sampling(1.0, top_k=3)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval(uniform):
    """Tokens without probability stay undrawn, and no place lies behind the last token."""
    logits = torch.tensor([[-2000.0, 0.0, 0.0, -2000.0]])
    assert choose(logits, Sampling(1.0), [uniform]).item() in (1, 2)
    assert choose(logits, Sampling(1e-300), [uniform]).item() in (1, 2)
