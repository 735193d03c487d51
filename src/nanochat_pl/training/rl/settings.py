"""Settings of the config group ``rl``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nanochat_pl.common.schema import setting
from nanochat_pl.evaluation.candidates import MAX_SAMPLES

# What the weights do not depend on: it may differ when a stage goes on.
IRRELEVANT_KEYS = {
    "decode_batch_size",
    "eval_every_steps",
    "eval_samples",
    "eval_problems",
    "sample_table_every_steps",
    "rollouts_mb",
}


@dataclass(frozen=True)
class RLSettings:
    """Of the stage rl: rollouts, rewards and the loss. The tasks are those of mixture."""

    reward: str | None = setting(
        None,
        "A reward of your own, package.module.name: a function, or a class that is made without arguments, called with"
        " (conversation, completion); null: that of each task.",
    )
    prompts_per_step: int = setting(
        16, "Prompts of an optimizer step; a rollout has updates_per_rollout times as many.", at_least=1, at_most=2**16
    )
    samples_per_prompt: int = setting(16, "Answers to each prompt: a group.", at_least=1, at_most=2**16)
    max_new_tokens: int | None = setting(
        None, "Maximum number of tokens in an answer; null: half of the model's row.", at_least=1, at_most=2**16
    )
    temperature: float = setting(
        1.0, "Sampling temperature; a value other than 1 needs importance_cap.", above=0, at_most=100
    )
    top_k: int | None = setting(
        None,
        "Sample from the k most likely tokens only; null: from all. Needs importance_cap, and stays biased.",
        at_least=1,
    )
    top_p: float = setting(
        1.0,
        "Sample from the most likely tokens that together have this probability; below 1 needs importance_cap, and"
        " stays biased.",
        above=0,
        at_most=1,
    )
    min_p: float = setting(
        0.0,
        "Sample from tokens with at least this share of the largest probability; above 0 needs importance_cap, and"
        " stays biased.",
        at_least=0,
        at_most=1,
    )
    advantage: Literal["mean", "mean_std"] = setting(
        "mean", "Reward minus the mean of its group; mean_std: also divided by the group's standard deviation."
    )
    denominator: Literal["tokens", "constant"] = setting(
        "tokens",
        "What the loss of a step is divided by. tokens: its trained tokens; constant: max_new_tokens times all of its"
        " answers, also those left out of the loss, as in Dr. GRPO.",
    )
    updates_per_rollout: int = setting(
        1, "Optimizer steps that share a rollout: each has other groups of it.", at_least=1, at_most=1024
    )
    clip_low: float | None = setting(
        None,
        "With several updates: a token of an answer below average loses its gradient where its probability has fallen"
        " below 1 - clip_low of that at the rollout; null: never.",
        above=0,
        at_most=1,
    )
    clip_high: float | None = setting(
        None, "As clip_low, above average and risen above 1 + clip_high; null: never.", above=0, at_most=1e6
    )
    importance_cap: float | None = setting(
        None,
        "Truncated importance sampling: weight each token by its probability under the model over that under which it"
        " was drawn, at most this; null: no such weights.",
        at_least=1,
        at_most=1e6,
    )
    kl_beta: float = setting(
        0.0, "Coefficient of the divergence (KL) from the model that the stage starts from; 0: none.", at_least=0
    )
    skip_groups_without_signal: bool = setting(
        False,
        "Leave groups whose rewards are all equal out of the loss and, with denominator=tokens, of its denominator."
        " They have no gradient but that of kl_beta.",
    )
    unfinished: Literal["keep", "drop"] = setting(
        "keep", "Answers that reached max_new_tokens: train on them, or leave them out of the loss."
    )
    shuffle_rewards: bool = setting(
        False,
        "A control: the rewards of a step are permuted over all of its answers, so they say nothing; what is recorded"
        " as reward stays the true one.",
    )
    decode_batch_size: int | None = setting(
        None, "Answers that are written at the same time; null: as the engine chooses. Memory and time.", at_least=1
    )
    eval_every_steps: int | None = setting(
        0,
        "Steps between two measurements of pass@k on held-out problems; 0: before the first step and at the end; null:"
        " never.",
        at_least=0,
    )
    eval_samples: int = setting(
        8, "Answers to each of them; pass@k is given for k = 1, 2, 4 … up to it.", at_least=1, at_most=MAX_SAMPLES
    )
    eval_problems: int | None = setting(100, "Held-out problems of each task; null: all.", at_least=1)
    sample_table_every_steps: int = setting(
        20, "Steps between two tables of answers, as text in TensorBoard; 0: none.", at_least=0
    )
    rollouts_mb: float = setting(
        200.0,
        "Megabytes that the records of the rollouts may take: the oldest go, but for those of the first step; 0: none"
        " are kept.",
        at_least=0,
    )

    def problems(self) -> list[str]:
        """What cannot be, a line for each key: of the stages that use these settings, as others need not care."""
        problems = []
        if self.samples_per_prompt == 1:
            problems.append(
                "samples_per_prompt=1: an answer is compared with the mean of its group, and the mean of one is itself:"
                " nothing would be learnt; give at least 2."
            )
        if self.updates_per_rollout == 1:
            problems += [
                f"{key}={value}: does nothing with updates_per_rollout=1, where the model is the one that wrote."
                for key, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high))
                if value is not None
            ]
        if self.importance_cap is None:
            other = "the answers would be drawn from another distribution than the one that the gradient is of"
            if self.temperature != 1:
                problems.append(
                    f"temperature={self.temperature}: {other}; set importance_cap=2 to weight their tokens, or"
                    " temperature=1."
                )
            problems += [
                f"{key}={value}: {other}; set {key}={usual}. importance_cap=2 weights the tokens that were drawn, but"
                " the gradient stays biased: tokens outside the kept set can never be drawn."
                for key, value, usual in self._truncated
            ]
        return problems

    @property
    def _truncated(self) -> list[tuple[str, float, str]]:
        """The keys by which some tokens can never be drawn: key, value, the value with which all can."""
        found: list[tuple[str, float, str]] = []
        if self.top_k is not None:
            found.append(("top_k", self.top_k, "null"))
        if self.top_p != 1:
            found.append(("top_p", self.top_p, "1"))
        if self.min_p != 0:
            found.append(("min_p", self.min_p, "0"))
        return found

    def for_rows(self, sequence_len: int) -> RLSettings:
        """These settings for rows of so many positions: ``max_new_tokens`` is a number."""
        return self if self.max_new_tokens is not None else replace(self, max_new_tokens=max(1, sequence_len // 2))

    @property
    def max_answer_tokens(self) -> int:
        """``max_new_tokens``, once the model's rows are known."""
        assert self.max_new_tokens is not None, "settings.for_rows(sequence_len) has it"
        return self.max_new_tokens

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that are answered at once, over all processes."""
        return self.prompts_per_step * self.updates_per_rollout

    @property
    def samples_per_rollout(self) -> int:
        """Answers of a rollout, over all processes."""
        return self.prompts_per_rollout * self.samples_per_prompt

    @property
    def samples_per_update(self) -> int:
        """Answers of an optimizer step, over all processes."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the weights of tokens depend on what the trained model gave them when they were drawn."""
        return self.updates_per_rollout > 1 or self.importance_cap is not None or self.kl_beta > 0

    def eval_ks(self) -> list[int]:
        """The k of pass@k: powers of two."""
        return [k for k in (2**power for power in range(11)) if k <= self.eval_samples]
