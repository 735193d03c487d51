"""The weight of each token in the loss, sum of weight * nats: pure functions.

The gradient of any function f of the log-probability of drawn tokens is f' times that of the log-probability, so every
objective is the weighted loss with constant weights. G answers a group, n trained tokens of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanochat_pl.engine.sampling import seed_of
from nanochat_pl.training.rl.settings import RLSettings

# Rewards of a group that differ by less than this share of the largest one (in absolute value) count as equal.
ROUNDING = 1e-9


def advantages(rewards: np.ndarray, how: str = "mean") -> np.ndarray:
    """How much better each answer is than its group.

    Args:
        rewards: float64 (groups, G), G at least 2.
        how: ``mean``: the reward minus the group's mean; ``mean_std``: divided by the group's standard deviation
            (that of a sample, over G - 1) as well.

    Returns:
        float64 (groups, G); exactly 0 in groups whose rewards are all equal up to rounding.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if how == "mean_std":
        deviation = rewards.std(axis=1, ddof=1, keepdims=True)
        centred = centred / np.where(deviation > 0, deviation, 1.0)
    return np.where(has_signal(rewards)[:, None], centred, 0.0)


def shuffled(rewards: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The rewards of a step, permuted over all of its answers: a control, in which they say nothing of the answers.

    Args:
        rewards: (groups, G).
        seed: of the stage.
        step: optimizer steps made before. Seed and step determine the permutation.
    """
    return np.random.default_rng(seed_of("shuffle", seed, step)).permutation(rewards.reshape(-1)).reshape(rewards.shape)


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Which groups have answers of different rewards, beyond rounding: (groups, G) → bool (groups,)."""
    return np.ptp(rewards, axis=1) > ROUNDING * np.abs(rewards).max(axis=1)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the trained tokens of an answer, float64 (n,) each.

    Attributes:
        sampled: in the distribution from which they were drawn (temperature, top-k … included).
        old: in the trained model as it was then.
        current: in the model as it is now.
        reference: in the model that the stage started from; None: not needed.
    """

    sampled: np.ndarray
    old: np.ndarray
    current: np.ndarray
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class TokenWeights:
    """Of the trained tokens of an answer, (n,) each.

    Attributes:
        weights: float64.
        clipped_low, clipped_high: bool: which tokens have lost their gradient, below and above.
        kl: float64: the estimate of the divergence from the reference; empty without one.
    """

    weights: np.ndarray
    clipped_low: np.ndarray
    clipped_high: np.ndarray
    kl: np.ndarray


def token_weights(advantage: float, logprobs: Logprobs, settings: RLSettings) -> TokenWeights:
    """The weights of an answer's tokens, before the division by the denominator of the step.

    With r = current / old and c = old / sampled, at most ``importance_cap``: c r advantage, and 0 where r is clipped;
    plus ``kl_beta`` (reference / current - 1), the gradient of the estimate reference / current - log of it - 1.
    """
    ratio = np.exp(logprobs.current - logprobs.old)
    low, high = settings.clip_low, settings.clip_high
    clipped_low = (ratio < 1 - low) & (advantage < 0) if low is not None else np.zeros_like(ratio, dtype=bool)
    clipped_high = (ratio > 1 + high) & (advantage > 0) if high is not None else np.zeros_like(ratio, dtype=bool)
    weights = np.where(clipped_low | clipped_high, 0.0, ratio * advantage)
    if settings.importance_cap is not None:
        weights = weights * np.minimum(np.exp(logprobs.old - logprobs.sampled), settings.importance_cap)
    kl = np.zeros(0)
    if logprobs.reference is not None:
        difference = logprobs.reference - logprobs.current
        kl = np.expm1(difference) - difference
        weights = weights + settings.kl_beta * np.expm1(difference)
    return TokenWeights(weights, clipped_low, clipped_high, kl)


def divisor(settings: RLSettings, num_samples: int) -> float | None:
    """What the step's sum is divided by; None: its number of trained tokens.

    Args:
        num_samples: answers of the step, over all processes.
    """
    return None if settings.denominator == "tokens" else float(settings.max_answer_tokens * num_samples)
