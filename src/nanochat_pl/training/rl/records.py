"""The rollouts of a stage on the disk: a file of JSON lines for each step, the oldest go; and tables of answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import entries, write_text
from nanochat_pl.common.text_files import read_bytes
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.rl.rollouts import Sample

FOLDER = "rollouts"
_NAME = re.compile(r"step=(\d{6,})\.jsonl")
TABLE_ROWS = 8
TABLE_CHARS = 400


class RolloutRecords:
    """Keeps what was written and learnt in each step, as far as there is room.

    Args:
        folder: of the stage.
        megabytes: that all files may take; 0: none are kept.
    """

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.folder, self.most_bytes = folder / FOLDER, megabytes * 1e6

    def rewind(self, step: int) -> None:
        """Drop what a run that was stopped wrote after ``step``."""
        for number, path in record_files(self.folder).items():
            if number > step:
                path.unlink(missing_ok=True)

    def write(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers of a step, and let go of the oldest files: not of the first step's, whose weights are
        those of the bundle that the stage started from."""
        if not self.most_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.folder / f"step={step:06d}.jsonl", text, surrogates=True)
        files = record_files(self.folder)
        sizes = {number: path.stat().st_size for number, path in files.items()}
        total = sum(sizes.values())
        for number in sorted(files):
            if total > self.most_bytes and number not in (min(files), step):
                files[number].unlink(missing_ok=True)
                total -= sizes[number]


def record_files(folder: Path) -> dict[int, Path]:
    """The files of records by their steps, in order."""
    found = {int(match[1]): path for path in entries(folder) if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def record_of(
    sample: Sample,
    step: int,
    index: int,
    written_at: int,
    advantage: float,
    trained: bool,
    logprobs: Sequence[float] | None,
) -> dict[str, Any]:
    """An answer as a line.

    Args:
        step: optimizer step that it was trained in, from 1.
        index: its number in that step.
        written_at: steps that had been made when it was written.
        trained: whether it is in the loss.
        logprobs: of its tokens in the forward that made the gradient; None: it was not in it. Those that are not
            finite are null in the line.
    """
    line = {
        "step": step,
        "index": index,
        "written_at": written_at,
        "task": sample.task,
        "seed": sample.seed,
        "finish_reason": sample.finish_reason,
        "reward": sample.reward,
        "advantage": advantage,
        "trained": trained,
        "prompt": sample.prompt,
        "ids": sample.ids,
        "mask": [int(drawn) for drawn in sample.drawn],
        "logprobs": sample.logprobs,
    }
    if sample.sampled_logprobs != sample.logprobs:
        line["sampled_logprobs"] = sample.sampled_logprobs
    if logprobs is not None and sample.of_drawn(logprobs) != sample.of_drawn(sample.logprobs):
        # Elsewhere they are the same, bit for bit.
        shown = zip(logprobs, sample.drawn, strict=True)
        line["trained_logprobs"] = [x if drawn and math.isfinite(x) else None for x, drawn in shown]
    return line


def read_record(folder: Path, step: int, index: int) -> dict[str, Any]:
    """The line of an answer.

    Args:
        folder: of the stage.

    Raises:
        UserError: there is none; says which there are.
    """
    lines = _lines_of_step(folder, step, f"rollout={step}:{index}")
    if not 0 <= index < len(lines):
        raise UserError(f"rollout={step}:{index}: step {step:,} has the answers 0 to {len(lines) - 1:,}.")
    line: dict[str, Any] = json.loads(lines[index])
    return line


def read_step(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of all answers of a step, as :func:`record_of` makes them.

    Args:
        folder: of the stage.

    Raises:
        UserError: there are none; says of which steps there are.
    """
    return [json.loads(line) for line in _lines_of_step(folder, step, f"step={step}")]


def _lines_of_step(folder: Path, step: int, asked: str) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"{asked}: {folder} is not there: the run has no such stage.",
            "Answers are kept by stage rl: nanochat-pl train stage=rl run=NAME",
        )
    files = record_files(folder / FOLDER)
    if step not in files:
        kept = f"those of the steps {ranges_in_words(files)} are kept" if files else "none are kept"
        raise UserError(
            f"{asked}: {folder / FOLDER} has no answers of step {step:,}; {kept}.",
            "Ask for one of these steps." if files and step > max(files) else "rl.rollouts_mb=… keeps more of them.",
        )
    return read_bytes(files[step]).decode("utf-8").split("\n")[:-1]


def ranges_in_words(numbers: Iterable[int]) -> str:
    """Rising numbers for people: 1, 5–9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]:,}" if len(part) == 1 else f"{part[0]:,}–{part[-1]:,}" for part in parts)


def sample_table(samples: Sequence[Sample], advantages: Sequence[float], tokenizer: Tokenizer) -> str:
    """Some answers of a step as a table in Markdown: the first group, its best answers first."""
    first = [index for index, sample in enumerate(samples) if sample.prompt == samples[0].prompt]
    shown = sorted(first, key=lambda index: -samples[index].reward)[:TABLE_ROWS]
    cells = [
        (f"{samples[i].reward:.3g}", f"{advantages[i]:.3g}", samples[i].finish_reason, _cell(tokenizer, samples[i].ids))
        for i in shown
    ]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    head = f"**{samples[0].task}**: {_cell(tokenizer, samples[0].prompt)}"
    return "\n".join([head, "", "| reward | advantage | end | answer |", "|---|---|---|---|", *rows])


def _cell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids)
    text = text if len(text) <= TABLE_CHARS else f"{text[:TABLE_CHARS]}…"
    return "".join(f"\\{char}" if char in "\\|<>*_`" else char for char in text).replace("\n", " ⏎ ")
