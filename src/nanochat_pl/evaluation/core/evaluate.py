"""CORE: a base model's score over 22 tasks (DCLM, arXiv 2406.11794), comparable with the published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import explain_out_of_memory
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.hub.core_bundle import bundle_in_cache
from nanochat_pl.data.sources.hub import key_of_cache, typed_keys
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.coordination import raise_on_all_ranks
from nanochat_pl.evaluation.candidates import Score
from nanochat_pl.evaluation.core.bundle import (
    CORE_TASKS,
    CoreTask,
    fingerprint,
    read_problems,
    read_tasks,
    unknown_task,
)
from nanochat_pl.evaluation.core.prompts import (
    Problem,
    Question,
    choose,
    choose_shots,
    is_right,
    make_question,
    mean_nats,
    render,
)
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.evaluation.results import TaskResult, make_result
from nanochat_pl.evaluation.scoring import score
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.arc import ARCChallenge, ARCChallengeSettings, ARCEasy, ARCEasySettings
from nanochat_pl.tokenizer import Tokenizer

_ARC = {"arc_easy": (ARCEasy, ARCEasySettings), "arc_challenge": (ARCChallenge, ARCChallengeSettings)}
_ARC_BEGINNING = "Question: "
# Characters of a context that a row for people shows.
_SHOWN = 1000

# (question, choices in any order) → the right choice.
Answers = Mapping[str, list[tuple[frozenset[str], str]]]


@dataclass(frozen=True)
class CoreBundle:
    """An opened evaluation bundle.

    Attributes:
        by_name: its chosen tasks.
        missing: names of CORE's tasks that it has not, or without their files; empty where tasks were named.
        settings: how much of each task is asked.
        arc: right answers of ARC by task; empty without ``fix_arc``.
    """

    folder: Path
    by_name: dict[str, CoreTask]
    missing: tuple[str, ...]
    settings: CoreSettings
    arc: Mapping[str, Answers] = dataclasses.field(default_factory=dict, repr=False)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order in which they are measured."""
        return tuple(self.by_name)

    def fingerprint(self, name: str) -> str:
        """Of all that decides about a task's problems, prompts and answers: results of the same are comparable."""
        answers = self.arc.get(name, {})
        right = sorted((key, sorted(choices), answer) for key, rows in answers.items() for choices, answer in rows)
        return fingerprint_of("core 1", fingerprint(self.by_name[name]), self.settings.max_per_task, right)


def open_core(settings: CoreSettings, cache_dir: Path, hub: Path | None) -> CoreBundle:
    """Open the evaluation bundle; its problems are read when they are asked.

    Args:
        cache_dir: ``paths.cache``: where a downloaded bundle lies.
        hub: ``paths.hub``: a mirror of data sets, for ``fix_arc``.

    Raises:
        UserError: the bundle, a task that is named, or (with ``fix_arc``) ARC is not here, and the fix is the command
            that fetches it; or what is in the bundle is not as it must be.
    """
    folder = Path(settings.path) if settings.path is not None else bundle_in_cache(cache_dir)
    if not folder.is_dir():
        keys = typed_keys({"eval_bundle": "true"} | key_of_cache(cache_dir))
        raise UserError(
            f"core.path={settings.path}: there is no folder {folder}."
            if settings.path is not None
            else f"core: the evaluation bundle is not here ({folder}).",
            f"Fetch it: nanochat-pl download {keys}",
        )
    try:
        known = read_tasks(folder)
    except UserError as error:
        keys = typed_keys({"eval_bundle": "true"} | key_of_cache(cache_dir))
        fix = f"Mend the bundle, name another folder (core.path=…), or fetch one: nanochat-pl download {keys}"
        raise UserError(error.problems, error.fix or fix) from error
    there = {name: task for name, task in known.items() if task.path.is_file()}
    missing: tuple[str, ...] = ()
    if settings.tasks is None:
        missing = tuple(name for name in dict.fromkeys([*CORE_TASKS, *known]) if name not in there)
    else:
        for name in settings.tasks:
            if name not in known and name in CORE_TASKS:
                raise UserError(f"core.tasks: {name}: the bundle in {folder} does not have this task of CORE.")
            if name not in known:
                raise unknown_task(name, known)
            if name not in there:
                raise UserError(f"core.tasks: {name}: there is no file {known[name].path}.")
        there = {name: there[name] for name in settings.tasks}
    if not there:
        raise UserError(f"{folder}: no task of it has its file.")
    arc = {name: _right_answers(name, cache_dir, hub) for name in _ARC if settings.fix_arc and name in there}
    return CoreBundle(folder, there, missing, settings, arc)


def evaluate_core_task(
    bundle: CoreBundle,
    name: str,
    net: GPT,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Ask a model the problems of a task. All processes of a launch call it and share the problems out.

    ``details`` of the result: ``kind``, ``num_shots``, ``cut_prompts`` (problems whose prompts lost their beginning,
    being longer than the model's positions), ``longest_prompt`` (tokens), ``empty_spans`` (alternatives of which no
    token is scored, as they begin another one), ``shots_from`` ("asked", or "file" where too few problems are asked),
    and with ``fix_arc`` ``corrected_answers`` and ``unknown_answers``.

    Args:
        progress: called with the number of problems just finished by all processes, in the pace of this one.

    Returns:
        the same on all processes.

    Raises:
        UserError: the task's file is not as it must be, or has too few problems for its shots; memory ran out on one.
    """

    def share() -> dict[str, Any]:
        with explain_out_of_memory(name, "Free some of it, or use a smaller model."):
            return _evaluate_share(bundle, name, net, tokenizer, progress)

    own = raise_on_all_ranks(share)
    rows = [row for each in collectives.all_gather_plain(own["rows"]) for row in each]
    rows.sort(key=lambda row: row["number"])
    task = bundle.by_name[name]
    details = {
        "kind": task.kind,
        "num_shots": task.num_shots,
        "cut_prompts": sum(row["cut"] for row in rows),
        "longest_prompt": max(row["longest"] for row in rows),
        "empty_spans": sum(row["empty"] for row in rows),
        **own["details"],
    }
    return make_result(
        name,
        [row["answer"]["item"] for row in rows],
        [float(row["answer"]["correct"]) for row in rows],
        baseline=task.baseline,
        details=details,
        answers=[row["answer"] for row in rows],
    )


@dataclass(frozen=True)
class _Asked:
    """The problems of a task that are asked, and where their shots are drawn from."""

    problems: list[Problem]
    pool: list[Problem]
    details: dict[str, Any]


def ask(bundle: CoreBundle, name: str) -> _Asked:
    """The problems of a task, in the order in which they are asked.

    Shots are drawn from the asked problems. Where these are too few, the published evaluation has no result; then the
    others of the file are drawn from, too.

    Raises:
        UserError: the file is not as it must be, or has too few problems even so.
    """
    task, most = bundle.by_name[name], bundle.settings.max_per_task
    enough = most is None or most > task.num_shots
    pool = read_problems(task, most if enough else None)
    if len(pool) <= task.num_shots:
        raise UserError(
            f"{task.path}: has {len(pool)} problems, too few for {task.num_shots} shots in front of each.",
            f"Leave {name} out of core.tasks.",
        )
    details: dict[str, Any] = {"shots_from": "asked" if enough else "file"}
    if name in bundle.arc:
        pool, corrected = _corrected(pool, bundle.arc[name])
        details |= corrected
    return _Asked(pool[:most], pool, details)


def _evaluate_share(
    bundle: CoreBundle, name: str, net: GPT, tokenizer: Tokenizer, progress: Callable[[int], None] | None
) -> dict[str, Any]:
    """What this process finds: a row of plain data for each of its problems."""
    task, asked = bundle.by_name[name], ask(bundle, name)
    numbers = range(collectives.rank(), len(asked.problems), collectives.world_size())
    shots = [choose_shots(asked.pool, number, task.num_shots) for number in numbers]
    questions = [
        make_question(tokenizer, task.kind, asked.problems[n], each, task.delimiter, net.config.rotary_reach)
        for n, each in zip(numbers, shots, strict=True)
    ]
    report = None if progress is None else _of_all(progress, len(numbers), len(asked.problems))
    scores = score(net, [question.candidates for question in questions], progress=report, name=name)
    rows = [
        _row(task, number, asked.problems[number], before, question, found)
        for number, before, question, found in zip(numbers, shots, questions, scores, strict=True)
    ]
    return {"rows": rows, "details": asked.details}


def _of_all(progress: Callable[[int], None], own: int, total: int) -> Callable[[int], None]:
    """Reports of a share as those of the whole."""
    done = told = 0

    def report(amount: int) -> None:
        nonlocal done, told
        done += amount
        reached = total * done // own
        progress(reached - told)
        told = reached

    return report


def _row(
    task: CoreTask,
    number: int,
    problem: Problem,
    shots: Sequence[Problem],
    question: Question,
    scores: Sequence[Score],
) -> dict[str, Any]:
    """A problem's result as plain data."""
    spans = [score.num_tokens for score in scores]
    identity = fingerprint_of(render(problem, shots, task.delimiter), problem.gold)
    answer: dict[str, Any] = {"item": f"{problem.row}-{identity[:12]}", "correct": is_right(task.kind, problem, scores)}
    if task.kind == "language_modeling":
        answer |= {"question": problem.contexts[0][-_SHOWN:], "reference": problem.endings[0], "nats": scores[0].nats}
    else:
        texts = problem.contexts if task.kind == "schema" else problem.endings
        shared = problem.endings[0] if task.kind == "schema" else problem.contexts[0]
        means = [None if math.isnan(mean) else mean for mean in mean_nats(scores)]
        answer |= {
            "question": shared[-_SHOWN:],
            "answer": texts[choose(scores)][-_SHOWN:],
            "reference": texts[problem.gold][-_SHOWN:],
            "mean_nats": means,
        }
    return {
        "number": number,
        "cut": question.cut > 0,
        "longest": max(len(candidate.ids) for candidate in question.candidates) + question.cut,
        "empty": spans.count(0),
        "answer": answer,
    }


def _right_answers(name: str, cache_dir: Path, hub: Path | None) -> Answers:
    """The right answers of ARC's test questions, from the hub's data set."""
    task, settings = _ARC[name]
    questions = task(settings(order_seed=None), "test", TaskContext(cache_dir, hub=hub, where="core.fix_arc"))
    answers: dict[str, list[tuple[frozenset[str], str]]] = {}
    for index in range(len(questions)):
        row = questions.row(index)
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        answer = texts[labels.index(row["answerKey"])]
        answers.setdefault(row["question"].strip(), []).append((frozenset(texts), answer))
    return answers


def _corrected(problems: list[Problem], answers: Answers) -> tuple[list[Problem], dict[str, Any]]:
    """ARC's problems with the right answers, and how many were wrong or are not known."""
    mended, num_corrected, num_unknown = [], 0, 0
    for problem in problems:
        question = problem.contexts[0].removeprefix(_ARC_BEGINNING).strip()
        right = [text for texts, text in answers.get(question, ()) if texts.issuperset(problem.endings)]
        if not right or right[0] not in problem.endings:
            num_unknown += 1
        elif problem.endings[problem.gold] != right[0]:
            problem = dataclasses.replace(problem, gold=problem.endings.index(right[0]))
            num_corrected += 1
        mended.append(problem)
    return mended, {"corrected_answers": num_corrected, "unknown_answers": num_unknown}
