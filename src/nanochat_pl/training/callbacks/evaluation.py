"""What is measured while a stage trains: validation bits per byte on fixed rows, and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.files import explain_disk_errors, keep_lines_until
from nanochat_pl.common.out_of_memory import release_memory, runs_out_of_memory
from nanochat_pl.distributed import coordination
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.samples import write_samples
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.callbacks.metrics import StepClock, log_everywhere
from nanochat_pl.training.callbacks.tensorboard import show_samples


class ModelAndTokenizer(NamedTuple):
    """What the engine needs of a model in training."""

    net: GPT
    tokenizer: Tokenizer


class Samples:
    """Greedy continuations of fixed prompts, one JSON line each in `samples.jsonl`."""

    def __init__(self, path: Path, prompts: Sequence[str], max_tokens: int) -> None:
        self.path, self.prompts, self.max_tokens = path, prompts, max_tokens

    def write(self, net: GPT, tokenizer: Tokenizer, step: int) -> list[dict[str, Any]]:
        """Sample and append. Where memory runs out there are none of this step: that is no reason to end a training."""
        samples: list[dict[str, str]] = []

        def sample() -> None:
            samples.extend(write_samples(Engine(ModelAndTokenizer(net, tokenizer)), self.prompts, self.max_tokens))

        net.eval()
        ran_out = runs_out_of_memory(sample)
        net.train()
        if ran_out:
            release_memory(next(net.parameters()).device)
            rank_zero_print(f"Samples after step {step:,}: out of memory, so there are none.")
        rows = [{"step": step, **each} for each in samples]
        with explain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return rows

    def rewind(self, step: int) -> None:
        """Drop what a run that was stopped wrote after ``step``."""
        keep_lines_until(self.path, step)


class PeriodicEvaluation(Callback):
    """Validation and samples every N steps. The last step is left to the end of the stage, which always measures."""

    def __init__(
        self,
        validation: Validation | None,
        samples: Samples,
        every_steps: int,
        samples_every_steps: int,
        clock: StepClock,
        check_stop: Callable[[], None],
        at_start: bool = False,
    ) -> None:
        self.validation, self.samples, self.clock, self.check_stop = validation, samples, clock, check_stop
        self.at_start = at_start
        self.every_steps, self.samples_every_steps = every_steps, samples_every_steps
        self._measured = 0

    def state_dict(self) -> dict[str, Any]:
        """The step measured last: a run that goes on from there does not measure it again, nor count it twice."""
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a resume file."""
        self._measured = state_dict["measured"]

    def is_due(self, step: int) -> bool:
        """Whether the validation of a step before the last is still to be measured."""
        return bool(self.validation and self.every_steps and step % self.every_steps == 0 and step != self._measured)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the first weights; later, what a stop kept from being measured after the resume file's step."""
        if trainer.global_step > 0:
            self._measure(trainer, pl_module)
        elif self.at_start and self.validation is not None:
            with self.clock.paused():
                log_everywhere(trainer, self.validation.measure(pl_module.whole_net(), self.check_stop))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if self.validation is None or step >= trainer.max_steps:
            return
        with self.clock.paused():
            if self.is_due(step):
                _call_all(trainer, pl_module, "on_validation_start", "on_validation_epoch_start")
                metrics = self.validation.measure(pl_module.whole_net(), self.check_stop)
                trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
                log_everywhere(trainer, metrics)
                self._measured = step
                # What EarlyStopping waits for.
                _call_all(trainer, pl_module, "on_validation_epoch_end", "on_validation_end")
            if self.samples_every_steps and step % self.samples_every_steps == 0:
                net = pl_module.whole_net()
                coordination.run_on_rank_zero(lambda: self._sample(trainer, net, step))

    def _sample(self, trainer: Trainer, net: GPT, step: int) -> None:
        assert self.validation is not None
        self.samples.rewind(step - 1)
        show_samples(trainer.loggers, self.samples.write(net, self.validation.tokenizer, step), step)


def _call_all(trainer: Trainer, pl_module: Any, *hooks: str) -> None:
    """Call hooks of all callbacks, as Lightning's own validation would."""
    for hook in hooks:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            getattr(callback, hook)(trainer, pl_module)
