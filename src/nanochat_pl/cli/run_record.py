"""What a run's folder says about its beginning: the resolved settings, the command, versions, machine, git state."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import nanochat_pl
from nanochat_pl.bundle.stage_info import library_versions, load_stage_info, source_hash
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, write_bytes, write_json, write_text
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import to_plain
from nanochat_pl.common.text_files import read_bytes, require_regular
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.overrides import UNKNOWN, Setting, type_of_key
from nanochat_pl.data.sources.open import read_chosen
from nanochat_pl.planning import Plan
from nanochat_pl.tasks.published.conversations import ConversationSettings
from nanochat_pl.tasks.registry import kind_of
from nanochat_pl.training.checkpoint import history as changes
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.rl import settings as rl
from nanochat_pl.training.stages.registry import stage_named

# Keys that control the command, not the training.
OF_THE_COMMAND = {"run", "resume", "resume_with_changes", "check_only", "yes"}
# Keys, or groups of keys, that what is learnt does not depend on: they may differ when a stage goes on.
IRRELEVANT = {"trainer", "evaluation", "paths", "logger", "callbacks", "device_batch_size"} | OF_THE_COMMAND
_RELEVANT = {field.name for field in dataclasses.fields(TrainConfig)} - IRRELEVANT
# Of those groups what changes when the work is done and never its result.
IRRELEVANT_KEYS = {"data.download", "data.max_bad_fraction"} | {f"rl.{key}" for key in rl.IRRELEVANT_KEYS}
# What cannot change on the way, even with resume_with_changes=true, and why.
_FIXED = {
    "model": "the weights are of that model",
    "tokenizer": "the weights were trained on its ids",
    "total_batch_tokens": "step N begins at row N times the rows of a step, so rows would be left out or seen twice",
}
_NOT_FIXED = {"model.compute_dtype"}


def write_records(folder: StageFolder, composed: Composed[Any], resuming: bool = False) -> None:
    """Write config.yaml and overrides.txt; and about.json, unless the stage goes on: that is of its beginning.

    Where it goes on, what is otherwise than at the last start is said, and added to changes.jsonl.
    """
    if resuming:
        _tell_changes(folder, composed)
    config = yaml.safe_dump(composed.plain(), sort_keys=False, allow_unicode=True)
    overrides = [f"experiment={composed.experiment}"] if composed.experiment else []
    write_text(folder.path / "config.yaml", config)
    write_text(folder.path / "overrides.txt", "".join(f"{text}\n" for text in [*overrides, *composed.overrides]))
    if not resuming:
        write_json(folder.path / "about.json", about())


def settings_that_matter(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Of all settings as plain data those that a stage depends on, by their dotted keys."""
    keys, groups = flat(values), stage_named(stage).depends_on(_RELEVANT)
    # Keys of a source of a mixture, data.sources.NAME.KEY, are keys of data.
    own = {key: re.sub(r"^data\.sources\.[^.]+\.", "data.", key) for key in keys}
    return {key: keys[key] for key in keys if key.split(".")[0] in groups and own[key] not in IRRELEVANT_KEYS}


def own_settings(folder: StageFolder, schema: type) -> list[Setting]:
    """What a stage was begun with, of the keys that its rows depend on, and where its caches are. None: not begun."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        return []
    values = settings_of(folder)
    own = settings_that_matter(values, folder.stage) | {"paths.cache": values.get("paths", {}).get("cache")}
    return [
        Setting(key, value, is_text=isinstance(value, str), origin=str(path))
        for key, value in own.items()
        # What a record names is never imported: a class of one's own is named again on the command line.
        if not _names_a_class(key, value) and type_of_key(schema, key) is not UNKNOWN  # of an older version
    ]


def _names_a_class(key: str, value: Any) -> bool:
    if key in ("stage.name", "stage.parent"):  # a record has names of stages
        return "." in str(value)
    return value is not None and (
        key in ("stage.module", "rl.reward") or (key.startswith("data.") and key.endswith(".target"))
    )


def require_same_settings(folder: StageFolder, composed: Composed[TrainConfig], reopens: bool = False) -> None:
    """Refuse to go on with a stage, or to call it finished, under other settings than it was begun with.

    With resume_with_changes=true, a stage that is not finished may go on under other settings.

    Args:
        folder, composed: the stage and the settings.
        reopens: whether the stage, if finished, goes on (:func:`trains_longer`).

    Raises:
        UserError: names each key with both values.
    """
    goes_on = folder.status != "finished" or reopens
    _require_same(folder, composed, but_for_changes=composed.config.resume_with_changes and goes_on)


def trains_longer(folder: StageFolder, composed: Composed[TrainConfig]) -> bool:
    """Whether a finished stage is asked for more steps than were planned, with resume_with_changes=true.

    One that a callback ended before has no more to do.
    """
    config = composed.config
    if not config.resume_with_changes or folder.status != "finished" or not any(folder.checkpoints.glob("*.ckpt")):
        return False
    path = folder.path / "plan.json"
    plan = Plan.from_plain(read_object(path), str(path)) if path.exists() else {"num_steps": folder.finished()["step"]}
    return (config.max_steps or 0) > plan["num_steps"]


def reopen(folder: StageFolder, composed: Composed[TrainConfig]) -> None:
    """Make a finished stage one that goes on. Raises :class:`UserError` where what cannot change was changed, too."""
    require_same_settings(folder, composed, reopens=True)
    (folder.path / "finished.json").unlink()


@contextlib.contextmanager
def restored_on_refusal(folder: StageFolder) -> Iterator[None]:
    """Put a stage's records back where what is done inside is refused before it has come to another resume file."""
    names = ("finished.json", "plan.json", "config.yaml", "overrides.txt", changes.NAME)
    paths = [*(folder.path / name for name in names), folder.chosen_corpus]
    before = {path: read_bytes(path) for path in paths if path.exists()}
    files = {*folder.checkpoints.glob("*.ckpt")}
    try:
        yield
    except UserError:
        if files.issuperset(folder.checkpoints.glob("*.ckpt")):
            for path in paths:
                write_bytes(path, before[path]) if path in before else path.unlink(missing_ok=True)
        raise


def _require_same(folder: StageFolder, composed: Composed[TrainConfig], but_for_changes: bool) -> None:
    differences = _differences(folder, composed)
    reasons = {key: _why_fixed(key) if composed.config.resume_with_changes else None for key in differences}
    whole = {} if but_for_changes else _tasks_of_one_side(differences)
    problems = [f"{task}: {folder.path} was begun {how} that task." for task, how in whole.items()]
    problems += [
        f"{key}={as_typed(now)}: {folder.path} was begun with {key}={as_typed(then)}{f'; {why}' if why else ''}."
        for (key, (then, now)), why in zip(differences.items(), reasons.values(), strict=True)
        if (why or not but_for_changes) and _task_of(key) not in whole
    ]
    if problems:
        # What a later stage starts from is in this run: in one of another name there is no parent.
        anew = "resume=never" if composed.config.stage.parent not in (None, "tokenizer") else "run=NEW or resume=never"
        how = f"Leave these keys as they were, or begin a new run with {anew}"
        raise UserError(problems, f"{how}{_how_to_change(folder, differences.keys())}.")


def _task_of(key: str) -> str:
    """Of a key of a task, ``mixture.tasks.NAME.KEY``, the part that names the task."""
    parts = key.split(".")
    return ".".join(parts[: 4 if parts[2:3] == ["conversations"] else 3])


def _tasks_of_one_side(differences: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    """Tasks that are only there now ("without"), or were only there when the stage was begun ("with")."""
    return {
        _task_of(key): "with" if now is None else "without"
        for key, (then, now) in differences.items()
        if re.fullmatch(r"mixture\.tasks\..+\.repeat", key) and None in (then, now)  # every task has that key
    }


def _how_to_change(folder: StageFolder, keys: Collection[str]) -> str:
    if any(map(_why_fixed, keys)):
        return ""
    if folder.status != "finished":
        return "; or go on all the same with resume_with_changes=true"
    longer = "; or train on, with a larger max_steps and resume_with_changes=true"
    return longer if "max_steps" in keys else ""  # which a tokenizer does not depend on


# Keys that are no more, with the value under which a stage did what it does without them.
_GONE = {"optim.matrix_optimizer": "muon"}


def _differences(folder: StageFolder, composed: Composed[Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that a stage depends on, where they are others than it was begun with: the old and the new."""
    begun = settings_of(folder)
    if not begun:
        return {}
    then, now = (settings_that_matter(values, folder.stage) for values in (begun, composed.plain()))
    then = {key: value for key, value in then.items() if (key, value) not in _GONE.items()}
    then |= _of_younger_keys(then, folder.stage)
    then, now = (_with_counted_files(values, folder) for values in (then, now))
    return _unequal(then, now)


def _unequal(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted(then.keys() | now.keys())
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def _why_fixed(key: str) -> str | None:
    return None if key in _NOT_FIXED else _FIXED.get(key.split(".")[0])


def _tell_changes(folder: StageFolder, composed: Composed[Any]) -> None:
    """Say what is otherwise than at the last start, and add it to the record."""
    then, now = (
        {key: value for key, value in flat(values).items() if key.split(".")[0] not in OF_THE_COMMAND}
        for values in (settings_of(folder), composed.plain())
    )
    then = {**flat(to_plain(TrainConfig())), **then}  # of keys that are younger than the stage
    matters = _differences(folder, composed)
    lines = [
        f"{key} {as_typed(was)} → {as_typed(value)}" + (" (it alters the result)" if key in matters else "")
        for key, (was, value) in _unequal({key: then[key] for key in then if key in now}, now).items()
    ]
    now_running = code()
    lines += _code_changes(last_code(folder), now_running)
    if lines:
        rank_zero_print(f"Since the last start: {'; '.join(lines)}.")
        changes.note_changes(folder.path, lines, now_running)


def last_code(folder: StageFolder) -> dict[str, Any]:
    """The code that the stage last went on with, empty where it is older than this record."""
    path = folder.path / "about.json"
    begun = (
        [read_object(path, "Bring it back from a copy, or delete it: it is a record, nothing more.")]
        if path.exists()
        else []
    )
    noted = [line["code"] for line in changes.read_changes(folder.path) if "code" in line]
    return next((state for state in reversed(begun + noted) if "source_sha256" in state), {})


def _code_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the code is otherwise; where the commit differs and not the source, nothing that runs here does."""
    if not then:
        return []
    changed = _unequal(then["versions"], now["versions"])
    lines = [f"{name} {was} → {value}" for name, (was, value) in changed.items()]
    if then["source_sha256"] != now["source_sha256"]:
        commits = f" ({then['git'] or '?'} → {now['git'] or '?'})" if then["git"] != now["git"] else ""
        lines.append(f"the code of nanochat_pl{commits}")
    return [f"{line} (the last bits may be others)" for line in lines]


def _with_counted_files(values: dict[str, Any], folder: StageFolder) -> dict[str, Any]:
    """The settings, where null files of a hub are as many as the stage was begun with: it goes on with these."""
    counted = {f"{key}.num_shards": len(chosen.train) for key, chosen in read_chosen(folder.chosen_files).items()}
    return values | {key: number for key, number in counted.items() if key in values and values[key] is None}


def _of_younger_keys(then: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The defaults of keys that did not exist yet when a stage was begun: what they name was done so all the time."""
    defaults = settings_that_matter(to_plain(TrainConfig()), stage) | _defaults_of_tasks(then)

    def known(key: str) -> bool:  # or part of a group that was null, or a group that was not empty
        parts = key.split(".")
        within = any(".".join(parts[:count]) in then for count in range(1, len(parts) + 1))
        return within or any(other.startswith(f"{key}.") for other in then)

    return {key: value for key, value in defaults.items() if not known(key)}


def _defaults_of_tasks(then: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the keys of each task, ``mixture.tasks.NAME.KEY``, that a stage was begun with."""
    defaults: dict[str, Any] = {}
    for task in {_task_of(key) for key in then if key.startswith("mixture.tasks.") and key != _task_of(key)}:
        kind = kind_of(task.rpartition(".")[2]) if task.count(".") == 2 else None
        fields = dataclasses.fields(kind.settings if kind else ConversationSettings)
        of_task = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        defaults |= flat(to_plain(of_task), f"{task}.")
    return defaults


def settings_of(folder: StageFolder) -> dict[str, Any]:
    """What config.yaml says; else the bundle: base makes a tokenizer on its way, and that has no records of its own."""
    path = folder.path / "config.yaml"
    if not path.exists():
        return load_stage_info(folder.bundle).settings if folder.bundle.is_dir() else {}
    require_regular(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # as written: a text 1e-3 has no quotes in it
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings.", "Delete the stage's folder to begin again.")
    return content


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups of values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def as_typed(value: Any) -> str:
    """A value as YAML and the command line write it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]


def about() -> dict[str, Any]:
    """Time, versions, machine and git state, as plain data."""
    from nanochat_pl.common.device import choose_device, device_name  # with torch: what else is here needs none

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **code(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device_name(choose_device()),
    }


def code() -> dict[str, Any]:
    """What runs: git state, the first 16 digits of the SHA-256 of the source, versions."""
    return {"git": _git_state(), "source_sha256": source_hash(), "versions": library_versions()}


def what_runs() -> dict[str, str]:
    """The versions of the libraries, and the source of this package: what has to be the same on all nodes."""
    return {**library_versions(), "source of nanochat_pl": source_hash()}


def _git_state() -> str:
    """Commit of the checkout that runs, with a word where it has changes; empty for an installed package."""
    checkout = Path(nanochat_pl.__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return ""
    commit = _git(checkout, "rev-parse", "HEAD")
    return f"{commit} with changes" if commit and _git(checkout, "status", "--porcelain", "-uno") else commit


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
