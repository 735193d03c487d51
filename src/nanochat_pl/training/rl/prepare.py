"""What the stage rl trains with: prompts, rewards, the parent's model."""

from __future__ import annotations

import dataclasses
from functools import partial

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.planning import Plan
from nanochat_pl.planning.plan import Derived
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.rl.module import RLModule
from nanochat_pl.training.rl.pass_at_k import pass_at_k_benchmark
from nanochat_pl.training.rl.prompts import Prompts
from nanochat_pl.training.rl.rewards import Rewards
from nanochat_pl.training.stage_data.conversations import held_out_rows
from nanochat_pl.training.stage_data.parent import ParentModel, load_parent
from nanochat_pl.training.stages.registry import StageContext, StageData


def prepare_rl(context: StageContext) -> StageData:
    """Prompts of the mixture's tasks; model, tokenizer and what is not given from the parent stage.

    Raises:
        UserError: a task has no reward; there is no finished parent; prompt and answer do not fit into its rows.
    """
    config = context.config
    _refuse(config)
    rewards = Rewards(config.rl.reward)
    tasks = TaskContext(
        context.cache,
        config.data.max_bad_fraction,
        config.paths.hub_folder,
        config.evaluation.sandbox,
        run_corpus=context.corpus,
    )
    mixture = build_mixture(config.mixture, "train", tasks)
    rewards.require(mixture.tasks)
    held_out = build_mixture(config.mixture, "test", tasks)
    parent = load_parent(context)
    settings = config.rl.for_rows(parent.model.sequence_len)
    config = dataclasses.replace(config, rl=settings)
    prompts = _prompts(config, mixture, parent)
    first = prompts.prompt(0)
    rewards.try_out(mixture.tasks[first.task], first, parent.tokenizer)
    plan = _plan(dataclasses.replace(context, config=config), parent, prompts)
    fixed = held_out_rows(held_out, parent.tokenizer, parent.model.sequence_len, context.cache)
    benchmarks = pass_at_k_benchmark(held_out.tasks, parent.tokenizer, settings)
    _announce(prompts, config, is_measured=bool(benchmarks), half_row=context.config.rl.max_new_tokens is None)
    return StageData(
        plan=plan,
        rows=prompts,  # type: ignore[arg-type]  # as far as the training is concerned
        validation=Validation.of_rows(
            fixed, min(plan["validation_rows"], len(fixed)), parent.tokenizer, plan["device_batch_size"]
        ),
        data={
            "mixture": {name: len(task) for name, task in mixture.tasks.items()},
            "fingerprint": mixture.fingerprint,
            "held_out_conversations": len(held_out),
        }
        | context.corpus.chosen(),
        make_module=partial(RLModule, settings=settings, prompts=prompts, rewards=rewards, folder=context.folder.path),
        benchmarks=benchmarks,
        **parent.start(context),
    )


def _refuse(config: TrainConfig) -> None:
    """Keys of other stages, which would do nothing here. Raises :class:`UserError`."""
    problems = []
    if config.stage.module is not None:
        problems.append(f"stage.module={config.stage.module}: rl has a module of its own.")
    if config.stage.loss_mask is not None:
        problems.append(f"stage.loss_mask={config.stage.loss_mask}: rl trains on what the model writes.")
    if problems:
        raise UserError(problems, "Leave it out, or set it for other stages.")


def _prompts(config: TrainConfig, mixture: Mixture, parent: ParentModel) -> Prompts:
    settings, row = config.rl, parent.model.sequence_len
    most = row + 1 - settings.max_answer_tokens  # the last token of a row is no input
    if most < 1:
        raise UserError(
            f"rl.max_new_tokens={settings.max_new_tokens}: a row of the model has {row:,} positions, for prompt and"
            " answer.",
            "Set it lower.",
        )
    needed = len(mixture)
    if config.max_steps is not None:
        rollouts = -(-config.max_steps // settings.updates_per_rollout)
        needed = min(needed, rollouts * settings.prompts_per_rollout)
    prompts = Prompts(mixture, parent.tokenizer, most, needed, settings.samples_per_prompt, config.seed)
    if not prompts.num_prompts:
        raise UserError(
            f"rl.max_new_tokens={settings.max_new_tokens}: leaves {most:,} of a row's {row:,} positions for the prompt,"
            " and every prompt is longer.",
            "Set it lower, or take tasks with shorter prompts.",
        )
    return prompts


def _plan(context: StageContext, parent: ParentModel, prompts: Prompts) -> Plan:
    """The plan. It counts rows of the model's length, though answers are shorter."""
    config, settings = context.config, context.config.rl
    size = settings.samples_per_update
    if config.total_batch_tokens is not None:  # an experiment may say it for all of its stages
        rank_zero_print(
            f"total_batch_tokens={config.total_batch_tokens}: is for other stages; a step has {size} answers."
        )
    planned = dataclasses.replace(config, total_batch_tokens=size * parent.model.sequence_len)
    wanted = round(config.stage.num_epochs * prompts.num_prompts * settings.samples_per_prompt)
    plan = parent.plan(dataclasses.replace(context, config=planned), num_rows=max(wanted, size))
    formulas = {
        "total_batch_tokens": "rl.prompts_per_step * rl.samples_per_prompt rows, all full",
        "num_rows": "prompts of num_epochs, times rl.samples_per_prompt",
    }
    for name, formula in formulas.items():
        derived = plan.values[name]
        plan.values[name] = Derived(derived.value, formula, section=derived.section)
    prompts.num_rows = plan["num_steps"] * size
    return plan


def _announce(prompts: Prompts, config: TrainConfig, is_measured: bool, half_row: bool) -> None:
    """Say what is rolled out, and which settings do nothing."""
    settings, longer = config.rl, prompts.num_left_out
    left_out = (
        f"; {longer:,} are too long for rl.max_new_tokens={settings.max_new_tokens} and left out" if longer else ""
    )
    updates = settings.updates_per_rollout
    several = f" for {updates} steps of {settings.prompts_per_step} prompts" if updates > 1 else ""
    rank_zero_print(
        f"Rollouts: {settings.prompts_per_rollout} prompts x {settings.samples_per_prompt} answers of at most"
        f" {settings.max_new_tokens} tokens{' (half of a row)' if half_row else ''}{several}; {prompts.num_prompts:,}"
        f" prompts{left_out}."
    )
    if config.mixture.packing != "pad":  # an experiment may say it for all of its stages
        rank_zero_print(
            f"mixture.packing={config.mixture.packing}: is for other stages; in rl each answer is a row of its own."
        )
    if settings.eval_every_steps is not None and not is_measured:
        rank_zero_print(
            f"rl.eval_every_steps={settings.eval_every_steps}: pass@k is not measured, as the answers to"
            f" {', '.join(prompts.tasks)} are rewarded, but neither right nor wrong."
        )
    if settings.shuffle_rewards:
        rank_zero_print("rl.shuffle_rewards=true: a control, whose rewards say nothing of the answers.")
