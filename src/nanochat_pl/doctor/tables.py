"""What the doctor found, for people: tables of few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanochat_pl.doctor.examine import Found, Lengths
from nanochat_pl.doctor.findings import StageMetrics
from nanochat_pl.doctor.overlap import GRAM_WORDS, Overlap

MAX_EXAMPLES = 3  # of overlaps

Cells = Sequence[object]


class Table(NamedTuple):
    """A table with the lines that stand under it."""

    title: str
    columns: Sequence[str]
    rows: list[Cells]
    notes: list[str]


def tables(metrics: StageMetrics, found: Found) -> Iterator[Table]:
    """The tables in the order in which they are shown."""
    yield _documents(metrics, found)
    yield _rows(metrics)
    yield _duplicates(found)
    yield _overlaps(found.overlaps)


def _documents(metrics: StageMetrics, found: Found) -> Table:
    noun = "conversations" if metrics.is_chat else "documents"
    splits = (found.train, found.validation)
    rows: list[Cells] = [(noun, *(_count(split.documents) for split in splits))]
    empty = "left out: nothing to learn" if metrics.is_chat else "empty or blank"
    rows.append((f"  {empty}", *(_count(split.empty) for split in splits)))
    if metrics.is_chat:
        rows.append(("  cut to a row", _count(metrics.cut), ""))
    rows += [(f"  bad rows: {cause}", _count(count), "") for cause, count in metrics.bad_rows.items()]
    rows += _lengths("tokens", [split.tokens for split in splits])
    rows += _lengths("characters", [split.characters for split in splits])
    rows.append(("bytes a token", *(f"{split.bytes_per_token:.2f}" for split in splits)))
    rows.append(("characters outside of ASCII", *(f"{split.non_ascii_share:.2%}" for split in splits)))
    rows.append((f"{noun} with U+FFFD", *(_count(split.replaced) for split in splits)))
    rows.append((f"{noun} with control characters", *(_count(split.controls) for split in splits)))
    rows.append((f"{noun} that repeat their lines", *(_count(split.repeating) for split in splits)))
    if metrics.validation_rows:
        rows.append(("rows to validate on", "", _count(metrics.validation_rows)))
    notes = []
    if any(split.sampled < split.distinct for split in splits):
        read = " and ".join(f"{split.sampled:,} of {split.distinct:,}" for split in splits)
        notes = [f"A sample: the text of {read} different {noun} was read. max_documents=… reads more."]
    notes += [
        f"{'Longest:' if not number else '        '} {size:,} tokens, {place}: {text}"
        for number, (place, size, text) in enumerate(found.train.longest)
    ]
    return Table(metrics.data, ("", "training", "validation"), rows, notes)


def _lengths(unit: str, lengths: Sequence[Lengths]) -> list[Cells]:
    return [
        (unit, *(_count(each.total) for each in lengths)),
        (
            "  median / mean / 95 % / longest",
            *(f"{each.median:,.0f} / {each.mean:,.0f} / {each.p95:,.0f} / {each.longest:,}" for each in lengths),
        ),
    ]


def _rows(metrics: StageMetrics) -> Table:
    of = list(metrics.rows.values())
    rows: list[Cells] = [
        ("rows of the plan", *(f"{each.rows:,} of {each.sequence_len:,} tokens" for each in of)),
        ("epochs", *(f"{each.epochs:,.2f}" for each in of)),
        ("text trained on", *(f"{each.trained_share:.1%} of what is taken" for each in of)),
    ]
    if any(each.cropped_tokens or each.never_placed for each in of):
        rows.append(("cropped", *(f"{each.cropped_tokens:,} tokens" for each in of)))
        rows.append(("documents that still wait for a row", *(_count(each.never_placed) for each in of)))
    rows.append(("padding", *(f"{each.padded_share:.1%} of the places" for each in of)))
    if metrics.is_chat:
        rows.append(("masked", *(f"{1 - each.target_share - each.padded_share:.1%} of the places" for each in of)))
    rows.append(("trained on", *(f"{each.target_share:.1%} of the places" for each in of)))
    notes = [f"{metrics.steps:,} steps of {metrics.rows_per_step:,} rows."]
    return Table("Rows", ("", *(name or "training" for name in metrics.rows)), rows, notes)


def _duplicates(found: Found) -> Table:
    duplicates, documents = found.duplicates, found.validation.documents
    wanted = f", {duplicates.wanted:,} of them asked for by repeat" if duplicates.wanted else ""
    leaked = duplicates.validation_copies
    rows: list[Cells] = [
        (
            "exact copies in training",
            _count(duplicates.copies),
            f"{duplicates.copied_tokens:.2%} of the text{wanted}",
        ),
        ("training documents in validation", _count(leaked), f"{leaked / max(documents, 1):.2%} of {documents:,}"),
    ]
    notes = [f"A {kind}: {example}" for kind, example in duplicates.examples.items()]
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
