"""What one sees of a step: rewards, lengths, tools, and how far the sampler's log-probs are from the trainer's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.rl.rollouts import Sample
from nanochat_pl.training.rl.weights import TokenWeights, has_signal

# Of each token's importance weight: within them a mismatch counts as small.
RATIO_BOUNDS = (0.9, 1.1)
QUANTILES = (0.5, 0.9, 0.99)

_DIFFERENCE, _RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
COLUMNS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "steps_without_signal",
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length")),
    "completions/mean_terminated_length",
    "completions/clipped_ratio",
    "entropy_estimate",
    "tools/call_frequency",
    "tools/failure_frequency",
    "kl",
    *(f"clip_ratio/{name}_mean" for name in ("low", "high", "region")),
    *(f"{_DIFFERENCE}/{name}" for name in ("mean", "max", *(f"p{round(100 * q)}" for q in QUANTILES))),
    *(f"{_RATIO}/{name}" for name in ("min", "mean", "max")),
    "ratio_fraction_low",
    "ratio_fraction_high",
    "rollout_is_eff_sample_size",
    "training_ppl",
    "rollout_ppl",
    "num_tokens",
    "rollout_time",
    "step_time",
)


def reward_column(task: str) -> str:
    """The name of a task's mean reward, where there are several tasks."""
    return f"reward/{task}"


def sample_metrics(samples: Sequence[Sample], group_size: int, tokenizer: Tokenizer) -> dict[str, float]:
    """Of all answers of a step, also those left out of the loss: rewards, lengths, ends, tool calls, entropy.

    Args:
        samples: whole groups, one after the other.
        group_size: G.
    """
    rewards = np.array([sample.reward for sample in samples]).reshape(-1, group_size)
    lengths = np.array([len(sample.ids) for sample in samples])
    ended = np.array([sample.finished for sample in samples])
    calls, answered = (
        np.array(counts) for counts in zip(*(tool_calls(each, tokenizer) for each in samples), strict=True)
    )
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1, ddof=1).mean()),
        "frac_reward_zero_std": float((~has_signal(rewards)).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
        "entropy_estimate": float(
            -np.mean([value for each in samples for value in each.of_drawn(each.sampled_logprobs)])
        ),
        "tools/call_frequency": float(calls.mean()),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    if calls.sum():
        metrics["tools/failure_frequency"] = float(1 - answered.sum() / calls.sum())
    tasks = sorted({sample.task for sample in samples})
    for task in tasks:
        metrics[reward_column(task)] = float(np.mean([each.reward for each in samples if each.task == task]))
    return metrics


def tool_calls(sample: Sample, tokenizer: Tokenizer) -> tuple[int, int]:
    """How many expressions an answer gave to the calculator, and to how many of them it got a result."""
    start, end, output = (
        tokenizer.special_ids[name] for name in ("<|python_start|>", "<|python_end|>", "<|output_start|>")
    )
    calls, is_open = 0, False
    for token, drawn in zip(sample.ids, sample.drawn, strict=True):
        if drawn and token == end and is_open:
            calls += 1
        if drawn and token in (start, end):
            is_open = token == start
    results = sum(token == output for token, drawn in zip(sample.ids, sample.drawn, strict=True) if not drawn)
    return calls, results


def sampler_metrics(samples: Sequence[Sample], trained: Sequence[Sequence[float]]) -> dict[str, float]:
    """How the sampler's log-probs of the drawn tokens compare with those of the forward that makes the gradient.

    Differences are absolute ones, of the plain softmax at temperature 1; ratios are those of the trainer's probability
    over that in the distribution from which a token was drawn, before any cap.

    Args:
        samples: those in the loss, of a step in which the weights are still those that wrote them.
        trained: log-probs of all tokens of each of them.
    """
    ours = np.array([value for each, row in zip(samples, trained, strict=True) for value in each.of_drawn(row)])
    plain = np.array([value for each in samples for value in each.of_drawn(each.logprobs)])
    drawn = np.array([value for each in samples for value in each.of_drawn(each.sampled_logprobs)])
    difference, ratio = np.abs(ours - plain), np.exp(ours - drawn)
    low, high = RATIO_BOUNDS
    return {
        f"{_DIFFERENCE}/mean": float(difference.mean()),
        f"{_DIFFERENCE}/max": float(difference.max()),
        **{f"{_DIFFERENCE}/p{round(100 * q)}": float(np.quantile(difference, q)) for q in QUANTILES},
        f"{_RATIO}/min": float(ratio.min()),
        f"{_RATIO}/mean": float(ratio.mean()),
        f"{_RATIO}/max": float(ratio.max()),
        "ratio_fraction_low": float((ratio < low).mean()),
        "ratio_fraction_high": float((ratio > high).mean()),
        "rollout_is_eff_sample_size": float(ratio.mean() ** 2 / (ratio**2).mean()),
        "training_ppl": float(np.exp(-ours.mean())),
        "rollout_ppl": float(np.exp(-plain.mean())),
    }


def weight_metrics(weights: Sequence[TokenWeights], clips: bool) -> dict[str, float]:
    """Shares of tokens that were clipped, and the divergence from the start, of the answers in the loss of a step.

    Args:
        clips: whether any could be clipped.
    """
    low = np.concatenate([each.clipped_low for each in weights])
    high = np.concatenate([each.clipped_high for each in weights])
    kl = np.concatenate([each.kl for each in weights])
    shares = {"low": low, "high": high, "region": low | high} if clips and len(low) else {}
    metrics = {f"clip_ratio/{name}_mean": float(clipped.mean()) for name, clipped in shares.items()}
    return metrics | ({"kl": float(kl.mean())} if len(kl) else {})
