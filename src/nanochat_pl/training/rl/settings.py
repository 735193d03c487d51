"""Settings of the config group ``rl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting

# What has no say in the weights: it may differ when a stage goes on.
WITHOUT_A_SAY = {"eval_every_steps", "eval_samples", "eval_problems", "sample_table_every_steps", "rollouts_mb"}


@dataclass(frozen=True)
class RLSettings:
    """Of the stage rl: rollouts, rewards and the loss. The tasks are those of mixture."""

    reward: str | None = setting(
        None,
        "A reward of your own, package.module.name: a function, or a class that is made without arguments, called with"
        " (conversation, completion); null: that of each task.",
    )
    prompts_per_step: int = setting(16, "Prompts of a rollout.", at_least=1, at_most=2**16)
    samples_per_prompt: int = setting(16, "Answers to each prompt: a group.", at_least=1, at_most=2**16)
    max_new_tokens: int = setting(256, "Most tokens of an answer.", at_least=1, at_most=2**16)
    temperature: float = setting(1.0, "Of the draws; other than 1 needs importance_cap.", above=0, at_most=100)
    top_k: int | None = setting(
        None, "Draw from the k most likely tokens; null: from all; else it needs importance_cap.", at_least=1
    )
    top_p: float = setting(
        1.0,
        "Draw from the most likely tokens that have this share of the probability; below 1 needs importance_cap.",
        above=0,
        at_most=1,
    )
    min_p: float = setting(
        0.0,
        "Draw from tokens with at least this share of the largest probability; above 0 needs importance_cap.",
        at_least=0,
        at_most=1,
    )
    advantage: Literal["mean", "mean_std"] = setting(
        "mean", "Of an answer: reward minus the mean of its group; mean_std: divided by the group's deviation too."
    )
    denominator: Literal["tokens", "constant"] = setting(
        "tokens",
        "What the step's sum is divided by: its trained tokens; or, as Dr. GRPO, max_new_tokens times its answers.",
    )
    updates_per_rollout: int = setting(
        1, "Optimizer steps that share the prompts of a rollout.", at_least=1, at_most=1024
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
        "Weight each token by its probability under the model over that under which it was drawn, at most this; null:"
        " no such weights.",
        above=0,
        at_most=1e6,
    )
    kl_beta: float = setting(
        0.0, "Coefficient of the divergence (KL) from the model that the stage starts from; 0: none.", at_least=0
    )
    skip_groups_without_signal: bool = setting(
        False, "Leave groups whose rewards are all equal out of the loss and of its denominator."
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
    eval_samples: int = setting(8, "Answers to each of them; pass@k is given for k = 1, 2, 4 … up to it.", at_least=1)
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

    def __post_init__(self) -> None:
        problems = []
        if self.samples_per_prompt == 1:
            problems.append(
                "samples_per_prompt=1: an answer is compared with the mean of its group, and the mean of one is itself:"
                " nothing would be learnt; give at least 2."
            )
        if self.prompts_per_step % self.updates_per_rollout:
            problems.append(
                f"updates_per_rollout={self.updates_per_rollout}: does not divide prompts_per_step="
                f"{self.prompts_per_step}, whose groups the updates share."
            )
        if self.updates_per_rollout == 1:
            problems += [
                f"{key}={value}: does nothing with updates_per_rollout=1, where the model is the one that wrote."
                for key, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high))
                if value is not None
            ]
        if self.importance_cap is None:
            problems += [
                f"{key}={value}: the answers would be drawn from another distribution than the one that the gradient"
                f" is of; set importance_cap=2 to weight their tokens, or {key}={usual}."
                for key, value, usual in self._truncated
            ]
        if problems:
            raise UserError(problems)

    @property
    def _truncated(self) -> list[tuple[str, float, str]]:
        """The keys by which answers are not drawn from the model's own distribution: key, value, the usual one."""
        found: list[tuple[str, float, str]] = []
        if self.temperature != 1:
            found.append(("temperature", self.temperature, "1"))
        if self.top_k is not None:
            found.append(("top_k", self.top_k, "null"))
        if self.top_p != 1:
            found.append(("top_p", self.top_p, "1"))
        if self.min_p != 0:
            found.append(("min_p", self.min_p, "0"))
        return found

    @property
    def samples_per_rollout(self) -> int:
        """Answers of a rollout, over all processes."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def samples_per_update(self) -> int:
        """Answers of an optimizer step, over all processes."""
        return self.samples_per_rollout // self.updates_per_rollout

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the weights of tokens depend on what the trained model gave them when they were drawn."""
        return self.updates_per_rollout > 1 or self.importance_cap is not None or self.kl_beta > 0

    def eval_ks(self) -> list[int]:
        """The k of pass@k: powers of two."""
        return [k for k in (2**power for power in range(11)) if k <= self.eval_samples]
