"""The optimizer's file of nanochat: a ``torch.optim`` state dict, matrices stacked. Source: golden/nanochat_trained.

Its groups are ours: one for each role of AdamW, then one for each shape of the matrices, shapes sorted. Parameters are
numbered through all groups. An AdamW parameter has its state under its own number, the matrices of a shape have theirs
stacked under the number of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.convert.nanochat.safe_unpickle import problem_of_tensor, problem_of_weight, read_torch
from nanochat_pl.convert.report import require_finite
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import make_groups
from nanochat_pl.planning.horizon import MAX_STEPS

# Names of the moments there, and here.
ADAMW = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MUON = {"momentum_buffer": "momentum", "second_momentum_buffer": "second_moment"}
NUM_ITERATIONS = 5
WITHOUT = "moments=false imports the weights alone."


# Settings of the optimizer that are more than a number of the plan.
PARTS = ("adam_betas", "adam_eps", "adamw", "muon")


def reference_groups(
    net: GPT, hyperparameters: Mapping[str, float] | None = None, optim: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The groups in the reference's order, with ``names`` and ``shape`` of their parameters.

    Args:
        net: on any device.
        hyperparameters: final ones by name (``Plan.to_inherit``); the recipe's by default.
        optim: the stage's settings of that group, of which :data:`PARTS` are taken; the recipe's by default.
    """
    parts = {name: optim[name] for name in PARTS if name in optim} if optim else {}
    settings = build(OptimSettings, {**parts, **(hyperparameters or {})}, "plan")
    hyper = resolve_hyperparameters(settings, width=net.config.width)
    groups = make_groups(net.named_parameters(), parameter_roles(net), hyper)
    for group in groups:
        # The gate stands before the factors there.
        members = sorted(group.pop("params"), key=lambda member: member[1].ndim < 2)
        group["names"] = [name for name, _ in members]
        group["shapes"] = [tuple(parameter.shape) for _, parameter in members]
    return groups


def read_moments(path: Path, net: GPT) -> tuple[dict[str, Tensor], list[Any], bool]:
    """The moments by our names, the settings of the groups, and whether numbers of steps are tensors there.

    Args:
        path: the file of a run with one process.

    Raises:
        UserError: the file is damaged, or is not the optimizer state of this model by one process.
    """
    content = read_torch(path)
    state, found = (content.get("state"), content.get("param_groups")) if isinstance(content, dict) else (None, None)
    expected = reference_groups(net)
    if not isinstance(state, dict) or not isinstance(found, list) or not _groups_fit(found, expected):
        raise UserError(f"{path}: is no optimizer state of this model in a layout that is known here.", fix=WITHOUT)
    reader = _Reader(state)
    for first, group in _numbered(expected):
        if group["kind"] == "muon":
            reader.read_muon(first, group["names"], group["shapes"][0])
        else:
            for number, (name, shape) in enumerate(zip(group["names"], group["shapes"], strict=True), start=first):
                reader.read_adamw(number, name, shape)
    if reader.problems:
        more = f" ({len(reader.problems)} problems in all)" if len(reader.problems) > 1 else ""
        raise UserError(
            f"{path}: {reader.problems[0]}{more}",
            fix=f"It may be the share of one of several processes; those of a single one are read. {WITHOUT}",
        )
    require_finite(reader.moments, str(path))
    settings = [{key: value for key, value in group.items() if key != "params"} for group in found]
    return reader.moments, settings, reader.step_is_tensor


def write_moments(net: GPT, moments: Mapping[str, Tensor], groups: list[dict[str, Any]], step_is_tensor: bool) -> Any:
    """The reference's optimizer state, ready for ``torch.save``.

    Args:
        moments: by our names.
        groups: settings of the groups, in the reference's order, without ``params``.
        step_is_tensor: whether the number of steps is a tensor there, or a plain number.

    Raises:
        UserError: they are not the moments, or not the groups, of this model.
    """
    require_moments(net, {name: tuple(moment.shape) for name, moment in moments.items()}, len(groups))
    state: dict[int, dict[str, Any]] = {}
    param_groups = []
    for (first, expected), settings in zip(_numbered(reference_groups(net)), groups, strict=True):
        names = expected["names"]
        param_groups.append({**settings, "params": list(range(first, first + len(names)))})
        if expected["kind"] == "muon":
            state[first] = {
                there: torch.stack([moments[f"{name}.{here}"] for name in names]) for there, here in MUON.items()
            }
            continue
        for number, name in enumerate(names, start=first):
            step = moments[f"{name}.step"]
            state[number] = {
                "step": step.clone() if step_is_tensor else int(step),
                **{there: moments[f"{name}.{here}"] for there, here in ADAMW.items()},
            }
    return {"state": state, "param_groups": param_groups}


def require_moments(net: GPT, found: Mapping[str, tuple[int, ...]], num_groups: int) -> None:
    """Refuse moments, of which the shapes are known by name, that are not those of this model.

    Raises:
        UserError: with the first that is missing, unknown or of another shape.
    """
    expected = _shapes_of_moments(net)
    lacking, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [name for name in sorted(expected) if name in found and found[name] != expected[name]]
    if lacking:
        problem = f"lacks {lacking[0]}"
    elif unknown:
        problem = f"has {unknown[0]}, which this model does not have"
    elif misshapen:
        problem = f"{misshapen[0]} has the shape {found[misshapen[0]]}, not {expected[misshapen[0]]}"
    elif num_groups != (number := len(reference_groups(net))):
        problem = f"has {num_groups} groups, the model {number}"
    else:
        return
    raise UserError(f"optimizer state of the bundle: {problem}.", fix="moments=false writes the weights alone.")


def _shapes_of_moments(net: GPT) -> dict[str, tuple[int, ...]]:
    """The shape of each moment by our names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in reference_groups(net):
        for name, shape in zip(group["names"], group["shapes"], strict=True):
            if group["kind"] == "muon":
                shapes |= {
                    f"{name}.{here}": one for here, one in zip(MUON.values(), _shapes_of_muon(shape), strict=True)
                }
            else:
                shapes |= {f"{name}.step": (), **{f"{name}.{here}": shape for here in ADAMW.values()}}
    return shapes


def _shapes_of_muon(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the momentum of a matrix, and of its second moment."""
    rows, columns = shape
    return shape, (rows, 1) if rows >= columns else (1, columns)


def groups_by_role(net: GPT, groups: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Settings of the groups by the role of their parameters; those of all matrices are alike."""
    return {ours["role"]: theirs for ours, theirs in zip(reference_groups(net), groups, strict=True)}


def recipe_groups(
    net: GPT, hyperparameters: Mapping[str, float] | None, optim: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Settings of the groups for a model that does not come from the reference."""
    groups = []
    for group in reference_groups(net, hyperparameters, optim):
        lr = {"kind": group["kind"], "lr": group["lr"], "initial_lr": group["lr"]}
        keys = ("betas", "eps", "weight_decay") if group["kind"] == "adamw" else ("momentum", "beta2", "weight_decay")
        own = {} if group["kind"] == "adamw" else {"ns_steps": NUM_ITERATIONS}
        groups.append({**lr, **{key: group[key] for key in keys}, **own})
    return groups


def _groups_fit(found: list[Any], expected: list[dict[str, Any]]) -> bool:
    if len(found) != len(expected) or not all(isinstance(group, dict) for group in found):
        return False
    return all(
        _numbers(theirs.get("params")) == list(range(first, first + len(ours["names"])))
        and theirs.get("kind", ours["kind"]) == ours["kind"]
        for theirs, (first, ours) in zip(found, _numbered(expected), strict=True)
    )


def _numbers(value: Any) -> list[int] | None:
    """A list of whole numbers, or None: an untrusted file may have tensors there, which nothing is equal to."""
    return value if isinstance(value, list) and all(type(number) is int for number in value) else None


def _numbered(groups: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each group with the number of its first parameter."""
    number = 0
    for group in groups:
        yield number, group
        number += len(group["names"])


class _Reader:
    """Takes moments out of the state, each checked, and notes what is wrong."""

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self.state = state
        self.moments: dict[str, Tensor] = {}
        self.problems: list[str] = []
        self.step_is_tensor = False

    def read_adamw(self, number: int, name: str, shape: tuple[int, ...]) -> None:
        own = self.state.get(number)
        step = own.get("step") if isinstance(own, dict) else None
        if isinstance(step, Tensor) and problem_of_tensor(step) is None and step.numel() == 1:
            self.step_is_tensor, step = True, step.item()
        if isinstance(step, (int, float)) and not isinstance(step, bool) and 0 <= step <= MAX_STEPS:
            self.moments[f"{name}.step"] = torch.tensor(float(step))
        else:
            self.problems.append(f"{name} has no number of steps.")
        for there, here in ADAMW.items():
            found = self._find(number, there, shape, name)
            if found is not None:
                self.moments[f"{name}.{here}"] = found

    def read_muon(self, number: int, names: Sequence[str], shape: tuple[int, ...]) -> None:
        for (there, here), one in zip(MUON.items(), _shapes_of_muon(shape), strict=True):
            stack = self._find(number, there, (len(names), *one), names[0])
            if stack is not None:
                self.moments.update({f"{name}.{here}": stack[i].clone() for i, name in enumerate(names)})

    def _find(self, number: int, moment: str, shape: tuple[int, ...], name: str) -> Tensor | None:
        own = self.state.get(number)
        found = own.get(moment) if isinstance(own, dict) else None
        if not isinstance(found, Tensor):
            self.problems.append(f"{name} has no {moment}.")
        elif problem := problem_of_weight(found):
            self.problems.append(f"{moment} of {name} {problem}.")
        elif tuple(found.shape) != shape:
            self.problems.append(f"{moment} of {name} has the shape {tuple(found.shape)}, not {shape}.")
        else:
            return found
        return None
