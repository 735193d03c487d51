"""Classes of one's own that fail: one error says key, class, method and line; none ends as a success."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from nanochat_pl import LMModule
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.user_code import user_code
from nanochat_pl.config.instantiate import make_objects, problems_of_module, problems_of_objects
from nanochat_pl.data.sources.base import DataSettings, Shard, Source
from nanochat_pl.data.sources.custom import TextSource, open_custom
from nanochat_pl.doctor.stage_data import prepare_stage
from nanochat_pl.training.guarded import guard_callbacks, guard_module
from nanochat_pl.training.run import train_stage
from nanochat_pl.training.stages.registry import Stage
from tests.helpers.steps import BATCH, CPU_MEMORY, MEMORY, StepLoop, fails
from tests.helpers.training import fit_tiny
from tests.training.conftest import tiny_overrides, write_texts

FAULTS: list[BaseException] = [ValueError("what"), SystemExit(0), BaseException("odd")]


class Own(Callback):
    """Fails in one place; ``seen`` are the hooks that were called."""

    def __init__(self, place: str = "", fault: BaseException = FAULTS[0]) -> None:
        self.place, self.fault, self.seen = place, fault, list[str]()
        self._meet("__init__")

    def _meet(self, place: str) -> None:
        self.seen.append(place)
        if place == self.place:
            raise self.fault

    def setup(self, *rest: Any, **more: Any) -> None:
        self._meet("setup")

    def on_train_batch_end(self, *rest: Any) -> None:
        self._meet("on_train_batch_end")

    def state_dict(self) -> dict[str, Any]:
        self._meet("state_dict")
        return {}

    def teardown(self, *rest: Any, **more: Any) -> None:
        self._meet("teardown")


class Unreadable(Callback):
    __signature__ = "of another kind"


class UnreadableModule(LMModule):
    __signature__ = "of another kind"


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_constructor_that_fails(fault: BaseException) -> None:
    node = {"_target_": f"{__name__}.Own", "place": "__init__", "fault": fault}
    with pytest.raises(
        UserError, match=rf"callbacks\.x: {__name__}\.Own cannot be made: {type(fault).__name__}"
    ) as found:
        make_objects({"x": node}, "callbacks")
    assert Path(__file__).name in found.value.fix and "(_meet)" in found.value.fix


def test_ctrl_c_and_errors_for_people_stay_what_they_are() -> None:
    with pytest.raises(KeyboardInterrupt), user_code("x"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"^said$"), user_code("x"):
        raise UserError("said")


def test_a_signature_that_python_refuses() -> None:
    (problem,) = problems_of_objects({"x": {"_target_": f"{__name__}.Unreadable"}}, "callbacks")
    assert problem.startswith(f"callbacks.x: {__name__}.Unreadable has no signature: TypeError")
    assert "has no signature: TypeError" in problems_of_module(f"{__name__}.UnreadableModule")[0]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("place", ["on_train_batch_end", "state_dict", "teardown"])
def test_a_callback_that_fails_later_is_left_out(
    place: str, fault: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = Own(place, fault)
    fitted = fit_tiny(tmp_path, num_steps=2, callbacks=guard_callbacks({"callbacks.x": callback}))
    assert fitted.trainer.global_step == 2
    said = capsys.readouterr().out
    assert f"callbacks.x: {__name__}.Own fails in {place} and is left out from here on" in said
    assert type(fault).__name__ in said
    assert callback.seen.count(place) == 1 and callback.seen[-1] == "teardown"


def test_a_callback_that_cannot_begin_is_an_error_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.x: {__name__}\.Own fails in setup: SystemExit: 0"):
        fit_tiny(tmp_path, num_steps=2, callbacks=guard_callbacks({"callbacks.x": Own("setup", SystemExit(0))}))


def test_what_a_callback_keeps_under_the_name_of_a_hook_stays_what_it_is(tmp_path: Path) -> None:
    """It was taken for a hook, and the training ended in an error of its own."""
    callback: Any = Own()
    callback.on_gpu, callback.on_exception = True, None
    fitted = fit_tiny(tmp_path, num_steps=2, callbacks=guard_callbacks({"callbacks.x": callback}))
    assert fitted.trainer.global_step == 2
    assert callback.on_gpu is True and callback.on_exception is None and "on_train_batch_end" in callback.seen


class Step(LMModule):
    given: Any = None

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "training_step gives NoneType without loss, "),
        ({"loss": 1}, "training_step gives dict without gradient_norm, "),
        (SystemExit(0), "fails in training_step: SystemExit: 0"),
        (ValueError("what"), "fails in training_step: ValueError: what"),
    ],
)
def test_a_module_whose_step_fails(given: Any, said: str) -> None:
    stage = Step.__new__(Step)
    super(LMModule, stage).__init__()
    Step.given = given
    with pytest.raises(UserError) as found:
        guard_module(stage).training_step(None)
    assert found.value.problems[0].startswith(f"stage.module={__name__}.Step") and said in found.value.problems[0]


@pytest.mark.parametrize("error", [MEMORY, CPU_MEMORY, MemoryError()], ids=repr)
def test_a_loss_of_ones_own_that_runs_out_of_memory_is_tried_with_fewer_rows(error: Exception) -> None:
    """It was said to be a fault of the class."""
    loop = StepLoop(4)
    loop.before_forward = fails(error, 1)
    guard_module(loop)
    loop.train_steps(BATCH)
    assert loop.device_batch_size == 2


def test_what_handles_lacking_memory_wrongly_is_a_fault_of_the_class() -> None:
    loop = StepLoop(4)

    def mishandles() -> None:
        try:
            raise MEMORY
        except RuntimeError:
            raise KeyError("rows")  # noqa: B904

    loop.before_forward = mishandles
    with pytest.raises(UserError, match=r"StepLoop fails in weighted_loss: KeyError"):
        guard_module(loop).training_step(BATCH)


def test_memory_that_runs_out_where_no_step_can_be_done_again_is_no_bug(tmp_path: Path) -> None:
    class Builds(Callback):
        def on_train_start(self, *rest: Any) -> None:
            raise MEMORY

    with pytest.raises(UserError, match="out of memory") as found:
        fit_tiny(tmp_path, num_steps=2, callbacks=[Builds()])
    assert "model.depth" in found.value.fix


class Texts(TextSource):
    def __init__(self, documents: Any = None, fault: BaseException | None = None) -> None:
        self.given, self.calls = documents, 0
        if fault is not None:
            raise fault

    def documents(self) -> Iterator[Any]:
        self.calls += 1
        if isinstance(self.given, BaseException):
            raise self.given
        yield from self.given if self.given is not None else ["a text", "another"]
        if self.calls > 1:
            raise SystemExit(0)


class Parts:
    """A source with parts of its own, each of whose facts may be another than it should."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def _fact(self, name: str, usual: Any) -> Any:
        value = self.given.get(name, usual)
        if isinstance(value, BaseException):
            raise value
        return value

    @property
    def name(self) -> Any:
        return self._fact("name", "parts")

    @property
    def fingerprint(self) -> Any:
        return self._fact("fingerprint", "0" * 64)

    def describe(self) -> Any:
        return self._fact("describe", "parts")

    def shards(self, split: Any) -> Any:
        texts = self.given.get("texts", ["a"])
        return self._fact("shards", [Shard("one", split, "f", "c", lambda: iter(texts))])


def use(cls: str, **options: Any) -> None:
    source: Source = open_custom(DataSettings(name="custom", target=f"{__name__}.{cls}", options=options), "data")
    source.describe()
    for shard in source.shards("train"):
        assert all(isinstance(text, str) for text in shard.documents())


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        ("Texts", {"fault": SystemExit(0)}, "cannot be opened: SystemExit: 0"),
        ("Texts", {"documents": SystemExit(0)}, "fails in fingerprint: SystemExit: 0"),
        ("Texts", {"documents": [b"bytes"]}, "fails in fingerprint: TypeError: documents() gives bytes, no text (str)"),
        ("Texts", {}, "fails in documents of the shard 'Texts': SystemExit: 0"),
        ("Parts", {"describe": 3}, "describe gives int where str is needed."),
        ("Parts", {"describe": ValueError("what")}, "fails in describe: ValueError: what"),
        ("Parts", {"shards": ValueError("what")}, "fails in shards: ValueError: what"),
        ("Parts", {"shards": [3]}, "shards gives int where Shard is needed."),
        ("Parts", {"texts": [None]}, "documents gives NoneType where str is needed."),
        ("Parts", {"name": None}, "name gives NoneType where str is needed."),
    ],
)
def test_a_source_that_fails(cls: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        use(cls, **options)
        _ = open_custom(DataSettings(name="custom", target=f"{__name__}.{cls}", options=options), "data").name
    assert said in found.value.problems[0] and f"{__name__}.{cls}" in found.value.problems[0]


class OwnStage(Stage):
    has_model = False

    def prepare(self, context: Any) -> Any:
        raise SystemExit(0)

    def make_bundle(self, *rest: Any) -> Any:
        raise ValueError("what")


def test_a_stage_that_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training said only of prepare that it was no bug of ours, the doctor never."""
    config = compose_train(tiny_overrides(here)).config
    monkeypatch.setattr(type(config.stage), "definition", OwnStage())
    folder, own = StageFolder(here / "runs", "x", "base", "x"), rf"stage={__name__}\.OwnStage"
    with pytest.raises(UserError, match=f"{own} fails in prepare: SystemExit"):
        prepare_stage(config, folder, here / "cache")
    with pytest.raises(UserError, match=f"{own} fails in make_bundle: ValueError: what"):
        train_stage(config, folder, here / "cache")


LEAVES = """
import sys
from nanochat_pl import LMModule

class Leaves(LMModule):
    def training_step(self, batch, batch_idx=0):
        sys.exit(0)
"""


def test_a_class_that_leaves_the_program_is_no_success(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ended with 0, and nothing had been trained."""
    (here / "leaves.py").write_text(LEAVES, encoding="utf-8")
    write_texts(here / "texts")
    own = ["stage.module=leaves.Leaves", "evaluation.at_start=false"]
    try:
        assert main(["train", "stage=base", "run=x", *tiny_overrides(here), *own]) == 2
    finally:
        sys.modules.pop("leaves", None)
    error = capsys.readouterr().err
    assert "error: stage.module=leaves.Leaves fails in training_step: SystemExit: 0" in error
    assert "leaves.py, line 7 (training_step)" in error and "Traceback" not in error
    assert [path.name for path in (here / "runs" / "x").iterdir()] == ["tokenizer"], "nothing of base was trained"
