"""The loss: weights, ignored targets, and numbers that only float32 gets right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_pl.model.loss import token_losses
from tests.model.helpers import perturbed, random_ids, tiny_config


@pytest.mark.parametrize("cap", [0.5, 15.0, 64.0])
def test_loss_and_its_gradient_are_those_of_autograd(cap):
    """The backward is written by hand: it has to be that of the textbook's formula, to the ends of the range."""
    raw = 40 * torch.randn(9, 7, 33, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(63).view(9, 7) % 34 - 1
    weights = torch.linspace(-2, 2, 63).view(9, 7)
    ours, textbook = raw.clone().requires_grad_(), raw.double().requires_grad_()
    losses = token_losses(ours, targets, cap)
    capped = cap * torch.tanh(textbook / cap)
    expected = F.cross_entropy(capped.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses.flatten(), expected.float(), atol=1e-5, rtol=1e-5)
    (losses * weights).sum().backward()
    (expected * weights.flatten()).sum().backward()
    torch.testing.assert_close(ours.grad, textbook.grad.float(), atol=2e-6, rtol=1e-4)


def test_ignored_targets_have_loss_zero_and_no_gradient():
    net = perturbed(tiny_config())
    ids = random_ids(net.config, 2, 8)
    targets = torch.full_like(ids, -1)
    losses = net.losses(ids, targets)
    assert torch.equal(losses, torch.zeros(2, 8))
    net.weighted_loss(ids, targets).backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in net.parameters())


def test_weighted_loss_is_the_sum_of_weights_times_nats():
    net = perturbed(tiny_config())
    ids = random_ids(net.config, 2, 8)
    targets = ids.roll(-1, dims=1).index_fill(1, torch.tensor([2, 5]), -1)
    weights = torch.randn(2, 8)
    losses = net.losses(ids, targets)
    torch.testing.assert_close(net.weighted_loss(ids, targets, weights), (losses * weights).sum())
    torch.testing.assert_close(net.weighted_loss(ids, targets), losses.sum())
    torch.testing.assert_close(net.weighted_loss(ids, targets, torch.ones(2, 8)), losses.sum())


def test_a_uniform_head_costs_log_of_the_vocabulary():
    losses = token_losses(torch.zeros(1, 3, 64), torch.tensor([[0, 63, -1]]), cap=15.0)
    torch.testing.assert_close(losses, torch.tensor([[1.0, 1.0, 0.0]]) * torch.log(torch.tensor(64.0)))


def test_padding_of_the_vocabulary_is_never_predicted():
    net = perturbed(tiny_config(vocab_size=50))
    assert net.config.padded_vocab_size == 64
    ids = random_ids(net.config, 1, 4)
    before = net(ids)
    with torch.no_grad():
        net.lm_head.weight[50:] += 100.0
    assert before.shape == (1, 4, 50) and torch.equal(before, net(ids))
