"""`nanochat-pl plan`: what is printed, for which device, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import _say_plan
from nanochat_pl.data.sources import token_counts
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.planning import HorizonSettings, make_plan

ERAS = ("nanochat", "nanochat_2026_02", "nanochat_2025_10")


@pytest.fixture(autouse=True)
def no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "built_python_docs", lambda cache_dir: None)


def plan(*arguments: str) -> int:
    """Of the docstrings, of which there are none here, unless other data is given."""
    group = [] if any(text.startswith("data") for text in arguments) else ["data=python_docs"]
    return main(["plan", "trainer.accelerator=cpu", *group, *arguments])


@pytest.mark.parametrize("era", ERAS)
def test_sections_of_every_generation(era: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(f"model={era}", "model.depth=6") == 0
    out = capsys.readouterr().out
    titles = [
        "Model",
        "Horizon and batch",
        "Optimizer",
        "Validation",
        "Memory on CPU",
        "Time and cost",
        "Data",
        "Next:",
    ]
    places = [out.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    assert out.startswith("Plan for CPU")
    for name in ("parameters_total", "lr_matrix", "weight_decay", "total_flops", "step_peak_bytes", "training_seconds"):
        assert name in out
    command = f"nanochat-pl train trainer.accelerator=cpu data=python_docs model={era} model.depth=6"
    assert f"train what a CPU can       {command.replace('model.depth=6', 'model.depth=4 max_steps=20')}\n" in out
    assert list(here.iterdir()) == []


def test_a_named_gpu_with_its_price(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["model.depth=20", "data=climbmix", "hardware=h100", "num_devices=8", "price_per_hour=2.5", "mfu=0.5"]
    assert plan(*asked) == 0
    out = capsys.readouterr().out
    assert "Memory on h100" in out and "79.00 GiB" in out
    assert "mfu=0.5" in out and "cost" in out and "1.1 hours" in out
    assert "shards_needed" in out and "data=climbmix has 6,542" in out
    assert "Memory is that of one of" in out
    assert "nanochat-pl train trainer.accelerator=cpu model.depth=20 data=climbmix\n" in out, "without plan's own keys"


@pytest.mark.parametrize(
    ("hardware", "dtype"), [("t4", "float32"), ("V100-SXM2-16GB", "float32"), ("l4", "bfloat16"), ("cpu", "CPU")]
)
def test_the_type_is_the_hardwares(hardware: str, dtype: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(f"hardware={hardware}") == 0
    assert dtype in capsys.readouterr().out


def test_a_wrong_wish_is_one_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("hardware=h1000") == 2
    err = capsys.readouterr().err
    assert "hardware=h1000: is not in the table of known GPUs; did you mean h100" in err and "mi300x" in err
    assert plan("mfu=1.5", "price_per_hour=-1", "num_devices=0") == 2
    err = capsys.readouterr().err
    assert "mfu=1.5: is above 1." in err and "price_per_hour=-1: is below 0." in err
    assert "num_devices=0: is below 1." in err
    Path("my_text").mkdir()
    assert plan("data=local", "data.path=my_texts/") == 2
    assert "; did you mean my_text?" in capsys.readouterr().err
    assert plan("data=local", "data.path=nowhere") == 2
    assert "data.path='nowhere': there is no such file or folder" in capsys.readouterr().err


def test_every_value_can_be_explained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "step_peak_bytes",
        "training_seconds",
        "text_bytes",
        "epochs",
        "device_batch_size",
        "chat_cache_bytes",
    ):
        assert plan(f"explain={name}") == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name} = ") and "formula: " in out


def test_what_is_not_known_is_unknown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("explain=epochs") == 0
    assert capsys.readouterr().out.startswith("epochs = unknown\n")


def test_the_text_at_hand_gives_epochs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("x" * 480_000, encoding="utf-8")
    keys = ["data=local", "data.path=a.txt", "model.sequence_len=512", "total_batch_tokens=1024", "max_steps=186"]
    assert plan(*keys, "explain=tokens_at_hand") == 0
    assert capsys.readouterr().out.startswith("tokens_at_hand = 95,000\n")  # 5 % are held out
    assert plan(*keys, "explain=epochs") == 0
    assert capsys.readouterr().out.startswith("epochs = 2.0048")
    line = json.dumps({"text": "x" * 96})
    Path("b.jsonl").write_text(f"{line}\n" * 10, encoding="utf-8")
    assert plan("data=local", "data.path=b.jsonl", "data.validation_path=a.txt", "explain=tokens_at_hand") == 0
    assert capsys.readouterr().out.startswith("tokens_at_hand = 2")
    Path("b.txt").write_text("y" * 480_000, encoding="utf-8")
    one, other = ([f"data.sources.{name}.{key}" for key in ("name=local", "weight=1")] for name in ("one", "other"))
    mixture = ["data.name=mixture", *one, *other, "data.sources.one.path=a.txt", "data.sources.other.path=b.txt"]
    assert plan(*mixture, "explain=tokens_at_hand") == 0
    assert capsys.readouterr().out.startswith("tokens_at_hand = 190,000\n")
    assert {path.name for path in here.iterdir()} == {"a.txt", "b.jsonl", "b.txt"}


@pytest.mark.parametrize(
    ("depth", "length", "shown", "asks"),
    [("4", "max_steps=1", " seconds", False), ("40", "max_steps=null", " years", True)],
)
def test_a_plan_says_what_train_would_ask(
    depth: str, length: str, shown: str, asks: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(f"model.depth={depth}", length) == 0
    out = capsys.readouterr().out
    assert shown in out
    assert ("train refuses it unasked: The plan's own horizon" in out) == asks


def test_a_width_that_is_rounded_up_is_named_with_the_depths_that_need_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("model.depth=5") == 0
    out = capsys.readouterr().out
    assert "model.depth=5: width 384 instead of 320, for whole heads of 128" in out
    assert "nearest that divide: model.depth=4 or 6." in out
    assert plan("model.depth=6") == 0
    assert "instead of" not in capsys.readouterr().out


def test_train_names_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    for depth, named in ((5, True), (6, False)):
        _say_plan(make_plan(ModelSettings(depth=depth), HorizonSettings(), OptimSettings(), vocab_size=4096))
        assert ("width 384 instead of 320" in capsys.readouterr().out) == named


def test_a_model_that_does_not_fit_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("model.depth=200", "hardware=t4") == 0
    out = capsys.readouterr().out
    assert "A step of device_batch_size=1 takes" in out and "t4 has 14.50 GiB" in out
    assert plan("model.depth=200", "hardware=t4", "explain=largest_batch_both") == 0
    assert capsys.readouterr().out.startswith("largest_batch_both = 0\n")


@pytest.mark.parametrize(
    "key",
    ["tokens_per_parameter=1e300", "flops_budget=1e300", f"max_steps={10**400}", f"total_batch_tokens={10**400}"],
)
def test_lengths_that_no_figure_can_hold(key: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sums of the plan overflowed."""
    assert plan(key) == 2
    assert f"{key.partition('=')[0]}=" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        ["tokens_per_parameter=1e9"],
        ["flops_budget=1e36"],
        [f"max_steps={10**12}", f"total_batch_tokens={2**40}"],
        ["tokens_per_parameter=1e9", "hardware=h100", "price_per_hour=1e9"],
    ],
)
def test_the_longest_that_may_be_asked_for(keys: list[str], here: Path) -> None:
    assert plan(*keys) == 0


def test_a_budget_below_one_step_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("flops_budget=1") == 0
    assert "flops_budget=1: is less than one step takes" in capsys.readouterr().out
    assert plan("flops_budget=1e18") == 0
    assert "less than one step" not in capsys.readouterr().out


def test_more_devices_than_rows_and_another_machine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("num_devices=65536", "hardware=h100") == 0
    out = capsys.readouterr().out
    assert "num_devices=65536: a step has" in out and "train it there" in out
    assert plan("num_devices=2") == 0
    assert "so the other devices would have none" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hardware", "fp8", "value", "remark"),
    [
        ("h100", "true", "true", "trainer.fp8=true: model.depth=4 is likely to be slower"),
        ("a100-80gb", "true", "false", "trainer.fp8=true: a100-80gb in bfloat16 has none"),
        ("a100-80gb", "auto", "false", "trainer.fp8=auto: a100-80gb in bfloat16 has none"),
        ("a100-80gb", "emulate", "true", "trainer.fp8=emulate: it rounds as FP8 does"),
    ],
)
def test_fp8_of_the_hardware_is_told(
    hardware: str, fp8: str, value: str, remark: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("model.depth=4", f"hardware={hardware}", f"trainer.fp8={fp8}", "trainer.compile=true") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f" fp8 {value} trainer.fp8; its time and memory are not known here" in out
    assert remark in out
    assert ("; train refuses it." in out) == (hardware == "a100-80gb" and fp8 == "true")
