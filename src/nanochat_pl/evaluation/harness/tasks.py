"""Tasks of lm-evaluation-harness (the package ``lm_eval``, extra ``lm-eval``), measured on a bundle.

Tasks come by name from the package, from a folder of YAML files, or from one such file. Nothing goes to the network
unless that is asked for. A YAML file may name Python functions beside it, and these are run: trust who wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import to_plain as settings_to_plain
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.coordination import rank_zero_first, run_on_rank_zero
from nanochat_pl.engine.engine import Model
from nanochat_pl.evaluation.chat_tasks import choose_items
from nanochat_pl.evaluation.harness.result import metric_of, result_of
from nanochat_pl.evaluation.harness.settings import HarnessSettings
from nanochat_pl.evaluation.results import TaskResult, from_plain, to_plain

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

INSTALL = "Install it: pip install 'nanochat-pl[lm-eval]'"
# As the harness seeds it: of the few-shot examples, and of what tasks draw.
_SEED = 1234


class HarnessTasks:
    """Tasks that are open: :func:`open_harness`.

    Attributes:
        names: of the tasks; groups and tags are resolved.
    """

    def __init__(self, tasks: Mapping[str, Task], settings: HarnessSettings) -> None:
        self._tasks, self._settings = dict(tasks), settings
        self.names = sorted(self._tasks)

    def size(self, name: str) -> int:
        """Problems that would be asked."""
        return len(self._items(name))

    def fingerprint(self, name: str) -> str:
        """Changes where the metrics of a task may change for another reason than the model."""
        asked = {
            key: value for key, value in settings_to_plain(self._settings).items() if key not in ("tasks", "download")
        }
        config = {key: value for key, value in self._tasks[name].dump_config().items() if key != "metadata"}
        facts = json.dumps([asked, importlib.metadata.version("lm_eval"), config], sort_keys=True, default=str)
        with _by_itself(self._settings.download):
            return fingerprint_of("harness 2", facts, _hash_of_documents(name, self._tasks[name]))

    def evaluate(
        self,
        name: str,
        bundle: Model,
        progress: Callable[[int, int], None] = lambda done, total: None,
        max_batch: int | None = None,
    ) -> TaskResult:
        """Measure a model on one task. Several processes share out the problems; all get the result.

        Args:
            max_batch: answers written at the same time: memory and time only.

        Raises:
            UserError: the bundle has no tokenizer; the task asks for what the model cannot do.
        """
        from lm_eval.evaluator import evaluate

        from nanochat_pl.evaluation.harness.model import BundleLM

        size, told, task, chat = self.size(name), 0, self._tasks[name], self._settings.chat

        def tell(done: int, total: int) -> None:
            nonlocal told
            told = max(told, size * done // total)
            progress(told, size)

        alone = size < collectives.world_size()  # the harness needs a problem for each process
        lm = BundleLM(bundle, chat, max_batch, tell, f"harness.tasks: {name}", alone)

        def measure() -> Any:
            with _by_itself(self._settings.download):
                return evaluate(
                    lm=lm,
                    task_dict={"tasks": {name: task}, "groups": {}},
                    samples={name: self._items(name)},
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=True,
                )

        def plain(found: Mapping[str, Any], num_cut: int) -> dict[str, Any]:
            shots = task.config.num_fewshot or 0
            details = {
                "lm_eval": importlib.metadata.version("lm_eval"),
                "num_fewshot": shots,
                "chat": chat,
                "cut_prompts": num_cut,
            }
            return to_plain(result_of(name, task, found, metric_of(name, task, self._settings.metric), details))

        if alone:
            return from_plain(run_on_rank_zero(lambda: plain(measure(), lm.num_cut)), name)
        found, num_cut = measure(), collectives.all_reduce_sum(lm.num_cut)
        return from_plain(run_on_rank_zero(lambda: plain(found, num_cut)), name)

    def _items(self, name: str) -> list[int]:
        return choose_items(name, len(self._tasks[name].eval_docs), self._settings.limit)


def open_harness(settings: HarnessSettings, hub: Path | None = None) -> HarnessTasks:
    """Open tasks and their data.

    Args:
        hub: a local mirror of hub data sets (``datasets/OWNER/NAME/CONFIG/SPLIT-….parquet``), looked at first.

    Raises:
        UserError: the package is missing; a task is unknown, its data is not here, it cannot be judged as right or
            wrong, or would run code that a model has written. All problems at once.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise UserError(f"suites: harness needs the package lm_eval ({error}).", INSTALL) from error
    if not settings.tasks:
        raise UserError("harness.tasks: is empty.", "Name tasks of lm-eval, for instance harness.tasks=[arc_easy].")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise UserError(f"harness.include_path={settings.include_path}: there is no such folder.")
    with _by_itself(settings.download):
        return HarnessTasks(rank_zero_first(lambda: _open_tasks(settings, hub)), settings)


def _open_tasks(settings: HarnessSettings, hub: Path | None) -> dict[str, Task]:
    manager = _manager_of(settings)
    random.seed(0)  # some tasks draw from these when they are opened
    np.random.seed(_SEED)
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    missing = False
    for name in settings.tasks:
        try:
            tasks.update(manager.load(_specs(manager, name, hub))["tasks"])
        except UserError as error:
            problems.extend(error.problems)
        except _trouble() as error:
            problems.append(f"harness.tasks: {name}: cannot be opened: {_said(error)}")
            missing |= isinstance(error, OSError)
    for name, task in tasks.items():
        try:
            _check(name, task)
            metric_of(name, task, settings.metric)
        except UserError as error:
            problems.extend(error.problems)
        else:
            _set_fewshot(task, settings.num_fewshot)
    if problems:
        fetch = "A file of yours: mend data_files. A data set: harness.download=true fetches it." if missing else ""
        raise UserError(problems, fetch)
    return tasks


def _unreadable(include_path: str | None) -> list[str]:
    """The YAML files of a folder that are none: the package passes over them without a word."""
    problems = []
    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path is not None else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            problems.append(f"{path}: cannot be read as YAML: {_said(error)}")
    return problems


def _manager_of(settings: HarnessSettings) -> TaskManager:
    """What knows the tasks by name. Those of the package are thousands of files: they are read only where needed."""
    own = _manager(settings.include_path, False)
    asked = [name for name in settings.tasks if not Path(name).is_file()]
    if set(asked) <= set(own.all_tasks):
        return own
    manager = _manager(settings.include_path, True)
    known = set(manager.all_tasks)
    if unknown := [name for name in asked if name not in known]:
        raise UserError(
            [f"harness.tasks: {name}: there is no such task; {did_you_mean(name, known)}" for name in unknown]
            + _unreadable(settings.include_path),
            "lm-eval ls tasks lists the names; harness.include_path=FOLDER adds tasks of your own.",
        )
    return manager


@functools.lru_cache(maxsize=4)
def _manager(include_path: str | None, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _specs(manager: TaskManager, name: str, hub: Path | None) -> list[Any]:
    """What to have the manager open for a name: the tasks, with their data from the local mirror where it is there.

    Raises:
        UserError: a task would run code that a model wrote.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    path = Path(name) if entry is None else entry.yaml_path
    if entry is not None and path is None:
        return [spec for each in sorted(entry.tags) for spec in _specs(manager, each, hub)]
    config = load_yaml(path, resolve_func=False)  # nothing is imported yet
    if config.get("unsafe_code"):
        raise UserError(
            f"harness.tasks: {name}: runs what a model writes, without isolation; suites=[chatcore] has them."
        )
    data = config.get("dataset_path")
    if hub is None or not isinstance(data, str) or "class" in config:
        return [name]
    splits: dict[str, list[str]] = {}
    for file in sorted((hub / "datasets" / data / str(config.get("dataset_name") or "")).rglob("*.parquet")):
        splits.setdefault(file.name.partition("-")[0].removesuffix(".parquet"), []).append(str(file))
    if not splits:
        return [name]
    local = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    return [{**load_yaml(path), **local}]


def _hash_of_documents(name: str, task: Task) -> str:
    """Of the problems, and of the solved examples that are drawn from: files may change and keep their names."""
    digest = hashlib.sha256()
    try:
        for documents in (task.eval_docs, task.fewshot_docs() if task.config.num_fewshot else ()):
            digest.update(f"{len(documents)}\n".encode())
            for document in documents:
                digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    except _trouble() as error:
        raise UserError(f"harness.tasks: {name}: its data cannot be read: {_said(error)}") from error
    return digest.hexdigest()


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):  # of a group
        raise UserError(f"harness.tasks: {name}: runs what a model writes, without isolation.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"harness.tasks: {name}: has more than text, which this model cannot read.")


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    given = task.config.num_fewshot
    task.set_config("num_fewshot", given or 0 if num_fewshot is None or given == 0 else num_fewshot)
    task.set_fewshot_seed(_SEED)


def _trouble() -> tuple[type[Exception], ...]:
    """What opening a task raises where its file or its data is not as it must be: nearly all that Python has."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    names = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError)
    return (*names, DatasetsError, TemplateError, YAMLError)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


@contextlib.contextmanager
def _by_itself(download: bool) -> Iterator[None]:
    """Work of the harness without its bars, logs and warnings, and without the network unless ``download``."""
    import datasets
    import evaluate
    import huggingface_hub
    import lm_eval.api.task

    hub, offline = huggingface_hub.constants, not download
    changes: list[tuple[Any, str, Any]] = [
        (lm_eval.api.task, "tqdm", functools.partial(lm_eval.api.task.tqdm, disable=True)),
        (hub, "HF_HUB_OFFLINE", offline or hub.HF_HUB_OFFLINE),
        (hub, "HF_HUB_DISABLE_TELEMETRY", True),
        (datasets.config, "HF_HUB_OFFLINE", offline or datasets.config.HF_HUB_OFFLINE),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
        (evaluate.config, "HF_EVALUATE_OFFLINE", True),  # metrics of the hub are code of others
        (evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]
    with contextlib.ExitStack() as back, warnings.catch_warnings():
        for place, name, value in changes:
            back.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        if not datasets.are_progress_bars_disabled():
            back.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        back.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        yield
