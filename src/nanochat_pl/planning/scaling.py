"""Make the plan of a stage: one dial, depth, and everything follows.

Sources: golden/plan.json, golden/era_*/plan.json; batch size by the horizon (Power Lines, arXiv 2505.13738), learning
rate by the square root of the batch, weight decay by batch and horizon (arXiv 2405.13698).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.config import DType, GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.counts import count_parameters, flops_per_token
from nanochat_pl.optim.config import Hyperparameters, OptimSettings, adamw_rules, learning_rate, resolve_hyperparameters
from nanochat_pl.optim.rules import ADAMW_RULES, RECIPE
from nanochat_pl.optim.schedules import ScheduleSettings
from nanochat_pl.planning.batch_size import RowOptions, plan_rows_in_memory, plan_validation
from nanochat_pl.planning.horizon import HorizonSettings
from nanochat_pl.planning.plan import Plan

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383
TOKENS_PER_PARAMETER = 12.0
# Of a small corpus, the reference's batch would be a large part, and a run of a few epochs a handful of steps.
MIN_STEPS_PER_EPOCH = 256
# Sections of a plan.
MODEL, HORIZON, OPTIMIZER, VALIDATION = "Model", "Horizon and batch", "Optimizer", "Validation"


def make_plan(
    model: ModelSettings,
    horizon: HorizonSettings,
    optim: OptimSettings,
    *,
    vocab_size: int,
    compute_dtype: DType = "float32",
    options: RowOptions | None = None,
    schedule: ScheduleSettings | None = None,
    tokens_at_hand: int | None = None,
) -> Plan:
    """The plan of pretraining.

    Args:
        options: device, memory and validation.
        schedule: of the stage, where the plan is to tell how long its parts are.
        tokens_at_hand: training tokens that the data has, one epoch, where that is known: it bounds the batch.

    Raises:
        UserError: total_batch_tokens is no whole number of rows.
    """
    config = resolve_model(model, vocab_size, compute_dtype)
    reference = resolve_model(
        dataclasses.replace(model, depth=REFERENCE_DEPTH, num_kv_heads=None), vocab_size, compute_dtype
    )
    plan, options = Plan(), options or RowOptions()
    _plan_model(plan, config, model)
    plan.section = HORIZON
    _plan_horizon(plan, reference, horizon, tokens_at_hand)
    _plan_length(plan, horizon)
    plan_rows_in_memory(plan, config, options)
    plan.section = OPTIMIZER
    _plan_scales(plan, optim)
    hyper = resolve_hyperparameters(
        optim,
        width=config.width,
        compute_dtype=compute_dtype,
        batch_lr_scale=plan["batch_lr_scale"],
        weight_decay_scale=plan["weight_decay_scale"],
    )
    _plan_optimizer(plan, config, optim, hyper)
    _plan_schedule(plan, schedule)
    plan.section = VALIDATION
    plan_validation(plan, options)
    return plan


def make_finetune_plan(
    config: GPTConfig,
    horizon: HorizonSettings,
    optim: OptimSettings,
    *,
    num_rows: int,
    num_epochs: float = 1.0,
    parent: Mapping[str, float],
    parent_batch_tokens: int,
    parent_name: str = "base",
    options: RowOptions | None = None,
    schedule: ScheduleSettings | None = None,
) -> Plan:
    """The plan of a stage that goes on from another one: its length comes from its rows, the rest from its parent.

    Args:
        config: the parent's model.
        num_rows: packed rows of all epochs.
        num_epochs: how many those are.
        parent: hyperparameters of the parent stage (:meth:`Plan.to_inherit`).
        parent_batch_tokens: tokens of one optimizer step of the parent.

    Raises:
        UserError: as :func:`make_plan`; or the rows are fewer than one step takes.
    """
    plan, options = Plan(), options or RowOptions()
    _plan_model(plan, config)
    plan.section = HORIZON
    plan.derive("tokens_per_step_of_parent", parent_batch_tokens, f"the {parent_name} stage's total_batch_tokens")
    given = _given("total_batch_tokens", horizon.total_batch_tokens)
    batch = _plan_batch(plan, parent_batch_tokens, "tokens_per_step_of_parent", ("tokens_per_step_of_parent",), given)
    plan.derive("num_epochs", num_epochs, "stage.num_epochs")
    plan.derive("num_rows", num_rows, "packed rows of num_epochs", ("num_epochs",))
    by_rows = -(-num_rows // plan["rows_per_step"])
    if num_rows < plan["rows_per_step"] and horizon.max_steps is None and horizon.flops_budget is None:
        raise UserError(
            f"total_batch_tokens={batch}: one step takes {plan['rows_per_step']:,} rows, the data has {num_rows:,}.",
            fix=f"Set total_batch_tokens={max(1, num_rows // 10) * config.sequence_len} or so, or max_steps=….",
        )
    formula = "num_rows / rows_per_step, rounded up: no row is left over, so the last step may have fewer"
    plan.derive("num_steps", by_rows, formula, ("num_rows", "rows_per_step"), _given_steps(plan, horizon))
    _plan_totals(plan)
    plan_rows_in_memory(plan, config, options)
    plan.section = OPTIMIZER
    hyper = resolve_hyperparameters(
        optim, width=config.width, compute_dtype=config.compute_dtype, parent=parent, parent_name=parent_name
    )
    _plan_optimizer(plan, config, optim, hyper)
    _plan_schedule(plan, schedule)
    plan.section = VALIDATION
    plan_validation(plan, options)
    return plan


def hyperparameters(plan: Plan, optim: OptimSettings, compute_dtype: str) -> Hyperparameters:
    """The plan's hyperparameters as the optimizer takes them."""
    return Hyperparameters(
        **plan.to_inherit(),
        width=plan["width"],
        compute_dtype=compute_dtype,
        adamw=adamw_rules(optim),
        muon=optim.muon,
        compile=optim.compile,
        sources={name: plan.values[name].overridden_by or "recipe" for name in RECIPE},
    )


def _given(key: str, value: float | None) -> tuple[str, float | None]:
    return f"{key}={value}", value


def _plan_model(plan: Plan, config: GPTConfig, settings: ModelSettings | None = None) -> None:
    plan.section = MODEL
    plan.derive("depth", config.num_layers, "model.depth, the dial")
    if settings is None:
        plan.derive("width", config.width, "the parent's model")
        plan.derive("num_heads", config.num_heads, "the parent's model")
    else:
        plan.derive("aspect_ratio", settings.aspect_ratio, "model.aspect_ratio")
        plan.derive("head_dim", settings.head_dim, "model.head_dim")
        formula = "depth * aspect_ratio, rounded up to a multiple of head_dim"
        plan.derive("width", config.width, formula, ("depth", "aspect_ratio", "head_dim"))
        plan.derive("num_heads", config.num_heads, "width / head_dim", ("width", "head_dim"))
    plan.derive("sequence_len", config.sequence_len, "model.sequence_len, positions of a row")
    plan.derive("vocab_size", config.vocab_size, "the tokenizer's")
    plan.derive("windows", list(config.windows), "model.window_pattern tiled over the layers, the last one full")
    parameters = count_parameters(config)
    for group in ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total"):
        formula = "sum of the groups" if group == "total" else "counted from the model's shapes"
        plan.derive(f"parameters_{group}", parameters[group], formula)
    plan.derive(
        "flops_per_token",
        flops_per_token(config),
        "6 per parameter of every linear + 12 * num_heads * head_dim * visible keys of every layer, training",
    )


def _plan_horizon(plan: Plan, reference: GPTConfig, horizon: HorizonSettings, tokens_at_hand: int | None) -> None:
    counted: tuple[str, ...] = ("parameters_transformer_matrices", "parameters_lm_head")
    if horizon.counted_parameters == "all":
        counted = ("parameters_total",)
    scaling = sum(plan[each] for each in counted)
    plan.derive("scaling_parameters", scaling, " + ".join(counted), counted)
    of_reference = count_parameters(reference)
    plan.derive(
        "reference_scaling_parameters",
        sum(of_reference[each.removeprefix("parameters_")] for each in counted),
        f"scaling_parameters of a model of depth {REFERENCE_DEPTH} with this vocabulary",
    )
    given = _given("tokens_per_parameter", horizon.tokens_per_parameter)
    ratio = plan.derive("tokens_per_parameter", TOKENS_PER_PARAMETER, "the recipe's", given=given)
    inputs = ("tokens_per_parameter", "scaling_parameters")
    tokens = plan.derive(
        "horizon_tokens", int(ratio * scaling), "int(tokens_per_parameter * scaling_parameters)", inputs
    )
    if tokens < 1:
        raise UserError(f"tokens_per_parameter={ratio:g}: gives no token to train on.", fix="The recipe's is 12.")
    reference_tokens = plan.derive(
        "reference_tokens",
        ratio * plan["reference_scaling_parameters"],
        "tokens_per_parameter * reference_scaling_parameters",
        ("tokens_per_parameter", "reference_scaling_parameters"),
    )
    power = REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** BATCH_EXPONENT
    formula = (
        f"2 ** round(log2({REFERENCE_BATCH_TOKENS} * (horizon_tokens / reference_tokens) ** {BATCH_EXPONENT})),"
        " to whole rows"
    )
    wanted = 2 ** round(math.log2(power))
    needed: tuple[str, ...] = ("horizon_tokens", "reference_tokens")
    if tokens_at_hand is not None:
        plan.derive("tokens_at_hand", tokens_at_hand, "one epoch of the data")
        wanted = min(wanted, 2 ** int(math.log2(max(1, tokens_at_hand // MIN_STEPS_PER_EPOCH))))
        formula += f"; at least {MIN_STEPS_PER_EPOCH} steps an epoch"
        needed = (*needed, "tokens_at_hand")
    _plan_batch(plan, wanted, formula, needed, _given("total_batch_tokens", horizon.total_batch_tokens))


def _plan_batch(plan: Plan, wanted: int, formula: str, inputs: tuple[str, ...], given: tuple[str, float | None]) -> int:
    """The batch and its rows. A derived batch is rounded to whole rows, a given one must have whole rows."""
    row = plan["sequence_len"]
    derived = max(1, round(wanted / row)) * row
    batch = plan.derive("total_batch_tokens", derived, formula, inputs, given)
    if batch % row:
        near = sorted({max(1, batch // row) * row, (batch // row + 1) * row})
        raise UserError(
            f"total_batch_tokens={batch}: is no whole number of rows of model.sequence_len={row} tokens.",
            fix=f"Set total_batch_tokens={' or '.join(str(each) for each in near)}.",
        )
    plan.derive(
        "rows_per_step", batch // row, "total_batch_tokens / sequence_len", ("total_batch_tokens", "sequence_len")
    )
    return batch


def _plan_length(plan: Plan, horizon: HorizonSettings) -> None:
    by_ratio = max(1, plan["horizon_tokens"] // plan["total_batch_tokens"])
    formula = "horizon_tokens // total_batch_tokens"
    inputs = ("horizon_tokens", "total_batch_tokens")
    plan.derive("num_steps", by_ratio, formula, inputs, _given_steps(plan, horizon))
    _plan_totals(plan)


def _given_steps(plan: Plan, horizon: HorizonSettings) -> tuple[str, int] | None:
    if horizon.max_steps is not None:
        return f"max_steps={horizon.max_steps}", horizon.max_steps
    if horizon.flops_budget is not None:
        steps = round(horizon.flops_budget / (plan["flops_per_token"] * plan["total_batch_tokens"]))
        how = f"flops_budget={horizon.flops_budget:g}: round(flops_budget / (flops_per_token * total_batch_tokens))"
        return how, max(1, steps)
    return None


def _plan_totals(plan: Plan) -> None:
    inputs = ("num_steps", "total_batch_tokens")
    tokens = plan.derive("total_tokens", plan["num_steps"] * plan["total_batch_tokens"], " * ".join(inputs), inputs)
    inputs = ("flops_per_token", "total_tokens")
    plan.derive("total_flops", plan["flops_per_token"] * tokens, " * ".join(inputs), inputs)


def _plan_scales(plan: Plan, optim: OptimSettings) -> None:
    if not optim.scale_by_batch:
        for name in ("batch_lr_scale", "weight_decay_scale"):
            plan.derive(name, 1.0, "1: optim.scale_by_batch=false")
        return
    scale = math.sqrt(plan["total_batch_tokens"] / REFERENCE_BATCH_TOKENS)
    formula = f"sqrt(total_batch_tokens / {REFERENCE_BATCH_TOKENS})"
    plan.derive("batch_lr_scale", scale, formula, ("total_batch_tokens",))
    plan.derive(
        "weight_decay_scale",
        scale * (plan["reference_tokens"] / plan["horizon_tokens"]),
        "batch_lr_scale * reference_tokens / horizon_tokens",
        ("batch_lr_scale", "reference_tokens", "horizon_tokens"),
    )


def _plan_optimizer(plan: Plan, config: GPTConfig, optim: OptimSettings, hyper: Hyperparameters) -> None:
    """Hyperparameters, then the learning rate of every group, both before the schedules; the rest of the groups."""
    absent = _roles_not_in(config)
    for name, recipe_value in RECIPE.items():
        scale, reference = _scale_of(name, plan), getattr(optim.reference, name)
        by_formula = reference * plan[scale] if scale else reference
        whose = "the recipe's" if reference == recipe_value else f"optim.reference.{name}"
        formula = f"{reference} * {scale}" if scale else f"{reference}, {whose}"
        source, value = hyper.sources[name], getattr(hyper, name)
        given = None if source == "recipe" else (f"optim.{name}={value}" if source == "given" else source, value)
        plan.derive(name, by_formula, formula, (scale,) if scale else (), given)
    plan.derive("width_lr_scale", hyper.width_lr_scale, "(width / 768) ** -0.5", ("width",))
    for role, rule in hyper.adamw.items():
        if role in absent:
            continue
        factors = [rule.hyperparameter, *([f"{rule.factor}"] if rule.factor != 1 else [])]
        inputs = (rule.hyperparameter, *(("width_lr_scale",) if rule.by_width else ()))
        formula = " * ".join([*factors, *inputs[1:]])
        plan.derive(f"lr_{role}", learning_rate(role, hyper), formula, inputs)
    plan.derive("lr_matrix", hyper.matrix_lr, "matrix_lr", ("matrix_lr",))
    for role, rule in hyper.adamw.items():
        if role not in absent:
            values = [*rule.betas, rule.eps, rule.weight_decay]
            plan.derive(f"adamw_{role}", values, f"betas, eps and weight decay: optim.adamw.{role}")
    plan.derive("muon", _muon_in_words(optim), "optim.muon")
    norm = optim.max_grad_norm
    plan.derive("max_grad_norm", "none" if norm is None else norm, "optim.max_grad_norm")


def _roles_not_in(config: GPTConfig) -> set[str]:
    """Roles of AdamW that no parameter of this model has."""
    there = {
        "value_embedding": bool(config.value_embedding_layers),
        "resid_lambda": config.residual_lambdas,
        "x0_lambda": config.residual_lambdas,
        "smear": config.smear_channels > 0 or config.backout,
    }
    return {role for role in ADAMW_RULES if not there.get(role, True)}


def _muon_in_words(optim: OptimSettings) -> str:
    muon = optim.muon
    norm = f"norm x {muon.frobenius_factor:g}"
    parts = [
        *(["equilibrated rows"] if muon.equilibrate_rows else []),
        f"{muon.orthogonalization} ({norm}, {muon.dtype})",
        *(["renormalized"] if muon.renormalize else []),
        *([f"variance reduction {muon.beta2:g}"] if muon.variance_reduction else []),
        f"{muon.decay} decay",
    ]
    return ", ".join(parts)


def _scale_of(hyperparameter: str, plan: Plan) -> str | None:
    """Which value of the plan scales the recipe's number; none for smear, and none in later stages."""
    scale = {"weight_decay": "weight_decay_scale", "smear_lr": ""}.get(hyperparameter, "batch_lr_scale")
    return scale if scale in plan else None


def _plan_schedule(plan: Plan, schedule: ScheduleSettings | None) -> None:
    if schedule is not None:
        by_ratio = schedule.warmup_ratio is not None
        formula = (
            f"round(schedule.warmup_ratio {schedule.warmup_ratio:g} * num_steps)"
            if by_ratio
            else "schedule.warmup_steps"
        )
        steps, fitted = plan["num_steps"], schedule.fitted(plan["num_steps"])
        shortened = ("shortened, so that the warmdown has room", fitted.warmup_length(steps))
        plan.derive(
            "warmup_steps",
            schedule.warmup_length(steps),
            formula,
            ("num_steps",) if by_ratio else (),
            None if fitted is schedule else shortened,
        )
        formula = f"round(schedule.warmdown_ratio {schedule.warmdown_ratio:g} * num_steps)"
        plan.derive("warmdown_steps", schedule.warmdown_steps(plan["num_steps"]), formula, ("num_steps",))
