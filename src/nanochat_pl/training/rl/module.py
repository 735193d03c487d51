"""The LightningModule of the stage rl: THE training step, on answers that it writes itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat_pl.common.paths import run_keys
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.engine import Engine
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.gpt import GPT
from nanochat_pl.training.callbacks.evaluation import ModelAndTokenizer
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop
from nanochat_pl.training.callbacks.tensorboard import show_text
from nanochat_pl.training.module import LMModule, ModuleConfig
from nanochat_pl.training.rl.metrics import COLUMNS, reward_column, sample_metrics, sampler_metrics, weight_metrics
from nanochat_pl.training.rl.prompts import Prompts
from nanochat_pl.training.rl.records import RolloutRecords, record_of, sample_table
from nanochat_pl.training.rl.rewards import Rewards
from nanochat_pl.training.rl.rollouts import (
    Sample,
    batch_of,
    gathered,
    logprobs_of,
    own_share,
    roll_out,
    values_by_sample,
)
from nanochat_pl.training.rl.settings import RLSettings
from nanochat_pl.training.rl.weights import Logprobs, TokenWeights, advantages, divisor, shuffled, token_weights


class Answers(NamedTuple):
    """Those of a step, over all processes; which of them are in its loss, and which are in its batch."""

    samples: Sequence[Sample]
    advantage: Sequence[float]
    in_loss: set[int]
    chosen: Sequence[int]


class RLModule(LMModule):
    """As :class:`LMModule`, but a step's rows are answers to prompts, drawn from the current weights within the step.

    Every process holds all answers of a step, and trains on its share of them. All that is random depends on the seed
    and the number of the step, so a step that is done again is the same.

    Args:
        config, weights, moments: of LMModule; the weights are those of the model that the stage starts from.
        settings: of the stage.
        prompts: by number.
        rewards: of the answers.
        folder: of the stage, for the records.
    """

    progress_metric: ClassVar[str] = "reward"

    def __init__(
        self,
        config: ModuleConfig | Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Tensor] | None = None,
        *,
        settings: RLSettings,
        prompts: Prompts,
        rewards: Rewards,
        folder: Path,
    ) -> None:
        super().__init__(config, weights, moments)
        self.settings, self.prompts, self.rewards = settings, prompts, rewards
        self.tokenizer = prompts.tokenizer
        self.records = RolloutRecords(folder, settings.rollouts_mb)
        tasks = prompts.tasks if len(prompts.tasks) > 1 else ()
        self.columns = (*COLUMNS, *map(reward_column, tasks))  # type: ignore[misc]
        self._samples: list[Sample] = []  # of the rollout whose answers are being trained on
        self._rollout = -1  # its number
        self._num_tokens = self._steps_without_signal = 0
        self._has_signal = self._is_finite = True
        self._answers = Answers([], [], set(), [])  # of the step at hand
        self._logprobs_of_step: list[list[float]] = []  # of the tokens of those in the batch, in its forward
        self._token_nats: list[Tensor] = []
        # Each in a tuple: as attributes, modules and what is bound to them would be part of what is trained and saved.
        self._by_token: tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], ...] = ()
        self._reference: tuple[GPT | None, ...] = (None,)

    def configure_model(self) -> None:
        """As of LMModule; with the model that the stage starts from, where the divergence from it is in the loss."""
        if self.net is not None:
            return
        super().configure_model()
        assert self.net is not None
        loss = self._loss[0]
        self._by_token = (loss.by_token if isinstance(loss, CompiledLoss) else self.net.loss_by_token,)
        reference: GPT | None = None
        if self.settings.kl_beta:
            reference = GPT(
                self.config.model, loss_chunk_tokens=self.config.loss_chunk_tokens, attention=self.config.attention
            )
            reference.materialise(self._training_device()).requires_grad_(False)
            self.init_weights(reference)
        self._reference = (reference,)

    def on_train_start(self) -> None:
        """Forget the records of steps that will be made again."""
        coordination.run_on_rank_zero(lambda: self.records.rewind(self.global_step))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the answers that later steps are still to be trained on."""
        super().on_save_checkpoint(checkpoint)
        is_used_up = self.global_step % self.settings.updates_per_rollout == 0
        checkpoint["nanochat_pl"]["rl"] = {
            "rollout": -1 if is_used_up else self._rollout,
            "samples": [] if is_used_up else [asdict(sample) for sample in self._samples],
            "num_tokens": self._num_tokens,
            "steps_without_signal": self._steps_without_signal,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a resume file."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["nanochat_pl"]["rl"]
        self._rollout, self._samples = saved["rollout"], [Sample(**each) for each in saved["samples"]]
        self._num_tokens, self._steps_without_signal = saved["num_tokens"], saved["steps_without_signal"]

    def inspect_command(self, step: int) -> str:
        """The command that shows the first answer of a step, whose rows are numbered as its answers are."""
        if not self.settings.rollouts_mb:
            return ""
        folder = self.records.folder.parent
        run = run_keys(folder.parent.name, folder.parent.parent)
        return f"nanochat-pl inspect rollout={step}:0 stage={folder.name} {run}"

    def training_step(self, batch: StepBatch, batch_idx: int = 0) -> dict[str, Any]:
        """One optimizer step on answers to the prompts of its rows; see :meth:`LMModule.training_step`.

        Returns:
            what LMModule's does, and ``num_tokens``, padding included. A step without signal is not ``skipped``.

        Raises:
            UserError: as there; a reward fails; answers cannot be written.
        """
        began, step, settings = time.perf_counter(), self.global_step, self.settings
        samples = self._samples_of_step(step)
        written_in = time.perf_counter() - began
        rewards = np.array([sample.reward for sample in samples]).reshape(-1, settings.samples_per_prompt)
        if settings.shuffle_rewards:
            rewards = shuffled(rewards, self.config.seed, step)
        advantage = advantages(rewards, settings.advantage).reshape(-1).tolist()
        chosen = self._trained(samples, advantage)
        trained = [samples[number] for number in chosen]
        weights = self._weights(trained, [advantage[number] for number in chosen], step)
        in_loss = {*chosen}
        if len(chosen) < len(samples) and not any(each.weights.any() for each in weights):
            chosen, trained = list(range(len(samples))), samples  # none is left that teaches anything
            weights = [_no_weights(sample) for sample in samples]
        self._has_signal = any(each.weights.any() for each in weights)
        made = self._batch(trained, weights, chosen)
        self._answers = Answers(samples, advantage, in_loss, chosen)
        outputs = super().training_step(made, batch_idx)
        self._steps_without_signal += not self._has_signal
        self._num_tokens += sum(len(sample.prompt) + len(sample.ids) for sample in samples)
        metrics = sample_metrics(samples, settings.samples_per_prompt, self.tokenizer) | weight_metrics(
            weights, settings.updates_per_rollout > 1
        )
        if step % settings.updates_per_rollout == 0:
            metrics |= sampler_metrics(trained, self._logprobs_of_step)
        metrics |= {
            "steps_without_signal": self._steps_without_signal,
            "num_tokens": self._num_tokens,
            "train/epochs": self.prompts.epochs_after((step + 1) * settings.samples_per_update),
            "rollout_time": written_in,
            "step_time": time.perf_counter() - began,
        }
        self._log({name: value for name, value in metrics.items() if name in self.columns or "/epochs" in name})
        if collectives.is_rank_zero():
            self._show(step, samples, advantage)
        num_tokens = (made.num_rows_of_all or len(made.inputs)) * made.inputs.shape[1]
        return outputs | {"skipped": not self._is_finite, "num_tokens": num_tokens}

    def may_update(self, batch: StepBatch, loss: float, norm: float) -> bool:
        """As of LMModule; a step in which all weights are 0 changes nothing: the optimizer would go on by momentum.

        The answers are recorded first: where a metric is not finite, the message names the command that shows them.
        """
        trained = [self._answers.samples[number] for number in self._answers.chosen]
        own = values_by_sample(-torch.cat(self._token_nats)[: len(batch.inputs)], trained)
        self._logprobs_of_step = gathered(own)
        if collectives.is_rank_zero():
            self._record(self.global_step, self._answers)
        self._is_finite = super().may_update(batch, loss, norm)
        return self._is_finite and self._has_signal

    def weighted_loss(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """As of LMModule; keeps the nats of each target."""
        assert weights is not None
        total, row_losses, nats = self._by_token[0](inputs, targets, weights)
        self._row_losses.append(row_losses)
        self._token_nats.append(nats)
        return total

    def between_micro_batches(self, part: int) -> None:
        """As of LMModule."""
        if part == 0:
            self._token_nats = []
        super().between_micro_batches(part)

    def _samples_of_step(self, step: int) -> list[Sample]:
        """The answers that a step is trained on, of all processes; in the first step of a rollout they are written."""
        settings = self.settings
        rollout, part = divmod(step, settings.updates_per_rollout)
        if self._rollout != rollout:
            self._samples, self._rollout = self._write(rollout), rollout
        size = settings.samples_per_update
        return self._samples[part * size : (part + 1) * size]

    def _write(self, rollout: int) -> list[Sample]:
        assert self.net is not None
        self.net.eval()
        engine = Engine(ModelAndTokenizer(self.net, self.tokenizer))
        seed = self.config.seed
        samples = roll_out(engine, self.prompts, rollout, self.settings, seed, self.rewards, self._check_stop)
        if self.settings.needs_old_logprobs:
            every = self._logprobs(self.net, samples)
            samples = [replace(sample, old=row) for sample, row in zip(samples, every, strict=True)]
        if (reference := self._reference[0]) is not None:
            every = self._logprobs(reference, samples)
            samples = [replace(sample, reference=row) for sample, row in zip(samples, every, strict=True)]
        self.net.train()
        return samples

    def _logprobs(self, net: GPT, samples: Sequence[Sample]) -> list[list[float]]:
        return logprobs_of(net, samples, self.device_batch_size, self.tokenizer.bos_id)

    def _check_stop(self) -> None:
        """Ask for a stop while answers are written; of several processes none could be asked alone."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GracefulStop):
                callback.check_alone()

    def _trained(self, samples: Sequence[Sample], advantage: Sequence[float]) -> list[int]:
        """Numbers of the answers that are in the loss."""
        size = self.settings.samples_per_prompt
        signal = [any(advantage[i - i % size : i - i % size + size]) for i in range(len(samples))]
        return [
            number
            for number, sample in enumerate(samples)
            if (sample.finished or self.settings.unfinished == "keep")
            and (signal[number] or not self.settings.skip_groups_without_signal)
        ]

    def _weights(self, samples: Sequence[Sample], advantage: Sequence[float], step: int) -> list[TokenWeights]:
        """The weights of the drawn tokens of each answer."""
        assert self.net is not None
        current: Sequence[Sequence[float] | None] = [sample.old for sample in samples]
        if step % self.settings.updates_per_rollout and samples:
            current = self._logprobs(self.net, samples)
        found = []
        for sample, each, now in zip(samples, advantage, current, strict=True):
            sampled = np.array(sample.of_drawn(sample.sampled_logprobs))
            old = sampled if sample.old is None else np.array(sample.of_drawn(sample.old))
            reference = None if sample.reference is None else np.array(sample.of_drawn(sample.reference))
            present = old if now is None else np.array(sample.of_drawn(now))
            found.append(token_weights(each, Logprobs(sampled, old, present, reference), self.settings))
        return found

    def _batch(self, samples: Sequence[Sample], weights: Sequence[TokenWeights], numbers: Sequence[int]) -> StepBatch:
        """This process's rows, on the device. ``numbers``: of the answers in the step."""
        # Compiled, each length would be a graph of its own.
        length = self.config.model.sequence_len if self.config.compile else None
        batch = batch_of(samples, length, self.tokenizer.bos_id)
        table = torch.zeros(batch.targets.shape, dtype=torch.float32)
        own = own_share(len(samples))
        for row, number in enumerate(own):
            drawn = torch.tensor(samples[number].drawn).nonzero()[:, 0] + len(samples[number].prompt) - 1
            table[row, drawn] = torch.as_tensor(weights[number].weights, dtype=torch.float32)
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        by = divisor(self.settings, self.settings.samples_per_update)
        return batch._replace(
            inputs=inputs,
            targets=targets,
            weights=table.to(self.device),
            divisor=by,
            row_numbers=tuple(numbers[number] for number in own),
        )

    def _record(self, step: int, answers: Answers) -> None:
        """Write down the answers of a step."""
        logprobs = dict(zip(answers.chosen, self._logprobs_of_step, strict=True))
        written_at = step - step % self.settings.updates_per_rollout
        self.records.write(
            step + 1,
            [
                record_of(each, step + 1, i, written_at, answers.advantage[i], i in answers.in_loss, logprobs.get(i))
                for i, each in enumerate(answers.samples)
            ],
        )

    def _show(self, step: int, samples: Sequence[Sample], advantage: Sequence[float]) -> None:
        """A table of some answers, for people."""
        every = self.settings.sample_table_every_steps
        if every and step % every == 0:
            show_text(self.loggers, "rollouts", sample_table(samples, advantage, self.tokenizer), step + 1)


def _no_weights(sample: Sample) -> TokenWeights:
    number = sum(sample.drawn)
    return TokenWeights(np.zeros(number), np.zeros(number, dtype=bool), np.zeros(number, dtype=bool), np.zeros(0))
