"""The report of a run: what it shows, what it survives, what it refuses."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
from pathlib import Path
from xml.dom import minidom

import pytest
from markdown_it import MarkdownIt

from nanochat_pl.common.errors import UserError
from nanochat_pl.report import SUMMARY_COLUMNS, summary_table, write_report
from nanochat_pl.report.evaluations import Conditions, read_evaluation
from nanochat_pl.report.format import clean, compact, markdown_block, markdown_inline, show
from tests.report.fake_run import HOSTILE, add_benchmarks, make_run, write_json


class Page(html.parser.HTMLParser):
    """The elements of a page, the addresses that it names, its ids, and its visible text."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo", hostile=HOSTILE)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_benchmarks(make_run(tmp_path_factory.mktemp("runs") / "demo"))
    write_report(folder)
    return folder


@pytest.fixture
def without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a report says: drawing takes the most of its time."""
    for name in ("plots.svg", "bars_svg"):
        monkeypatch.setattr(f"nanochat_pl.report.write.{name}", lambda *_: '<svg viewBox="0 0 1 1"></svg>')


def read(run: Path, name: str) -> str:
    return (run / "report" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_a_report_shows_every_part_of_a_run(run: Path, name: str) -> None:
    text = read(run, name)
    text = Page(text).text if name.endswith("html") else text.replace("\\", "")
    for expected in (
        "total_batch_tokens",  # the plan, its reason and what overrode it
        "2 ** round(log2(B_ref * (D / D_ref) ** 0.383))",
        "plan.total_batch_tokens=4096",
        "1.1801",  # bits per byte of the last validation
        "97.5 %",  # the task table: accuracy, standard error, baseline
        "1.1 %",
        "25.0 %",
        "number of elements in the given array.",  # a sample, a chat, an answer
        "I am a small language model",
        "12 * 7 is 74.",
        "c0ffee" * 8,  # where and with what
        "2.13.0",
        "depth 4 · 5.24 M parameters · 2026-01-02 03:04 · CPU, two cores",
        "3 min 30 s",
    ):
        assert expected in text


def test_the_page_is_one_file_that_works_offline_and_without_scripts(run: Path) -> None:
    page = Page(read(run, "report.html"))
    assert page.open == []
    assert "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids)), "drawings of one page share one name space"
    assert page.tags.count("svg") == 13, "six panels of each stage, and the bars of the tasks"
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", read(run, "report.html"))


def test_references_within_the_drawings_resolve(run: Path) -> None:
    text = read(run, "report.html")
    page = Page(text)
    used = {address[1:] for address in page.addresses} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(page.ids)


def test_drawings_follow_the_colours_of_the_page(run: Path) -> None:
    """A colour written into a drawing would be unreadable on the dark page or on the light one."""
    drawings = re.findall(r"<svg viewBox.*?</svg>", read(run, "report.html"), flags=re.S)
    assert len(drawings) == 13
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(drawings))
    assert "var(--first)" in "".join(drawings)


def test_a_report_of_the_same_files_is_the_same_to_the_byte(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "demo"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("report"))
    write_report(again)
    for file in sorted((run / "report").iterdir()):
        assert (again / "report" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_json_has_the_figures_in_full(run: Path) -> None:
    metrics = json.loads(read(run, "report.json"), parse_constant=pytest.fail)
    assert metrics["run"] == "demo"
    assert metrics["total_seconds"] == pytest.approx(21 + 0.35 * 540)
    base = metrics["stages"]["base"]
    assert base["status"] == "finished"
    assert base["series"]["train/loss"]["steps"] == list(range(1, 321))
    assert base["series"]["val/bpb"]["steps"] == [50, 100, 150, 200, 250, 300, 320]
    assert metrics["evaluations"]["sft"]["suites"]["chat"]["tasks"][0]["n"] == 200


def test_drawings_stand_beside_the_markdown(measured_run: Path) -> None:
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(measured_run, "report.md"))
    assert {"base_core.svg", "sft_chat.svg", "sft_chatcore.svg", "base-loss.svg", "mid-bpb.svg", "sft-chat.svg"} <= {
        *named
    }
    assert len(named) == len(set(named)) == 24
    for name in named:
        minidom.parse(str(measured_run / "report" / name))
    page = Page(read(measured_run, "report.html"))
    assert page.open == [] and page.tags.count("svg") == 24


def test_text_of_a_run_never_becomes_markup_in_html(hostile_run: Path, run: Path) -> None:
    page, harmless = Page(read(hostile_run, "report.html")), Page(read(run, "report.html"))
    assert page.tags == harmless.tags
    assert page.open == []
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text


def test_text_of_a_run_never_becomes_markup_in_markdown(hostile_run: Path, run: Path) -> None:
    def structure(folder: Path) -> tuple[list[str], str]:
        rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(read(folder, "report.md"))
        return Page(rendered.replace(" />", ">")).tags, rendered

    tags, rendered = structure(hostile_run)
    assert tags == structure(run)[0]
    assert "<script" not in rendered
    assert "javascript:alert(3)" in rendered
    assert 'href="javascript' not in rendered


@pytest.mark.usefixtures("without_drawings")
def test_lone_surrogates_and_other_unprintables_do_not_stop_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", hostile="\ud800 \u202e \x00 end")
    write_report(run)
    for name in ("report.html", "report.md", "report.json"):
        assert " end" in read(run, name)


@pytest.mark.usefixtures("without_drawings")
def test_missing_and_unfinished_stages_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    shutil.rmtree(run / "sft")
    shutil.rmtree(run / "evaluation")
    for name in ("finished.json", "plan.json", "about.json", "samples.jsonl"):
        (run / "base" / name).unlink()
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Stage sft was not trained." in text
    assert "Stage base is unfinished" in text
    assert "Curves: base" in text
    assert "Stage sft was not trained." in read(run, "report.md")


def test_a_run_of_which_only_the_folder_is_there_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "demo" / "base").mkdir(parents=True)
    assert write_report(tmp_path / "demo").is_file()
    assert summary_table(tmp_path / "demo")[1][:3] == ("base", "status", "unfinished")


def test_one_step_and_values_that_are_no_numbers_can_be_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "base"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,train/loss,val/bpb,train/mfu\n1,nan,1.5,\n", encoding="utf-8")
    write_report(tmp_path / "demo")
    series = json.loads(read(tmp_path / "demo", "report.json"))["stages"]["base"]["series"]
    assert series["train/loss"] == {"steps": [], "values": [], "num_not_finite": 1}
    assert series["val/bpb"]["values"] == [1.5]
    assert "not finite" in read(tmp_path / "demo", "report.md")


@pytest.mark.usefixtures("without_drawings")
def test_a_step_written_twice_counts_as_it_was_written_last(tmp_path: Path) -> None:
    """A killed run repeats the steps since its resume file."""
    folder = tmp_path / "demo" / "base"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,train/loss\n1,5\n2,4\n2,4.5\n3,3\n", encoding="utf-8")
    write_report(tmp_path / "demo")
    series = json.loads(read(tmp_path / "demo", "report.json"))["stages"]["base"]["series"]
    assert series["train/loss"]["values"] == [5, 4.5, 3]


@pytest.mark.usefixtures("without_drawings")
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for path, rest in ((run / "base" / "metrics.csv", "321,2.9"), (run / "base" / "samples.jsonl", '{"step": 3')):
        with path.open("a", encoding="utf-8") as file:
            file.write(rest)
    write_report(run)
    metrics = json.loads(read(run, "report.json"))["stages"]["base"]
    assert metrics["series"]["train/loss"]["steps"][-1] == 320
    assert len(metrics["samples"]) == 4


DAMAGES = {
    "base/metrics.csv": ["step,train/loss\n1,abc\n", "step,train/loss\n1\n", "loss,step\n1,2\n", b"step,\xff\n1,2\n"],
    "base/plan.json": ["{", "[1]"],
    "base/finished.json": ['{"step": "many"}', '{"step": 1, "seconds": NaN}', '{"step": 1, "metrics": 3}'],
    "base/about.json": ['"here"'],
    "base/samples.jsonl": ['{"prompt": 1, "text": "x"}\n', "no json\n", "[" * 100_000 + "\n"],
    "evaluation/sft/results.json": [
        '{"suites": []}',
        '{"suites": {"chat": {"tasks": [{"name": "a", "accuracy": 7, "n": 3, "stderr": 0}]}}}',
        '{"suites": {"chat": {"tasks": [{"name": "a"}]}}}',
        '{"suites": {"core": {"summary": {"name": "CORE", "value": "high"}}}}',
        '{"suites": {"core": {"differences": 3}}}',
        '{"suites": {"x": {"tasks": [{"name": "a", "accuracy": 1, "n": 3, "stderr": 0, "details": {"chat": 3}}]}}}',
        '{"suites": {"core": {"differences": [{"name": "a", "difference": 0.1}]}}}',
    ],
    "evaluation/sft/answers_arithmetic.jsonl": ['{"question": "x"}\n'],
    "evaluation/sft/chats.jsonl": ['{"messages": [{"role": "user", "content": 3}]}\n', "[]\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in DAMAGES.items() for content in all_])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    (tmp_path / "demo" / "base").mkdir(parents=True)
    path = tmp_path / "demo" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "evaluation" in name:  # what is read is what the results name
        tasks = [{"name": "arithmetic", "accuracy": 0.5, "n": 2, "stderr": 0.1}]
        write_json(path.parent / "results.json", {"suites": {"chat": {"tasks": tasks}}})
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}(.|\n)*move it away"):
        write_report(tmp_path / "demo")
    with pytest.raises(UserError, match=re.escape(str(path))):
        summary_table(tmp_path / "demo")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl", "plan.json"])
def test_no_pipe_is_waited_for(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "demo")
    (folder / "base" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "base" / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: is a FIFO"):
        write_report(folder)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_run_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report").exists()


def test_a_stage_that_starts_from_another_run_says_so(tmp_path: Path) -> None:
    write_json(tmp_path / "demo-2" / "sft" / "parent.json", {"run": "demo"})
    assert "Stage sft starts from run demo." in write_report(tmp_path / "demo-2").read_text(encoding="utf-8")


def test_the_summary_has_a_row_for_every_figure(run: Path) -> None:
    rows = summary_table(run)
    assert all(len(row) == len(SUMMARY_COLUMNS) for row in rows)
    assert ("sft", "chat: docs_choice", "41.0 %", "3.5 %", "200", "25.0 %") in rows
    assert ("base", "validation bits per byte", "1.1801", "0.0120", "", "") in rows


def test_a_long_run_is_thinned_to_means_that_end_at_the_last_step() -> None:
    from nanochat_pl.report.plots import MAX_POINTS, _thinned
    from nanochat_pl.report.read import Series

    thinned = _thinned(Series(tuple(range(100_001)), tuple(float(i % 2) for i in range(100_001))))
    assert len(thinned.steps) <= MAX_POINTS
    assert thinned.steps[-1] == 100_000
    assert all(abs(value - 0.5) < 0.05 for value in thinned.values)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_benchmarks_are_shown_with_errors_numbers_and_remarks(measured_run: Path, name: str) -> None:
    text = read(measured_run, name)
    text = Page(text).text if name.endswith("html") else text.replace("\\", "")
    for expected in (
        "humaneval",
        "mean of 6 answers, temperature 0.8, top_k 50",  # how answers were drawn, and pass@k with its errors
        "pass@4",
        "20.0 % ± 1.4 %",
        "pass@6",
        "the accuracy is the mean over all of them",
        "acc_norm, 5 shots, as a chat",
        "less that of other",  # bits per byte: against whom, and on how many rows
        "0.1436 ± 0.02489",
        "on 512 rows of held-out text",
        "CORE (4 of 22 tasks)",  # the summary, its error, interval and n
        "0.0765",
        "± 0.0080",
        "0.0615 … 0.0925",
        "2,000",
        "62.0 %",  # a baseline, and what is below it
        "-0.184",
        "ChatCORE (2 of 5 tasks)",
        "humaneval: sandbox=weak: no network isolation",
        "Compared with other",
        "+3.1 %",
        "-0.4 %",
        "mid",
        "def f(): ...",
        "mean of centered accuracies",
    ):
        assert expected in text, expected
    assert "core_piqa" not in text, "answers without words"
    assert "Stage mid was not trained" not in text


@pytest.mark.usefixtures("without_drawings")
def test_answers_and_chats_of_other_evaluations_are_left_out(tmp_path: Path) -> None:
    """They lie beside those of the last one, which has none of these tasks; and they may be damaged."""
    run = make_run(tmp_path / "demo")
    folder = run / "evaluation" / "sft"
    rows = '{"question": "an earlier question", "answer": "a"}\n'
    for name in ("answers_earlier.jsonl", "answers_harness_mine.jsonl", "answers_chat_arithmetic.jsonl"):
        (folder / name).write_text(rows, encoding="utf-8")
    (folder / "answers_letters_of_old.jsonl").write_text("no json\n", encoding="utf-8")
    write_report(run)
    text = read(run, "report.md")
    assert "12 * 7 is 74." in text and "an earlier question" not in text
    assert list(json.loads(read(run, "report.json"))["evaluations"]["sft"]["answers"]) == ["arithmetic"]
    write_json(folder / "results.json", {"suites": {"bpb": {"bpb": 1.0}}})
    write_report(run)
    assert "I am a small language model" not in read(run, "report.md")


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({}, ""),
        ({"num_samples": 1, "temperature": 0.0}, ""),
        ({"num_samples": 1, "temperature": 1.0}, "temperature 1"),
        ({"num_samples": 8}, "mean of 8 answers, drawn"),
        ({"num_shots": 1}, "1 shot"),
        ({"metric": "acc", "num_fewshot": 0, "chat": False}, "acc, 0 shots, as plain text"),
    ],
)
def test_conditions_of_a_task_in_words(details: dict[str, object], words: str) -> None:
    assert str(Conditions(**details)) == words  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_drawings")
def test_epochs_are_how_often_the_tokens_were_read(tmp_path: Path) -> None:
    """The file has the passes that the packer began."""
    run = make_run(tmp_path / "demo")
    packing = {"placed_tokens": 9740, "pieces": 184, "epochs": 2}
    data = {"train_tokens": 50_611, "packing": packing, "held_out_conversations": 934}
    write_json(run / "sft" / "bundle" / "stage.json", {"stage": "sft", "data": data})
    mixed = {"sources": {"web": {"train_tokens": 20_000, "packing": {"placed_tokens": 24, "epochs": 1}}}}
    write_json(run / "base" / "bundle" / "stage.json", {"stage": "base", "data": mixed})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "pieces 184, epochs 0.19" in text and "placed_tokens 24, epochs 0.0012" in text
    assert "the last validation of its training, on held-out conversations." in text


@pytest.mark.usefixtures("without_drawings")
def test_the_plan_says_where_a_value_comes_from(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    plan = {
        "matrix_lr": {"value": 0.01, "formula": "0.02, the recipe's", "overridden_by": "inherited from base"},
        "num_steps": {"value": 10, "formula": "rows / 8", "overridden_by": "max_steps=10"},
        "validation_rows": {"value": 16, "formula": "at least 32"},
    }
    write_json(run / "sft" / "plan.json", plan)
    write_report(run)
    for text in (Page(read(run, "report.html")).text, re.sub(r"\\|\*\*", "", read(run, "report.md"))):
        assert "inherited from base instead of 0.02, the recipe's" in text
        assert "set by max_steps=10 instead of rows / 8" in text
        assert "set by inherited" not in text
        assert "on at most 16 rows of held-out text." in text


def test_benchmarks_are_in_the_json_and_in_the_summary(measured_run: Path) -> None:
    evaluations = json.loads(read(measured_run, "report.json"))["evaluations"]
    core = evaluations["base"]["suites"]["core"]
    assert (core["summary"]["value"], core["against"]) == (0.0765, "other")
    assert (core["differences"][0]["difference"], core["summary_difference"]["difference"]) == (0.031, -0.004)
    assert evaluations["sft"]["suites"]["chatcore"]["tasks"][0]["remark"].startswith("sandbox=weak")
    rows = summary_table(measured_run)
    assert ("base", "CORE (4 of 22 tasks)", "0.0765", "0.0080", "2,000", "") in rows
    assert ("sft", "chatcore: mmlu", "31.0 %", "2.0 %", "500", "25.0 %") in rows


def test_benchmarks_of_strangers_never_become_markup(tmp_path: Path, measured_run: Path) -> None:
    hostile = add_benchmarks(make_run(tmp_path / "demo"), hostile=HOSTILE + " $\\frac{1$ \ud800 中文")
    write_report(hostile)
    page = Page(read(hostile, "report.html"))
    assert page.tags == Page(read(measured_run, "report.html")).tags and page.open == []
    assert not [name for name in page.attributes if name.startswith("on")]
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(read(hostile, "report.md"))
    assert "<script" not in rendered and 'href="javascript' not in rendered


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "—"),
        (True, "yes"),
        (32768, "32,768"),
        (0.000123456, "0.0001235"),
        (2.0, "2"),
        ([1, 2], "1, 2"),
        ({"a": 1, "b": {"c": "x"}, "d": ""}, "a 1, b (c x)"),
        ([{"a": 1}, {"a": 2}], "a 1; a 2"),
        (1e300, "1e+300"),
    ],
)
def test_values_are_shown_as_people_read_them(value: object, expected: str) -> None:
    assert show(value) == expected


def test_counts_and_escapes() -> None:
    assert [compact(n) for n in (999, 1310720, 12_345, 999_999)] == ["999", "1.31 M", "12.3 k", "1.00 M"]
    assert markdown_inline("a|b\n`c`") == "a\\|b \\`c\\`"
    assert [markdown_inline(text) for text in ("- a", "2. a", "-0.5", "1.5 a")] == ["\\- a", "2\\. a", "-0.5", "1.5 a"]
    assert markdown_block("x\n````\ny").startswith("`````text\n")
    assert clean("a\r\nb\x00") == "a\nb\ufffd"


@pytest.mark.usefixtures("without_drawings")
def test_tokenizers_that_were_not_compared_with_are_said_once_and_short(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    reason = "skipped: it cannot be loaded: HTTPSConnectionPool(host='x', port=443)"
    rows = [{"name": "ours", "bytes_per_token": {"train": 3.5}, "skipped": ""}, {"name": "gpt-2", "skipped": reason}]
    write_json(run / "tokenizer" / "finished.json", {"step": 0, "metrics": {"comparison": rows}, "seconds": 1.0})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "name ours, bytes_per_token (train 3.5); gpt-2 (skipped: it cannot be loaded)" in text
    assert text.count("skipped") == 1


def test_means_of_two_suites_are_told_apart(tmp_path: Path) -> None:
    """Results of before had one name for both, and the table two rows that looked alike."""
    mean = {"name": "mean of the tasks", "value": 0.5, "stderr": 0.1, "low": 0.3, "high": 0.7, "num_tasks": 1, "n": 9}
    task = {"name": "a", "accuracy": 0.5, "n": 9, "stderr": 0.1}
    suite = {"tasks": [task], "summary": mean}
    write_json(tmp_path / "evaluation" / "sft" / "results.json", {"suites": {"chat": suite, "chatcore": suite}})
    assert [each.name for each in read_evaluation(tmp_path / "evaluation" / "sft").summaries] == [
        "chat: mean of the tasks",
        "chatcore: mean of the tasks",
    ]
