"""What several processes do in tests of stage rl: a job for tests.helpers.processes."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from nanochat_pl.engine import Engine
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tasks.base import conversation_of
from nanochat_pl.training.rl.prompts import Prompt
from nanochat_pl.training.rl.rewards import Rewards
from nanochat_pl.training.rl.rollouts import roll_out
from nanochat_pl.training.rl.settings import RLSettings
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.training import tiny_model

SETTINGS = RLSettings(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=6)


class FewPrompts:
    """Numbers as prompts, in place of a mixture."""

    tokenizer = byte_tokenizer()
    tasks: ClassVar[dict[str, Any]] = {"numbers": SimpleNamespace(name="numbers")}

    def prompt_of_row(self, row: int) -> tuple[Prompt, int]:
        number, sample = divmod(row, SETTINGS.samples_per_prompt)
        conversation = conversation_of(str(number), "")
        return Prompt("numbers", conversation, self.tokenizer.render_for_completion(conversation)), sample


def roll_out_tiny() -> list[dict[str, Any]]:
    """The third rollout of a tiny model, without log-probs, whose last bits depend on how many answers are drawn at
    once."""
    return [{key: value for key, value in of.items() if not key.endswith("logprobs")} for of in _roll_out("float32")]


def roll_out_tiny_in_bfloat16() -> list[dict[str, Any]]:
    """The same in bfloat16, with log-probs."""
    return _roll_out("bfloat16")


def _roll_out(dtype: str) -> list[dict[str, Any]]:
    prompts: Any = FewPrompts()
    net = init_weights(GPT(replace(tiny_model(), compute_dtype=dtype)).materialise(), seed=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model: Any = SimpleNamespace(net=net.eval(), tokenizer=prompts.tokenizer)
    rewards = Rewards("tests.helpers.rewards.thirds")
    samples = roll_out(Engine(model), prompts, 2, SETTINGS, 0, rewards, lambda: None)
    return [asdict(sample) for sample in samples]
