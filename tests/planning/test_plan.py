"""The plan's reasons, overrides, errors, and its JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.schedules import ScheduleSettings
from nanochat_pl.planning import (
    HorizonSettings,
    Plan,
    RowOptions,
    check_horizon,
    estimate_cpu_seconds,
    hyperparameters,
    make_finetune_plan,
    make_plan,
    plan_rows,
    plan_sections,
    width_remark,
)
from nanochat_pl.planning.plan import show

SMALL = ModelSettings(depth=4, head_dim=64, sequence_len=256)


def small_plan(optim: OptimSettings | None = None, model: ModelSettings = SMALL, **keys: Any) -> Plan:
    names = {"max_steps", "flops_budget", "tokens_per_parameter", "total_batch_tokens"}
    horizon = HorizonSettings(**{name: keys.pop(name) for name in names & set(keys)})
    row_keys = {field.name for field in fields(RowOptions)} & set(keys)
    options = RowOptions(**{name: keys.pop(name) for name in row_keys})
    return make_plan(model, horizon, optim or OptimSettings(), vocab_size=4096, options=options, **keys)


def test_precedence_is_steps_then_flops_then_ratio() -> None:
    ratio = small_plan(total_batch_tokens=4096)
    flops = small_plan(total_batch_tokens=4096, flops_budget=1e13)
    steps = small_plan(total_batch_tokens=4096, flops_budget=1e13, max_steps=20)
    assert ratio["num_steps"] == ratio["horizon_tokens"] // 4096
    assert flops["num_steps"] == round(1e13 / (flops["flops_per_token"] * 4096))
    assert steps["num_steps"] == 20
    assert steps["total_tokens"] == 20 * 4096


def test_batch_and_weight_decay_come_from_the_ratio_whatever_sets_the_length() -> None:
    ratio, steps = small_plan(), small_plan(max_steps=20)
    for name in ("horizon_tokens", "total_batch_tokens", "weight_decay", "matrix_lr"):
        assert ratio[name] == steps[name]


def test_explain_gives_formula_inputs_and_what_overrode_it() -> None:
    plan = small_plan(total_batch_tokens=4096)
    text = plan.explain("total_batch_tokens")
    assert text.splitlines()[0] == "total_batch_tokens = 4,096"
    assert "2 ** round(log2(524288 * (horizon_tokens / reference_tokens) ** 0.383))" in text
    assert f"horizon_tokens = {plan['horizon_tokens']:,}" in text
    assert "overridden by total_batch_tokens=4096; the formula gives 131,072" in text
    assert "overridden" not in small_plan().explain("total_batch_tokens")


def test_explain_of_an_unknown_value_names_the_nearest() -> None:
    with pytest.raises(UserError, match="total_batch_tokens"):
        small_plan().explain("total_batch_token")


def test_every_input_of_every_formula_is_named_in_it_with_the_value_used() -> None:
    plan = small_plan()
    for name, derived in plan.values.items():
        for each, value in derived.inputs.items():
            assert plan[each] == value, (name, each)


def test_a_given_rate_is_taken_as_it_is_and_the_recipes_is_scaled_by_the_batch() -> None:
    plan = small_plan(OptimSettings(matrix_lr=0.012, weight_decay=0.05), total_batch_tokens=4096)
    assert plan["matrix_lr"] == 0.012 and "optim.matrix_lr=0.012" in plan.explain("matrix_lr")
    assert plan["weight_decay"] == 0.05
    assert plan["embedding_lr"] == pytest.approx(0.3 * (4096 / 2**19) ** 0.5)
    assert plan["lr_wte"] == pytest.approx(plan["embedding_lr"] * 3**0.5)
    assert plan["lr_smear"] == 0.2


def test_the_optimizer_gets_what_the_plan_says() -> None:
    optim = OptimSettings(matrix_lr=0.012)
    plan = small_plan(optim)
    hyper = hyperparameters(plan, optim, "bfloat16")
    assert hyper.to_inherit() == plan.to_inherit()
    assert (hyper.width, hyper.compute_dtype, hyper.matrix_lr) == (256, "bfloat16", 0.012)


def test_a_derived_batch_is_whole_rows_of_any_length_and_device_batch_size_need_not_divide_them() -> None:
    for sequence_len in (100, 300, 1000):
        plan = small_plan(model=ModelSettings(depth=4, sequence_len=sequence_len), device_batch_size=7)
        assert plan["total_batch_tokens"] == plan["rows_per_step"] * sequence_len
        assert plan["device_batch_size"] == 7


@pytest.mark.slow
def test_every_depth_is_planned_and_built_with_whole_heads() -> None:
    for depth in range(1, 65):
        plan = small_plan(model=ModelSettings(depth=depth))
        assert plan["width"] == plan["num_heads"] * 128 >= depth * 64
        assert plan["num_steps"] >= 1 and plan["device_batch_size"] >= 1
        net = GPT(resolve_model(ModelSettings(depth=depth), 4096, "float32"))  # on the meta device: no memory
        assert sum(parameter.numel() for parameter in net.parameters()) == plan["parameters_total"]
        remark = width_remark(plan)
        assert (remark is None) == (depth % 2 == 0)
        if remark is not None:
            near = {1: "2"}.get(depth, f"{depth - 1} or {depth + 1}")
            assert f"instead of {depth * 64:,}" in remark and remark.endswith(f"model.depth={near}.")


def test_the_nearest_good_depths_of_another_aspect_ratio() -> None:
    for depth, near in ((7, "8"), (20, "16 or 24")):
        plan = small_plan(model=ModelSettings(depth=depth, aspect_ratio=48, head_dim=128))
        assert str(width_remark(plan)).endswith(f"nearest that divide: model.depth={near}.")
    assert width_remark(finetune()) is None, "the parent's model is what it is"


def test_validation_takes_about_one_percent_of_the_time() -> None:
    plan = small_plan(max_steps=1000, total_batch_tokens=4096, evaluate_every_steps=250)
    training = 1000 * plan["rows_per_step"]
    validation = 4 * plan["validation_rows"] / 3  # after 250, 500, 750 and 1000 steps; forward only
    assert validation / training == pytest.approx(0.01, rel=0.05)
    short = small_plan(max_steps=5, total_batch_tokens=4096)
    assert 2 <= short["validation_rows"] <= 5 * short["rows_per_step"] / 4, "less than what is trained on"
    assert small_plan(max_steps=5, total_batch_tokens=2**15)["validation_rows"] == 32
    assert small_plan(validation_rows=8)["validation_rows"] == 8


def test_to_plain_is_json_and_comes_back() -> None:
    plan = small_plan(max_steps=20)
    back = Plan.from_plain(json.loads(json.dumps(plan.to_plain(), allow_nan=False)))
    assert back.to_plain() == plan.to_plain()
    assert back.explain("num_steps") == plan.explain("num_steps")
    with pytest.raises(UserError, match="formula"):
        Plan.from_plain({"num_steps": {"value": 3, "formula": 4}})
    with pytest.raises(UserError, match="plan"):
        Plan.from_plain({"num_steps": 3})


def test_rows_for_people() -> None:
    rows = {row.name: row for row in plan_rows(small_plan(max_steps=2000))}
    assert rows["num_steps"].value == "2,000"
    assert rows["num_steps"].source == "max_steps=2000"
    assert rows["width"].source == "derived"
    assert rows["windows"].value == "128 128 128 256"
    assert show([512] * 9 + [2048]) == "9 × 512, 1 × 2,048"


def test_the_plan_tells_the_parts_of_the_schedule() -> None:
    plan = small_plan(max_steps=100, schedule=ScheduleSettings(warmdown_ratio=0.3))
    assert (plan["warmup_steps"], plan["warmdown_steps"]) == (40, 30)
    assert "warmup_steps" not in small_plan()


def test_a_horizon_of_ones_own_past_four_epochs_is_refused_with_the_keys_that_set_another() -> None:
    plan = small_plan(total_batch_tokens=4096)
    with pytest.raises(UserError, match="epochs of the 6,000,000 tokens") as error:
        check_horizon(plan, tokens_at_hand=6_000_000)
    assert f"max_steps={4 * 6_000_000 // 4096}" in error.value.fix
    for key in ("flops_budget", "tokens_per_parameter", "total_batch_tokens", "model.depth"):
        assert key in error.value.fix
    check_horizon(plan, tokens_at_hand=10**9)


def test_a_horizon_past_an_hour_on_a_cpu_is_refused() -> None:
    plan = small_plan(total_batch_tokens=4096)
    seconds = estimate_cpu_seconds(plan["total_flops"], num_cores=2)
    with pytest.raises(UserError, match="hours on this CPU") as error:
        check_horizon(plan, tokens_at_hand=10**9, estimated_seconds=seconds)
    assert "more data" not in error.value.fix, "it makes no step faster"
    with pytest.raises(UserError) as error:
        check_horizon(plan, tokens_at_hand=1000)
    assert "more data" in error.value.fix
    check_horizon(plan, tokens_at_hand=10**9, estimated_seconds=3599.0)


@pytest.mark.parametrize("given", [{"max_steps": 10**6}, {"flops_budget": 1e18}, {"tokens_per_parameter": 500.0}])
def test_a_horizon_that_was_asked_for_is_never_refused(given: dict[str, Any]) -> None:
    check_horizon(small_plan(**given), tokens_at_hand=1000, estimated_seconds=1e9)


def test_one_step_too_many_tokens_says_so() -> None:
    with pytest.raises(UserError) as error:
        check_horizon(small_plan(), tokens_at_hand=1000)
    assert "total_batch_tokens" in error.value.fix and "max_steps=0" not in error.value.fix


def finetune(**keys: Any) -> Plan:
    config = resolve_model(SMALL, 4096, "float32")
    horizon = HorizonSettings(**keys.pop("horizon", {}))
    optim = keys.pop("optim", OptimSettings())
    given = {"num_rows": 1000, "parent": small_plan().to_inherit(), "parent_batch_tokens": 4096, **keys}
    return make_finetune_plan(config, horizon, optim, **given)


def test_a_later_stage_takes_its_length_from_its_rows_and_the_rest_from_its_parent() -> None:
    plan = finetune(num_rows=2000, num_epochs=2.0, optim=OptimSettings(scalar_lr=0.1))
    assert (plan["rows_per_step"], plan["num_steps"]) == (16, 125)
    assert plan["matrix_lr"] == small_plan()["matrix_lr"]
    assert plan.values["matrix_lr"].overridden_by == "inherited from base"
    assert plan["scalar_lr"] == 0.1
    assert finetune(horizon={"max_steps": 7})["num_steps"] == 7
    assert finetune(num_rows=1001, horizon={"total_batch_tokens": 2048})["num_steps"] == 126, "no row is left over"
    assert hyperparameters(plan, OptimSettings(), "float32").sources["matrix_lr"] == "inherited from base"


def test_a_later_stage_with_fewer_rows_than_a_step_takes_says_so() -> None:
    with pytest.raises(UserError, match="16 rows, the data has 10") as error:
        finetune(num_rows=10)
    assert "total_batch_tokens=256" in error.value.fix


def test_a_small_corpus_bounds_the_batch() -> None:
    """The reference's batch would be a twentieth of the corpus: a run of a few epochs would be some dozen steps."""
    plan = make_plan(
        ModelSettings(depth=4), HorizonSettings(), OptimSettings(), vocab_size=32768, tokens_at_hand=5_000_000
    )
    assert plan["total_batch_tokens"] == 2**14
    assert plan.values["total_batch_tokens"].inputs["tokens_at_hand"] == 5_000_000
    large = make_plan(
        ModelSettings(depth=4), HorizonSettings(), OptimSettings(), vocab_size=32768, tokens_at_hand=10**11
    )
    assert large["total_batch_tokens"] == 2**18


def test_a_ratio_that_gives_no_token() -> None:
    with pytest.raises(UserError, match="tokens_per_parameter"):
        make_plan(ModelSettings(), HorizonSettings(tokens_per_parameter=1e-9), OptimSettings(), vocab_size=300)


def test_rows_in_memory_are_not_more_than_a_step_has() -> None:
    plan = make_plan(
        ModelSettings(sequence_len=256),
        HorizonSettings(max_steps=1, total_batch_tokens=4096),
        OptimSettings(),
        vocab_size=300,
        options=RowOptions(device_batch_size=5000),
    )
    assert plan["device_batch_size"] == 16


def test_validation_tokens_are_whole_batches_of_all_devices_as_the_recipe_counts_them() -> None:
    """tokens // (rows × T × processes) batches; T is the model's."""
    given = {"total_batch_tokens": 2**16, "max_steps": 10}
    one = small_plan(**given, device_batch_size=8, validation_tokens=100_000)
    assert one["validation_rows"] == 100_000 // (8 * one["sequence_len"]) * 8
    three = small_plan(**given, device_batch_size=8, num_devices=3, validation_tokens=100_000)
    assert three["validation_rows"] == 100_000 // (8 * 3 * one["sequence_len"]) * 24
    assert small_plan(**given, device_batch_size=8, validation_tokens=1)["validation_rows"] == 8, "one batch at least"
    assert "evaluation.num_tokens=100000" in one.explain("validation_rows")


def test_the_horizon_counts_the_parameters_that_are_asked_for() -> None:
    scaling = small_plan(total_batch_tokens=4096)
    every = make_plan(
        SMALL, HorizonSettings(counted_parameters="all", total_batch_tokens=4096), OptimSettings(), vocab_size=4096
    )
    assert every["scaling_parameters"] == every["parameters_total"] > scaling["scaling_parameters"]
    assert every["num_steps"] == 12 * every["parameters_total"] // 4096


def test_rates_that_know_no_batch() -> None:
    plan = small_plan(OptimSettings(scale_by_batch=False), total_batch_tokens=4096)
    assert (plan["matrix_lr"], plan["weight_decay"], plan["embedding_lr"]) == (0.02, 0.28, 0.3)
    assert "scale_by_batch" in plan.explain("batch_lr_scale")


def test_every_value_has_a_section_and_sections_keep_together() -> None:
    plan = small_plan(max_steps=100, schedule=ScheduleSettings())
    sections = plan_sections(plan)
    assert list(sections) == ["Model", "Horizon and batch", "Optimizer", "Validation"]
    assert sum(map(len, sections.values())) == len(plan.values)
    assert list(plan_sections(finetune())) == list(sections)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("weights_bytes", 3 * 2**30 // 2, "1.50 GiB"),
        ("chat_cache_bytes", 100, "100 bytes"),
        ("training_seconds", 30.04, "30 seconds"),
        ("training_seconds", 600.0, "10 minutes"),
        ("training_seconds", 86400.0, "24 hours"),
        ("training_seconds", 864000.0, "10 days"),
        ("training_seconds", 1e9, "31.7 years"),
        ("total_flops", 15072000000000000000, "1.507e+19"),
        ("num_steps", 4980, "4,980"),
        ("epochs", None, "unknown"),
    ],
)
def test_values_are_shown_with_their_units(name: str, value: Any, shown: str) -> None:
    assert show(value, name) == shown
