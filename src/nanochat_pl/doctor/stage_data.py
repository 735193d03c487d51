"""What the doctor looks at: the data of a stage, prepared by the functions that a training prepares it with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.common.device import choose_compute_dtype, choose_device, device_name
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.cache.conversations import ConversationCache
from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.data.packing.streamed_index import StreamedIndex
from nanochat_pl.data.sources.base import Source
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.data.sources.local import LocalFiles
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.doctor.documents import Documents
from nanochat_pl.doctor.eval_sets import ConversationTexts
from nanochat_pl.doctor.findings import Finding, StageMetrics, row_metrics
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture, build_tasks
from nanochat_pl.tasks.published.conversations import ConversationSet
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.device import Machine
from nanochat_pl.training.stage_data.source import corpus_of_stage
from nanochat_pl.training.stages.registry import StageContext, StageData, stage_code


@dataclass(frozen=True)
class ExaminedStage:
    """The data of a stage.

    Attributes:
        metrics: what is known of it before its text is read.
        eval_sets: the tasks that are at hand, by name.
        wanted_copies: that the tasks' ``repeat`` asks for.
        shortfall: what is missing of the files that the plan needs.
    """

    metrics: StageMetrics
    train: Documents
    validation: Documents
    eval_sets: dict[str, ConversationTexts]
    wanted_copies: int = 0
    shortfall: tuple[Finding, ...] = ()


def prepare_stage(config: TrainConfig, folder: StageFolder, cache: Path) -> StageData:
    """What a training of these settings starts with; of a stage that has begun, with the files that it has.

    No folder of a run is made, and nothing in one is changed.

    Raises:
        UserError: what the training would end with.
    """
    device = choose_device(config.trainer.accelerator, "trainer.accelerator")
    dtype = choose_compute_dtype(config.model.compute_dtype, device)
    machine = Machine(device, device_name(device), dtype, compile=False)
    corpus = corpus_of_stage(config, folder, cache, resuming=True)
    stage = config.stage.definition
    if stage.from_scratch:
        folder = _with_tokenizer(config, folder, cache)
    # As if it had begun: else it records the files that it chooses.
    with stage_code(stage, "prepare"):
        return stage.prepare(StageContext(config, folder, cache, machine, corpus, resuming=True))


def _with_tokenizer(config: TrainConfig, folder: StageFolder, cache: Path) -> StageFolder:
    """A folder whose run has a tokenizer or may be given one: the run's own, or one in the cache."""
    if folder.parent("tokenizer").status == "finished":
        return folder
    key = fingerprint_of(open_source(config.data, cache).fingerprint, to_plain(config.tokenizer))
    return StageFolder(cache / "doctor", name := f"doctor-{key[:16]}", folder.stage, parent_run=name)


def open_stage_data(config: TrainConfig, folder: StageFolder, cache: Path) -> ExaminedStage:
    """The data of a stage.

    Raises:
        UserError: what a training would end with.
    """
    return (_sft_data if config.stage.trains_on_conversations else _base_data)(config, folder, cache)


def _base_data(config: TrainConfig, folder: StageFolder, cache: Path) -> ExaminedStage:
    prepared = prepare_stage(config, folder, cache)
    tokenizer, validation = prepared.tokenizer, prepared.validation
    rows: dict[str, Rows] = {}  # by the name of their source
    parts = prepared.rows.parts() if isinstance(prepared.rows, MixedRows) else {"": prepared.rows}
    for name, part in parts.items():
        part.wait_for(len(part))
        read = part.cache
        if isinstance(part.index, StreamedIndex):  # the shards that the plan comes to
            read = TokenCache(read.shards[: part.index.num_segments], read.fingerprint)
        rows[name] = Rows(read, part.index, part.sequence_len, part.bos_id)
    source, eval_sets = open_source(config.data, cache), _at_hand(config, cache)
    metrics = _metrics(config.stage.name, source.describe(), prepared, rows, eval_sets, _remarks_of(source))
    fitted = _is_of_text(folder.parent("tokenizer"), source)
    return ExaminedStage(
        dataclasses.replace(metrics, fitted_tokenizer=fitted),
        Documents({name: part.cache for name, part in rows.items()}, tokenizer),
        Documents({name: part.rows.cache for name, part in validation.sources.items()}, tokenizer),
        eval_sets,
        shortfall=tuple(_shortfall(source, prepared)),
    )


def _is_of_text(tokenizer: StageFolder, source: Source) -> bool:
    """Whether a stage's tokenizer was trained on this text; where the run has none, the doctor has made one of it."""
    if tokenizer.status != "finished":
        return True
    return load_stage_info(tokenizer.bundle).data.get("fingerprint") == source.fingerprint


def _metrics(
    stage: str,
    data: str,
    prepared: StageData,
    rows: dict[str, Rows],
    eval_sets: dict[str, ConversationTexts],
    remarks: tuple[str, ...],
    target_share: float = 1.0,
) -> StageMetrics:
    plan = prepared.plan
    return StageMetrics(
        stage,
        data,
        rows={
            name: row_metrics(part, target_share, num_rows)
            for (name, part), num_rows in zip(rows.items(), _rows_taken(prepared), strict=True)
        },
        steps=plan["num_steps"],
        rows_per_step=plan["rows_per_step"],
        validation_rows=prepared.validation.num_rows,
        validation_rows_wanted=plan["validation_rows"],
        vocab_size=prepared.tokenizer.vocab_size,
        model_vocab_size=prepared.model.vocab_size,
        remarks=remarks,
        made_sets=tuple(name for name, texts in eval_sets.items() if not texts.from_files),
    )


def _rows_taken(prepared: StageData) -> list[int]:
    """Rows that the plan takes of each source."""
    num_rows = prepared.plan["num_steps"] * prepared.plan["rows_per_step"]
    return prepared.rows.turns.counts(num_rows) if isinstance(prepared.rows, MixedRows) else [num_rows]


def _shortfall(source: Source, prepared: StageData) -> list[Finding]:
    """What is missing of the files that the plan needs."""
    sources = [part.source for part in source.parts.values()] if isinstance(source, MixedSource) else [source]
    lacks = [
        part.shortfall(num_rows * prepared.rows.sequence_len)
        for part, num_rows in zip(sources, _rows_taken(prepared), strict=True)
        if isinstance(part, HubFiles)
    ]
    return [Finding(False, lines[0], " ".join(lines[1:])) for lines in lacks if lines]


def _remarks_of(source: Source) -> tuple[str, ...]:
    """What the files of a source are that is not read, or not as it might have been meant."""
    if isinstance(source, MixedSource):
        parts = source.parts.items()
        return tuple(f"{name}: {remark}" for name, part in parts for remark in _remarks_of(part.source))
    return tuple(source.remarks()) if isinstance(source, (HubFiles, LocalFiles)) else ()


def _at_hand(config: TrainConfig, cache: Path) -> dict[str, ConversationTexts]:
    """The test parts of those tasks of the mixture that are here: nothing is built or fetched for them."""
    sets: dict[str, ConversationTexts] = {}
    context = TaskContext(cache, hub=config.paths.hub_folder, builds_corpus=False)
    for name in config.mixture.tasks.chosen():
        # One that has not been downloaded, or is bad, is nothing that a training on text minds.
        with contextlib.suppress(UserError):
            sets[name] = _texts_of(build_tasks(config.mixture.tasks.only({name}), "test", context)[name])
    return sets


def _texts_of(task: Task) -> ConversationTexts:
    return ConversationTexts(task, from_files=isinstance(task, ConversationSet))


def _sft_data(config: TrainConfig, folder: StageFolder, cache: Path) -> ExaminedStage:
    prepared = prepare_stage(config, folder, cache)
    train, test = mixtures(config, cache)
    rows, validation = prepared.rows, prepared.validation
    conversations = rows.cache if isinstance(rows, Rows) else None
    if not isinstance(rows, Rows) or not isinstance(conversations, ConversationCache):
        raise UserError(
            f"stage={config.stage.name}: the doctor looks at the conversations of mixture, and it has others."
        )
    documents = Documents({"": conversations}, prepared.tokenizer, place_in(train))
    eval_sets = {name: _texts_of(task) for name, task in test.tasks.items()}
    bad: dict[str, int] = {}
    remarks: list[str] = []
    own: dict[str, tuple[int, float]] = {}
    for name, task in train.tasks.items():
        if isinstance(task, ConversationSet):
            remarks += [f"{name}: {line}" for line in task.losses()]
            own[task.key] = train.repeats[name], len(task) * train.repeats[name] / len(train)
            bad |= {f"{name}: {cause}": count for cause, count in task.audit.bad.items()}
    joined = [f"{train.num_turns:,} of them in {train.num_joined:,} of several turns"] if train.num_joined else []
    data = [*(f"{len(task):,} × {train.repeats[name]} {name}" for name, task in train.tasks.items()), *joined]
    metrics = _metrics(
        config.stage.name, ", ".join(data), prepared, {"": rows}, eval_sets, tuple(remarks), documents.target_share
    )
    return ExaminedStage(
        dataclasses.replace(metrics, cut=conversations.rendering.num_cut, bad_rows=bad, own_sets=own),
        documents,
        Documents({"": validation.sources[""].rows.cache}, prepared.tokenizer, place_in(test)),
        eval_sets,
        wanted_copies=train.count_copies(),
    )


def mixtures(config: TrainConfig, cache: Path) -> tuple[Mixture, Mixture]:
    """The conversations to train on, and those held out."""
    context = TaskContext(cache, config.data.max_bad_fraction, config.paths.hub_folder)
    train, test = (build_mixture(config.mixture, split, context) for split in ("train", "test"))
    return train, test


def place_in(mixture: Mixture) -> Callable[[int], str]:
    """Says of a conversation which task's it is, and where in a file it stands if it comes from one."""

    def place_of_part(name: str, index: int) -> str:
        task = mixture.tasks[name]
        if isinstance(task, ConversationSet):
            file, row = task.origin(index)
            return f"{name}, {file}, row {row:,}"
        return f"{name}, conversation {index:,}"

    return lambda number: " + ".join(place_of_part(*part) for part in mixture.places(number))
