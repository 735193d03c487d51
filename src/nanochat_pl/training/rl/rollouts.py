"""Rollouts: answers drawn from the current weights, with their rewards; and the rows that they are trained on as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.out_of_memory import explain_out_of_memory
from nanochat_pl.data.batch import StepBatch, micro_batches
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.distributed.partition import share
from nanochat_pl.engine import Engine
from nanochat_pl.engine.sampling import seed_of
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tasks.base import Completion
from nanochat_pl.training.rl.prompts import Prompts
from nanochat_pl.training.rl.rewards import Rewards
from nanochat_pl.training.rl.settings import RLSettings

# Of eager steps: rows are padded to a multiple of this many positions.
POSITIONS = 16


@dataclass(frozen=True)
class Sample:
    """An answer, as plain data.

    Attributes:
        row: its number in the stage.
        task: name of the task of its prompt.
        prompt: the ids that it follows on.
        ids: of the answer, the token that ends it included.
        drawn: which of them the model chose; a tool has put in the others. These are trained on.
        logprobs: of each in the model that wrote it, at temperature 1.
        sampled_logprobs: in the distribution from which it was drawn.
        finish_reason: "stop", "length" or "context".
        reward: what it is worth.
        seed: of its draws.
        old: log-probs of each in the trained forward of the weights that wrote it; None: not needed.
        reference: in the model that the stage started from; None: not needed.
    """

    row: int
    task: str
    prompt: list[int]
    ids: list[int]
    drawn: list[bool]
    logprobs: list[float]
    sampled_logprobs: list[float]
    finish_reason: str
    reward: float
    seed: int
    old: list[float] | None = None
    reference: list[float] | None = None

    @property
    def finished(self) -> bool:
        """Whether the model ended it itself."""
        return self.finish_reason == "stop"

    def of_drawn(self, values: Sequence[float]) -> list[float]:
        """Of values of all tokens, those of the drawn ones."""
        return [value for value, drawn in zip(values, self.drawn, strict=True) if drawn]


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """The seed of an answer's draws: of no other answer of the stage.

    Args:
        seed: of the stage.
        step: optimizer steps made before.
        prompt: number in the rollout.
        sample: number in its group.
    """
    return seed_of("rollout", seed, step, prompt, sample)


def draw(
    engine: Engine, prompts: Prompts, rows: range, settings: RLSettings, seed: int, meanwhile: Callable[[], None]
) -> list[Sample]:
    """Answers to the prompts of some rows, without rewards.

    Args:
        engine: with the current weights.
        rows: of this process.
        seed: of the stage.
        meanwhile: called now and then.
    """
    asked = [prompts.prompt_of_row(row) for row in rows]
    step = rows.start // settings.samples_per_rollout * settings.updates_per_rollout if rows else 0
    per_rollout = settings.prompts_per_rollout
    seeds = [
        sample_seed(seed, step, row // settings.samples_per_prompt % per_rollout, sample)
        for row, (_, sample) in zip(rows, asked, strict=True)
    ]
    with explain_out_of_memory("rl: writing answers", "Use a smaller rl.decode_batch_size."):
        results = engine.generate(
            [prompt.ids for prompt, _ in asked],
            seeds=seeds,
            progress=lambda done, total: meanwhile(),
            **sampling(settings),
        )
    return [
        Sample(
            row=row,
            task=prompt.task,
            prompt=prompt.ids,
            ids=result.ids,
            drawn=[not forced for forced in result.forced],
            logprobs=result.logprobs,
            # What a tool puts in could not have been drawn, perhaps: its -inf is no JSON, and nobody needs it.
            sampled_logprobs=[
                plain if forced else sampled
                for sampled, plain, forced in zip(result.sampled_logprobs, result.logprobs, result.forced, strict=True)
            ],
            finish_reason=result.finish_reason,
            reward=0.0,
            seed=each,
        )
        for row, (prompt, _), result, each in zip(rows, asked, results, seeds, strict=True)
    ]


def sampling(settings: RLSettings) -> dict[str, Any]:
    """How answers are drawn: arguments of :meth:`Engine.generate`."""
    return {
        "max_tokens": settings.max_answer_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "max_batch": settings.decode_batch_size,
    }


def rewarded(samples: Sequence[Sample], prompts: Prompts, rewards: Rewards) -> list[Sample]:
    """The answers with their rewards. Raises :class:`UserError` where a reward fails."""
    given = []
    for sample in samples:
        prompt, _ = prompts.prompt_of_row(sample.row)
        completion = Completion(prompts.tokenizer.parse_assistant(sample.ids), sample.ids, sample.finished)
        given.append(replace(sample, reward=rewards.reward(prompts.tasks[sample.task], prompt, completion)))
    return given


def of_all_processes(own: Sequence[Sample]) -> list[Sample]:
    """The answers of all processes, in the order of their rows. All processes call it."""
    return [Sample(**each) for each in gathered([asdict(sample) for sample in own])]


def gathered(own: list[Any]) -> list[Any]:
    """The items of all processes, which are plain data, in the order of the processes. All processes call it."""
    if collectives.world_size() == 1:
        return own
    # A float survives JSON bit for bit.
    return [item for each in collectives.all_gather_plain(own) for item in each]


def own_share(count: int) -> range:
    """Which of ``count`` answers are this process's."""
    return share(0, count, collectives.rank(), collectives.world_size())


def batch_of(samples: Sequence[Sample], num_positions: int | None, fill: int) -> StepBatch:
    """This process's share of a step's answers as rows: prompt and answer, of which the drawn tokens are the targets.

    Args:
        samples: of the step, over all processes.
        num_positions: of each row; None: of the longest, rounded up.
        fill: the id behind a row's end.
    """
    longest = max(len(sample.prompt) + len(sample.ids) for sample in samples) - 1
    length = num_positions or -(-longest // POSITIONS) * POSITIONS
    own = own_share(len(samples))
    inputs = torch.full((len(own), length), fill, dtype=torch.int64)
    targets = torch.full((len(own), length), IGNORE_INDEX, dtype=torch.int64)
    for place, number in enumerate(own):
        sample = samples[number]
        ids = torch.tensor([*sample.prompt, *sample.ids])
        inputs[place, : len(ids) - 1] = ids[:-1]
        answer = slice(len(sample.prompt) - 1, len(ids) - 1)
        targets[place, answer] = torch.where(torch.tensor(sample.drawn), ids[len(sample.prompt) :], IGNORE_INDEX)
    return StepBatch(
        inputs,
        targets,
        int((targets != IGNORE_INDEX).sum()),
        num_rows=len(share(0, len(samples), 0, collectives.world_size())),
        num_rows_of_all=len(samples),
    )


def values_by_sample(values: Tensor, samples: Sequence[Sample]) -> list[list[float]]:
    """Of float32 (R, T), what belongs to the tokens of each of this process's answers, all of them."""
    own = [samples[number] for number in own_share(len(samples))]
    table = values.cpu()
    return [
        table[row, len(sample.prompt) - 1 : len(sample.prompt) + len(sample.ids) - 1].tolist()
        for row, sample in enumerate(own)
    ]


@torch.no_grad()
def logprobs_of(net: GPT, samples: Sequence[Sample], rows_at_once: int, fill: int) -> list[list[float]]:
    """Log-probs in a model of all tokens of all answers, tool output too. All processes call it, each for its share."""
    batch = batch_of(samples, None, fill)
    if not len(batch.inputs):
        return gathered([])
    every = batch._replace(targets=batch.inputs.roll(-1, 1), num_rows=0)  # the last one of each row is of no answer
    for number, place in enumerate(own_share(len(samples))):
        sample = samples[place]
        every.targets[number, len(sample.prompt) + len(sample.ids) - 2] = sample.ids[-1]
    parts = [
        -net.losses(inputs.to(net.device), targets.to(net.device))
        for inputs, targets, _ in micro_batches(every, rows_at_once)
    ]
    return gathered(values_by_sample(torch.cat(parts)[: len(batch.inputs)], samples))


def roll_out(
    engine: Engine,
    prompts: Prompts,
    rollout: int,
    settings: RLSettings,
    seed: int,
    rewards: Rewards,
    meanwhile: Callable[[], None],
) -> list[Sample]:
    """The answers of a rollout, of all processes, with their rewards. All processes call it.

    Args:
        rollout: its number, from 0.
    """
    first = rollout * settings.samples_per_rollout
    own = own_share(settings.samples_per_rollout)
    rows = range(first + own.start, first + own.stop)

    def drawn() -> list[Sample]:
        return rewarded(draw(engine, prompts, rows, settings, seed, meanwhile), prompts, rewards)

    return of_all_processes(coordination.raise_on_all_ranks(drawn))
