"""Six steps of the two older versions of the recipe, and their schedules, against the reference (golden/era_*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from nanochat_pl.cli.train import compose_train
from nanochat_pl.model.config import resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from tests.helpers.models import era_model_config, load_net, size_overrides
from tests.optim.test_golden_optimizer import backward

NAMES = {"oct2025": "nanochat_2025_10", "feb2026": "nanochat_2026_02"}


def facts_of(golden: Path, era: str, file: str) -> dict[str, Any]:
    return json.loads((golden / f"era_{era}" / file).read_text(encoding="utf-8"))


def net_of(golden: Path, era: str) -> GPT:
    meta = era_model_config(golden, f"era_{era}")
    overrides = [f"model={NAMES[era]}", *size_overrides(meta)]
    if "window_pattern" in meta:
        overrides.append(f"model.window_pattern={meta['window_pattern']}")
    config = resolve_model(compose_train(overrides).config.model, meta["vocab_size"], "float32")
    return load_net(golden, config, f"era_{era}/model_000003.pt")


def schedule_of(era: str, **keys: Any) -> ScheduleSettings:
    overrides = [f"schedule={NAMES[era]}", *(f"schedule.{key}={value}" for key, value in keys.items())]
    return compose_train(overrides).config.schedule


def optimizer_of(net: GPT, era: str, facts: dict[str, Any]) -> tuple[MuonAdamW, float | None]:
    """The preset with the golden run's own rates, and the norm that gradients are clipped to."""
    overrides = [f"optim={NAMES[era]}", f"optim.muon.dtype={facts['muon_arithmetic']}"]
    overrides += [f"optim.{name}={value}" for name, value in facts["base_lrs"].items()]
    if (decay := facts.get("adamw_weight_decay")) is not None:
        overrides += [f"optim.adamw.{role}.weight_decay={decay}" for role in ("lm_head", "wte")]
    settings = compose_train(overrides).config.optim
    assert settings.max_grad_norm == facts["grad_clip"]
    hyper = resolve_hyperparameters(settings, width=net.config.width)
    return build_optimizer(net.named_parameters(), parameter_roles(net), hyper), settings.max_grad_norm


@pytest.mark.parametrize("era", NAMES)
def test_groups(golden: Path, era: str) -> None:
    net, facts = net_of(golden, era), facts_of(golden, era, "optimizer_6_steps.json")
    ours = {frozenset(group["param_names"]): group for group in optimizer_of(net, era, facts)[0].param_groups}
    theirs = facts["groups"]
    # The reference of that autumn keeps matrices of one number of elements together, whatever their shape.
    muon = {name for group in theirs if group["kind"] == "muon" for name in group["names"]}
    assert muon == {name for names, group in ours.items() if group["kind"] == "muon" for name in names}
    for want in theirs:
        if want["kind"] == "muon":
            rates = [group["initial_lr"] for group in ours.values() if group["kind"] == "muon"]
            assert all(rate == pytest.approx(want["initial_lr"], rel=1e-12) for rate in rates)
            continue
        group = ours[frozenset(want["names"])]
        assert group["kind"] == "adamw" and group["initial_lr"] == pytest.approx(want["initial_lr"], rel=1e-12)
        assert [list(group["betas"]), group["eps"], group["weight_decay"]] == [
            want["betas"],
            want["eps"],
            want["weight_decay"],
        ]


@pytest.mark.parametrize(("file", "of_loss", "of_change"), [("", 5e-6, 1e-3), ("_bf16", 2e-3, 0.15)])
@pytest.mark.parametrize("era", NAMES)
def test_six_steps(golden: Path, era: str, file: str, of_loss: float, of_change: float) -> None:
    facts = facts_of(golden, era, f"optimizer_6_steps{file}.json")
    tensors = load_file(golden / f"era_{era}" / f"optimizer_6_steps{file}.safetensors")
    net = net_of(golden, era)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer, most = optimizer_of(net, era, facts)
    of_base = facts["schedule"]
    schedule = schedule_of(
        era,
        warmup_ratio=of_base["warmup_ratio"],
        warmdown_ratio=of_base["warmdown_ratio"],
        final_lr_fraction=of_base["final_lr_frac"],
    )
    norms = []
    for number, step in enumerate(facts["steps"]):
        assert backward(net, tensors[f"batch.{number}"]) == pytest.approx(step["loss_before"], abs=of_loss), number
        values = schedule_values(schedule, step["schedule_step"], of_base["num_iterations"])
        assert values.lr_multiplier == pytest.approx(step["lr_multiplier"], rel=1e-12)
        assert values.muon_momentum == pytest.approx(step["muon_momentum"], rel=1e-12)
        if "muon_weight_decay" in step:
            decay = facts["base_lrs"]["weight_decay"] * values.weight_decay_multiplier
            assert decay == pytest.approx(step["muon_weight_decay"], rel=1e-12)
        norms.append(float(optimizer.reduce_gradients()))
        assert norms[-1] == pytest.approx(step["grad_norm"], rel=max(1e-5, of_loss))
        if most is not None:
            optimizer.scale_gradients(min(1.0, most / (norms[-1] + 1e-6)))
        optimizer.set_step_values(values)
        optimizer.step()
        if number in (0, len(facts["steps"]) - 1):
            prefix = "param_after_1." if number == 0 else "param."
            worst = furthest(net, tensors, prefix, start)
            assert max(worst.values()) <= of_change, worst
    after = backward(net, tensors[f"batch.{len(norms) - 1}"])
    assert after == pytest.approx(facts["loss_after_on_the_last_batch"], abs=2 * of_loss)


def furthest(net: GPT, tensors: dict[str, Tensor], prefix: str, start: dict[str, Tensor]) -> dict[str, float]:
    """The distance of each parameter from the golden one, in parts of how far that has moved."""
    return {
        name: float((parameter.detach() - want).norm() / (want - start[name]).norm())
        for name, parameter in net.named_parameters()
        for want in [tensors[prefix + name]]
    }


@pytest.mark.parametrize("era", NAMES)
def test_schedules_of_base(golden: Path, era: str) -> None:
    table = facts_of(golden, era, "schedules.json")["base"]
    exact = {"rel": 1e-12, "abs": 1e-15}
    assert {"warmup_ratio", "warmdown_ratio", "final_lr_frac"} == set(table["defaults"])
    settings = schedule_of(era)
    defaults = table["defaults"]
    assert (settings.warmdown_ratio, settings.final_lr_fraction) == (
        defaults["warmdown_ratio"],
        defaults["final_lr_frac"],
    )
    assert settings.warmup_length(1000) == round(1000 * defaults["warmup_ratio"])
    keys = {"warmup_ratio": "warmup_ratio", "warmdown_ratio": "warmdown_ratio", "final_lr_frac": "final_lr_fraction"}
    schedules: dict[tuple, ScheduleSettings] = {}
    for case in table["cases"]:
        shape = tuple(case[key] for key in keys)
        if shape not in schedules:
            schedules[shape] = schedule_of(era, **dict(zip(keys.values(), shape, strict=True)))
        values = schedule_values(schedules[shape], case["step"], case["num_iterations"])
        assert values.lr_multiplier == pytest.approx(case["lr_multiplier"], **exact), case
        assert values.muon_momentum == pytest.approx(case["muon_momentum"], **exact), case
        if "muon_weight_decay" in case:
            decay = table["muon_weight_decay_at_step_0"] * values.weight_decay_multiplier
            assert decay == pytest.approx(case["muon_weight_decay"], **exact), case


@pytest.mark.parametrize(
    ("era", "stage"), [("oct2025", "mid"), ("oct2025", "sft"), ("oct2025", "rl"), ("feb2026", "sft"), ("feb2026", "rl")]
)
def test_schedules_of_later_stages(golden: Path, era: str, stage: str) -> None:
    table = facts_of(golden, era, "schedules.json")[stage]
    name = f"{NAMES[era]}_{stage}" if stage != "rl" else "nanochat_2025_10_sft"  # of rl all but the fraction
    settings = compose_train([f"schedule={name}"]).config.schedule
    fraction = settings.initial_lr_fraction
    if stage != "rl":
        assert fraction == table["init_lr_frac"]
    for case in table["lr"]:
        length = case.get("num_iterations", 10_000)
        step = case["step"] if "step" in case else round(case["progress"] * length)
        values = schedule_values(settings, step, length)
        assert values.lr_multiplier / fraction == pytest.approx(case["lr_multiplier"], rel=1e-12, abs=1e-15), case
        assert values.weight_decay_multiplier == 0.0
    if isinstance(table["momentum"], str):
        assert table["momentum"].startswith("constant 0.95")
        assert all(schedule_values(settings, step, 700).muon_momentum == pytest.approx(0.95) for step in range(700))
        return
    for case in table["momentum"]:
        momentum = schedule_values(settings, case["step"], 10_000).muon_momentum
        assert momentum == pytest.approx(case["muon_momentum"], rel=1e-12), case


def test_a_cosine_warmdown_begins_and_ends_where_the_line_does() -> None:
    line, cosine = (ScheduleSettings(warmdown=shape) for shape in ("linear", "cosine"))
    found = [[schedule_values(each, step, 1000).lr_multiplier for step in range(1001)] for each in (line, cosine)]
    assert found[0][:351] == found[1][:351] and found[1][1000] == pytest.approx(0.05)
    assert found[1][675] == pytest.approx(found[0][675]), "halfway"
    assert all(above > below for above, below in zip(found[1][360:670], found[0][360:670], strict=True))
    assert all(above < below for above, below in zip(found[1][680:990], found[0][680:990], strict=True))
