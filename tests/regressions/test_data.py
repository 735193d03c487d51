"""Bugs around the data: rows that are lost, repeated or packed otherwise, and what their metrics keep quiet about.

20 to 22 stand in tests/data (test_hub.py, test_local_files.py, test_token_cache.py), beside the files and servers that
they need; 23 in tests/test_structure.py; 56 in tests/training/test_epochs.py and tests/data/test_token_cache.py.
"""

from __future__ import annotations

import hashlib
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nanochat_pl.cli.main import main
from nanochat_pl.common.files import read_json
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.cache.conversations import build_conversation_cache
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.packer import Packing, pack, pack_as_they_come
from nanochat_pl.data.packing.row_index import RowIndex
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows, validation_rows
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.tasks.base import Task, generator, reference_of, text_of
from nanochat_pl.tasks.synthetic.documentation import Documentation, DocumentationSettings
from nanochat_pl.tasks.synthetic.documentation_choice import DocumentationChoice, DocumentationChoiceSettings
from nanochat_pl.tasks.synthetic.identity import Identity, IdentitySettings
from nanochat_pl.tasks.synthetic.spelling_bee import SpellingBee
from nanochat_pl.tasks.synthetic.stories import NAMES, THINGS
from nanochat_pl.tasks.synthetic.words import WordTask
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.datamodule import StepRows
from nanochat_pl.training.stage_data.conversations import rows_of_epochs
from tests.data.test_build_ahead import start_in_process
from tests.helpers.fake_data import BOS, ByteTokenizer, ListSource
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.training import ROWS_PER_STEP, fit_tiny, tiny_rows
from tests.regressions.test_fit import stop_after
from tests.tasks.test_tasks import TASKS, WORDS, make
from tests.training.conftest import tiny_overrides, write_texts
from tests.training.test_epochs import talk

T = 64
_CHANCE = np.random.RandomState(0)
TEXTS = ["".join(map(chr, _CHANCE.randint(97, 123, size))) for size in _CHANCE.randint(1, 150, 120)]


def cropping(shuffle: str) -> Iterator[RowIndex]:
    """What the packer gives for two shards: at once, or shard by shard for some epochs."""
    lengths = np.array([len(text) for text in TEXTS])
    packing = Packing(T + 1, "crop", buffer_documents=10, refill_documents=4, shuffle=shuffle)  # type: ignore[arg-type]
    if shuffle == "global":
        return iter([pack(lengths, **asdict(packing), epochs=2)])
    shards = (lengths[:70], lengths[70:])
    return islice(pack_as_they_come(shards.__getitem__, (0, 70).__getitem__, 2, packing), 6)


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_every_token_is_in_a_row_or_counted_as_cropped(shuffle: str) -> None:
    """A third of the text was cropped to fill rows, and no metric told of it."""
    for index in cropping(shuffle):
        documents, begins, counts = index.pieces.T
        assert not begins.any(), "whole, or cut at its end"
        taken = sum(len(TEXTS[document]) for document in documents)
        assert index.stats.placed_tokens == counts.sum() and index.stats.cropped_tokens == taken - counts.sum()
        assert index.stats.cropped_tokens > 0.1 * taken


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_a_training_says_and_records_how_much_it_cropped(
    shuffle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share of the text that is trained on was to be found in no output of a run."""
    write_texts(tmp_path / "texts")
    keys = [f"data.shuffle={shuffle}", "data.long_documents=crop", "max_steps=6", "data.pack_buffer_documents=20"]
    assert main(["train", "run=r", *tiny_overrides(tmp_path), *keys]) == 0
    packing = read_json(tmp_path / "runs/r/base/bundle/stage.json")["data"]["packing"]
    assert packing["cropped_tokens"] > 0.1 * packing["placed_tokens"]
    assert f"{packing['cropped_tokens']:,} tokens cropped" in capsys.readouterr().out


def test_training_and_validation_make_the_same_rows_of_a_text(tmp_path: Path) -> None:
    """Two loaders packed in two ways: what was validated on did not look like what was trained on."""
    source = ListSource({"a": [TEXTS[number % 120][: number % 97] for number in range(4_000)]})
    cache = build_token_cache(source, "train", ByteTokenizer(), tmp_path)
    validated = validation_rows(cache, T, BOS, tmp_path, num_rows=10**6)
    trained = packed_rows(cache, T, BOS, DataSettings().long_documents, tmp_path, num_rows=2 * len(validated))
    numbers = range(len(validated) // 2)  # later on, documents of the next epoch are in the packer's buffer
    for mine, theirs in zip(validated.read(numbers), trained.read(numbers), strict=True):
        assert np.array_equal(mine, theirs)
    inputs, targets = trained.read(range(len(trained)))
    assert (inputs[:, 0] == BOS).all() and np.array_equal(inputs[:, 1:], targets[:, :-1])


def rows_of_three_epochs(kind: str, folder: Path) -> Rows:
    """Tokenized and packed in ``folder``, from the beginning."""
    source, tokenizer = ListSource({"a": TEXTS[:70], "b": TEXTS[70:]}), ByteTokenizer()
    keys = {"buffer_documents": 10, "refill_documents": 4, "seed": 1}
    if kind == "conversations":
        talks = [talk(text[:20], text[20:60] + "a") for text in TEXTS]
        rendered = build_conversation_cache(talks, tokenizer, T + 1, folder, "talks")
        return rows_of_epochs(partial(packed_rows, rendered, T, BOS, "pad", folder, **keys), 3)
    if kind == "shards":
        shards = source.shards("train")
        return streamed_rows(shards, tokenizer, folder, sequence_len=T, mode="split", num_rows=400, **keys)
    cache = build_token_cache(source, "train", tokenizer, folder)
    return packed_rows(cache, T, BOS, "split", folder, num_rows=400, **keys)


@pytest.mark.parametrize("kind", ["documents", "shards", "conversations"])
def test_a_run_that_goes_on_in_any_epoch_has_the_rows_of_one_that_was_not_stopped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed loader began its epoch anew, or took the rest of it in another epoch's order."""
    monkeypatch.setattr("nanochat_pl.data.packing.rows.start_builder", start_in_process)
    rows = rows_of_three_epochs(kind, tmp_path / "whole")
    assert rows.index.stats.epochs == 3
    steps = [batch_hash(StepRows(rows, 7)[step]) for step in range(len(rows) // 7)]
    assert len(set(steps)) == len(steps), "no step comes twice"
    for stop in (1, len(steps) // 3, len(steps) // 3 + 1, len(steps) - 1):
        again = StepRows(rows_of_three_epochs(kind, tmp_path / f"{stop}"), 7)
        assert [batch_hash(again[step]) for step in range(stop, len(steps))] == steps[stop:]


def batch_hash(batch: StepBatch) -> str:
    return hashlib.sha256(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()).hexdigest()


class Rowing(Callback):
    """Notes the rows of each step that was finished; a signal may come when those of a step have been handed over."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.stop_in = stop_in
        self.steps: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.stop_in:
            raise StopRequested(signal.SIGTERM, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(batch_hash(batch))


@pytest.mark.parametrize(  # an epoch ends in the seventh step
    ("num_workers", "stop_in"), [(0, 8), pytest.param(2, 3, marks=pytest.mark.slow), (2, 8)]
)
def test_rows_that_were_read_ahead_and_not_trained_on_come_again(
    tmp_path: Path, num_workers: int, stop_in: int
) -> None:
    """The state that was saved was that of the loader, which was some batches ahead; what the packer held was lost."""
    fit_few = partial(fit_tiny, tmp_path, num_steps=9, num_texts=20, num_workers=num_workers)
    stopped, resumed = Rowing(stop_in), Rowing()
    with pytest.raises(StopRequested):
        fit_few(callbacks=[stopped])
    fit_few(callbacks=[resumed])
    rows = StepRows(tiny_rows(tmp_path / "cache", num_texts=20), ROWS_PER_STEP)
    assert len(stopped.steps) == stop_in - 1
    assert stopped.steps + resumed.steps == [batch_hash(rows[step]) for step in range(9)]


def seed_all(seed: int) -> None:
    """Every generator that a process has."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_no_generator_of_the_process_matters(tmp_path: Path) -> None:
    """States of generators were not saved: a resumed run drew other numbers. Ours draws none that would need saving."""

    def fitted(seed: int) -> tuple[dict[str, torch.Tensor], str]:
        seed_all(seed)
        stage = fit_tiny(tmp_path, num_steps=4, every_steps=2)
        return stage.net.state_dict(), (tmp_path / "samples.jsonl").read_text(encoding="utf-8")  # type: ignore[union-attr]

    weights, samples = fitted(1)
    for seed, stop in ((2, 2), (3, 0)):
        stop_after(tmp_path, stop)
        others, other_samples = fitted(seed)
        assert all(torch.equal(weights[name], others[name]) for name in weights) and other_samples == samples


def test_seeds_of_opposite_sign_give_other_examples() -> None:
    """``seed(1)`` is ``seed(-1)``: seeded with its index and with minus its index, both parts had the same problems."""
    assert random.Random(1).random() == random.Random(-1).random()
    draws = {tuple(generator("task", number).random() for _ in range(4)) for number in range(-50, 51)}
    assert len(draws) == 101
    assert generator("task", "train", 1).random() != generator("task", "test", 1).random()


# The next sentence without a blank, a number on a word, two words in one, a quoted one on another; a blank too many.
GLUED = re.compile(r"[.,:;?!][^\W\d_]|(?<!\d)[.,:;?!]\d|[^\W\d_]\d|\d[^\W\d_]|[a-z][A-Z]|\w[`\"]\w|  ")
FUNCTIONS = [("median", "Return the middle of all numbers."), ("print", "Print some values.")]


def glued(task: Task, index: int, question: str, answer: str) -> list[str]:
    """What a task has put into a wording without the blank before or after it."""
    if isinstance(task, WordTask):  # a word's letters may also be a part of the wording
        words = [task.word(index)]
        calls = [
            part["text"] for part in reference_of(task[index]) if isinstance(part, dict) and part["type"] == "python"
        ]
        words += [letter for call in calls for letter in re.findall(r"count\('(.)'\)", call)]
        # There are languages without blanks, and "the rs" of a word.
        alone = r"(?<![a-z]){}s?(?![a-z])" if isinstance(task, SpellingBee) else r"\b{}\b"
        return [word for word in words if not re.search(alone.format(word), question)]
    words = [*NAMES, *THINGS, *(name for name, _ in FUNCTIONS)]
    return [word for word in words if re.search(rf"\w{word}|{word}\w", f"{question}\n{answer}")]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_no_blank_is_missing_in_a_rendered_task(name: str, split: Any) -> None:
    """Pieces of a sentence were put together without a blank, and every example taught the mistake."""
    if name == "documentation":
        task: Task = Documentation(DocumentationSettings(), split, FUNCTIONS)
    elif name == "documentation_choice":
        functions = [(word, f"Return the {word} of all numbers.") for word in WORDS]
        task = DocumentationChoice(DocumentationChoiceSettings(), split, functions)
    else:
        task = Identity(IdentitySettings(name="Ada"), split) if name == "identity" else make(name, split)
    tokenizer = byte_tokenizer()
    for index in range(min(len(task), 300)):
        conversation = task[index]
        question, answer = conversation["messages"][0]["content"], reference_of(conversation)
        plain = re.sub('[`"]', "", question) if isinstance(task, SpellingBee) else question  # `r`s is right
        plain = re.sub(r"module\.function_\d+", "name", plain)  # of a function
        assert not GLUED.search(plain.replace("ChatGPT", "")), question
        if name != "out_of_scope":  # its words hold each other, as expensive does pens
            assert not glued(task, index, question, text_of(answer)), (question, answer)
        if not isinstance(task, WordTask):  # theirs is a,p,p,l,e
            assert not GLUED.search(text_of(answer)), answer
        rendered = tokenizer.decode(tokenizer.render_conversation(conversation)[0])
        assert f"<|user_start|>{question}<|user_end|>" in rendered
        texts = [answer] if isinstance(answer, str) else [part["text"] for part in answer]
        assert re.sub(r"<\|\w+\|>", "", rendered) == question + "".join(texts)
