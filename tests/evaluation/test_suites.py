"""What results.json says is what is read of it: by `evaluate` itself, and by the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.evaluation.results import make_result
from nanochat_pl.evaluation.suites import Evaluation, SuiteResult, read_results, suite_of
from nanochat_pl.evaluation.tables import show_suite


def tasks(right: int) -> list:
    names = [f"problem {n}" for n in range(8)]
    outcomes = [float(n < right) for n in range(8)]
    return [make_result("arc_easy", names, outcomes, baseline=0.25, details={"remark": "weak", "k": 1})]


def test_results_are_written_as_they_are_read(tmp_path: Path) -> None:
    suite = suite_of("chatcore", tasks(6)).compared_with(suite_of("chatcore", tasks(4)), "other")
    assert suite.summary and suite.summary.name == "ChatCORE (1 of 5 tasks)" and len(suite.differences) == 1
    bits = SuiteResult("bpb", plain={"bpb": 1.2, "num_rows": 7}).compared_with(
        SuiteResult("bpb", plain={"bpb": 1}), "x"
    )
    samples = SuiteResult("samples", plain=[{"prompt": "a", "text": "b"}])
    suites = {each.name: each for each in (bits, suite, samples)}
    written = Evaluation({"stage": "sft", "version": 2}, suites).to_json()
    (tmp_path / "results.json").write_text(json.dumps(written), encoding="utf-8")
    found = read_results(tmp_path)
    assert found.to_json() == written
    assert found.suites["chatcore"].tasks[0].remark == "weak"
    assert found.suites["bpb"].metrics == pytest.approx({"bpb": 1.2, "num_rows": 7, "difference": 0.2})
    assert found.suites["samples"].samples[0].text == "b"
    assert read_results(tmp_path / "nowhere") == Evaluation()


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They had neither centered accuracies nor details."""
    row = {"name": "arithmetic", "accuracy": 0.4, "stderr": 0.1, "n": 20, "baseline": 0.25, "remark": "of old"}
    (tmp_path / "results.json").write_text(json.dumps({"suites": {"chat": {"tasks": [row]}}}), encoding="utf-8")
    (task,) = read_results(tmp_path).suites["chat"].tasks
    assert (task.centered, task.remark) == (pytest.approx(0.2), "of old")


def test_one_row_alone_has_no_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    show_suite(SuiteResult("bpb", plain={"bpb": 1.25, "num_rows": 1}))
    assert capsys.readouterr().out == "bits per byte: 1.2500\n"
