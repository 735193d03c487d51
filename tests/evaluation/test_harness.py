"""Bundles as models of lm-evaluation-harness: log-probabilities against plain ones, windows, stops, tasks of files."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.harness import tasks as harness
from nanochat_pl.evaluation.harness.settings import HarnessSettings
from nanochat_pl.evaluation.harness.tasks import open_harness
from nanochat_pl.evaluation.results import TaskResult, from_plain, to_plain
from tests.helpers.processes import run
from tests.helpers.random_model import random_bundle
from tests.helpers.small_engine import ScriptedNet, SmallBundle, byte_tokenizer, golden_bundle, mark

lm_eval = pytest.importorskip("lm_eval")

from nanochat_pl.evaluation.harness.model import BundleLM, generation_settings  # noqa: E402

BOS = 991
TOLERANCE = 2e-4  # nats over some tens of tokens, float32


@pytest.fixture
def bundle(golden: Path) -> SmallBundle:
    return golden_bundle(golden)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package datasets makes of files is not kept in the home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def plainly(bundle: SmallBundle, ids: list[int], start: int) -> tuple[float, bool]:
    """Log-probability of ids[start:] by one whole forward, and whether each is the most probable token."""
    with torch.inference_mode():
        logits = bundle.net(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)
    rows = range(start, len(ids))
    total = sum(logits[n - 1, ids[n]].item() for n in rows)
    return total, all(logits[n - 1].argmax().item() == ids[n] for n in rows)


def scripted(next_id: Callable[[list[int]], int]) -> SmallBundle:
    """A model that goes on from a history of bytes and special tokens as it is told."""
    return SmallBundle(ScriptedNet(next_id), byte_tokenizer())  # type: ignore[arg-type]


def asked(*arguments: Any) -> list[Any]:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=each, doc_id=number) for number, each in enumerate(arguments)]


def evaluate_harness(bundle: Any, settings: HarnessSettings, **more: Any) -> list[TaskResult]:
    tasks = open_harness(settings)
    return [tasks.evaluate(name, bundle, **more) for name in tasks.names]


# The three requests.


def test_continuations_are_as_probable_as_by_a_whole_forward(bundle):
    encode, lm = bundle.tokenizer.encode, BundleLM(bundle)
    greedy = bundle.tokenizer.decode(Engine(bundle).generate([[BOS, *encode("The capital")]], 1, tools=False)[0].ids)
    pairs = [("The capital of France", each) for each in (" is Paris", " is a city in the north", " is")]
    pairs += [("", "Once upon a time"), ("The capital", greedy), ("The capital", " of France")]
    found = lm.loglikelihood(asked(*pairs))
    for (context, continuation), metrics in zip(pairs, found, strict=True):
        ids, start = [BOS, *encode(context + continuation)], 1 + len(encode(context))
        assert metrics == pytest.approx(plainly(bundle, ids, start), abs=TOLERANCE)
    assert [is_greedy for _, is_greedy in found] == [False, False, False, False, True, False]
    assert lm.loglikelihood(asked(("A context", ""))) == [(0.0, True)]


@pytest.mark.parametrize("blanks", [" ", "  ", " \n"])
def test_blanks_before_a_continuation_are_its_own(bundle, blanks):
    """So the harness has it, and published metrics."""
    pairs = asked((f"The capital{blanks}", "of"), ("The capital", f"{blanks}of"))
    [mine, theirs] = BundleLM(bundle).loglikelihood(pairs)
    assert mine == theirs
    ids = [BOS, *bundle.tokenizer.encode(f"The capital{blanks}of")]
    assert mine[0] == pytest.approx(
        plainly(bundle, ids, 1 + len(bundle.tokenizer.encode("The capital")))[0], abs=TOLERANCE
    )


def test_a_token_over_the_border_is_scored(bundle):
    """Of "int" + "o" the tokens may be one: it is not lost, and the beginning is not scored twice."""
    tokenizer = bundle.tokenizer
    word = next(
        text
        for token in tokenizer.tokens[300:]
        if (text := token.decode("utf-8", "replace")).isascii()
        and text.isalpha()
        and len(text) > 3
        and tokenizer.encode(text) == tokenizer.encode(text)[:1]
    )
    [(nats, _)] = BundleLM(bundle).loglikelihood(asked((f"x {word[:2]}", word[2:])))
    ids = [BOS, *tokenizer.encode(f"x {word}")]
    border = len(f"x {word[:2]}")
    start = next(n for n in range(1, len(ids)) if int(tokenizer.token_bytes[ids[: n + 1]].sum()) > border)
    assert nats == pytest.approx(plainly(bundle, ids, start)[0], abs=TOLERANCE)
    assert nats < 0


def test_a_context_past_the_positions_loses_its_beginning_but_not_bos(bundle, monkeypatch):
    reach, tokenizer = bundle.net.config.rotary_reach, bundle.tokenizer
    lm = BundleLM(bundle)
    lm._reach = 40  # the model's own are 5,120, which takes long
    context, continuation = " one two three" * 30, " four"
    [(nats, _)] = lm.loglikelihood(asked((context, continuation)))
    whole = [BOS, *tokenizer.encode(context + continuation)]
    ids = [BOS, *whole[len(whole) - 40 :]]
    assert len(ids) == 41 < reach
    assert nats == pytest.approx(plainly(bundle, ids, len(ids) - len(tokenizer.encode(continuation)))[0], abs=TOLERANCE)
    assert lm.num_cut == 1
    with pytest.raises(UserError, match="positions end at 40"):
        lm.loglikelihood(asked(("short", context)))


def test_whole_texts_are_read_in_windows_and_each_token_once(golden):
    whole = golden_bundle(golden)
    config = dataclasses.replace(whole.net.config, sequence_len=16)
    net = type(whole.net)(config).materialise()
    net.load_state_dict(whole.net.state_dict())
    bundle = SmallBundle(net.eval(), whole.tokenizer)
    texts = ["The quick brown fox jumps over the lazy dog. " * 4, "", "Short", "Numbers: 1 2 3 4 5 6 7 8 9 and on"]
    found = BundleLM(bundle).loglikelihood_rolling(asked(*((text,) for text in texts)))
    for text, nats in zip(texts, found, strict=True):
        ids, expected = [BOS, *bundle.tokenizer.encode(text)], 0.0
        for begin in range(1, len(ids), 16):  # the targets of a window, and as much before them as it has room for
            end = min(begin + 16, len(ids))
            first = max(0, end - 1 - 16)
            expected += plainly(bundle, ids[first:end], begin - first)[0]
        assert nats == pytest.approx(expected, abs=TOLERANCE), text
    assert found[1] == 0
    assert len(bundle.tokenizer.encode(texts[0])) > 32, "windows of several kinds"


def test_answers_end_before_the_first_text_that_ends_them(bundle):
    done: list[tuple[int, int]] = []
    lm = BundleLM(bundle, progress=lambda now, total: done.append((now, total)))
    prompt = "The capital of France"
    free = lm.generate_until(asked((prompt, {"max_gen_toks": 30})))[0]
    assert len(free) > 12
    ends = [free[9:11], free[4:6]]
    ways = [
        (prompt, {"until": ends, "max_gen_toks": 30}),
        (prompt, {"until": "nowhere", "max_gen_toks": 3, "do_sample": False, "temperature": 0.7}),
        (prompt, {"until": [], "max_gen_toks": 30, "do_sample": True, "temperature": 2.0, "top_k": 5}),
        (prompt, {"until": [], "max_gen_toks": 30, "do_sample": True, "temperature": 2.0, "top_k": 5}),
    ]
    cut, short, *drawn = lm.generate_until(asked(*ways))
    assert cut == free[: min(free.find(end) for end in ends)]
    assert free.startswith(short) and short
    assert len({free, *drawn}) == 3, "drawn, and each anew"
    assert done[1:] == sorted(done[1:]) and done[-1] == (4, 4), "one count over several ways of writing"


@pytest.mark.parametrize(
    "kwargs", [{"top_p": 0.9}, {"num_beams": 4}, {"penalty_alpha": 0.5}, {"top_p": 0.5, "repetition_penalty": 1.2}]
)
def test_what_would_change_answers_and_is_not_there_is_refused(kwargs):
    with pytest.raises(UserError) as error:
        generation_settings(kwargs)
    assert len(error.value.problems) == len(kwargs)
    assert all(key in str(error.value) for key in kwargs)


def test_what_asks_for_nothing_is_passed_over():
    kwargs = {"top_p": 1.0, "num_beams": 1, "do_sample": False, "temperature": 0.7, "until": "\n", "max_gen_toks": 7}
    assert generation_settings(kwargs) == {"until": ["\n"], "max_tokens": 7, "temperature": 0.0, "top_k": None}


def test_a_conversation_is_rendered_as_in_training(bundle):
    lm = BundleLM(bundle, chat=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which letter?"}]
    context = lm.apply_chat_template(messages)
    [(nats, _)] = lm.loglikelihood(asked((context, "B")))
    prompt = bundle.tokenizer.render_for_completion({"messages": messages})
    ids = [*prompt, *bundle.tokenizer.encode("B")]
    assert nats == pytest.approx(plainly(bundle, ids, len(prompt))[0], abs=TOLERANCE)
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "The letter is"}], False)
    [(nats, _)] = lm.loglikelihood(asked((begun, " B")))
    ids = [*prompt, *bundle.tokenizer.encode("The letter is"), *bundle.tokenizer.encode(" B")]
    assert nats == pytest.approx(plainly(bundle, ids, len(ids) - len(bundle.tokenizer.encode(" B")))[0], abs=TOLERANCE)
    assert lm._context("conversation 0: []") != lm._context(context), "a text that looks like one is a text"


def test_a_model_that_was_taught_conversations_answers_in_one(golden):
    """It says "42" after the mark of an assistant's turn, and nothing sensible elsewhere."""

    start, answer = mark("<|assistant_start|>")[0], mark("42<|assistant_end|>")

    def next_id(history: list[int]) -> int:
        return answer[len(history) - history.index(start) - 1] if start in history else mark("<|bos|>")[0]

    lm = BundleLM(scripted(next_id), chat=True)
    chat = lm.apply_chat_template([{"role": "user", "content": "6 times 7?"}])
    assert lm.generate_until(asked((chat, {}), ("6 times 7?", {}))) == ["42", ""]


def shared(folder: str) -> str:
    """What a process finds; of drawn answers, and of a task with fewer problems than processes, too."""
    torch.set_num_threads(1)
    bundle, settings = random_bundle(), HarnessSettings(tasks=["capitals", "texts", "drawn"], include_path=folder)
    results = evaluate_harness(bundle, settings)
    results += evaluate_harness(bundle, dataclasses.replace(settings, tasks=["texts"], limit=1))
    return json.dumps([to_plain(each) for each in results])


@pytest.mark.slow
def test_any_number_of_processes_finds_the_same(folder, tmp_path):
    drawn = ANSWERS.replace("task: sums", "task: drawn").replace("max_gen_toks: 20", "max_gen_toks: 6, do_sample: true")
    (folder / "drawn.yaml").write_text(drawn.format(folder=folder), encoding="utf-8")
    alone = shared(str(folder))
    found = run(2, shared, str(folder), environment={"HF_DATASETS_CACHE": str(tmp_path / "datasets")})
    assert [each["n"] for each in json.loads(alone)] == [20, 5, 2, 1]
    rounded = [json.loads(text, parse_float=lambda text: round(float(text), 6)) for text in found]
    assert rounded == [json.loads(alone, parse_float=lambda text: round(float(text), 6))] * 2


def without_memory() -> list[str]:
    lm = BundleLM(random_bundle())

    def work() -> None:
        if collectives.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError) as error:
        lm._agreed(work)
    return [*error.value.problems, error.value.fix, str(collectives.all_reduce_sum(1))]


def test_memory_that_runs_out_on_one_process_ends_all():
    assert run(2, without_memory) == [["process 1: harness: out of memory.", "Use a smaller batch_size.", "2"]] * 2


# Tasks.

CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/capitals.jsonl
    train: {folder}/shots.jsonl
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{cities}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""
ANSWERS = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/sums.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["!"], max_gen_toks: 20}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/texts.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks of local files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    countries = [("France", ["Paris", "Rome", "Berlin", "Oslo"], 0), ("Italy", ["a pot", "Rome"], 1)]
    rows: dict[str, list[dict[str, Any]]] = {
        "capitals": [{"country": name, "cities": cities, "right": right} for name, cities, right in countries * 10],
        "shots": [{"country": f"Land {n}", "cities": ["A", "B"], "right": n % 2} for n in range(6)],
        "sums": [{"question": f"{n} plus 1 is", "answer": str(n + 1)} for n in range(5)],
        "texts": [{"text": "The quick brown fox."}, {"text": "Grüße an alle, 1 2 3. " * 30}],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    for name, text in {"capitals": CHOICES, "sums": ANSWERS, "texts": TEXTS}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


def test_a_task_of_choices_end_to_end(bundle, folder, capfd, recwarn):
    settings = HarnessSettings(tasks=["capitals"], include_path=str(folder), num_fewshot=2)
    done: list[tuple[int, int]] = []
    [result] = evaluate_harness(bundle, settings, progress=lambda now, total: done.append((now, total)))
    assert (result.name, result.n, result.baseline) == ("capitals", 20, pytest.approx(0.375))
    assert result.details["metric"] == "acc" and result.details["num_fewshot"] == 2
    assert result.details["metrics"]["acc,none"] == pytest.approx(result.accuracy)
    assert result.accuracy == sum(result.outcomes) / 20
    assert len(set(result.items)) == 20
    for row in result.answers:
        assert row["question"] in ("The capital of France is", "The capital of Italy is")
        assert row["answer"] in ("Paris", "Rome", "Berlin", "Oslo", "a pot")
        assert row["correct"] == (row["answer"] == row["reference"])
    assert done[-1] == (20, 20) and done == sorted(done)
    assert from_plain(json.loads(json.dumps(to_plain(result))), "here") == result
    assert capfd.readouterr() == ("", "") and not recwarn.list
    [again] = evaluate_harness(bundle, settings)
    assert again == result


def test_the_answers_of_a_task_of_choices_are_those_of_plain_forwards(bundle, folder):
    [result] = evaluate_harness(bundle, HarnessSettings(tasks=["capitals"], include_path=str(folder), limit=7))
    assert result.n == 7 and result.details["num_fewshot"] == 0
    rows = [json.loads(line) for line in (folder / "capitals.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [int(item.partition(":")[0]) for item in result.items]
    assert numbers == sorted(numbers) and len(numbers) == 7 and numbers != list(range(7)), "a seeded choice"
    for number, outcome in zip(numbers, result.outcomes, strict=True):
        row, start = rows[number], f"The capital of {rows[number]['country']} is"
        ids = [[BOS, *bundle.tokenizer.encode(f"{start} {city}")] for city in row["cities"]]
        nats = [plainly(bundle, each, 1 + len(bundle.tokenizer.encode(start)))[0] for each in ids]
        assert outcome == (nats.index(max(nats)) == row["right"])


@pytest.mark.parametrize(
    ("file", "num_fewshot", "changes"), [("capitals", 0, True), ("shots", 2, True), ("shots", 0, False)]
)
def test_other_data_under_the_same_names_are_other_problems(folder, file, num_fewshot, changes):
    """Their number alone was looked at, so the metrics of other problems were taken for those of these."""

    def fingerprint() -> str:
        settings = HarnessSettings(tasks=["capitals"], include_path=str(folder), num_fewshot=num_fewshot)
        return open_harness(settings).fingerprint("capitals")

    before, path = fingerprint(), folder / f"{file}.jsonl"
    assert fingerprint() == before
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[-1]["country"] += "ia"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert (fingerprint() != before) == changes


def test_another_metric_may_count(bundle, folder):
    settings = HarnessSettings(tasks=["capitals"], include_path=str(folder), metric="acc_norm")
    [result] = evaluate_harness(bundle, settings)
    assert result.details["metric"] == "acc_norm"
    assert result.details["metrics"]["acc_norm,none"] == pytest.approx(result.accuracy)
    assert all(row["correct"] == (row["answer"] == row["reference"]) for row in result.answers)


def test_a_task_of_answers_by_its_file_alone(folder):
    def next_id(history: list[int]) -> int:  # a model that writes "3!"
        said = bytes(history[1:]).partition(b" is")[2]
        return ord(" 3!?"[len(said)]) if len(said) < 4 else mark("<|bos|>")[0]

    [result] = evaluate_harness(scripted(next_id), HarnessSettings(tasks=[str(folder / "sums.yaml")]))
    assert (result.name, result.n, result.accuracy) == ("sums", 5, 0.0), "a blank is a difference"
    assert result.answers[2] == {"question": "2 plus 1 is", "answer": " 3", "reference": "3", "correct": False}


def test_a_task_of_whole_texts(bundle, folder):
    [result] = evaluate_harness(bundle, HarnessSettings(tasks=["texts"], include_path=str(folder)))
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    nats = BundleLM(bundle).loglikelihood_rolling(asked(*((text,) for text in texts)))
    sizes = [len(text.encode()) for text in texts]
    bits = -sum(nats) / sum(sizes) / torch.log(torch.tensor(2.0)).item()
    assert result.details["metrics"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    expected = [torch.exp(torch.tensor(each / size)).item() for each, size in zip(nats, sizes, strict=True)]
    assert result.outcomes == pytest.approx(expected, rel=1e-5)
    assert "geometric mean" in result.details["remark"]


@pytest.mark.slow  # it reads the package's 14,000 tasks
def test_a_task_of_the_package_on_a_local_mirror(bundle, shared):
    """Questions of ARC, prompts as the package has them, data from the folder: nothing is fetched."""
    settings = HarnessSettings(tasks=["ai2_arc"], limit=12, num_fewshot=1)
    tasks = open_harness(settings, shared / "data" / "hub")
    assert tasks.names == ["arc_challenge", "arc_easy"]
    results = [tasks.evaluate(name, bundle) for name in tasks.names]
    assert [each.n for each in results] == [12, 12]
    assert all(each.baseline == pytest.approx(0.25, abs=0.01) for each in results)
    assert results[0].answers[0]["question"].startswith("Question: ")
    others = open_harness(dataclasses.replace(settings, num_fewshot=2), shared / "data" / "hub")
    assert tasks.fingerprint("arc_easy") != others.fingerprint("arc_easy") != others.fingerprint("arc_challenge")
    again = open_harness(settings, shared / "data" / "hub")
    assert tasks.fingerprint("arc_easy") == again.fingerprint("arc_easy")
    assert tasks.size("arc_easy") == 12


# Errors.


def test_nothing_is_measured_where_something_is_wrong(bundle, folder):
    sums = (folder / "sums.yaml").read_text(encoding="utf-8")
    broken = sums.replace("task: sums", "task: broken").replace("{{question}}", "{{question")
    (folder / "broken.yaml").write_text(broken, encoding="utf-8")
    far = sums.replace("task: sums", "task: far")
    far = far.replace("dataset_path: json", "dataset_path: nobody/nothing").replace("dataset_kwargs", "metadata")
    (folder / "far.yaml").write_text(far, encoding="utf-8")
    code = sums.replace("task: sums", "task: code\nunsafe_code: true")
    (folder / "code.yaml").write_text(code, encoding="utf-8")
    names = ["capitals", "broken", "far", "code"]
    with pytest.raises(UserError) as error:
        open_harness(HarnessSettings(tasks=names, include_path=str(folder), metric="acc"))
    problems = error.value.problems
    assert [line.split(": ")[1] for line in problems] == ["broken", "far", "code"]
    assert "nobody/nothing" in problems[1] and "harness.download=true" in error.value.fix
    assert "without isolation" in problems[2]
    with pytest.raises(UserError, match=r"harness\.metric=acc: sums has exact_match"):
        open_harness(HarnessSettings(tasks=["sums"], include_path=str(folder), metric="acc"))


def test_unknown_names_get_the_nearest_ones(folder, monkeypatch):
    own = harness._manager(str(folder), False)
    monkeypatch.setattr(harness, "_manager", lambda include_path, include_defaults: own)
    with pytest.raises(UserError, match=r"captals: there is no such task; did you mean capitals"):
        open_harness(HarnessSettings(tasks=["captals", "sums"], include_path=str(folder)))
    (folder / "own.yaml").write_text("task: [own\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.yaml: cannot be read as YAML"):  # it was passed over
        open_harness(HarnessSettings(tasks=["own"], include_path=str(folder)))


def test_settings_that_name_nothing_are_refused(folder):
    with pytest.raises(UserError, match="there is no such folder"):
        open_harness(HarnessSettings(tasks=["capitals"], include_path=str(folder / "no")))
    with pytest.raises(UserError, match="is empty"):
        open_harness(HarnessSettings())


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"nanochat-pl\[lm-eval\]"):
        open_harness(HarnessSettings(tasks=["arc_easy"]))


def test_the_library_is_left_as_it_was(bundle, folder):
    import logging

    import datasets
    import huggingface_hub

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    level = logging.root.manager.disable
    with pytest.raises(UserError):
        open_harness(HarnessSettings(tasks=["sums"], include_path=str(folder), metric="none"))
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert logging.root.manager.disable == level
    assert datasets.are_progress_bars_disabled() is False
