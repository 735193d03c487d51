"""What the metrics of the doctor mean: what would break a run, what would spoil it, and the key that mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.doctor.examine import Found, SplitMetrics
from nanochat_pl.doctor.overlap import Overlap
from nanochat_pl.planning.horizon import MAX_EPOCHS
from nanochat_pl.training.stages.registry import stage_named

# From where on a metric is worth a warning.
MIN_TRAINED_SHARE = 0.5
MAX_PADDED_SHARE = 0.3
MAX_COPIED_TOKENS = 0.05
# Of the validation documents those that are trained on too. Texts hold some documents twice; that most of them are the
# same comes of one file under two keys, and then the metric says nothing of unseen text.
MAX_COPIED_VALIDATION = 0.5
MAX_LEAKED_SHARE = 0.01  # of the documents or items of an evaluation set
MAX_LEAKED_GRAMS = 0.05  # of the validation documents' 13-grams: texts of one kind share some
MAX_ODD_SHARE = 0.02  # of the documents: replaced signs, repeated lines
MAX_LOST_SHARE = 0.05  # of the documents: empty, left out, cut
MAX_SHARE_OF_ONE = 0.1  # of the tokens, in the longest document
MIN_BYTES_PER_TOKEN = 2.0
MAX_SEEN = 100  # times that a conversation of the person's own is trained on
MIN_SHARE_OF_OWN = 0.01  # of the conversations of an epoch
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Finding:
    """Something that a person should know before training. ``fails``: it would break the run."""

    fails: bool
    problem: str
    fix: str = ""


@dataclass(frozen=True)
class RowMetrics:
    """What the plan makes of the training documents of one source.

    Attributes:
        rows: that the plan trains on.
        epochs: passes over the documents' tokens.
        trained_share: share of the tokens taken that are in a row; documents that wait for their turn count too.
        never_placed: documents that have been read and are in no row: they wait in the packer's buffer.
        cropped_tokens: dropped to fill rows.
        padded_share: share of the places that hold nothing.
        target_share: share of the places that are trained on.
    """

    sequence_len: int
    rows: int
    epochs: float
    trained_share: float
    never_placed: int
    cropped_tokens: int
    padded_share: float
    target_share: float


@dataclass(frozen=True)
class StageMetrics:
    """What is known of a stage's data before its text is read.

    Attributes:
        data: what is trained on, for people.
        rows: by the name of the source, "" where there is one.
        steps: of the plan, of ``rows_per_step``.
        validation_rows: that there are, of ``validation_rows_wanted``.
        vocab_size, model_vocab_size: ids of the tokenizer, and of the model (with padding).
        fitted_tokenizer: whether the tokenizer was trained on this text.
        cut: conversations cut to a row.
        bad_rows: rows of files that were left out, by cause.
        made_sets: evaluation sets whose items are made of templates and of the same words as those to train on.
        remarks: what else is not read of the files, or not as it might have been meant.
        own_sets: sets of conversations out of files by their key: how often each conversation is in an epoch, and which
            share of all conversations of an epoch these are.
    """

    stage: str
    data: str
    rows: dict[str, RowMetrics]
    steps: int
    rows_per_step: int
    validation_rows: int
    validation_rows_wanted: int
    vocab_size: int
    model_vocab_size: int
    fitted_tokenizer: bool = False
    cut: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    made_sets: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    own_sets: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return stage_named(self.stage).trains_on_conversations


def row_metrics(rows: Rows, target_share: float, num_rows: int) -> RowMetrics:
    """The metrics of packed rows.

    Args:
        rows: of which the plan takes ``num_rows``, going on from the first where they end before.
        target_share: of the documents' tokens, those that are trained on.
    """
    stats, lengths = rows.index.stats, rows.cache.lengths
    taken = stats.placed_tokens + stats.cropped_tokens
    # Of what has been read once, and not of documents that are still to come. Conversations (masked) never wait.
    never = (lengths > 0) & (stats.epochs > 1 and not rows.cache.masked)
    for first in range(0, len(rows) if never.any() else 0, _ROWS_AT_ONCE):
        never[rows.index.pieces_of(np.arange(first, min(first + _ROWS_AT_ONCE, len(rows))))[1][:, 0]] = False
    places = stats.placed_tokens + stats.pieces + stats.padded_places
    packed = places // (rows.sequence_len + 1)  # of rows that are packed shard by shard more than are asked for
    trained = stats.placed_tokens * target_share + (0 if rows.cache.masked else stats.pieces - packed)
    return RowMetrics(
        sequence_len=rows.sequence_len,
        rows=num_rows,
        epochs=taken / max(int(lengths.sum(dtype=np.int64)), 1) * num_rows / max(packed, 1),
        trained_share=stats.placed_tokens / max(taken + int(lengths[never].sum(dtype=np.int64)), 1),
        never_placed=int(never.sum()),
        cropped_tokens=stats.cropped_tokens,
        padded_share=stats.padded_places / max(places, 1),
        target_share=trained / max(packed * rows.sequence_len, 1),
    )


def finding_of(error: UserError) -> list[Finding]:
    """What a training would end with."""
    *others, last = error.problems
    return [*(Finding(True, problem) for problem in others), Finding(True, last, error.fix)]


def findings(metrics: StageMetrics, found: Found) -> list[Finding]:
    """What would break a run first, then what would spoil it."""
    problems = [
        *_of_rows(metrics),
        *_of_text(metrics, found),
        *_of_duplicates(metrics, found),
        *_of_overlaps(metrics, found.overlaps),
        *(Finding(False, f"{remark}.") for remark in metrics.remarks),
        *_of_own_sets(metrics),
    ]
    return sorted(problems, key=lambda finding: not finding.fails)


def _of_rows(metrics: StageMetrics) -> Iterator[Finding]:
    if metrics.vocab_size > metrics.model_vocab_size:
        yield Finding(
            True,
            f"The tokenizer has {metrics.vocab_size:,} ids, the model {metrics.model_vocab_size:,}.",
            "Take the tokenizer that the model was trained with: run=NAME of the run that has both.",
        )
    for name, rows in metrics.rows.items():
        yield from _of_source(rows, metrics, f"{name}: " if name else "", f"data.sources.{name}" if name else "data")
    if metrics.validation_rows < metrics.validation_rows_wanted and not metrics.is_chat:
        yield Finding(
            False,
            f"The held-out text fills {metrics.validation_rows:,} rows, the plan wants"
            f" {metrics.validation_rows_wanted:,}: metrics of validation will be uncertain.",
            "Raise data.validation_fraction, or give data.validation_path=….",
        )


def _of_source(rows: RowMetrics, metrics: StageMetrics, what: str, key: str) -> Iterator[Finding]:
    if rows.target_share <= 0:
        yield Finding(
            True,
            f"{what}No token is trained on: the mask leaves none.",
            "Give conversations with answers (mixture.tasks.…).",
        )
    if rows.epochs > MAX_EPOCHS and not metrics.is_chat:
        steps = max(int(metrics.steps * MAX_EPOCHS / rows.epochs), 1)
        yield Finding(
            False,
            f"{what}The plan goes {rows.epochs:,.1f} times over the text; more than {MAX_EPOCHS:g} teach little new.",
            f"Set max_steps={steps} or lower, or give more text.",
        )
    if rows.trained_share < MIN_TRAINED_SHARE and not metrics.is_chat:
        waiting = f", and {rows.never_placed:,} documents still wait for a row" if rows.never_placed else ""
        yield Finding(
            False,
            f"{what}{rows.trained_share:.0%} of the text is trained on: the rest is cropped to fill rows{waiting}.",
            f"Set {key}.long_documents=split, which drops nothing, or a longer model.sequence_len.",
        )
    if rows.padded_share > MAX_PADDED_SHARE:
        yield Finding(
            False,
            f"{what}{rows.padded_share:.0%} of the places are padding: time is spent on nothing.",
            "Give more or shorter conversations, or a shorter model.sequence_len to the base stage.",
        )


def _of_own_sets(metrics: StageMetrics) -> Iterator[Finding]:
    """Conversations of the person's own that are seen too often to teach more, or hardly at all."""
    epochs = max((rows.epochs for rows in metrics.rows.values()), default=0.0)
    for key, (repeat, share) in metrics.own_sets.items():
        if (times := epochs * repeat) > MAX_SEEN:
            yield Finding(
                False,
                f"{key}: each conversation is seen {times:,.0f} times ({epochs:.3g} epochs, repeat={repeat}): it will"
                " be learnt by heart.",
                f"Lower {key}.repeat, stage.num_epochs or max_steps, or give more conversations.",
            )
        elif share < MIN_SHARE_OF_OWN:
            # Repeated, they make the mixture larger, too.
            factor = MIN_SHARE_OF_OWN / (1 - MIN_SHARE_OF_OWN) * (1 - share) / share
            wanted = max(math.ceil(repeat * factor), 2)
            is_too_often = epochs * wanted > MAX_SEEN
            repeat_it = "Give more conversations" if is_too_often else f"Set {key}.repeat={wanted} or more"
            yield Finding(
                False,
                f"{key}: {share:.2%} of the conversations of the mixture are of it: it will hardly be learnt.",
                f"{repeat_it}, or leave other tasks out (mixture=own has none).",
            )


def _of_text(metrics: StageMetrics, found: Found) -> Iterator[Finding]:
    train, chat = found.train, metrics.is_chat
    if train.documents == train.empty:
        yield Finding(True, "There is no text to train on.", "Give some: data.path=….")
        return
    if found.validation.documents == found.validation.empty:
        yield Finding(
            True,
            "There is no text to validate on.",
            "Raise data.validation_fraction, or give data.validation_path=….",
        )
    if train.empty > MAX_LOST_SHARE * train.documents:
        why = "left out: bad, or without anything to learn" if chat else "empty or blank"
        yield Finding(False, f"{_share(train.empty, train.documents)} of the documents are {why}.")
    if metrics.cut > MAX_LOST_SHARE * train.documents:
        yield Finding(
            False,
            f"{_share(metrics.cut, train.documents)} of the conversations are cut: they are longer than a row.",
            "Give the base stage a longer model.sequence_len.",
        )
    for cause, count in metrics.bad_rows.items():
        yield Finding(False, f"Rows of files left out: {count:,} ({cause}).")
    if train.bytes_per_token < MIN_BYTES_PER_TOKEN and not chat:
        fits = metrics.fitted_tokenizer
        cause = "the tokenizer's vocabulary is small" if fits else "the tokenizer does not fit this text"
        size = f"tokenizer.vocab_size ({metrics.vocab_size:,})"
        yield Finding(
            False,
            f"A token stands for {train.bytes_per_token:.2f} bytes only: {cause}.",
            f"Raise {size}." if fits else f"Train one on it: another run, run=NEW, and a larger {size}.",
        )
    if train.tokens.longest > MAX_SHARE_OF_ONE * train.tokens.total:
        share = train.tokens.longest / train.tokens.total
        yield Finding(False, f"One document holds {share:.0%} of the text: {train.longest[0][0]}.")
    yield from _of_signs(train, chat)


def _of_signs(train: SplitMetrics, chat: bool) -> Iterator[Finding]:
    """Documents whose text is odd, where they are more than a few."""
    kinds = [
        (
            train.replaced,
            "hold U+FFFD: they were decoded wrongly once.",
            "Convert the files to UTF-8 from their own encoding.",
        ),
        (
            train.controls,
            "hold NULs or other control characters: they are no text, or were decoded wrongly once.",
            "Convert the files to UTF-8 from their own encoding, or leave them out.",
        ),
        (
            0 if chat else train.separators,
            "hold a separator of documents, as <|endoftext|>, as letters: several documents are taken for one.",
            "Cut them there: in a .txt file that is done; in a table give each document a row.",
        ),
        (train.repeating, "repeat their own lines: menus, tables …", ""),
    ]
    for count, problem, fix in kinds:
        if count > MAX_ODD_SHARE * train.sampled:
            yield Finding(False, f"{_share(count, train.sampled)} of the documents {problem}", fix)


def _of_duplicates(metrics: StageMetrics, found: Found) -> Iterator[Finding]:
    duplicates, validation = found.duplicates, found.validation
    unwanted = duplicates.copied_tokens * max(0.0, 1 - duplicates.wanted / max(duplicates.copies, 1))
    if unwanted > MAX_COPIED_TOKENS:
        yield Finding(
            False,
            f"{unwanted:.0%} of the text are exact copies of other documents.",
            "Take them out: a copy is trained on as often as there are copies, in every epoch.",
        )
    if duplicates.validation_copies > MAX_LEAKED_SHARE * validation.documents:
        fix = "" if metrics.is_chat else "Give another data.validation_path=…, or take the copies out."
        yield Finding(
            duplicates.validation_copies > MAX_COPIED_VALIDATION * (validation.documents - validation.empty),
            f"{_share(duplicates.validation_copies, validation.documents)} of the validation documents are trained on:"
            " its metrics are too good.",
            fix,
        )


def _of_overlaps(metrics: StageMetrics, overlaps: Sequence[Overlap]) -> Iterator[Finding]:
    for overlap in overlaps:
        if overlap.name in metrics.made_sets:
            continue
        is_validation = overlap.name == "validation"
        share, most = (overlap.gram_share, MAX_LEAKED_GRAMS) if is_validation else (overlap.share, MAX_LEAKED_SHARE)
        if share > most:
            what = "of its 13-grams" if is_validation else f"of {overlap.items - overlap.short:,} items"
            yield Finding(
                False,
                f"{overlap.name}: {share:.1%} {what} stand in the training text: its metrics are too good.",
                ""
                if is_validation
                else "Take them out of the training text, or do not compare this metric with others'.",
            )


def failing(found: Sequence[Finding]) -> bool:
    return any(finding.fails for finding in found)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"
