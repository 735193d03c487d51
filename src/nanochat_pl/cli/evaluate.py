"""Measures a trained stage: tasks, bits per byte, samples; as a table, JSON and CSV.

nanochat-pl evaluate run=demo
nanochat-pl evaluate run=demo stage=base suites=[bpb,samples]
nanochat-pl evaluate bundle=PATH to=FOLDER
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_pl.bundle import Bundle, load_bundle
from nanochat_pl.cli.compose import Composed
from nanochat_pl.cli.experiment import compose_step
from nanochat_pl.cli.locate import cache_folder, locate_bundle, locate_stage
from nanochat_pl.common.console import by_difference, print_table, progress, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, read_json, write_json, write_text
from nanochat_pl.common.hardware import choose_device
from nanochat_pl.common.settings import build, setting
from nanochat_pl.data.sources import DataSettings
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.chat_tasks import evaluate_task
from nanochat_pl.evaluation.results import TaskResult
from nanochat_pl.evaluation.samples import DEFAULT_PROMPTS, write_samples
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.settings import MixtureSettings
from nanochat_pl.training.settings import PathsSettings

Suite = Literal["bpb", "chat", "samples"]
# What is measured where nothing else is said. A base model has seen no conversation.
SUITES: dict[str, list[Suite]] = {"base": ["bpb", "samples"], "sft": ["chat", "samples"]}
TABLE = ("task", "accuracy %", "stderr", "right", "of")
NUM_CHATS = 6


@dataclass(frozen=True)
class EvaluateConfig:
    """The root of configs/evaluate.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: str | None = setting(None, "Folder of a bundle, instead of a run.")
    to: str | None = setting(None, "Folder of the results; null: evaluation/STAGE in the run's folder.")
    suites: list[Suite] | None = setting(None, "What to measure: bpb, chat, samples; null: as it suits the stage.")
    limit: int | None = setting(200, "Most problems of a task, a seeded choice; null: all.", at_least=1)
    max_tokens: int = setting(256, "Most tokens of an answer.", at_least=1, at_most=4096)
    data_path: str | None = setting(
        None, "Text for bits per byte: file, folder or glob; null: the data that the model was trained on."
    )
    num_rows: int = setting(512, "Validation rows for bits per byte, or as many as there are.", at_least=1)
    batch_size: int = setting(32, "Rows at once: memory and time, not results.", at_least=1, at_most=4096)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Device to run on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = EvaluateConfig


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    composed = compose_step("evaluate", "evaluate", EvaluateConfig, arguments)
    config, (source, to) = composed.config, _places(composed.config, composed.experiment)
    bundle = load_bundle(source, device=choose_device(config.accelerator))
    if bundle.tokenizer is None:
        raise UserError(f"{source}: has no tokenizer, so nothing can be measured.")
    suites = config.suites or SUITES.get(bundle.stage.stage, ["samples"])
    ensure_folder(to)
    results: dict[str, Any] = {}
    for suite in suites:
        results[suite] = {"bpb": _bits_per_byte, "chat": _chat, "samples": _samples}[suite](bundle, config, to)
    origin = {"bundle": str(source), "stage": bundle.stage.stage, "settings": _asked(config)}
    write_json(to / "results.json", {**origin, "suites": results})
    say(f"results: {to / 'results.json'}")
    return 0


def is_measured(composed: Composed[EvaluateConfig]) -> bool:
    """Whether these figures of this model are there already."""
    source, to = _places(composed.config, composed.experiment)
    results = to / "results.json"
    if not results.is_file() or results.stat().st_mtime_ns < (source / "stage.json").stat().st_mtime_ns:
        return False
    return bool(read_json(results).get("settings") == _asked(composed.config))


def _asked(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that have a say in the figures."""
    return {key: getattr(config, key) for key in ("suites", "limit", "max_tokens", "data_path", "num_rows")}


def _places(config: EvaluateConfig, experiment: str) -> tuple[Path, Path]:
    """The bundle to measure and the folder of the results."""
    runs = Path(config.paths.runs)
    if config.bundle is not None:
        if config.to is None:
            raise UserError("to: is missing: with bundle=PATH it names the folder of the results.")
        return locate_bundle(config.bundle, config.run, config.stage, runs), Path(config.to)
    stage = locate_stage(config.run or experiment or None, config.stage, runs)
    return stage.bundle, Path(config.to) if config.to else runs / stage.run / "evaluation" / stage.stage


def _bits_per_byte(bundle: Bundle, config: EvaluateConfig, to: Path) -> dict[str, Any]:
    """Bits per byte on the held-out text of the data that the model was trained on."""
    from nanochat_pl.data.opening import open_source
    from nanochat_pl.data.token_cache import build_token_cache
    from nanochat_pl.training.evaluation import open_validation

    cache, tokenizer = cache_folder(config.paths), bundle.tokenizer
    assert tokenizer is not None
    validation = open_validation(
        open_source(_data_of(bundle, config), cache),
        lambda part: build_token_cache(part, "val", tokenizer, cache),
        tokenizer,
        cache,
        sequence_len=bundle.config.sequence_len,
        num_rows=config.num_rows,
        device_batch_size=config.batch_size,
    )
    figures = validation.measure(bundle.net)
    say(f"bits per byte: {figures['val/bpb']:.4f} ± {figures.get('val/bpb_stderr', float('nan')):.4f}")
    return {name.removeprefix("val/"): value for name, value in figures.items()}


def _data_of(bundle: Bundle, config: EvaluateConfig) -> DataSettings:
    """Where the text is. Files that a bundle names are read for the run that was trained on them, not for a stranger's.

    Raises:
        UserError: the text would be files of this machine that nobody but the bundle named.
    """
    data: DataSettings = _settings_of(bundle, "data", DataSettings)
    if config.data_path is not None:
        return DataSettings(
            name="local",
            path=config.data_path,
            text_column=data.text_column,
            txt_document_chars=data.txt_document_chars,
            validation_fraction=data.validation_fraction,
        )
    if config.bundle is not None and data.own_paths:
        raise UserError(
            f"{bundle.path}: names {data.own_paths[0]!r} as data; what a bundle names is not read from this machine.",
            "Say where the text is, data_path=PATH; or leave it out, suites=[chat,samples].",
        )
    return data.without_download()  # nobody has asked for that here


def _chat(bundle: Bundle, config: EvaluateConfig, to: Path) -> dict[str, Any]:
    """The held-out problems of the tasks that the model was trained on, as far as their answers can be judged."""
    settings: MixtureSettings = _settings_of(bundle, "mixture", MixtureSettings)
    judged = only_judged(settings)
    if left_out := settings.tasks.chosen().keys() - (judged.tasks.chosen().keys() if judged else set()):
        say(f"{', '.join(sorted(left_out))}: left out; what is a right answer in a conversation, nobody can tell.")
    context = TaskContext(cache_folder(config.paths), hub=config.paths.hub_folder)
    tasks = build_tasks(judged.tasks, "test", context) if judged else {}
    engine, results = Engine(bundle), []
    for name, task in tasks.items():
        asked = len(task) if config.limit is None else min(config.limit, len(task))
        with progress(name, asked, "problems") as advance:
            report = by_difference(advance)
            results.append(evaluate_task(engine, task, config.limit, config.max_tokens, config.batch_size, report))
        _write_lines(to / f"answers_{name}.jsonl", results[-1].answers)
    _write_lines(to / "chats.jsonl", _first_chats(results))
    _write_table(to / "chat.csv", results)
    if results:
        print_table(TABLE, map(_row, results))
    rows = [{"name": r.name, "accuracy": r.accuracy, "stderr": r.stderr, "n": r.n, "baseline": 0.0} for r in results]
    return {"tasks": rows}


def _samples(bundle: Bundle, config: EvaluateConfig, to: Path) -> list[dict[str, str]]:
    """Greedy continuations of the recipe's prompts."""
    samples = write_samples(Engine(bundle), DEFAULT_PROMPTS)
    return [{"prompt": sample.prompt, "text": sample.text} for sample in samples]


def _settings_of(bundle: Bundle, group: str, schema: type) -> Any:
    """A group of the settings that the model was trained with, as its bundle keeps them."""
    if group not in bundle.stage.settings:
        raise UserError(
            f"{bundle.path}: stage.json does not say its {group} settings.", "Leave that suite out: suites=[…]"
        )
    return build(schema, bundle.stage.settings[group], f"{bundle.path}/stage.json: settings.{group}")


def _first_chats(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One question with its answer of each task, as conversations."""
    chats = []
    for result in results[:NUM_CHATS]:
        first = result.answers[0]
        turns = (("user", first["question"]), ("assistant", first["answer"]))
        chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return chats


def _row(result: TaskResult) -> tuple[object, ...]:
    return (
        result.name,
        f"{100 * result.accuracy:.1f}",
        f"{100 * result.stderr:.1f}",
        round(sum(result.outcomes)),
        result.n,
    )


def _write_table(path: Path, results: Sequence[TaskResult]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([TABLE, *map(_row, results)])
    write_text(path, text.getvalue())


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
