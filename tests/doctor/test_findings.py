"""What is said of which metrics, and what of it is a failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.doctor.examine import Duplicates, Found, Lengths, SplitMetrics
from nanochat_pl.doctor.findings import RowMetrics, StageMetrics, failing, finding_of, findings
from nanochat_pl.doctor.overlap import Overlap

SPLIT = SplitMetrics(
    documents=1000,
    empty=0,
    tokens=Lengths(100_000, 90, 100, 200, 900),
    distinct=1000,
    sampled=1000,
    characters=Lengths(400_000, 360, 400, 800, 3600),
    bytes_per_token=4.0,
    non_ascii_share=0.0,
    replaced=0,
    repeating=0,
    longest=[("s0, document 3", 900, "'text'")],
)
DUPLICATES = Duplicates(copies=0, copied_tokens=0.0, wanted=0, validation_copies=0)
ROWS = RowMetrics(256, 1000, 1.0, 1.0, 0, 0, 0.0, 1.0)
STAGE = StageMetrics(
    "base",
    "good text",
    {"": ROWS},
    steps=100,
    rows_per_step=10,
    validation_rows=50,
    validation_rows_wanted=50,
    vocab_size=500,
    model_vocab_size=512,
)
FOUND = Found(SPLIT, SPLIT, DUPLICATES, [])
Case = tuple[StageMetrics, Found]


def with_stage(**changes: Any) -> Case:
    return replace(STAGE, **changes), FOUND


def with_rows(name: str = "", **changes: Any) -> Case:
    return with_stage(rows={name: replace(ROWS, **changes)})


def with_train(**changes: Any) -> Case:
    return STAGE, replace(FOUND, train=replace(SPLIT, **changes))


def with_validation(validation_copies: int = 0, **changes: Any) -> Case:
    duplicates = replace(DUPLICATES, validation_copies=validation_copies)
    return STAGE, replace(FOUND, validation=replace(SPLIT, **changes), duplicates=duplicates)


def with_copies(**changes: Any) -> Case:
    return STAGE, replace(FOUND, duplicates=replace(DUPLICATES, copies=200, copied_tokens=0.2, **changes))


def with_overlap(name: str, overlapping: int, gram_share: float = 0.0, made: bool = False) -> Case:
    overlaps = [Overlap(name, 100, 100, 0, overlapping, 0, gram_share)]
    return replace(STAGE, made_sets=(name,) if made else ()), replace(FOUND, overlaps=overlaps)


def test_nothing_is_said_of_good_data() -> None:
    assert findings(STAGE, FOUND) == []
    assert not failing([])


@pytest.mark.parametrize(
    ("case", "problem", "fix"),
    [
        (with_train(empty=1000), "no text to train on", "data.path"),
        (with_train(documents=0), "no text to train on", "data.path"),
        (with_validation(documents=0), "no text to validate on", "data.validation_path"),
        (with_rows(target_share=0.0), "No token is trained on", "mixture"),
        (
            with_validation(301, empty=400),
            "301 (30.1%) of the validation documents are trained on",
            "data.validation_path",
        ),
        (with_stage(model_vocab_size=480), "tokenizer has 500 ids, the model 480", "run=NAME"),
    ],
)
def test_what_would_break_a_run_fails(case: Case, problem: str, fix: str) -> None:
    first, *_ = findings(*case)
    assert first.fails and problem in first.problem and fix in first.fix


@pytest.mark.parametrize(
    ("case", "problem", "fix"),
    [
        (with_rows(epochs=8.0), "8.0 times over the text", "max_steps=50"),
        (with_rows(trained_share=0.4, never_placed=7), "40% of the text is trained on", "data.long_documents=split"),
        (with_rows("web", trained_share=0.4), "web: 40%", "data.sources.web.long_documents=split"),
        (with_rows(padded_share=0.5), "50% of the places are padding", "model.sequence_len"),
        (with_stage(validation_rows=20), "fills 20 rows, the plan wants 50", "data.validation_fraction"),
        (with_train(empty=100), "100 (10.0%) of the documents are empty", ""),
        (with_train(bytes_per_token=1.3), "1.30 bytes only: the tokenizer does not fit", "Train one on it"),
        (
            (replace(STAGE, fitted_tokenizer=True), with_train(bytes_per_token=1.3)[1]),
            "vocabulary is small",
            "Raise tokenizer.vocab_size (500).",
        ),
        (with_train(tokens=Lengths(1000, 1, 1, 1, 500)), "One document holds 50% of the text: s0, document 3", ""),
        (with_train(replaced=50), "50 (5.0%) of the documents hold U+FFFD", "UTF-8"),
        (with_train(repeating=50), "repeat their own lines", ""),
        (with_stage(stage="sft", cut=100), "100 (10.0%) of the conversations are cut", "model.sequence_len"),
        (with_stage(stage="sft", bad_rows={"mine: invalid JSON": 3}), "left out: 3 (mine: invalid JSON)", ""),
        (with_overlap("gsm8k", 5), "gsm8k: 5.0% of 100 items", "training text"),
        (with_overlap("validation", 90, 0.2), "validation: 20.0% of its 13-grams", ""),
        (with_copies(), "20% of the text are exact copies", "Take them out"),
        (with_validation(30), "30 (3.0%) of the validation documents are trained on", "data.validation_path"),
    ],
)
def test_what_would_spoil_a_run_is_a_warning(case: Case, problem: str, fix: str) -> None:
    (finding,) = findings(*case)
    assert not finding.fails and problem in finding.problem and fix in finding.fix


def test_what_is_meant_to_be_so_is_no_finding() -> None:
    """Copies that a task's ``repeat`` asks for, templates that both parts of a task are made of."""
    assert findings(*with_copies(wanted=200)) == []
    assert findings(*with_overlap("identity", 50, made=True)) == []
    assert findings(*with_overlap("validation", 50, 0.01)) == []  # many documents share a sentence with another


def test_failures_come_first() -> None:
    found = findings(*with_rows(target_share=0.0, padded_share=0.9))
    assert [each.fails for each in found] == [True, False] and failing(found)


def test_what_a_training_would_end_with_is_a_failure() -> None:
    first, second = finding_of(UserError(["one", "two"], "do this"))
    assert (first.problem, first.fix, second.problem, second.fix) == ("one", "", "two", "do this")
    assert first.fails and second.fails


@pytest.mark.parametrize(
    ("case", "said", "fix"),
    [
        (with_stage(own_sets={"m.mine": (200, 0.5)}), "each conversation is seen 200 times", "Lower m.mine.repeat"),
        (with_stage(own_sets={"m.mine": (1, 0.002)}), "m.mine: 0.20% of the conversations", "Set m.mine.repeat=6"),
        (
            with_stage(own_sets={"m.mine": (1, 0.00001)}),
            "it will hardly be learnt",
            "Give more conversations, or leave",
        ),
        (with_stage(remarks=("4 files left out (.md)",)), "4 files left out (.md).", ""),
        (with_train(controls=900), "900 (90.0%) of the documents hold NULs", "UTF-8"),
        (with_train(separators=900), "hold a separator of documents", "row"),
    ],
)
def test_what_of_the_files_is_not_learnt_is_said(case: Case, said: str, fix: str) -> None:
    (finding,) = findings(*case)
    assert said in finding.problem and fix in finding.fix and not finding.fails
    assert findings(*with_stage(own_sets={"m.mine": (50, 0.02)})) == []
