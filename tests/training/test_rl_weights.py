"""The weights of tokens in stage rl: each option against a case worked out by hand, and against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanochat_pl.training.rl.settings import RLSettings
from nanochat_pl.training.rl.weights import Logprobs, advantages, divisor, has_signal, shuffled, token_weights


def logprobs(
    ratios: list[float], correction: float = 1.0, reference: list[float] | None = None, old: float = -1.0
) -> Logprobs:
    """Tokens whose probability has changed by these ratios since they were drawn; ``correction``: old over sampled."""
    before = np.full(len(ratios), old)
    current = before + np.log(ratios)
    of_reference = None if reference is None else current + np.log(reference)
    return Logprobs(before - math.log(correction), before, current, of_reference)


def weights(advantage: float, of: Logprobs, **settings: object) -> list[float]:
    return token_weights(advantage, of, RLSettings(**settings)).weights.round(12).tolist()  # type: ignore[arg-type]


def test_by_default_each_token_has_the_advantage_of_its_answer() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5]])
    found = advantages(rewards)
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [0, -0.5, 0.5, 0]]
    assert has_signal(rewards).tolist() == [True, False, True]
    assert weights(0.75, logprobs([1, 1])) == [0.75, 0.75]


def test_a_group_without_spread_has_no_advantage_at_all() -> None:
    """The mean of ten times 0.1 is not 0.1 in binary: a rounding error would be divided by its own size."""
    rewards = np.full((1, 10), 0.1)
    assert (advantages(rewards) == 0).all() and (advantages(rewards, "mean_std") == 0).all()


def test_rounding_is_no_signal() -> None:
    rewards = np.array([[1.0, 1.0000000000000002], [1.0, 1.000001], [0.0, 1e-12], [-3e9, -3e9 + 1], [0.0, 0.0]])
    assert has_signal(rewards).tolist() == [False, True, True, False, False]
    for how in ("mean", "mean_std"):
        assert advantages(rewards, how).any(axis=1).tolist() == has_signal(rewards).tolist()


def test_shuffled_rewards_are_those_of_the_step_in_an_order_of_seed_and_step() -> None:
    rewards = np.arange(32.0).reshape(4, 8)
    found = shuffled(rewards, seed=1, step=2)
    assert found.shape == (4, 8) and sorted(found.flat) == list(range(32))
    assert (found == shuffled(rewards, seed=1, step=2)).all()
    others = (rewards, shuffled(rewards, seed=1, step=3), shuffled(rewards, seed=2, step=2))
    assert not any((found == other).all() for other in others)
    assert all(len({value // 8 for value in group}) > 1 for group in found), "over the groups too"


def test_divided_by_the_deviation_of_the_group() -> None:
    found = advantages(np.array([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 3.0]]), "mean_std")
    assert found == pytest.approx(np.array([[1.5, -0.5, -0.5, -0.5], [x / math.sqrt(4 / 3) for x in (1, -1, -1, 1)]]))


def test_the_constant_denominator_does_not_know_how_long_answers_are() -> None:
    assert divisor(RLSettings(denominator="constant", max_new_tokens=50, samples_per_prompt=4), 4 * 8) == 1600
    assert divisor(RLSettings(), 4 * 8) is None


def test_tokens_are_clipped_on_the_side_that_their_advantage_pushes_them_to() -> None:
    clipped = {"updates_per_rollout": 2, "clip_low": 0.2, "clip_high": 0.28}
    ratios = [0.5, 0.85, 1.0, 1.25, 1.5]
    assert weights(2.0, logprobs(ratios), **clipped) == [1.0, 1.7, 2.0, 2.5, 0.0]
    assert weights(-2.0, logprobs(ratios), **clipped) == [0.0, -1.7, -2.0, -2.5, -3.0]
    found = token_weights(-2.0, logprobs(ratios), RLSettings(**clipped))  # type: ignore[arg-type]
    assert found.clipped_low.tolist() == [True, False, False, False, False] and not found.clipped_high.any()
    assert weights(2.0, logprobs(ratios), updates_per_rollout=2, clip_low=0.2)[-1] == 3.0, "no bound above"


def test_importance_weights_are_capped() -> None:
    of = Logprobs(np.log([0.5, 0.1, 0.4]), np.log([0.4, 0.9, 0.4]), np.log([0.4, 0.9, 0.4]))
    assert weights(1.0, of, importance_cap=2.0) == [0.8, 2.0, 1.0]
    assert weights(1.0, of) == [1.0, 1.0, 1.0]
    both = logprobs([1.5, 1.0], correction=4.0)
    assert weights(1.0, both, importance_cap=3.0, updates_per_rollout=2) == [4.5, 3.0]


def test_the_divergence_from_the_start_pulls_back() -> None:
    """A token that has become twice as likely is pushed down, one that has become half as likely is pushed up."""
    of = logprobs([1, 1, 1], reference=[0.5, 2.0, 1.0])
    assert weights(0.0, of, kl_beta=0.1) == pytest.approx([-0.05, 0.1, 0.0])
    found = token_weights(0.0, of, RLSettings(kl_beta=0.1))
    assert found.kl == pytest.approx([0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1, 0])


@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_weights_are_the_gradient_of_the_objective(advantage: float) -> None:
    """Of the clipped objective with the divergence, as its papers write it, differentiated by autograd."""
    generator = np.random.default_rng(0)
    old, reference = generator.normal(-2, 0.5, 50), generator.normal(-2, 0.5, 50)
    current = torch.tensor(old + generator.normal(0, 0.3, 50), requires_grad=True)
    ratio = torch.exp(current - torch.tensor(old))
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage)
    difference = torch.tensor(reference) - current
    (surrogate - 0.04 * (difference.exp() - difference - 1)).sum().backward()
    settings = RLSettings(updates_per_rollout=4, clip_low=0.2, clip_high=0.28, kl_beta=0.04)
    found = token_weights(advantage, Logprobs(old, old, current.detach().numpy(), reference), settings)
    assert current.grad is not None
    assert found.weights == pytest.approx(current.grad.numpy())
    assert found.clipped_low.any() or found.clipped_high.any()


@pytest.mark.parametrize("how", ["mean", "mean_std"])
@pytest.mark.parametrize("denominator", ["tokens", "constant", "tokens of groups with signal"])
def test_rewards_that_are_shuffled_over_the_batch_teach_nothing(how: str, denominator: str) -> None:
    """Half of each group's answers begin with a token that is always right, and they are longer: the mean weight of
    this token, and that of all tokens, over many batches; with the tokens of groups that have a signal as denominator
    too, which then depends on the rewards."""
    generator = np.random.default_rng(1)
    begins = np.tile([1.0, 0.0], (16, 4))
    lengths = generator.integers(1, 20, (16, 8)) + 10 * begins
    rewards = np.where(begins == 1, 1.0, (generator.random((16, 8)) < 0.2).astype(float))
    assert (advantages(rewards, how) * begins).sum() > 10
    found = []
    for step in range(800):
        permuted = shuffled(rewards, seed=0, step=step)
        by = {"tokens": lengths.sum(), "constant": 48.0 * 128}.get(denominator, lengths[has_signal(permuted)].sum())
        weight = advantages(permuted, how) / by
        found.append([(weight * begins).sum(), (weight * lengths).sum()])
    error = np.std(found, axis=0, ddof=1) / math.sqrt(len(found))
    assert (abs(np.mean(found, axis=0)) < 3 * error).all()
