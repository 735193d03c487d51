"""The evaluation bundle of CORE: a folder with ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data``.

It may come from an untrusted source: names, numbers and rows are checked, and nothing outside of the folder is read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.files import sha256_of_file
from nanochat_pl.common.schema import build, setting, to_plain
from nanochat_pl.common.text_files import is_unicode, read_text
from nanochat_pl.common.user_path import user_path
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.files.read import json_fault, lines_of, reading
from nanochat_pl.evaluation.core.prompts import Kind, Problem, kept_order

# In the order of the published results.
CORE_TASKS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
MAX_TABLE_BYTES = 4 * 2**20  # of core.yaml and eval_meta_data.csv
MAX_PROBLEMS = 10  # named in one message


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle.

    Attributes:
        kind: what is scored, see :mod:`~nanochat_pl.evaluation.core.prompts`.
        num_shots: solved problems in front of each.
        delimiter: between context and ending.
        baseline: accuracy of guessing, 0 … 1.
    """

    name: str
    kind: Kind
    num_shots: int
    delimiter: str
    baseline: float
    path: Path


_NumShots = Annotated[int, Field(ge=0, le=1000)]


@dataclass(frozen=True)
class _Entry:
    """A task of core.yaml, as far as it is of interest."""

    label: str = setting(doc="Its name.", max_length=100)
    dataset_uri: str = setting(doc="Its file, inside of eval_data.", max_length=1000)
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"] = setting(doc="Its kind.")
    num_fewshot: list[_NumShots] | _NumShots = setting(doc="Shots; of several numbers the first.")
    continuation_delimiter: str = setting(" ", "Between context and ending.", max_length=1000)

    def __post_init__(self) -> None:
        if self.num_fewshot == []:
            raise UserError("num_fewshot=[]: must be at least one number.")


def read_tasks(folder: Path) -> dict[str, CoreTask]:
    """The tasks of a bundle, in its order; their files may be missing.

    Raises:
        UserError: core.yaml or eval_meta_data.csv is missing, or anything in them is not as it must be; names the file.
    """
    path = folder / "core.yaml"
    tables = read_yaml(path)
    rows = tables.get("icl_tasks") if isinstance(tables, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: has no list icl_tasks.")
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    tasks: dict[str, CoreTask] = {}
    for number, row in enumerate(rows):
        where = f"{path}: icl_tasks[{number}]"
        known = {key: row[key] for key in _Entry.__dataclass_fields__ if key in row} if isinstance(row, dict) else row
        entry = build(_Entry, known, where)
        if entry.label in tasks:
            raise UserError(f"{where}: there are two tasks {entry.label!r}.")
        if entry.label not in baselines:
            raise UserError(f"{folder / 'eval_meta_data.csv'}: has no baseline of {entry.label!r}.")
        shots = entry.num_fewshot if isinstance(entry.num_fewshot, int) else entry.num_fewshot[0]
        tasks[entry.label] = CoreTask(
            entry.label,
            entry.icl_task_type,
            shots,
            entry.continuation_delimiter,
            baselines[entry.label],
            _inside(folder / "eval_data", entry.dataset_uri, where),
        )
    return tasks


def read_problems(task: CoreTask, most: int | None = None) -> list[Problem]:
    """The problems of a task in the seeded order in which they are asked, ``most`` of them; the others are not read.

    Raises:
        UserError: the file is missing or has no rows, or a row is not as its kind must be; names file and lines.
    """
    lines = [(number, line) for number, line in enumerate(lines_of(task.path), 1) if line.strip()]
    problems: list[Problem] = []
    faults: list[str] = []
    for row in kept_order(len(lines), most):
        number, line = lines[row]
        try:
            problems.append(_problem(json.loads(line), row, task.kind))
        except UserError as error:
            faults.append(f"{task.path}, line {number}: {error.problems[0]}")
        except (ValueError, RecursionError) as error:
            faults.append(f"{task.path}, line {number}: {json_fault(error)}.")
        if len(faults) == MAX_PROBLEMS:
            break
    if faults or not problems:
        fix = f"Fix the file, or leave {task.name} out of core.tasks."
        raise UserError(faults or f"{task.path}: has no problems.", fix)
    return problems


def fingerprint(task: CoreTask) -> str:
    """Of all that decides about a task's problems and prompts."""
    with reading(task.path):
        contents = sha256_of_file(task.path)
    facts = to_plain(task) | {"path": None}
    return fingerprint_of("core task 1", facts, contents)


def _problem(value: Any, row: int, kind: Kind) -> Problem:
    """A row of a file, checked. What else is in it is passed over."""
    if not isinstance(value, dict):
        raise UserError("is not a JSON object.")
    if kind == "language_modeling":
        return Problem(row, (_text(value, "context").strip(),), (_text(value, "continuation"),), 0)
    if kind == "schema":
        contexts = _texts(value, "context_options")
        endings = (_text(value, "continuation"),) * len(contexts)
    else:
        endings = _texts(value, "choices")
        contexts = (_text(value, "query"),) * len(endings)
    gold = value.get("gold")
    if type(gold) is not int or not 0 <= gold < len(contexts):
        raise UserError(f"gold={gold!r}: must be 0 … {len(contexts) - 1}.")
    return Problem(row, contexts, endings, gold)


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(text := value.get(key), str):
        raise UserError(f"{key}={text!r}: must be text.")
    return _whole(text, key)


def _whole(text: str, key: str) -> str:
    """A text that has a UTF-8 form: JSON can hold half a surrogate pair, which has none."""
    if not is_unicode(text):
        raise UserError(f"{key}={text!r}: holds half a surrogate pair, which is no character.")
    return text


def _texts(value: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = value.get(key)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key}={texts!r}: must be a list of two texts or more.")
    return tuple(_whole(text, key) for text in texts)


def _read_baselines(path: Path) -> dict[str, float]:
    """Accuracy of guessing, 0 … 1, by task."""
    rows = csv.DictReader(read_text(path, MAX_TABLE_BYTES).splitlines(keepends=True))
    columns = "Eval Task", "Random baseline"
    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
        raise UserError(f"{path}: has no column {missing[0]!r}.")
    baselines = {}
    try:
        for row in rows:
            name, percent = (row[column] for column in columns)
            try:
                baselines[name] = float(percent) / 100
            except (TypeError, ValueError):
                raise UserError(f"{path}: the baseline of {name!r} is {percent!r}, not a number.") from None
            if not 0 <= baselines[name] < 1:
                raise UserError(
                    f"{path}: the baseline of {name!r} is {percent} percent; must be at least 0 and below 100."
                )
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV: {error}") from error
    return baselines


def _inside(root: Path, uri: str, where: str) -> Path:
    path = Path(user_path(f"{where}: dataset_uri", str(root / uri)))
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: dataset_uri={uri!r} leads out of {root}.")
    return path


def unknown_task(name: str, valid: Any) -> UserError:
    return UserError(f"core.tasks: {name!r} is no task of CORE; {did_you_mean(name, valid)}")
