"""The command `evaluate`: what it refuses before anything is measured, what it writes, what it reads on whose word."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat_pl.bundle.bundle import load_bundle, save_bundle, save_stage_info
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli import evaluate_suites
from nanochat_pl.cli._evaluate import is_measured
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.evaluate_suites import data_of
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import to_plain
from nanochat_pl.config.compose import compose
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.evaluation.core.bundle import CORE_TASKS
from nanochat_pl.evaluation.suites import CHATCORE, summary_name
from nanochat_pl.tokenizer.comparison import KINDS
from tests.helpers.evaluated import QUICK, TASKS, make_eval_bundle, make_run, record_of, results_of
from tests.helpers.tiny_run import make_tiny_run

Captured = pytest.CaptureFixture[str]


def test_files_that_a_strangers_bundle_names_are_not_read(tmp_path: Path) -> None:
    """They were, and a metric told something of a text that nobody had given."""
    bundle = load_bundle(make_tiny_run(tmp_path) / "sft" / "bundle")
    data = DataSettings(name="local", path="/etc/passwd", text_column="words")
    bundle.stage.settings["data"] = to_plain(data)
    with pytest.raises(UserError, match=r"'/etc/passwd' .*\n.*data_path=PATH; or leave it out, suites="):
        data_of(bundle, EvaluateConfig(bundle="x"))
    assert data_of(bundle, EvaluateConfig(run="mine")) == data
    assert data_of(bundle, EvaluateConfig(bundle="x", data_path="here")) == replace(data, path="here")
    bundle.stage.settings["data"] = to_plain(DataSettings())
    assert data_of(bundle, EvaluateConfig(bundle="x", data_path="here")).name == "local"
    assert data_of(bundle, EvaluateConfig(bundle="x")) == DataSettings()


def test_tasks_do_not_read_files_that_a_strangers_bundle_names(here: Path, capsys: Captured) -> None:
    """A list of words that only the bundle named was opened, and its words stood in the answers."""
    Path("words.txt").write_text("".join(f"secret{chr(97 + n % 26)}{chr(97 + n // 26)}\n" for n in range(300)), "utf-8")
    bundle = make_run("a", tasks={"simple_spelling": {"test_size": 4, "words_path": "words.txt"}})
    assert main(["evaluate", f"bundle={bundle}", "to=out", "suites=[chat]", *QUICK]) == 2
    said = capsys.readouterr().err
    assert "mixture.tasks.simple_spelling.words_path names 'words.txt'; what a bundle names is not read" in said
    assert "run=NAME" in said and not Path("out").exists()
    assert main(["evaluate", f"bundle={bundle}", "to=out", *QUICK, "paths.cache=cache"]) == 0
    assert "chat: left out: " in capsys.readouterr().out
    assert main(["evaluate", "run=a", "suites=[chat]", *QUICK]) == 0


def test_weights_that_are_no_numbers_are_refused(here: Path, capsys: Captured) -> None:
    """Written answers had the metric 0, choices that of guessing."""
    bundle = load_bundle(make_run("a"))
    with torch.no_grad():
        bundle.net.lm_head.weight[3, 3] = torch.nan
    save_bundle(here / "broken", bundle.stage, net=bundle.net, tokenizer=bundle.tokenizer)
    assert main(["evaluate", "bundle=broken", "to=out", "suites=[chat]", *QUICK]) == 2
    assert "broken/model.safetensors: holds NaN or infinite numbers: lm_head.weight." in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_folder_of_a_stage_is_no_bundle(here: Path, capsys: Captured) -> None:
    make_run("a")
    assert main(["evaluate", "bundle=runs/a/sft", "to=out"]) == 2
    said = capsys.readouterr().err
    assert "bundle=runs/a/sft: is the folder of a stage." in said and "bundle=runs/a/sft/bundle" in said


def test_a_suite_that_was_left_out_is_measured_once_its_data_is_here(here: Path, capsys: Captured) -> None:
    """Its data was fetched, and the pipeline went on saying "finished before"."""
    make_run("a", stage="base")
    command = ["run=a", "core.path=tasks_of_core", *QUICK]

    def measured() -> bool:
        return is_measured(compose_step("evaluate", "evaluate", EvaluateConfig, command))

    assert not measured()
    assert main(["evaluate", *command]) == 0
    assert results_of("a", "base")["left_out"] == ["bpb", "core"]
    assert measured(), "a suite whose data is not here does not make it run for ever"
    make_eval_bundle(here / "tasks_of_core")
    assert not measured()
    assert main(["evaluate", *command]) == 0
    assert results_of("a", "base")["left_out"] == ["bpb"] and measured()
    assert "Measured before: samples." in capsys.readouterr().out


def test_a_bundle_without_a_tokenizer(here: Path, capsys: Captured) -> None:
    bundle = load_bundle(make_tiny_run(here / "full") / "sft" / "bundle")
    save_bundle(here / "bare", StageInfo(stage="base"), net=bundle.net)
    assert main(["evaluate", "bundle=bare", "to=out", "suites=[bpb]"]) == 2
    assert "bare: has no tokenizer" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("limit=0", "limit=0: is below 1."),
        ("suites=[cor]", "suites[0]='cor': must be one of bpb, core, chat"),
        ("suites=[]", "suites=[]: names nothing to measure"),
        ("num_samples=4", "num_samples=4: with temperature=0 all answers"),
        ("top_k=3", "top_k=3: has no meaning with temperature=0"),
        ("chatcore.hellaswag.size=3", "chatcore.hellaswag: there is no such key"),
        ("sandbox=srict", "sandbox=srict: there is no such choice; did you mean strict?"),
        ("core.tasks=[]", "core.tasks=[]: must name at least one task"),
    ],
)
def test_wrong_settings(key: str, problem: str, here: Path, capsys: Captured) -> None:
    assert main(["evaluate", key]) == 2
    assert problem in capsys.readouterr().err


def test_all_that_is_missing_is_said_before_anything_is_measured(here: Path, capsys: Captured) -> None:
    make_run("a")
    make_run("b", stage="base")
    suites = "suites=[chat,chatcore,core,bpb,harness]"
    assert main(["evaluate", "run=a", suites, "paths.cache=cache", *QUICK]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    missing = ("allenai/ai2_arc", "openai/gsm8k", "cais/mmlu", "openai/openai_humaneval", "evaluation bundle")
    assert all(name in err for name in (*missing, "bpb: ", "data settings", "harness.tasks: is empty"))
    commands = ("task=gsm8k", "task=mmlu", "task=arc_easy", "task=humaneval", "eval_bundle=true")
    assert all(f"nanochat-pl download {command} paths.cache=cache" in err for command in commands)
    assert not Path("runs/a/evaluation").exists()
    assert main(["evaluate", "run=b", "suites=[chat,chatcore]", *QUICK]) == 2
    assert capsys.readouterr().err.count("is a base model, which has seen no conversation") == 2


def test_by_default_what_is_not_here_is_left_out(here: Path, capsys: Captured) -> None:
    make_run("a", tasks={**TASKS, "conversations": {"own": {"path": "nowhere.jsonl"}}})
    assert main(["evaluate", "run=a", "paths.cache=cache", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "own: skipped: no answer is right or wrong there." in out
    assert "chatcore: left out: " in out and "suites=[chatcore] says how to get all of it." in out
    assert list(results_of("a")["suites"]) == ["chat", "samples"]


def test_an_unjudged_task_is_no_part_of_chatcore(here: Path, capsys: Captured) -> None:
    make_run("a")
    Path("own.jsonl").write_text(
        "".join(
            json.dumps([{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]) + "\n"
            for i in range(60)
        ),
        encoding="utf-8",
    )
    off = [f"chatcore.{name}=null" for name in CHATCORE]
    own = "chatcore.conversations.own.path=own.jsonl"
    assert main(["evaluate", "run=a", "suites=[chatcore]", own, "paths.cache=cache", *off]) == 2
    assert "chatcore.own: no answer is right or wrong there" in capsys.readouterr().err
    # Of a set whose files are not here this is said, too, and not how to fetch them.
    assert main(["evaluate", "run=a", "suites=[chatcore]", "chatcore.smoltalk={}", "paths.cache=cache", *off]) == 2
    said = capsys.readouterr().err
    assert "chatcore.smoltalk: no answer is right or wrong there" in said and "download" not in said


def test_suites_become_tables_and_files(here: Path, capsys: Captured) -> None:
    make_run("a")
    make_eval_bundle(here / "bundle_of_tasks")
    off = [f"chatcore.{name}=null" for name in CHATCORE]
    chatcore = ["chatcore.arithmetic.test_size=5", "core.path=bundle_of_tasks"]
    assert main(["evaluate", "run=a", "suites=[core,chat,chatcore,samples]", *chatcore, *off, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "core: bundle_of_tasks has no " in out and "boolq" in out
    assert "CORE (2 of 22 tasks): " in out and "chat: mean of the tasks: " in out
    assert "chatcore: mean of the tasks: " in out and "ChatCORE" not in out, "none of its tasks was asked"
    suites = results_of("a")["suites"]
    assert list(suites) == ["core", "chat", "chatcore", "samples"]
    copa, squad = suites["core"]["tasks"]
    assert (copa["name"], copa["n"], copa["baseline"]) == ("copa", 8, 0.5)
    assert copa["centered"] == pytest.approx(2 * copa["accuracy"] - 1)
    summary = suites["core"]["summary"]
    assert summary["value"] == pytest.approx((copa["centered"] + squad["centered"]) / 2)
    assert (summary["num_tasks"], summary["n"]) == (2, 16) and summary["low"] <= summary["value"] <= summary["high"]
    assert {row["name"]: row["n"] for row in suites["chat"]["tasks"]} == {"arithmetic": 6, "identity": 4}
    assert suites["chatcore"]["tasks"][0]["n"] == 5
    folder = Path("runs/a/evaluation/sft")
    rows = list(csv.DictReader((folder / "core.csv").open(encoding="utf-8")))
    assert [row["task"] for row in rows] == ["copa", "squad"]
    assert float(rows[0]["accuracy"]) == pytest.approx(copa["accuracy"])
    published = (folder / "core_published.csv").read_text(encoding="utf-8").splitlines()
    assert published[0] == f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}" and len(published) == 4
    answers = [json.loads(line) for line in (folder / "answers_arithmetic.jsonl").open(encoding="utf-8")]
    assert len(answers) == 6 and {"question", "answer", "reference", "correct"} <= answers[0].keys()
    assert len((folder / "answers_core_squad.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert len((folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_what_must_be_said_with_a_score_stands_everywhere(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", tasks={"arithmetic": {"test_size": 3}})
    task = evaluate_suites.build_tasks

    def with_a_remark(*arguments):
        tasks = task(*arguments)
        tasks["arithmetic"].remark = "sandbox=weak: no network isolation"
        return tasks

    monkeypatch.setattr(evaluate_suites, "build_tasks", with_a_remark)
    assert main(["evaluate", "run=a", "suites=[chat]", "num_samples=2", "temperature=1", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "\narithmetic: sandbox=weak: no network isolation\n" in out
    assert "1 task, n 3 [arithmetic: sandbox=weak: no network isolation]\n" in out
    assert "arithmetic: pass@1 " in out and ", pass@2 " in out
    chat = results_of("a")["suites"]["chat"]
    assert chat["tasks"][0]["remark"] == "sandbox=weak: no network isolation"
    assert chat["tasks"][0]["details"].items() >= {"num_samples": 2, "temperature": 1.0, "top_k": None}.items()
    assert chat["summary"]["remark"] == "arithmetic: sandbox=weak: no network isolation"
    assert "sandbox=weak: no network isolation" in Path("runs/a/evaluation/sft/chat.csv").read_text(encoding="utf-8")
    assert json.loads(record_of("a", "chat", "arithmetic").read_text())["asked"]["remark"].startswith("sandbox=weak")


def test_the_sandbox_is_chosen_by_one_word_and_chatcore_by_task() -> None:
    config = compose(
        "evaluate", EvaluateConfig, ["sandbox=weak", "sandbox.seconds=9", "chatcore.humaneval=null"]
    ).config
    assert (config.sandbox.mode, config.sandbox.seconds) == ("weak", 9.0)
    assert config.context("chatcore").sandbox == config.sandbox
    assert sorted(config.chatcore.chosen()) == sorted({*CHATCORE} - {"humaneval"})
    default = compose("evaluate", EvaluateConfig, []).config
    assert default.sandbox.mode == "strict"
    assert default.chatcore == EvaluateConfig().chatcore and sorted(default.chatcore.chosen()) == sorted(CHATCORE)


def test_means_of_other_tasks_have_other_names() -> None:
    assert summary_name("chatcore", CHATCORE) == "ChatCORE"
    assert summary_name("chatcore", [*CHATCORE, "spelling_bee"]) == "ChatCORE (with spelling_bee)"
    assert summary_name("chatcore", CHATCORE[1:]) == "ChatCORE (4 of 5 tasks)"
    assert summary_name("chatcore", ["arithmetic"]) == "chatcore: mean of the tasks"
    assert summary_name("core", CORE_TASKS) == "CORE"
    assert summary_name("harness", ["x"]) is None and summary_name("core", []) is None


def test_home_is_expanded_in_all_that_names_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["against=~/b", "core.path=~/c", "harness.include_path=~/h", "paths.hub=~"]
    config = compose("evaluate", EvaluateConfig, keys).config
    found = (config.against, config.core.path, config.harness.include_path, config.paths.hub)
    assert found == ("/home/me/b", "/home/me/c", "/home/me/h", "/home/me")


def test_a_tokenizer_is_compared_on_texts_of_its_own_and_of_the_run(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "tiktoken"))
    bundle = make_run("a", "base")
    keys = ["evaluate", "run=a", "suites=[tokenizer]", "paths.cache=cache", *QUICK]
    assert main(keys) == 0
    said = capsys.readouterr().out
    assert "tokenizer: without the text that it was trained on" in said
    assert "GPT-2: skipped: not in tiktoken's cache; nanochat-pl download tokenizers=true" in said
    assert [row["text"] for row in results_of("a", "base")["suites"]["tokenizer"]["table"]] == [*KINDS]

    Path("texts").mkdir()
    for n in range(40):
        Path(f"texts/{n}.txt").write_text(f"Return the number of elements in list {n}. " * 20, encoding="utf-8")
    info = load_bundle(bundle).stage
    save_stage_info(bundle, replace(info, settings={**info.settings, "data": to_plain(DataSettings())}))
    names = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}
    own = load_bundle(bundle).tokenizer
    assert own is not None
    monkeypatch.setattr("nanochat_pl.tokenizer.comparison._is_cached", lambda other: other.name in names.values())
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: own._encoding)
    assert main([*keys, f"data_path={here / 'texts'}"]) == 0
    assert "Measured before" not in capsys.readouterr().out
    rows = {row["text"]: row for row in results_of("a", "base")["suites"]["tokenizer"]["table"]}
    assert rows.keys() == {*KINDS, "training text", "held-out text"}
    assert rows["training text"]["bytes per token, ours"] > 1.5 > rows["korean"]["bytes per token, ours"]
    assert {row["ours for one token of GPT-2"] for row in rows.values()} == {1.0}
    table = Path("runs/a/evaluation/base/tokenizer.csv").read_text(encoding="utf-8")
    assert table.startswith('text,bytes,"bytes per token, ours"') and len(table.splitlines()) == 1 + len(rows)
    assert main([*keys, f"data_path={here / 'texts'}"]) == 0
    assert "Measured before: tokenizer." in capsys.readouterr().out
    assert main(["evaluate", "run=a", "suites=[samples]", *QUICK]) == 0
    assert main(["report", "run=a"]) == 0
