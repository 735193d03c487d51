"""What can be measured: each suite as jobs, one for a task, that are opened before the first of them is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from nanochat_pl.bundle.bundle import Bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.evaluate_settings import BASE_SUITES, CHAT_SUITES, EvaluateConfig
from nanochat_pl.common.console import by_difference, progress, rank_zero_print
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.sources.base import DataSettings, Source
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.data.sources.run_corpus import RunCorpus, corpus_of_bundle
from nanochat_pl.distributed import coordination
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.chat_tasks import evaluate_task
from nanochat_pl.evaluation.core.evaluate import ask, evaluate_core_task, open_core
from nanochat_pl.evaluation.harness.tasks import open_harness
from nanochat_pl.evaluation.jobs import Job, Measured
from nanochat_pl.evaluation.samples import DEFAULT_PROMPTS, write_samples
from nanochat_pl.evaluation.suites import Suite, require_chat_model
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import MIXTURE
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.settings import MixtureSettings, MixtureTasks
from nanochat_pl.tokenizer.comparison import cached_others, compare_tokenizers, comparison_table, texts_of_kinds
from nanochat_pl.training.stage_data.tokenizer import texts_of_source


class Trained(NamedTuple):
    """What is asked of a model before it is measured.

    Attributes:
        path: the folder of its bundle.
        stage: where it comes from.
    """

    path: Path
    stage: StageInfo


def open_jobs(bundle: Trained, config: EvaluateConfig) -> tuple[list[Job], list[Suite]]:
    """All that is to be measured, with its data at hand, and the suites that are left out.

    Raises:
        UserError: the problems of all suites that were asked for. Without ``suites=`` those whose data is missing are
            left out, and it is said how to get it.
    """
    jobs: list[Job] = []
    left_out: list[Suite] = []
    problems: list[str] = []
    fixes: list[str] = []
    for suite in dict.fromkeys(config.suites or _suites_of(bundle)):
        try:
            jobs += _OPENERS[suite](bundle, config)
        except UserError as error:
            if config.suites is None:
                _say_left_out(suite, error)
                left_out.append(suite)
            else:
                own = (f"{suite}:", f"{suite}.")
                problems += [line if line.startswith(own) else f"{suite}: {line}" for line in error.problems]
                fixes += [error.fix] if error.fix else []
    if problems:
        raise SharedError(problems, "\n".join(dict.fromkeys(fixes)))
    if not jobs:
        raise SharedError("suites: there is nothing to measure.", "Name what to measure: suites=[…]")
    return jobs, left_out


def can_be_opened(suite: Any, bundle: Trained, config: EvaluateConfig) -> bool:
    """Whether the data of a suite that was left out is here now. ``suite`` may be anything: it was in a file."""
    try:
        return suite in get_args(Suite) and bool(_OPENERS[suite](bundle, config))
    except UserError:
        return False


def _say_left_out(suite: Suite, error: UserError) -> None:
    problem, more = error.problems[0].removeprefix(f"{suite}: "), len(error.problems) - 1
    rest = f"And {more} more; suites=[{suite}] says how to get all of it." if more else error.fix
    rank_zero_print(f"{suite}: left out: {problem} {rest}".rstrip())


def _suites_of(bundle: Trained) -> Sequence[Suite]:
    return CHAT_SUITES if bundle.stage.has_seen_conversations else BASE_SUITES


def _open_bits_per_byte(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """Bits per byte on the held-out text of the data that the model was trained on."""
    source = coordination.rank_zero_first(lambda: _source_of(bundle, config))
    problems = {"text": source.fingerprint, "num_rows": config.num_rows}
    return [Job("bpb", "bpb", problems, {}, lambda model: _measure_bits_per_byte(model, source, config))]


def _measure_bits_per_byte(bundle: Bundle, source: Source, config: EvaluateConfig) -> Measured:
    from nanochat_pl.data.cache.tokens import build_token_cache
    from nanochat_pl.evaluation.validation import open_validation

    tokenizer = bundle.tokenizer
    assert tokenizer is not None
    validation = coordination.rank_zero_first(
        lambda: open_validation(
            source,
            lambda part, enough: build_token_cache(part, "val", tokenizer, config.cache, enough_tokens=enough),
            tokenizer,
            config.cache,
            sequence_len=bundle.config.sequence_len,
            num_rows=config.num_rows,
            device_batch_size=config.batch_size,
        )
    )
    batches = -(-validation.num_rows // config.batch_size)
    with progress("bits per byte", batches, "batches") as advance:
        metrics = validation.measure(bundle.net, lambda: advance(1))
    bundle.net.eval()
    for name in [name for name, value in metrics.items() if not math.isfinite(value)]:
        rank_zero_print(f"{name} is {metrics.pop(name)}, so it is left out: look at the weights before you use them.")
    named = {name.removeprefix("val/"): value for name, value in metrics.items()}
    return Measured(plain={**named, "num_rows": validation.num_rows})


def _source_of(bundle: Trained, config: EvaluateConfig) -> Source:
    """The text that the model was trained on, or that is measured instead of it."""
    return open_source(data_of(bundle, config), config.cache, corpus=_corpus_of(bundle, config))


def _corpus_of(bundle: Trained, config: EvaluateConfig) -> RunCorpus:
    """The corpus of docstrings that the model was trained on, or whose tasks it was given."""
    return RunCorpus(config.cache, inherited=corpus_of_bundle(bundle.stage.data, f"{bundle.path}/stage.json"))


def data_of(bundle: Trained, config: EvaluateConfig) -> DataSettings:
    """Where the text is. Files that a bundle names are read for the run that was trained on them, for no other.

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
    if classes := [name for name in data.own_classes if name != config.data_target]:
        raise UserError(
            f"{bundle.path}: names the class {classes[0]!r} as data; what a bundle names is never imported.",
            f"Name it yourself, data_target={classes[0]}; or say where the text is, data_path=PATH; or leave it out,"
            " suites=[chat,samples].",
        )
    if config.bundle is not None and data.own_paths:
        raise UserError(
            f"{bundle.path}: names {data.own_paths[0]!r} as data; what a bundle names is not read from this machine.",
            "Say where the text is, data_path=PATH; or leave it out, suites=[chat,samples].",
        )
    return data.without_download()  # nobody has asked for that here


def _open_core(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    core = coordination.rank_zero_first(lambda: open_core(config.core, config.cache, config.paths.hub_folder))

    if core.missing:
        rank_zero_print(f"core: {core.folder} has no {', '.join(core.missing)}.")
    sizes = {name: len(coordination.raise_on_all_ranks(lambda: ask(core, name)).problems) for name in core.tasks}  # noqa: B023

    def job(name: str) -> Job:
        def measure(model: Bundle) -> Measured:
            assert model.tokenizer is not None
            with progress(name, sizes[name], "problems") as advance:
                return Measured([evaluate_core_task(core, name, model.net, model.tokenizer, advance)])

        return Job("core", name, {"data": core.fingerprint(name)}, {}, measure)

    return [job(name) for name in core.tasks]


def _open_chat(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """The held-out problems of the tasks that the model was trained on, as far as their answers can be judged.

    Raises:
        UserError: a task would read files of this machine that nobody but the bundle named.
    """
    require_chat_model(bundle.stage, bundle.path, "chat")
    settings: MixtureSettings = _settings_of(bundle, "mixture", MixtureSettings)
    judged = only_judged(settings)
    if judged and config.bundle is not None and (named := _files_named(judged.tasks)):
        raise UserError(
            [
                f"{bundle.path}: mixture.tasks.{key} names {path!r}; what a bundle names is not read from this machine."
                for key, path in named.items()
            ],
            "A run of one's own is asked by its name, run=NAME; else leave the suite out, suites=[chatcore,samples].",
        )
    jobs = _task_jobs("chat", judged.tasks, bundle, config) if judged else []
    if left_out := settings.tasks.chosen().keys() - (judged.tasks.chosen().keys() if judged else set()):
        rank_zero_print(f"{', '.join(sorted(left_out))}: skipped: no answer is right or wrong there.")
    return jobs


def _files_named(tasks: MixtureTasks) -> dict[str, str]:
    """Files of this machine that settings of tasks name, by key."""
    return {
        f"{name}.{key.name}": path
        for name, settings in tasks.chosen().items()
        for key in fields(settings)
        if (key.name == "path" or key.name.endswith("_path")) and (path := getattr(settings, key.name)) is not None
    }


def _open_chatcore(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    require_chat_model(bundle.stage, bundle.path, "chatcore")
    return _task_jobs("chatcore", config.chatcore, bundle, config)


def _task_jobs(suite: Suite, chosen: MixtureTasks, bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """One job a task. Raises :class:`UserError` with what is missing of all of them."""
    context = config.context("chatcore" if suite == "chatcore" else MIXTURE, _corpus_of(bundle, config))
    judged = only_judged(MixtureSettings(tasks=chosen))
    can_be_judged = judged.tasks if judged else MixtureTasks()
    problems = [  # said although the data of such a one is not looked for
        f"{context.where}.{name}: no answer is right or wrong there."
        for name in chosen.chosen()
        if name not in can_be_judged.chosen()
    ]
    try:
        tasks = coordination.rank_zero_first(lambda: build_tasks(can_be_judged, "test", context))
    except UserError as error:
        raise UserError([*problems, *error.problems], error.fix) from error
    if problems:
        raise UserError(problems)
    return [_task_job(suite, task, config) for task in tasks.values()]


def _task_job(suite: Suite, task: Task, config: EvaluateConfig) -> Job:
    asked: dict[str, Any] = {"n": len(task) if config.limit is None else min(config.limit, len(task))}
    if task.kind == "generative":
        drawn = ("num_samples", "temperature", "top_k", "seed") if config.temperature > 0 else ()
        asked |= {key: getattr(config, key) for key in ("max_tokens", *drawn)}
    if task.remark is not None:
        asked["remark"] = task.remark
    if hasattr(task, "sandbox"):
        asked["sandbox"] = to_plain(config.sandbox)

    def measure(model: Bundle) -> Measured:
        with progress(task.name, asked["n"], "problems") as advance:
            result = evaluate_task(
                Engine(model),
                task,
                config.limit,
                config.max_tokens,
                config.batch_size,
                by_difference(advance),
                num_samples=config.num_samples,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
            )
        return Measured([result])

    return Job(suite, task.name, {"task": task.fingerprint}, asked, measure)


def _open_samples(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """Greedy continuations of the recipe's prompts."""

    def measure(model: Bundle) -> Measured:
        return Measured(plain=write_samples(Engine(model), DEFAULT_PROMPTS))

    return [Job("samples", "samples", {"prompts": list(DEFAULT_PROMPTS)}, {}, measure, together=False)]


def _open_harness(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """Tasks of lm-evaluation-harness."""
    tasks = open_harness(config.harness, config.paths.hub_folder)

    def job(name: str) -> Job:
        def measure(model: Bundle) -> Measured:
            with progress(name, tasks.size(name), "problems") as advance:
                return Measured([tasks.evaluate(name, model, by_difference(advance), config.batch_size)])

        return Job("harness", name, {"task": tasks.fingerprint(name)}, {}, measure)

    return [job(name) for name in tasks.names]


def _open_tokenizer(bundle: Trained, config: EvaluateConfig) -> list[Job]:
    """Bytes per token beside other tokenizers, on texts of a few kinds and, where it is here, the text of the run."""
    texts = texts_of_kinds()
    try:
        texts |= coordination.rank_zero_first(lambda: texts_of_source(_source_of(bundle, config)))
    except UserError as error:
        rank_zero_print(f"tokenizer: without the text that it was trained on: {error.problems[0]}")

    def measure(model: Bundle) -> Measured:
        assert model.tokenizer is not None
        rows = compare_tokenizers(model.tokenizer, texts)
        heading, lines = comparison_table(rows, texts)
        skipped = {row.name: row.skipped for row in rows if row.skipped}
        return Measured(plain={"table": [dict(zip(heading, line, strict=True)) for line in lines], "skipped": skipped})

    problems = {"texts": fingerprint_of(texts), "others": cached_others()}
    return [Job("tokenizer", "tokenizer", problems, {}, measure, together=False)]


def _settings_of(bundle: Trained, group: str, schema: type) -> Any:
    """A group of the settings that the model was trained with, as its bundle keeps them."""
    if group not in bundle.stage.settings:
        raise UserError(
            f"{bundle.path}: stage.json does not say its {group} settings.", "Leave that suite out: suites=[…]"
        )
    return build(schema, bundle.stage.settings[group], f"{bundle.path}/stage.json: settings.{group}")


_OPENERS: dict[Suite, Callable[[Trained, EvaluateConfig], list[Job]]] = {
    "bpb": _open_bits_per_byte,
    "core": _open_core,
    "chat": _open_chat,
    "chatcore": _open_chatcore,
    "samples": _open_samples,
    "harness": _open_harness,
    "tokenizer": _open_tokenizer,
}
