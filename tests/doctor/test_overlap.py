"""13-grams that evaluation sets and training documents have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.doctor import overlap as doctor_overlap
from nanochat_pl.doctor.eval_sets import ConversationTexts, read_eval_bundle
from nanochat_pl.doctor.overlap import MAX_TRAINING_DOCUMENTS, OverlapCounter
from tests.doctor.test_examine import words


def test_thirteen_words_in_a_row_count_and_twelve_do_not() -> None:
    items = [words(0, 13), words(50, 30), words(100, 12), words(200, 20)]
    counter = OverlapCounter({"set": items})
    counter.add([7, 9], [f"before. {words(0, 13).upper()}, after!", words(50, 12) + " other " + words(63, 12)])
    counter.add([11], ["unrelated " + words(205, 14) + " unrelated"])
    (found,) = counter.results()
    assert (found.items, found.short, found.overlapping, found.common) == (4, 1, 2, 0)
    assert found.share == pytest.approx(2 / 3)
    assert found.gram_share == pytest.approx((1 + 2) / (1 + 18 + 8))
    assert (found.example, found.example_item, found.example_document) == (words(0, 13), 0, 7)


def test_no_gram_goes_from_one_document_into_the_next() -> None:
    counter = OverlapCounter({"set": [words(0, 13)]})
    counter.add([0, 1], [words(0, 7), words(7, 6)])
    assert counter.results()[0].overlapping == 0


def test_the_example_is_the_longest_stretch() -> None:
    counter = OverlapCounter({"set": [words(0, 60)]})
    counter.add([3], [words(0, 13)])
    counter.add([4], [words(30, 16)])
    found = counter.results()[0]
    assert found.example == words(30, 16) and found.example_document == 4


@pytest.mark.parametrize(("documents", "counts"), [(MAX_TRAINING_DOCUMENTS, True), (MAX_TRAINING_DOCUMENTS + 1, False)])
def test_common_phrases_are_told_apart(documents: int, counts: bool) -> None:
    licence = words(0, 20)
    counter = OverlapCounter({"set": [licence], "other": [words(900, 20)]})
    for number in range(documents):
        counter.add([number], [f"{licence} and {licence} again in {number}"])  # twice in a document is once
    found, other = counter.results()
    assert (found.overlapping, found.common) == ((1, 0) if counts else (0, 1))
    assert (other.overlapping, other.common, other.example) == (0, 0, "")


def test_a_large_set_is_sampled_and_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [words(100 * n, 20) for n in range(10)]
    monkeypatch.setattr(doctor_overlap, "MAX_SET_CHARS", sum(map(len, items)) // 2)
    counter = OverlapCounter({"set": items})
    counter.add([0], [items[4], items[5]][:1])
    found = counter.results()[0]
    assert (found.items, found.items_in_all, found.overlapping, found.example_item) == (5, 10, 1, 4)


def test_nothing_to_compare() -> None:
    counter = OverlapCounter({})
    counter.add([0], ["some text"])
    assert counter.results() == []
    counter = OverlapCounter({"empty": [], "blank": ["", "  "]})
    counter.add([0], [words(0, 30)])
    assert [(each.items, each.short, each.share) for each in counter.results()] == [(0, 0, 0.0), (2, 2, 0.0)]


def test_an_eval_bundle_is_read_whatever_its_keys(tmp_path: Path, shared: Path) -> None:
    folder = tmp_path / "eval_data" / "some"
    folder.mkdir(parents=True)
    lines = [{"query": "a", "choices": ["b", {"deep": "c"}], "gold": 1}, {"context": "é"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "set.jsonl").write_text(text, encoding="utf-8")
    assert read_eval_bundle(tmp_path) == {"some/set": ["a\nb\nc", "é"]}
    assert read_eval_bundle(folder) == {"set": ["a\nb\nc", "é"]}
    real = read_eval_bundle(shared / "data" / "eval_bundle")
    assert len(real["world_knowledge/arc_easy"]) == 2376


def test_a_bundle_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval_bundle=.*no \*\.jsonl"):
        read_eval_bundle(tmp_path / "nothing")
    (tmp_path / "x.jsonl").write_text('{"a": "b"}\n{', encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: is not valid JSON"):
        read_eval_bundle(tmp_path)


def test_conversations_are_questions_and_answers() -> None:
    parts = [{"type": "python", "text": "1+2"}, {"type": "text", "text": "three"}]
    conversation = {"messages": [{"role": "user", "content": "sum?"}, {"role": "assistant", "content": parts}]}
    assert list(ConversationTexts([conversation])) == ["sum?\n1+2\nthree"]
