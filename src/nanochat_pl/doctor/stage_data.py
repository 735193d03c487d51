"""What the doctor looks at: the data of a stage, prepared by the functions that a training prepares it with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_pl.common.device import choose_compute_dtype, choose_device, device_name
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.cache.conversations import ConversationCache
from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows, packed_rows
from nanochat_pl.data.packing.streamed_index import StreamedIndex
from nanochat_pl.data.sources.base import Source, SourceSettings, Split
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.data.sources.local import LocalFiles
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.doctor.documents import CachedDocuments, Documents, JoinedDocuments, TextDocuments
from nanochat_pl.doctor.eval_sets import ConversationTexts
from nanochat_pl.doctor.examine import Found
from nanochat_pl.doctor.findings import Figures, Finding, finding_of, row_figures
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture, build_tasks
from nanochat_pl.tasks.published.conversations import ConversationSet
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.device import Machine
from nanochat_pl.training.stages.base import StageData, prepare_base
from nanochat_pl.training.stages.sft import prepare_sft
from nanochat_pl.training.stages.source import corpus_of_stage


@dataclass(frozen=True)
class ExaminedStage:
    """The data of a stage.

    Attributes:
        stage: its name.
        name: of the data, for people.
        train, validation: the documents.
        prepared: what a training starts with; None for a tokenizer.
        rows: by the name of the source, "" where there is one; and the documents that they are made of.
        refused: whether the plan is not the one that was asked for.
        eval_sets: the tasks that are at hand, by name.
        wanted_copies: that the tasks' ``repeat`` asks for.
        cut: conversations cut to a row.
        bad_rows: rows of files that were left out, by cause.
        remarks: what else is not read of the files, or not as it might have been meant.
        own_sets: sets of conversations out of files by their key, how often each conversation is in an epoch, and which
            share of the mixture's conversations these are.
    """

    stage: str
    name: str
    train: Documents
    validation: Documents
    prepared: StageData | None = None
    rows: dict[str, tuple[Rows, Documents]] = field(default_factory=dict)
    refused: bool = False
    eval_sets: dict[str, ConversationTexts] = field(default_factory=dict)
    wanted_copies: int = 0
    cut: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    own_sets: dict[str, tuple[int, float]] = field(default_factory=dict)

    def figures(self, found: Found) -> Figures:
        """All figures, with those that an examination found."""
        figures = Figures(
            stage=self.stage,
            data=self.name,
            found=found,
            cut=self.cut,
            bad_rows=self.bad_rows,
            remarks=self.remarks,
            own_sets=self.own_sets,
            made_sets=tuple(name for name, texts in self.eval_sets.items() if not texts.from_files),
        )
        if self.prepared is None:
            return figures
        plan = self.prepared.plan
        return dataclasses.replace(
            figures,
            rows={
                name: row_figures(rows, documents.lengths, documents.target_share, num_rows)
                for (name, (rows, documents)), num_rows in zip(self.rows.items(), self._rows_taken(), strict=True)
            },
            steps=0 if self.refused else plan["num_steps"],
            rows_per_step=plan["rows_per_step"],
            validation_rows=self.prepared.validation.num_rows,
            validation_rows_wanted=plan["validation_rows"],
            vocab_size=self.prepared.tokenizer.vocab_size,
            model_vocab_size=self.prepared.model.vocab_size,
        )

    def shortfall(self, config: TrainConfig, cache: Path) -> list[Finding]:
        """What is missing of the files that the plan needs."""
        if self.stage != "base" or self.prepared is None or self.refused:
            return []
        source = open_source(config.data, cache)
        sources = [part.source for part in source.parts.values()] if isinstance(source, MixedSource) else [source]
        lacks = [
            part.shortfall(num_rows * self.prepared.rows.sequence_len)
            for part, num_rows in zip(sources, self._rows_taken(), strict=True)
            if isinstance(part, HubFiles)
        ]
        return [Finding(False, lines[0], " ".join(lines[1:])) for lines in lacks if lines]

    def _rows_taken(self) -> list[int]:
        """Rows that the plan takes of each source."""
        assert self.prepared is not None
        if self.refused:
            return [len(rows) for rows, _ in self.rows.values()]
        num_rows = self.prepared.plan["num_steps"] * self.prepared.plan["rows_per_step"]
        rows = self.prepared.rows
        return rows.turns.counts(num_rows) if isinstance(rows, MixedRows) else [num_rows]


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
    if config.stage.trains_on_conversations:
        return prepare_sft(config, folder, cache, machine, True, corpus)
    folder = _with_tokenizer(config, folder, cache)
    return prepare_base(config, folder, cache, machine, True, corpus)  # else it records the files that it chooses


def _with_tokenizer(config: TrainConfig, folder: StageFolder, cache: Path) -> StageFolder:
    """A folder whose run has a tokenizer or may be given one: the run's own, or one in the cache."""
    if folder.parent("tokenizer").status == "finished":
        return folder
    key = fingerprint_of(open_source(config.data, cache).fingerprint, to_plain(config.tokenizer))
    return StageFolder(cache / "doctor", name := f"doctor-{key[:16]}", folder.stage, parent_run=name)


def open_stage_data(
    config: TrainConfig, folder: StageFolder, cache: Path, max_documents: int
) -> tuple[ExaminedStage | None, list[Finding]]:
    """The data of a stage as far as it can be had, and what would keep a training from beginning."""
    try:
        if config.stage.name == "tokenizer":
            return _tokenizer_data(config, cache, max_documents), []
        return (_sft_data if config.stage.trains_on_conversations else _base_data)(config, folder, cache), []
    except UserError as error:
        problems = finding_of(error)
    if config.stage.name != "base":
        return None, problems
    # The text can be looked at all the same, under a plan that nobody refuses.
    smallest = dataclasses.replace(config, max_steps=1, model=dataclasses.replace(config.model, depth=1))
    try:
        data = _base_data(smallest, folder, cache)
    except UserError as error:
        return None, list(dict.fromkeys([*problems, *finding_of(error)]))
    whole = {name: (_one_epoch(rows, config, name, cache), docs) for name, (rows, docs) in data.rows.items()}
    return dataclasses.replace(data, rows=whole, refused=True), problems


def _one_epoch(rows: Rows, config: TrainConfig, name: str, cache: Path) -> Rows:
    settings: SourceSettings = config.data.parts[name] if name else config.data
    return packed_rows(
        rows.cache,
        rows.sequence_len,
        rows.bos_id,
        settings.packing_mode,
        cache,
        epochs=1,
        buffer_documents=settings.pack_buffer_documents,
        refill_documents=settings.pack_refill_documents,
        seed=settings.seed,
    )


def _tokenizer_data(config: TrainConfig, cache: Path, max_documents: int) -> ExaminedStage:
    source = open_source(config.data, cache)
    splits = {split: TextDocuments(_texts(source, split, max_documents)) for split in ("train", "val")}
    return ExaminedStage(
        "tokenizer",
        source.describe(),
        splits["train"],
        splits["val"],
        eval_sets=_at_hand(config, cache),
        remarks=_remarks_of(source),
    )


def _remarks_of(source: Source) -> tuple[str, ...]:
    """What the files of a source are that is not read, or not as it might have been meant."""
    if isinstance(source, MixedSource):
        parts = source.parts.items()
        return tuple(f"{name}: {remark}" for name, part in parts for remark in _remarks_of(part.source))
    return tuple(source.remarks()) if isinstance(source, (HubFiles, LocalFiles)) else ()


def _texts(source: Source, split: Split, max_documents: int) -> list[tuple[str, str]]:
    texts = (
        (f"{shard.name}, document {number:,}", text)
        for shard in source.shards(split)
        for number, text in enumerate(shard.documents())
    )
    return list(itertools.islice(texts, max_documents))


def _base_data(config: TrainConfig, folder: StageFolder, cache: Path) -> ExaminedStage:
    prepared = prepare_stage(config, folder, cache)
    tokenizer, validation = prepared.tokenizer, prepared.validation
    rows: dict[str, tuple[Rows, Documents]] = {}
    for name, part in parts_of(prepared.rows).items():
        part.wait_for(len(part))
        read = part.cache
        if isinstance(part.index, StreamedIndex):  # the shards that the plan comes to
            read = TokenCache(read.shards[: part.index.num_segments], read.fingerprint)
        rows[name] = Rows(read, part.index, part.sequence_len, part.bos_id), CachedDocuments(read, tokenizer)
    source = open_source(config.data, cache)
    return ExaminedStage(
        "base",
        source.describe(),
        _joined({name: documents for name, (_, documents) in rows.items()}),
        _joined({name: CachedDocuments(part.rows.cache, tokenizer) for name, part in validation.sources.items()}),
        prepared=prepared,
        rows=rows,
        eval_sets=_at_hand(config, cache),
        remarks=_remarks_of(source),
    )


def parts_of(rows: Rows | MixedRows) -> dict[str, Rows]:
    """Rows by the name of their source, "" where there is one alone."""
    return rows.parts() if isinstance(rows, MixedRows) else {"": rows}


def _joined(parts: Mapping[str, Documents]) -> Documents:
    return parts[""] if "" in parts else JoinedDocuments(parts)


def _sft_data(config: TrainConfig, folder: StageFolder, cache: Path) -> ExaminedStage:
    prepared = prepare_stage(config, folder, cache)
    train, test = mixtures(config, cache)
    rows, validation = prepared.rows, prepared.validation
    assert isinstance(rows, Rows)
    conversations = rows.cache
    assert isinstance(conversations, ConversationCache)
    documents = CachedDocuments(conversations, prepared.tokenizer, place_in(train))
    bad: dict[str, int] = {}
    remarks: list[str] = []
    own: dict[str, tuple[int, float]] = {}
    for name, task in train.tasks.items():
        if isinstance(task, ConversationSet):
            remarks += [f"{name}: {line}" for line in task.losses()]
            own[task.key] = train.repeats[name], len(task) * train.repeats[name] / len(train)
            bad |= {f"{name}: {cause}": count for cause, count in task.audit.bad.items()}
    joined = [f"{train.num_turns:,} of them in {train.num_joined:,} of several turns"] if train.num_joined else []
    return ExaminedStage(
        config.stage.name,
        ", ".join([*(f"{len(task):,} × {train.repeats[name]} {name}" for name, task in train.tasks.items()), *joined]),
        documents,
        CachedDocuments(validation.sources[""].rows.cache, prepared.tokenizer, place_in(test)),
        prepared=prepared,
        rows={"": (rows, documents)},
        eval_sets={name: _texts_of(task) for name, task in test.tasks.items()},
        wanted_copies=train.count_copies(),
        cut=conversations.rendering.num_cut,
        bad_rows=bad,
        remarks=tuple(remarks),
        own_sets=own,
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
