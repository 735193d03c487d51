"""Resume checks: settings that must match the checkpoint, and those that may change with resume_with_changes=true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training.checkpoint.history import note_changes
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO

if TYPE_CHECKING:
    from nanochat_pl.training.module import ModuleConfig

# Of what a resume file says of its run: what cannot be otherwise, and why.
_FIXED = {
    "tokens a step": "step N begins at row N times the rows of a step, so rows would be left out or seen twice",
    "tokenizer": "the weights were trained on its ids",
}
_BEGIN_ANEW = "or begin a new run with run=NEW or resume=never"


def step_to_go_on_from(path: Path, recipe: ModuleConfig, with_changes: bool = False) -> int:
    """The step of a resume file, where rows and length of the run are still those that it was made with.

    What this machine chooses otherwise than the one that wrote the file is said.

    Args:
        path: of the file.
        recipe: of the stage that is to go on.
        with_changes: other data and a longer horizon are said and recorded instead of refused.

    Raises:
        UserError: another text, tokenizer or plan than when the run began: it would end as neither of the two.
    """
    saved = AtomicCheckpointIO().load_checkpoint(path)
    step, then, now = int(saved["global_step"]), saved["nanochat_pl"]["identity"], recipe.identity
    differences = {key: was for key, was in then.items() if now.get(key) != was}
    fixed = {key for key in differences if key in _FIXED or not _may_change(key, step, recipe)}
    problems = [
        f"{path}: was written with {key} {was}, now it is {now.get(key)}{_why_not(key, step) if key in fixed else ''}."
        for key, was in differences.items()
        if key in fixed or not with_changes
    ]
    if problems:
        how = "" if fixed else "; or say resume_with_changes=true to go on all the same"
        raise UserError(problems, f"Bring it back as it was, {_BEGIN_ANEW}{how}.")
    changes = [_consequence(key, was, step, recipe) for key, was in differences.items()]
    for line in changes:
        rank_zero_print(line)
    if changes and collectives.is_rank_zero():
        note_changes(path.parent.parent, changes)
    choices = saved["nanochat_pl"]["choices"]
    for key, was in choices.items():
        as_before = (
            key == "device_batch_size"
            and recipe.batch_size_as_recorded
            and (saved["nanochat_pl"].get("max_rows") or saved["nanochat_pl"].get("most_rows"))
        )
        if key in recipe.choices and recipe.choices[key] != was and not as_before:
            rank_zero_print(
                f"{key} was {was} and is {recipe.choices[key]} now: the run goes on, its last bits may be others."
            )
    return step


def _may_change(key: str, step: int, recipe: ModuleConfig) -> bool:
    return key != "steps" or recipe.num_steps >= step


def _why_not(key: str, step: int) -> str:
    return f": {_FIXED.get(key, f'{step:,} of them are made')}"


def _consequence(key: str, was: Any, step: int, recipe: ModuleConfig) -> str:
    if key != "steps":
        return (
            f"{key} {was} → {recipe.identity.get(key)}: the rows from step {step + 1:,} on are others; of text that"
            " is in both, some may be seen twice and some never."
        )
    before, after = (schedule_values(recipe.schedule, step, steps).lr_multiplier for steps in (was, recipe.num_steps))
    return (
        f"Horizon {was:,} → {recipe.num_steps:,} steps. The schedule is a function of step and horizon: in the next"
        f" step, {step + 1:,}, the learning rates jump from {before:.4g} of their peak to {after:.4g}."
    )
