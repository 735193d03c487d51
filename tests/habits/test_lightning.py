"""What a Lightning user does without thinking: works here too. The pages' own blocks are run by tests/docs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_pl import LMModule, ModuleConfig, RowsDataModule
from nanochat_pl.cli.main import main
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.optim.schedules import ScheduleSettings
from tests.helpers.processes import run
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.training import ROWS_PER_STEP, fit_tiny, tiny_model, tiny_rows
from tests.training.conftest import tiny_overrides, write_texts

OWN_CODE = """
import torch
from lightning.pytorch import Callback
from torchmetrics import MeanMetric
from nanochat_pl import LMModule
from nanochat_pl.data.sources.custom import TextSource

class Mine(Callback):
    def __init__(self, word="hello"):
        self.word = word

    def on_train_start(self, trainer, pl_module):
        print(f"{self.word} from a callback beside {type(pl_module).__name__}")

    def on_train_batch_end(self, trainer, pl_module, *rest):
        pl_module.log("mine/late", 10.0 * trainer.global_step)
        trainer.logger.experiment.add_scalar("mine/drawn", 1.0, trainer.global_step)

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine/epoch", 7.0)

class Doubled(LMModule):
    def __init__(self, *given):
        super().__init__(*given)
        self.save_hyperparameters()
        self.mean = MeanMetric()

    def on_train_batch_end(self, *given):
        super().on_train_batch_end(*given)
        self.log("train/later", float(self.global_step))

    def weighted_loss(self, inputs, targets):
        self.log("train/mine", 3.0)
        self.mean.update(5.0)
        assert self.trainer.log_dir and self.logger.experiment, (self.trainer.log_dir, self.logger)
        self.log("train/of_torchmetrics", self.mean)
        return 2 * super().weighted_loss(inputs, targets)

class Wide(LMModule):
    def __init__(self, config, factor):
        super().__init__(config)

class Counting(TextSource):
    def __init__(self, count=300):
        self.count = count

    def documents(self):
        for n in range(self.count):
            yield f"After {n} comes {n + 1}, and before {n} there was {n - 1}."

class Adam(LMModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

class Stateful(Mine):
    def state_dict(self):
        return {"word": self.word}

def function():
    raise AssertionError("a function was called")
"""


def tiny_module(num_steps: int = 8) -> LMModule:
    config = tiny_model(depth=1)
    return LMModule(
        ModuleConfig(config, num_steps, ROWS_PER_STEP // 2, schedule=ScheduleSettings(warmup_steps=2), seed=0)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RowsDataModule:
    rows = tiny_rows(tmp_path_factory.mktemp("rows"))
    validation = Validation.of_rows(rows, 5, byte_tokenizer(), batch_size=2)
    return RowsDataModule(rows, ROWS_PER_STEP, 8, validation=validation)


def stock_trainer(folder: Path, **arguments: Any) -> Trainer:
    usual = {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **(usual | arguments))


@pytest.mark.filterwarnings("ignore")
def test_a_stock_trainer_fits_validates_logs_and_keeps_the_best(data: RowsDataModule, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val/bpb", save_top_k=1)
    rates = LearningRateMonitor("step")
    logger = CSVLogger(tmp_path, name="", version="")
    module = tiny_module()
    trainer = stock_trainer(
        tmp_path, callbacks=[best, rates, EarlyStopping("val/bpb")], logger=logger, log_every_n_steps=1
    )
    trainer.fit(module, data)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "train/lr", "train/tokens_per_second", "val/loss", "val/bpb", "val/bpb_stderr"} <= set(
        measured
    )
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8")))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == list(range(1, 9)), "optimizer steps that are done"
    by_step = {int(row["step"]): float(row["val/bpb"]) for row in rows if row["val/bpb"]}
    assert sorted(by_step) == [2, 4, 6, 8]
    assert float(best.best_model_score) == pytest.approx(min(by_step.values()))
    assert {f"lr-MuonAdamW/{role}" for role in ("wte", "lm_head")} <= set(rows[0])

    loaded = LMModule.load_from_checkpoint(best.best_model_path)
    assert loaded.config == module.config
    (again,) = stock_trainer(tmp_path, logger=False).validate(loaded, data, verbose=False)
    assert again["val/bpb"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    assert data.validation is not None and loaded.net is not None
    assert data.validation.measure(loaded.net)["val/bpb"] == pytest.approx(again["val/bpb"], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_stock_trainer_goes_on_from_its_own_checkpoint(data: RowsDataModule, tmp_path: Path) -> None:
    """ckpt_path= of Lightning: with the same weights as a run that was not stopped, to the bit."""
    whole = tiny_module()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    stock_trainer(tmp_path, callbacks=[keep], logger=False, limit_val_batches=0).fit(whole, data)
    resumed = tiny_module()
    stock_trainer(tmp_path, logger=False, limit_val_batches=0, enable_checkpointing=False).fit(
        resumed, data, ckpt_path=str(tmp_path / "step=4.ckpt")
    )
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


class Noted(LMModule):
    """Saves what it is made with, as Lightning's documentation shows it."""

    def __init__(self, config: Any, weights: Any = None, moments: Any = None, factor: float = 1.0) -> None:
        super().__init__(config, weights, moments)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore")
def test_hyperparameters_reach_the_logger(data: RowsDataModule, tmp_path: Path) -> None:
    module = Noted(tiny_module().config, factor=3.0)
    stock_trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version=""), limit_val_batches=0).fit(module, data)
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text(encoding="utf-8")) == {"factor": 3.0}


class Scaled(LMModule):
    """A subclass with an argument of its own."""

    def __init__(self, config: Any, weights: Any = None, moments: Any = None, factor: float = 1.0) -> None:
        super().__init__(config, weights, moments)
        self.save_hyperparameters("factor")

    def weighted_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert self.net is not None
        return self.hparams["factor"] * self.net.weighted_loss(inputs, targets)  # and says nothing of rows


@pytest.mark.filterwarnings("ignore")
def test_what_a_subclass_saved_comes_back(data: RowsDataModule, tmp_path: Path) -> None:
    scaled = Scaled(tiny_module().config, factor=3.0)
    trainer = stock_trainer(tmp_path, logger=False, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(scaled, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert Scaled.load_from_checkpoint(tmp_path / "a.ckpt").hparams["factor"] == 3.0
    assert scaled.row_losses(4) is None


@pytest.mark.filterwarnings("ignore")
def test_the_rows_end_where_the_steps_do(data: RowsDataModule, tmp_path: Path) -> None:
    """Without max_steps a Trainer makes epoch after epoch; the rows are one, and none of them comes again."""
    module = tiny_module()
    trainer = stock_trainer(tmp_path, max_steps=-1, max_epochs=3, logger=False, limit_val_batches=0)
    trainer.fit(module, data)
    assert trainer.global_step == 8


def test_own_classes_come_from_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    own = ["callbacks.mine._target_=own_code.Mine", "callbacks.mine.word=greetings", "stage.module=own_code.Doubled"]
    write_texts(here / "texts")
    train = ["train", "stage=base", "run=x", *tiny_overrides(here), "max_steps=3", "logger=[tensorboard,csv]"]
    assert main([*train, *own, "schedule.warmup_steps=1", "optim.max_grad_norm=1000"]) == 0
    assert "greetings from a callback beside Doubled" in capsys.readouterr().out
    folder = here / "runs" / "x" / "base"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/mine")] == [3.0] * 3
    assert [event.step for event in events.Scalars("train/mine")] == [1, 2, 3]
    late = [(event.step, event.value) for event in events.Scalars("mine/late")]
    assert [event.step for event in events.Scalars("mine/drawn")] == [1, 2, 3]
    assert [(event.step, event.value) for event in events.Scalars("train/later")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("mine/epoch")] == [(3, 7.0)]
    assert late == [(1, 10.0), (2, 20.0), (3, 30.0)], "of the step behind which it was logged"
    assert [event.value for event in events.Scalars("train/of_torchmetrics")] == [5.0] * 3
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3], "written once"
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").open(encoding="utf-8")))
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2", "3"]
    told = yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text(encoding="utf-8"))
    assert told["run"] == "x" and told["plan"]["num_steps"] == 3 and told["optim"]["max_grad_norm"] == 1000
    assert "git" in told


def test_a_source_of_ones_own_is_one_class(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    usual = [text for text in tiny_overrides(here) if not text.startswith("data")]
    train = ["train", "stage=base", "run=x", "data=custom", "data.target=own_code.Counting", *usual, "max_steps=3"]
    assert main([*train, "schedule.warmup_steps=1", "data.options.count=500"]) == 0
    assert "Counting " in (out := capsys.readouterr().out) and ": 500 documents (" in out
    assert "empty or blank" not in out
    bundle = here / "runs" / "x" / "base" / "bundle"
    evaluate = ["evaluate", f"bundle={bundle}", f"to={here / 'to'}", "suites=[bpb]", f"paths.cache={here / 'cache'}"]
    assert main(evaluate) == 2, "a bundle's class is never imported"
    assert "names the class 'own_code.Counting' as data" in capsys.readouterr().err
    own = [*evaluate[:1], "run=x", f"paths.runs={here / 'runs'}", *evaluate[3:]]
    assert main(own) == 2, "nor is that of a run, which may be from elsewhere"
    assert main([*own, "data_target=own_code.Counting"]) == 0
    assert main([*train, "schedule.warmup_steps=1", "run=y", "data.options.cuont=500"]) == 2
    assert "data: own_code.Counting with {'cuont': 500} cannot be opened: TypeError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_source_of_ones_own_is_tokenized_while_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, to which it is sent: with a lambda in it, it could not be."""
    (here / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    monkeypatch.setattr("multiprocessing.process.ORIGINAL_DIR", str(here))  # it was another folder at the start
    usual = [text for text in tiny_overrides(here) if not text.startswith("data")]
    own = ["data=custom", "data.target=own_code.Counting", "data.shuffle=shards"]
    assert main(["train", "stage=base", "run=x", *own, *usual, "max_steps=3", "schedule.warmup_steps=1"]) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("callbacks.mine._target_=own_code.function", "there is no such class"),
        ("callbacks.mine._target_=own_code.Doubled", "is no Callback of Lightning"),
        ("callbacks.mine._target_=own_cod.Mine", "cannot be imported"),
        ("callbacks.mine={_target_: own_code.Mine, wrd: 3}", "did you mean word"),
        ("stage.module=own_code.Mine", "is no subclass of nanochat_pl.LMModule"),
        ("stage.module=own_code.Nothing", "there is no such class"),
        ("stage.module=own_code.Wide", "is made with (config, weights, moments), as LMModule is"),
        ("data=custom", "needs data.target=package.module.Class"),
        ("data.target=own_code.Counting", "has no meaning for"),
    ],
)
def test_wrong_ones_are_refused_before_anything_is_done(
    wrong: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    assert main(["train", "experiment=tiny", "stage=base", "run=x", wrong]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


def losses_of(folder: str, strategy: str) -> list[float]:
    """20 steps of a fit on these processes; the loss of each."""
    fit_tiny(Path(folder) / strategy, 20, trainer={"strategy": strategy})
    with (Path(folder) / strategy / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


def test_lightnings_ddp_has_the_losses_of_the_own_strategy(tmp_path: Path) -> None:
    """Two gloo processes, 20 steps, within 1e-5: gradients are summed in another order."""
    auto = run(2, losses_of, str(tmp_path), "auto")[0]
    ddp = run(2, losses_of, str(tmp_path), "ddp")[0]
    assert len(auto) == 20 and auto != [auto[0]] * 20
    assert ddp == pytest.approx(auto, abs=1e-5)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            ["callbacks.a._target_=own_code.Stateful", "callbacks.b._target_=own_code.Stateful"],
            "callbacks: 2 of the class Stateful have a state, and one name for it.",
        ),
        (["stage.module=own_code.Adam"], "configure_optimizers gives AdamW, no subclass of MuonAdamW."),
    ],
)
def test_what_shows_itself_once_the_training_begins_is_one_sentence(
    own: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    write_texts(here / "texts")
    assert main(["train", "stage=base", "run=x", *tiny_overrides(here), "max_steps=3", *own]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


class Ranked(LMModule):
    """Logs 10 and 20, on two processes."""

    columns = ("train/mean", "train/max", "train/own")

    def weighted_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = 10.0 * (1 + collectives.rank())
        self.log("train/mean", value, sync_dist=True)
        self.log("train/max", value, sync_dist=True, reduce_fx="max")
        self.log("train/own", value)
        return super().weighted_loss(inputs, targets)


def what_is_logged(folder: str) -> list[list[str]]:
    """Of two steps."""
    fit_tiny(Path(folder), 2, module=Ranked)
    with (Path(folder) / "metrics.csv").open(encoding="utf-8") as file:
        return [[row[name] for name in Ranked.columns] for row in csv.DictReader(file)]


def test_what_is_logged_with_sync_dist_is_of_all_processes(tmp_path: Path) -> None:
    assert run(2, what_is_logged, str(tmp_path))[0] == [["15.0", "20.0", "10.0"]] * 2
