"""The evaluation bundle, tasks on it, and the table: what must hold besides the golden values."""

from __future__ import annotations

import csv
import functools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.evaluation.candidates import Score
from nanochat_pl.evaluation.core.bundle import CORE_TASKS
from nanochat_pl.evaluation.core.evaluate import CoreBundle, ask, evaluate_core_task, open_core
from nanochat_pl.evaluation.core.prompts import choose, choose_shots, kept_order, make_question
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.evaluation.results import from_plain, make_result, summarize, to_plain
from nanochat_pl.evaluation.suites import summary_name
from nanochat_pl.evaluation.tables import core_table
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer
from tests.helpers import processes
from tests.helpers.models import perturbed, tiny_config
from tests.helpers.small_engine import byte_tokenizer

LM = {"icl_task_type": "language_modeling", "dataset_uri": "lm.jsonl", "num_fewshot": [2]}
MC = {
    "icl_task_type": "multiple_choice",
    "dataset_uri": "mc.jsonl",
    "num_fewshot": [3],
    "continuation_delimiter": "\nA: ",
}
SCHEMA = {"icl_task_type": "schema", "dataset_uri": "deep/schema.jsonl", "num_fewshot": [0]}


def write_bundle(folder: Path, tasks: dict[str, dict[str, Any]], files: dict[str, list[Any]], **baselines: Any) -> Path:
    """A bundle in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"label": name, **task} for name, task in tasks.items()]
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}), encoding="utf-8")
    with (folder / "eval_meta_data.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["Eval Task", "Task Category", "Random baseline"])
        table.writerows([name, "of a kind", baselines.get(name, 25)] for name in tasks)
    for name, rows in files.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def small_bundle(folder: Path) -> Path:
    return write_bundle(
        folder,
        {"numbers": LM, "letters": MC, "who": SCHEMA},
        {
            "lm.jsonl": [{"context": f" {n} and {n} is ", "continuation": str(2 * n)} for n in range(9)],
            "mc.jsonl": [{"query": f"Q: {n}?", "choices": ["ä", "no", "ä b"], "gold": n % 3} for n in range(12)],
            "deep/schema.jsonl": [
                {"context_options": ["The cat", "The dog of mine"], "continuation": f"has {n}.", "gold": 1}
                for n in range(4)
            ],
        },
        who=50,
    )


@functools.cache
def model() -> tuple[GPT, Tokenizer]:
    """Rotary tables for 320 positions, a token for every byte."""
    tokenizer = byte_tokenizer()
    return perturbed(tiny_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False).eval(), tokenizer


def opened(path: Path, **settings: Any) -> CoreBundle:
    return open_core(CoreSettings(path=str(path), **settings), path, None)


def test_each_kind_of_task_gives_a_result(tmp_path: Path) -> None:
    bundle = opened(small_bundle(tmp_path))
    assert bundle.tasks == ("numbers", "letters", "who") and set(CORE_TASKS) == set(bundle.missing)
    told: list[int] = []
    results = [evaluate_core_task(bundle, name, *model(), told.append) for name in bundle.tasks]
    assert [result.n for result in results] == [9, 12, 4] and sum(told) == 25
    for result in results:
        assert from_plain(json.loads(json.dumps(to_plain(result), allow_nan=False)), "here") == result
        assert [row["correct"] for row in result.answers] == [outcome == 1 for outcome in result.outcomes]
        assert result.details["cut_prompts"] == 0 and result.details["shots_from"] == "asked"
    assert (results[1].baseline, results[2].baseline) == (0.25, 0.5)
    assert results[2].centered == pytest.approx((results[2].accuracy - 0.5) / 0.5)
    assert summary_name("core", bundle.tasks) == "CORE (0 of 22 tasks and 3 others)"


def evaluate_on_ranks(folder: str, name: str) -> dict[str, Any]:
    return to_plain(evaluate_core_task(opened(Path(folder)), name, *model()))


@pytest.mark.parametrize(("world_size", "name"), [(2, "letters"), (3, "who")])
def test_processes_share_the_problems_and_all_get_the_result(tmp_path: Path, world_size: int, name: str) -> None:
    folder = small_bundle(tmp_path)
    alone = evaluate_on_ranks(str(folder), name)
    for result in processes.run(world_size, evaluate_on_ranks, str(folder), name):
        assert (result["items"], result["outcomes"]) == (alone["items"], alone["outcomes"])
        assert result["details"] == alone["details"]


def test_prompts_past_the_rotary_tables_lose_their_beginning_and_are_counted(tmp_path: Path) -> None:
    net, tokenizer = model()
    rows = [{"query": "x" * (100 * n), "choices": ["one", "another"], "gold": 0} for n in range(1, 5)]
    folder = write_bundle(tmp_path, {"long": MC | {"num_fewshot": [0]}}, {"mc.jsonl": rows})
    result = evaluate_core_task(opened(folder), "long", net, tokenizer)
    assert result.details["cut_prompts"] == 1 and result.details["longest_prompt"] == 1 + 400 + len("\nA: another")
    problem = max(ask(opened(folder), "long").problems, key=lambda problem: len(problem.contexts[0]))
    question = make_question(tokenizer, "multiple_choice", problem, [], "\nA: ", net.config.rotary_reach)
    whole = make_question(tokenizer, "multiple_choice", problem, [], "\nA: ", 1000)
    for one, other in zip(question.candidates, whole.candidates, strict=True):
        assert list(one.ids) == list(other.ids)[question.cut :], "all alternatives lose as much"
        assert list(one.ids[one.start : one.end]) == list(other.ids[other.start : other.end])
    assert max(len(each.ids) for each in question.candidates) == net.config.rotary_reach


def test_an_ending_longer_than_the_tables_is_still_scored(tmp_path: Path) -> None:
    rows = [{"context": "x", "continuation": "y" * 700}, {"context": "x", "continuation": "y"}]
    folder = write_bundle(tmp_path, {"long": LM | {"num_fewshot": [0]}}, {"lm.jsonl": rows})
    assert evaluate_core_task(opened(folder), "long", *model()).details["cut_prompts"] == 1


def test_an_ending_that_begins_another_one_has_no_mean(tmp_path: Path, shared: Path) -> None:
    """As the published evaluation: min() over a list with NaN gives the first where that is NaN, else never it."""
    some, more, none = Score(2.0, 2, False), Score(9.0, 3, False), Score(0.0, 0, True)
    assert [choose(scores) for scores in ([none, some], [some, none], [more, none, some])] == [0, 0, 2]
    rows = [{"query": "q", "choices": ["say", "say it"], "gold": gold} for gold in (0, 1)]
    folder = write_bundle(tmp_path, {"begun": MC | {"num_fewshot": [0]}}, {"mc.jsonl": rows})
    result = evaluate_core_task(opened(folder), "begun", *model())
    assert result.details["empty_spans"] == 2 and sorted(result.outcomes) == [0, 1]
    assert [row["mean_nats"][0] for row in result.answers] == [None, None]
    assert all(math.isfinite(row["mean_nats"][1]) for row in result.answers)
    piqa = {
        problem.row: problem for problem in ask(opened(shared / "data/eval_bundle", max_per_task=None), "piqa").problems
    }
    for row in (101, 178, 355, 987, 1028):
        first, second = sorted(piqa[row].endings, key=len)
        assert second.startswith(first)


@pytest.mark.parametrize("name", ["letters", "who", "numbers"])
def test_a_model_that_gives_no_numbers_is_no_guessing(tmp_path: Path, name: str) -> None:
    """Of NaN the first alternative is the least, so a task of choices had the metric of guessing."""
    net = perturbed(tiny_config(vocab_size=model()[0].config.vocab_size)).requires_grad_(False).eval()
    net.lm_head.weight[3, 3] = math.nan
    with pytest.raises(UserError, match=f"^{name}: the model's outputs are not finite numbers"):
        evaluate_core_task(opened(small_bundle(tmp_path)), name, net, model()[1])


def test_equal_alternatives_give_the_first(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "choices": ["same", "same", "same"], "gold": n} for n in range(3)]
    folder = write_bundle(tmp_path, {"same": MC | {"num_fewshot": [0]}}, {"mc.jsonl": rows})
    result = evaluate_core_task(opened(folder), "same", *model())
    assert [row["correct"] for row in sorted(result.answers, key=lambda row: row["item"])] == [True, False, False]


def test_items_say_which_problem_with_which_shots(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path)
    names = {most: evaluate_core_task(opened(folder, max_per_task=most), "letters", *model()).items for most in (8, 12)}
    assert [name.split("-")[0] for name in names[8]] == [str(row) for row in kept_order(12, 8)]
    assert not set(names[8]) & set(names[12]), "other shots: another problem"
    assert opened(folder, max_per_task=8).fingerprint("letters") != opened(folder).fingerprint("letters")
    same = write_bundle(tmp_path / "2", {"letters": MC}, {"mc.jsonl": rows_of(folder / "eval_data/mc.jsonl")})
    assert opened(same).fingerprint("letters") == opened(folder).fingerprint("letters")


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tasks_can_be_named(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path)
    bundle = opened(folder, tasks=["who", "letters"])
    assert bundle.tasks == ("who", "letters") and bundle.missing == ()
    with pytest.raises(UserError, match=r"core.tasks: jeopardy: the bundle in .* does not have this task of CORE"):
        open_core(CoreSettings(path=str(tmp_path), tasks=["jeopardy"]), tmp_path, None)
    with pytest.raises(UserError, match=r"core.tasks: 'letter' is no task of CORE; did you mean letters\?"):
        opened(folder, tasks=["letter"])
    (folder / "eval_data/mc.jsonl").unlink()
    assert opened(folder).tasks == ("numbers", "who") and "letters" in opened(folder).missing
    with pytest.raises(UserError, match=r"letters: there is no file .*mc\.jsonl"):
        opened(folder, tasks=["letters"])
    for wrong in ([], ["who", "who"]):
        with pytest.raises(UserError, match="must name at least one"):
            build(CoreSettings, {"tasks": wrong})


def test_a_bundle_that_is_not_here_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"core.path=.*nowhere: there is no folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nanochat-pl download eval_bundle=true paths.cache=") as raised:
        open_core(CoreSettings(), tmp_path, None)
    assert str(tmp_path) in str(raised.value)
    small_bundle(tmp_path / "eval_bundle")
    assert open_core(CoreSettings(), tmp_path, None).tasks == ("numbers", "letters", "who")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "core.yaml").unlink(), r"core\.yaml: cannot be read"),
        (lambda folder: (folder / "core.yaml").write_text("a: [\n"), r"core\.yaml: is no YAML"),
        (lambda folder: (folder / "core.yaml").write_text("a: 1\n"), r"has no list icl_tasks"),
        (lambda folder: (folder / "core.yaml").write_text("icl_tasks: [1]\n"), r"icl_tasks\[0\].*must be a group"),
        (lambda folder: (folder / "core.yaml").write_bytes(b"\xff\xfe\xff"), r"core\.yaml: is not UTF-8"),
        (lambda folder: (folder / "core.yaml").write_text("icl_tasks: !!python/object:os.x {}\n"), "is no YAML"),
        (lambda folder: (folder / "eval_meta_data.csv").unlink(), r"eval_meta_data\.csv: cannot be read"),
        (lambda folder: (folder / "eval_meta_data.csv").write_text("a,b\n"), r"has no column 'Eval Task'"),
        (
            lambda folder: (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nx,1\n"),
            "no baseline of",
        ),
    ],
)
def test_what_is_wrong_with_the_tables_is_said(tmp_path: Path, change: Any, message: str) -> None:
    folder = small_bundle(tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        opened(folder)
    assert re.search("core.path|iconv", error.value.fix), "each has a way out"


@pytest.mark.parametrize(
    ("task", "baseline", "message"),
    [
        (LM | {"icl_task_type": "generation"}, 0, r"icl_tasks\[0\]\.icl_task_type='generation': must be one of"),
        (LM | {"num_fewshot": []}, 0, "must be at least one number"),
        (LM | {"num_fewshot": [-1]}, 0, "below 0"),
        (LM | {"dataset_uri": "../../secret.jsonl"}, 0, "leads out of"),
        (LM | {"dataset_uri": "/etc/passwd"}, 0, "leads out of"),
        (
            LM | {"dataset_uri": "a\ud800"},
            0,
            r"core\.yaml: icl_tasks\[0\]: dataset_uri='.*a.*': is no path: it has bytes",
        ),
        (LM | {"dataset_uri": "a\0b"}, 0, "dataset_uri='.*a.*b': is no path: it has bytes"),
        (LM | {"dataset_uri": "a" * 300}, 0, "dataset_uri='.*a'…: cannot be looked at: File name too long"),
        (LM, 100, "is 100 percent; must be at least 0 and below 100"),
        (LM, "nan", "must be at least 0 and below 100"),
        (LM, "", "not a number"),
    ],
)
def test_a_task_that_is_not_as_it_must_be_is_refused(tmp_path: Path, task: Any, baseline: Any, message: str) -> None:
    folder = write_bundle(
        tmp_path, {"numbers": task}, {"lm.jsonl": [{"context": "a", "continuation": "b"}]}, numbers=baseline
    )
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_a_file_that_links_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "bundle")
    (tmp_path / "secret").write_text("{}")
    (folder / "eval_data/lm.jsonl").unlink()
    (folder / "eval_data/lm.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of"):
        opened(folder)
    (folder / "eval_data/lm.jsonl").unlink()
    (folder / "eval_data/lm.jsonl").symlink_to("lm.jsonl")
    with pytest.raises(UserError, match=r"dataset_uri='.*lm\.jsonl': cannot be looked at: Too many levels"):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("letters", {"query": "q", "choices": ["a", "b"], "gold": 2}, r"line 1: gold=2: must be 0 … 1"),
        ("letters", {"query": "q", "choices": ["a", "b"], "gold": True}, r"gold=True"),
        ("letters", {"query": "q", "choices": ["a"], "gold": 0}, r"a list of two texts or more"),
        ("letters", {"query": 1, "choices": ["a", "b"], "gold": 0}, r"query=1: must be text"),
        ("letters", {"choices": ["a", "b"], "gold": 0}, r"query=None: must be text"),
        ("who", {"context_options": ["a", 1], "continuation": "b", "gold": 0}, r"a list of two texts"),
        ("numbers", {"context": "a"}, r"continuation=None"),
        ("numbers", [1], r"is not a JSON object"),
        ("numbers", {"context": "a", "continuation": "\ud83d"}, r"line 1: continuation='\\ud83d': .* half a surrogate"),
        (
            "letters",
            {"query": "q", "choices": ["a", "\udc00b"], "gold": 0},
            r"line 1: choices=.* half a surrogate pair",
        ),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path: Path, name: str, row: Any, message: str) -> None:
    bundle = opened(small_bundle(tmp_path))
    bundle.by_name[name].path.write_text(json.dumps(row) + "\n{\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as raised:
        evaluate_core_task(bundle, name, *model())
    assert len(raised.value.problems) == 2 and "line 2: is not valid JSON" in str(raised.value)


@pytest.mark.parametrize(("size", "shots"), [(2, 1), (12, 3), (12, 11), (200, 10), (5000, 2)])
def test_shots_are_drawn_from_all_other_problems(size: int, shots: int) -> None:
    """As the published evaluation draws them: from the list of the others."""
    for index in {0, 1, size // 2, size - 1}:
        others = [n for n in range(size) if n != index]
        assert choose_shots(range(size), index, shots) == random.Random(1234 + index).sample(others, shots)  # type: ignore[arg-type]


def test_drawing_shots_does_not_go_through_all_problems() -> None:
    """It did for each of them: 10 s for the 20,321 of a task."""
    assert len(choose_shots(range(10**15), 7, 10)) == 10  # type: ignore[arg-type]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    bundle = opened(small_bundle(tmp_path))
    bundle.by_name["who"].path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no problems"):
        evaluate_core_task(bundle, "who", *model())


def test_arc_answers_are_mended_only_when_asked_for(shared: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"path": str(shared / "data/eval_bundle"), "max_per_task": None}
    arc = {"tasks": ["arc_easy", "arc_challenge"]}
    wrong = open_core(CoreSettings(**settings, **arc), tmp_path, shared / "data/hub")
    right = open_core(CoreSettings(**settings, **arc, fix_arc=True), tmp_path, shared / "data/hub")
    for name, number in (("arc_easy", 71), ("arc_challenge", 20)):
        before, after = ask(wrong, name), ask(right, name)
        assert "corrected_answers" not in before.details
        assert (after.details["corrected_answers"], after.details["unknown_answers"]) == (number, 0)
        changed = sum(one != other for one, other in zip(before.problems, after.problems, strict=True))
        assert changed == number
        assert right.fingerprint(name) != wrong.fingerprint(name)
    with pytest.raises(UserError, match="nanochat-pl download task=arc_easy"):
        open_core(CoreSettings(**settings, fix_arc=True), tmp_path, None)
    no_arc = CoreSettings(**settings, fix_arc=True, tasks=["copa"])
    assert open_core(no_arc, tmp_path, None).tasks == ("copa",)


def published(shared: Path) -> list[tuple[str, float, float]]:
    lines = (shared / "data/eval_bundle/openai-community-gpt2-xl.csv").read_text().splitlines()[1:-1]
    return [(task.strip(), float(one), float(two)) for task, one, two in (line.split(",") for line in lines)]


def test_the_published_file_is_reproduced(shared: Path) -> None:
    """Of its accuracies (to six digits) and the baselines of the bundle, to the byte."""
    baselines = {}
    with (shared / "data/eval_bundle/eval_meta_data.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            baselines[row["Eval Task"]] = float(row["Random baseline"]) / 100
    results = []
    for name, accuracy, centered in published(shared):
        n = next(n for n in range(1, 3000) if abs(round(accuracy * n) / n - accuracy) < 5e-7)
        right = round(accuracy * n)
        outcomes = [1.0] * right + [0.0] * (n - right)
        results.append(make_result(name, [str(i) for i in range(n)], outcomes, baseline=baselines[name]))
        assert results[-1].centered == pytest.approx(centered, abs=5e-7)
    assert tuple(result.name for result in results) == CORE_TASKS
    expected = (shared / "data/eval_bundle/openai-community-gpt2-xl.csv").read_bytes()
    assert core_table(results).encode() == expected
    assert summarize("CORE", results).value == pytest.approx(0.256525, abs=5e-7)


def test_a_mean_of_some_tasks_says_of_how_many() -> None:
    result = make_result("copa", ["1", "2"], [1, 0], baseline=0.5)
    assert (
        summary_name("core", CORE_TASKS) == "CORE" and summary_name("core", CORE_TASKS[:20]) == "CORE (20 of 22 tasks)"
    )
    assert core_table([result]).splitlines()[-1] == f"{'CORE (1 of 22 tasks)':<35}, {'':<10}, 0.000000  "
    summary = summarize("CORE", [result])
    assert summary.num_tasks == 1 and summary.low < 0 < summary.high
