"""What the doctor found, for people: tables of few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanochat_pl.common.run_dir import CHAT_STAGES
from nanochat_pl.doctor.examine import Lengths, SplitFigures
from nanochat_pl.doctor.findings import Figures
from nanochat_pl.doctor.overlap import GRAM_WORDS, Overlap

MAX_EXAMPLES = 3  # of overlaps

Cells = Sequence[object]


class Table(NamedTuple):
    """A table with the lines that stand under it."""

    title: str
    columns: Sequence[str]
    rows: list[Cells]
    notes: list[str]


def tables(figures: Figures) -> Iterator[Table]:
    """The tables in the order in which they are shown."""
    yield _documents(figures)
    if figures.rows:
        yield _rows(figures)
    yield _duplicates(figures)
    yield _overlaps(figures.found.overlaps)


def _documents(figures: Figures) -> Table:
    noun = "conversations" if figures.stage in CHAT_STAGES else "documents"
    splits = (figures.found.train, figures.found.validation)
    rows: list[Cells] = [(noun, *(_count(split.documents) for split in splits))]
    empty = "left out: nothing to learn" if figures.stage in CHAT_STAGES else "empty or blank"
    rows.append((f"  {empty}", *(_count(split.empty) for split in splits)))
    if figures.stage in CHAT_STAGES:
        rows.append(("  cut to a row", _count(figures.cut), ""))
    rows += [(f"  bad rows: {cause}", _count(count), "") for cause, count in figures.bad_rows.items()]
    if figures.found.train.tokens is not None:
        rows += _lengths("tokens", [split.tokens for split in splits if split.tokens])
    rows += _lengths("characters", [split.characters for split in splits])
    if figures.found.train.tokens is not None:
        rows.append(("bytes a token", *(f"{split.bytes_per_token:.2f}" for split in splits)))
    rows.append(("characters outside of ASCII", *(f"{split.non_ascii_share:.2%}" for split in splits)))
    rows.append((f"{noun} with U+FFFD", *(_count(split.replaced) for split in splits)))
    rows.append((f"{noun} with control characters", *(_count(split.controls) for split in splits)))
    rows.append((f"{noun} that repeat their lines", *(_count(split.repeating) for split in splits)))
    if figures.validation_rows:
        rows.append(("rows to validate on", "", _count(figures.validation_rows)))
    notes = [_sampled(noun, splits)] if any(_is_sample(split) for split in splits) else []
    unit = "tokens" if figures.found.train.tokens else "characters"
    notes += [
        f"{'Longest:' if not number else '        '} {size:,} {unit}, {place}: {text}"
        for number, (place, size, text) in enumerate(figures.found.train.longest)
    ]
    return Table(figures.data, ("", "training", "validation"), rows, notes)


def _lengths(unit: str, lengths: Sequence[Lengths]) -> list[Cells]:
    return [
        (unit, *(_count(each.total) for each in lengths)),
        (
            "  median / mean / 95 % / longest",
            *(f"{each.median:,.0f} / {each.mean:,.0f} / {each.p95:,.0f} / {each.longest:,}" for each in lengths),
        ),
    ]


def _is_sample(split: SplitFigures) -> bool:
    return split.sampled < split.distinct


def _sampled(noun: str, splits: Sequence[SplitFigures]) -> str:
    of = " and ".join(f"{split.sampled:,} of {split.distinct:,}" for split in splits)
    return f"A sample: the text of {of} different {noun} was read. max_documents=… reads more."


def _rows(figures: Figures) -> Table:
    of = list(figures.rows.values())
    rows: list[Cells] = [
        (
            "rows of the plan" if figures.steps else "rows of an epoch (the plan is refused)",
            *(f"{each.rows:,} of {each.sequence_len:,} tokens" for each in of),
        ),
        ("epochs", *(f"{each.epochs:,.2f}" for each in of)),
        ("text trained on", *(f"{each.trained_share:.1%} of what is taken" for each in of)),
    ]
    if any(each.cropped_tokens or each.never_placed for each in of):
        rows.append(("cropped", *(f"{each.cropped_tokens:,} tokens" for each in of)))
        rows.append(("documents that still wait for a row", *(_count(each.never_placed) for each in of)))
    rows.append(("padding", *(f"{each.padded_share:.1%} of the places" for each in of)))
    if figures.stage in CHAT_STAGES:
        rows.append(("masked", *(f"{1 - each.target_share - each.padded_share:.1%} of the places" for each in of)))
    rows.append(("trained on", *(f"{each.target_share:.1%} of the places" for each in of)))
    notes = [f"{figures.steps:,} steps of {figures.rows_per_step:,} rows."] if figures.steps else []
    return Table("Rows", ("", *(name or "training" for name in figures.rows)), rows, notes)


def _duplicates(figures: Figures) -> Table:
    found, validation = figures.found.duplicates, figures.found.validation
    wanted = f", {found.wanted:,} of them asked for by repeat" if found.wanted else ""
    rows: list[Cells] = [
        ("exact copies in training", _count(found.copies), f"{found.copied_tokens:.2%} of the text{wanted}"),
        ("near copies in training", _count(found.near), _of(found.near, found.near_sampled)),
        (
            "training documents in validation",
            _count(found.validation_copies),
            _of(found.validation_copies, validation.documents),
        ),
        (
            "near copies of these in validation",
            _count(found.near_validation),
            _of(found.near_validation, found.near_validation_sampled),
        ),
    ]
    notes = [f"A {kind}: {example}" for kind, example in found.examples.items()]
    return Table("Duplicates", ("", "number", "share"), rows, notes)


def _overlaps(overlaps: Sequence[Overlap]) -> Table:
    met = [overlap for overlap in overlaps if overlap.overlapping or overlap.common]
    rows: list[Cells] = [
        (
            overlap.name,
            _count(overlap.items) + (f" of {overlap.items_in_all:,}" if overlap.items < overlap.items_in_all else ""),
            _count(overlap.short),
            _count(overlap.overlapping),
            f"{overlap.share:.1%}",
            f"{overlap.gram_share:.2%}",
            _count(overlap.common),
        )
        for overlap in met
    ]
    notes = [
        f"{overlap.name}, item {overlap.example_item:,} = {overlap.example_place}: … {overlap.example} …"
        for overlap in sorted(met, key=lambda each: -each.share)[:MAX_EXAMPLES]
        if overlap.example
    ]
    if clean := [f"{overlap.name} ({overlap.items - overlap.short:,})" for overlap in overlaps if overlap not in met]:
        notes.append(f"Nothing in common, of so many items that are long enough: {', '.join(clean)}.")
    columns = ("set", "items", "too short", "overlap", "share", f"of {GRAM_WORDS}-grams", "common phrases only")
    title = f"Evaluation sets in the training text: items that have {GRAM_WORDS} words in a row in common with it"
    return Table(title, columns, rows, notes)


def _count(number: int) -> str:
    return f"{number:,}"


def _of(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%} of {whole:,}"
