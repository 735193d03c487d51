"""Which documents a row, or all rows of an optimizer step, are made of: read as the training reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import PieceAddress, Rows
from nanochat_pl.doctor.documents import both_ends
from nanochat_pl.doctor.stage_data import mixtures, place_in, prepare_stage
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stages.registry import StageData

STEP_CHARS = 100  # of a piece's text, where there are many


def row_lines(config: TrainConfig, folder: StageFolder, cache: Path, row: int) -> list[str]:
    """What a row of the training is made of, a line for each piece and one for its text.

    Raises:
        UserError: there is no such row.
    """
    prepared = prepare_stage(config, folder, cache)
    plan, rows = prepared.plan, prepared.rows
    if row >= len(rows):
        raise UserError(
            f"row={row}: the training has {len(rows):,} rows, 0 … {len(rows) - 1:,}"
            f" ({plan['num_steps']:,} steps of {plan['rows_per_step']:,})."
        )
    rows.wait_for(row + 1)
    step = row // plan["rows_per_step"] + 1
    lines = [
        f"Row {row:,} of {len(rows):,} (from 0), in step {step:,} of {plan['num_steps']:,}: {_filled(prepared, row)}."
    ]
    for place, text in _pieces(prepared, row, _place(config, cache)):
        lines += [f"{place}:", f"     {both_ends(text)}"]
    return lines


def step_lines(config: TrainConfig, folder: StageFolder, cache: Path, step: int) -> list[str]:
    """What the rows of an optimizer step are made of, a line for each row and one for each of its pieces.

    Args:
        step: from 1, as the progress bar and metrics.csv count: the step after which they say so.

    Raises:
        UserError: there is no such step.
    """
    prepared = prepare_stage(config, folder, cache)
    plan, rows = prepared.plan, prepared.rows
    if step > plan["num_steps"]:
        raise UserError(
            f"step={step}: the training has {plan['num_steps']:,} steps; they are counted from 1, as in metrics.csv."
        )
    first, end = (min(each * plan["rows_per_step"], len(rows)) for each in (step - 1, step))
    rows.wait_for(end)
    num_targets = (rows.read(np.arange(first, end))[1] != IGNORE_INDEX).sum(axis=1).tolist()
    place_of = _place(config, cache)
    lines = [
        f"Step {step:,} of {plan['num_steps']:,}: rows {first:,} to {end - 1:,} (from 0), {sum(num_targets):,} targets."
    ]
    for row, targets in zip(range(first, end), num_targets, strict=True):
        lines.append(f"Row {row:,}: {_filled(prepared, row)}, {targets:,} targets.")
        lines += [f"{place}: {both_ends(text, STEP_CHARS)}" for place, text in _pieces(prepared, row, place_of)]
    return lines


def kinds_of_places(rows: Rows | MixedRows, numbers: Sequence[int]) -> np.ndarray:
    """What each place of some rows is for: 0 nothing (padding), 1 given and not trained on, 2 trained on.

    Args:
        rows: of :func:`~nanochat_pl.doctor.stage_data.prepare_stage`.
        numbers: of R rows, from 0.

    Returns:
        int64 (R, T): place t is that of target t, the token t + 1 of the row.
    """
    _, targets = rows.read(np.asarray(numbers))
    ends = np.array([sum(1 + len(piece.ids) for piece in rows.address(number)) for number in numbers])
    is_filled = np.arange(targets.shape[1]) < ends[:, None] - 1
    return np.where(targets != IGNORE_INDEX, 2, is_filled.astype(np.int64))


def _filled(prepared: StageData, row: int) -> str:
    places = sum(1 + len(piece.ids) for piece in prepared.rows.address(row))
    return f"{places:,} of {prepared.rows.sequence_len + 1:,} places are filled"


def _pieces(prepared: StageData, row: int, place_of: Callable[[PieceAddress], str]) -> Iterator[tuple[str, str]]:
    """The pieces of a row: number and place, and text."""
    for number, piece in enumerate(prepared.rows.address(row), 1):
        yield f"{number:>3}. {place_of(piece)}", prepared.tokenizer.decode(piece.ids.tolist())


def _place(config: TrainConfig, cache: Path) -> Callable[[PieceAddress], str]:
    """Says of a piece which tokens of which document, or conversation, it is."""
    conversation = place_in(mixtures(config, cache)[0]) if config.stage.trains_on_conversations else None

    def place(piece: PieceAddress) -> str:
        # All conversations are one shard.
        of = conversation(piece.document) if conversation else f"{piece.shard}, document {piece.document:,}"
        return f"{of}, tokens {piece.start:,} to {piece.stop - 1:,} of {piece.length:,}"

    return place
