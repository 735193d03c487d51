"""What is measured while a stage trains: validation bits per byte on fixed rows, and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.files import explain_disk_errors, keep_lines_until
from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.data.packing.rows import Rows, validation_rows
from nanochat_pl.data.sources.base import Source
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.bits_per_byte import BitsPerByte, BitsPerByteResult, result_of, weighted_result
from nanochat_pl.evaluation.samples import Sample, write_samples
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.callbacks.metrics import StepClock, log_everywhere, name_by_source
from nanochat_pl.training.datamodule import share
from nanochat_pl.training.out_of_memory import ChunkOnOOM, release_memory, runs_out_of_memory


@dataclass(frozen=True)
class Validation:
    """Fixed rows and how they are scored: the same rows for any batch size, machine and setting of the training."""

    rows: Rows
    num_rows: int
    tokenizer: Tokenizer
    device_batch_size: int
    in_pieces: ChunkOnOOM = field(default_factory=lambda: ChunkOnOOM("validation"), repr=False, compare=False)

    def measure(self, net: GPT, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Bits per byte with its standard error, and nats per target.

        Args:
            net: the model; runs eagerly (its training graph is not compiled again), in eval mode.
            between: called between batches, on all processes equally often.
        """
        sums, loss = self.sums(net, between)
        return _figures(result_of(sums.tolist()), loss)

    @property
    def num_tokens(self) -> int:
        """Tokens of the held-out text, of which the rows are the beginning."""
        return self.rows.cache.num_tokens

    @torch.no_grad()
    def sums(self, net: GPT, between: Callable[[], None] = lambda: None) -> tuple[Tensor, float]:
        """What :meth:`measure` measures, as sums over rows (see :class:`BitsPerByte`), and the nats per target.

        Each process has a share of the rows, and all have the sums of all.
        """
        device = next(net.parameters()).device
        own, largest = (share(0, self.num_rows, rank, collectives.world_size()) for rank in (collectives.rank(), 0))
        metric = BitsPerByte(self.tokenizer.token_bytes)
        nats, targets_seen = 0.0, 0
        net.eval()
        for first in range(0, len(largest), self.device_batch_size):
            between()
            numbers = own[first : first + self.device_batch_size]
            if not numbers:  # the largest share has a row more
                continue
            inputs, targets = (torch.as_tensor(part).to(device) for part in self.rows.read(numbers))
            losses = self.in_pieces(net.losses, inputs, targets)
            metric.update(losses, targets)
            nats += losses.sum().item()
            targets_seen += int((targets >= 0).sum())
        net.train()
        sums = torch.cat([metric.sums, torch.tensor([nats, targets_seen], dtype=torch.float64)])
        collectives.all_reduce_(sums)
        return sums[:-2], (sums[-2] / sums[-1].clamp(min=1)).item()


@dataclass(frozen=True)
class MixedValidation:
    """Fixed rows of several sources. Each source has figures of its own; those of all are weighted as the training is.

    Of each source there are as many rows as its share of them; fewer where its held-out text ends before, and then
    each counts for more; one at least.
    """

    parts: Mapping[str, Validation]
    shares: Sequence[float]

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(part.num_rows for part in self.parts.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of the held-out text of all sources."""
        return sum(part.num_tokens for part in self.parts.values())

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the ids."""
        return next(iter(self.parts.values())).tokenizer

    def measure(self, net: GPT, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """As :meth:`Validation.measure`, and bits per byte of each source."""
        measured = {name: part.sums(net, between) for name, part in self.parts.items()}
        loss = sum(share * loss for share, (_, loss) in zip(self.shares, measured.values(), strict=True))
        figures = _figures(weighted_result([sums for sums, _ in measured.values()], self.shares), loss)
        for name, (sums, _) in measured.items():
            if (bpb := result_of(sums.tolist()).bpb) is not None:
                figures[name_by_source("val/bpb", name)] = bpb
        return figures


def _figures(result: BitsPerByteResult, loss: float) -> dict[str, float]:
    figures = {"val/bpb": result.bpb, "val/bpb_stderr": result.stderr, "val/loss": loss}
    return {name: value for name, value in figures.items() if value is not None}


def open_validation(
    source: Source,
    tokenize: Callable[[Source, int], TokenCache],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    sequence_len: int,
    num_rows: int,
    device_batch_size: int,
) -> Validation | MixedValidation:
    """The rows to validate on, of the source's held-out text.

    Args:
        source: one or a mixture.
        tokenize: gives the tokens of the held-out text of one: of very much of it the first shards that hold so many.
        tokenizer, cache: that it uses.
        sequence_len: T.
        num_rows: at most; fewer where the text ends before.
        device_batch_size: rows in memory at once.
    """

    def of(part: Source, count: int) -> Validation:
        tokens = tokenize(part, count * (sequence_len + 1))
        rows = validation_rows(tokens, sequence_len, tokenizer.bos_id, cache, count)
        return Validation(rows, len(rows), tokenizer, device_batch_size)

    if not isinstance(source, MixedSource):
        return of(source, num_rows)
    counts = zip(source.parts.items(), source.turns.counts(num_rows), strict=True)
    return MixedValidation({name: of(part, max(count, 1)) for (name, part), count in counts}, source.turns.shares)


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
        samples: list[Sample] = []

        def sample() -> None:
            samples.extend(write_samples(Engine(ModelAndTokenizer(net, tokenizer)), self.prompts, self.max_tokens))

        net.eval()
        ran_out = runs_out_of_memory(sample)
        net.train()
        if ran_out:
            release_memory(next(net.parameters()).device)
            rank_zero_print(f"Samples after step {step:,}: out of memory, so there are none.")
        rows = [{"step": step, "prompt": each.prompt, "text": each.text} for each in samples]
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
        validation: Validation | MixedValidation | None,
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
                log_everywhere(trainer, self.validation.measure(pl_module.net, self.check_stop))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if self.validation is None or step >= trainer.max_steps:
            return
        with self.clock.paused():
            if self.is_due(step):
                figures = self.validation.measure(pl_module.net, self.check_stop)
                trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
                log_everywhere(trainer, figures)
                self._measured = step
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    callback.on_validation_end(trainer, pl_module)  # what EarlyStopping waits for
            if self.samples_every_steps and step % self.samples_every_steps == 0:
                coordination.run_on_rank_zero(lambda: self._sample(pl_module.net, step))

    def _sample(self, net: GPT, step: int) -> None:
        assert self.validation is not None
        self.samples.rewind(step - 1)
        self.samples.write(net, self.validation.tokenizer, step)
