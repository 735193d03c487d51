"""MuonAdamW: one optimizer for all parameters, Muon for the matrices in the blocks, AdamW for the rest.

Shapes: K matrices of one shape in a stack, M rows, N columns. Each Muon group is one such stack: its state lives in
two stacked tensors, and ``state[parameter]`` holds views of them, so that the state by parameter name (what is saved
and handed on) does not depend on how the work is stacked or, later, divided over processes: a sharded step reduces
the gradients of a group, updates this process's share of its stack, and gathers the parameters, in
:meth:`MuonAdamW._step_adamw` and :meth:`MuonAdamW._step_muon`.

Sources: AdamW (arXiv 1711.05101), Muon (kellerjordan.github.io/posts/muon), NorMuon (arXiv 2510.05491),
golden/optimizer_6_steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.optim.orthogonalize import SMALL, newton_schulz, polar_express
from nanochat_pl.optim.schedules import StepValues

logger = logging.getLogger(__name__)

Scalar = float | Tensor
# What a resume file must agree on with the configuration, else the difference is told. The rest follows schedules.
FIXED_HYPERPARAMETERS = ("kind", "initial_lr", "initial_weight_decay", "betas", "eps", "beta2")


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer.

    Args:
        groups: of :func:`~nanochat_pl.optim.parameter_groups.make_groups`, parameters as (name, parameter).
        matrix_optimizer: "muon" (the recipe's) or "classic_muon": Newton-Schulz alone. That one is ``torch.optim.Muon``
            with ``adjust_lr_fn="original"`` and Nesterov momentum (which both take as a mean, ``lerp``), as long as
            ``muon_dtype`` is bfloat16 and the weight decay 0: decay is cautious here, and uses the lr scaled by shape.
        muon_dtype: of the matrix products in the orthogonalization. All else is float32.
        compile_muon: compile the Muon update at its first use.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrix_optimizer: str = "muon",
        muon_dtype: torch.dtype = torch.float32,
        compile_muon: bool = False,
    ) -> None:
        super().__init__(groups, defaults={})
        self.classic = matrix_optimizer == "classic_muon"
        self.muon_dtype = muon_dtype
        self._compile_muon = compile_muon
        self._muon_update: Callable[..., None] | None = None
        self._stacks: dict[int, tuple[Tensor, Tensor]] = {}  # group number → (momentum, second moment)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["initial_weight_decay"] = group["weight_decay"]

    def set_step_values(self, values: StepValues) -> None:
        """Set what the schedules give for the next step. AdamW groups keep their weight decay."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * values.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = values.muon_momentum
                group["weight_decay"] = group["initial_weight_decay"] * values.weight_decay_multiplier

    def allocate_state(self) -> None:
        """Allocate all state, zeros. Before the first step, so that no step fails half-way for want of memory.

        (What a step itself needs for a while is less than what the backward pass has just given back.)
        """
        for number, group in enumerate(self.param_groups):
            if group["params"][0] in self.state:
                continue
            if group["kind"] == "adamw":
                for parameter in group["params"]:
                    self.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                    }
            else:
                self._allocate_stack(number, group)

    def _allocate_stack(self, number: int, group: dict[str, Any]) -> None:
        first = group["params"][0]
        stack_size, (rows, columns) = len(group["params"]), first.shape
        reduced = (rows, 1) if rows >= columns else (1, columns)
        momentum = torch.zeros(stack_size, rows, columns, device=first.device)
        second_moment = torch.zeros(stack_size, *reduced, device=first.device)
        self._stacks[number] = (momentum, second_moment)
        for i, parameter in enumerate(group["params"]):
            self.state[parameter] = {"momentum": momentum[i], "second_moment": second_moment[i]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter, with the values last set by :meth:`set_step_values`.

        Raises:
            RuntimeError: a parameter has no gradient. Nothing has been changed then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        missing = [name for name, parameter in self._named() if parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}: every parameter takes part in every step")
        self.allocate_state()
        for number, group in enumerate(self.param_groups):
            if group["kind"] == "adamw":
                self._step_adamw(group)
            else:
                self._step_muon(group, *self._stacks[number])
        return result

    def _step_adamw(self, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in group["params"]]
        # In float32 whatever the parameters' dtype; float() of a float32 tensor is the tensor itself.
        values = [parameter.float() for parameter in group["params"]]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            values,
            [parameter.grad.float() for parameter in group["params"]],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for parameter, value in zip(group["params"], values, strict=True):
            if value.dtype != parameter.dtype:
                parameter.copy_(value)

    def _step_muon(self, group: dict[str, Any], momentum_stack: Tensor, second_moment: Tensor) -> None:
        rows, columns = momentum_stack.shape[-2:]
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        scalars: list[Scalar] = [lr, lr * group["weight_decay"], group["momentum"], group["beta2"]]
        update = self._muon_update or self._make_muon_update()
        if self._compile_muon:  # a float would be compiled in as a constant, again for every new value
            scalars = [torch.tensor(value) for value in scalars]
        values = torch.stack(group["params"]).float()
        gradients = torch.stack([parameter.grad for parameter in group["params"]]).float()
        update(values, gradients, momentum_stack, second_moment, *scalars, self.classic, self.muon_dtype)
        torch._foreach_copy_(group["params"], list(values.unbind()))

    def _make_muon_update(self) -> Callable[..., None]:
        self._muon_update = torch.compile(muon_update, dynamic=False) if self._compile_muon else muon_update
        return self._muon_update

    def _named(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    # What is saved. By name, so that it depends on neither the order of groups nor their stacking.

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name and the groups' hyperparameters, all plain: loads with ``weights_only=True``."""
        self.allocate_state()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"state": {name: dict(self.state[parameter]) for name, parameter in self._named()}, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:  # type: ignore[override]
        """Load the state; keep the current hyperparameters, which come from the configuration.

        Returns:
            One line for each hyperparameter that the file has otherwise; they are logged as warnings, too.

        Raises:
            UserError: the state is not that of these parameters. Nothing has been changed then.
        """
        try:
            states = state_dict["state"].items()
            moments = {f"{name}.{key}": moment for name, state in states for key, moment in state.items()}
            differences = self._differences(state_dict["groups"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError("optimizer state: it is not a state of MuonAdamW.") from error
        self.load_moments(moments)
        for line in differences:
            logger.warning(line)
        return differences

    def _differences(self, saved_groups: list[dict[str, Any]]) -> list[str]:
        saved_by_name = {name: group for group in saved_groups for name in group["param_names"]}
        lines = []
        for group in self.param_groups:
            name = group["param_names"][0]
            saved = saved_by_name.get(name, {})
            for key in FIXED_HYPERPARAMETERS:
                now, then = group.get(key), saved.get(key)
                if now != (tuple(then) if isinstance(then, list) else then):
                    what = key.removeprefix("initial_")
                    lines.append(f"{what} of the {group['role']} group ({name} …): {now}; it was {then} in the file.")
        return lines

    def moments_by_name(self) -> dict[str, Tensor]:
        """A copy of the state, one flat dict ``<parameter>.<moment>``, for warm starts (safetensors).

        Moments: ``step``, ``exp_avg``, ``exp_avg_sq`` (AdamW); ``momentum`` (M, N), ``second_moment`` (M, 1) or
        (1, N) (Muon). All float32.
        """
        return {key: moment.clone() for key, moment in self._moments().items()}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over moments of :meth:`moments_by_name`.

        Raises:
            UserError: a moment is missing, unknown or of another shape. Nothing has been changed then.
        """
        own = self._moments()
        problems = [f"optimizer state: {key} is missing." for key in own if key not in moments]
        problems += [f"optimizer state: {key} is unknown." for key in moments if key not in own]
        problems += [
            f"optimizer state: {key} has the shape {tuple(moments[key].shape)}, not {tuple(moment.shape)}."
            for key, moment in own.items()
            if key in moments and moments[key].shape != moment.shape
        ]
        if problems:
            shown = problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])
            raise UserError(shown, fix="It belongs to another model, or another matrix optimizer.")
        with torch.no_grad():
            for key, moment in own.items():
                moment.copy_(moments[key])

    def _moments(self) -> dict[str, Tensor]:
        self.allocate_state()
        return {
            f"{name}.{key}": moment
            for name, parameter in self._named()
            for key, moment in self.state[parameter].items()
        }


def muon_update(
    values: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    lr: Scalar,
    lr_times_decay: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    classic: bool,
    dtype: torch.dtype,
) -> None:
    """One Muon step on a stack, in place.

    Args:
        values, gradients, momentum: float32 (K, M, N); the gradients are used up.
        second_moment: float32 (K, M, 1) where M >= N, else (K, 1, N).
        lr: with the factor sqrt(max(1, M / N)) in it.
        lr_times_decay: that lr times the weight decay.
        beta1: the momentum.
        beta2: of the second moment.
        classic: Newton-Schulz alone, without equilibration, renormalisation and variance reduction.
        dtype: of the matrix products.
    """
    momentum.lerp_(gradients, 1 - beta1)
    nesterov = gradients.lerp_(momentum, beta1)
    if classic:
        update = newton_schulz(nesterov, dtype).float() * lr
    else:
        x = polar_express(nesterov, dtype)
        # Into memory that is there already and contiguous (a tall x is a transposed view).
        update = torch.mul(x, line_factors(x, second_moment, beta2) * lr, out=gradients)
    # Cautious decay: only where decay and update pull the same way.
    decay = (update * values).ge_(0.0).mul_(lr_times_decay)
    values.addcmul_(values, decay, value=-1).sub_(update)


def line_factors(x: Tensor, second_moment: Tensor, beta2: Scalar) -> Tensor:
    """Renormalisation and NorMuon as one factor per line; a line is a row where M >= N, else a column.

    Renormalisation brings the Frobenius norm to that of an orthogonal matrix, sqrt(min(M, N)). NorMuon then divides
    each line by the root of its running mean square, and keeps that norm. Both only scale lines, so line norms are
    all that is needed. No bias correction (arXiv 2602.21545, 2510.05491).

    Args:
        x: (K, M, N).
        second_moment: float32 (K, M, 1) or (K, 1, N), updated in place.

    Returns:
        float32, shaped as ``second_moment``.
    """
    dim = -1 if second_moment.shape[-1] == 1 else -2
    norm = min(x.shape[-2:]) ** 0.5
    line_norms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    renormalise = norm / _norm_over_lines(line_norms).clamp_min(SMALL)
    line_norms = line_norms * renormalise
    second_moment.lerp_(line_norms.square() / x.shape[dim], 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    keep_norm = _norm_over_lines(line_norms) / _norm_over_lines(line_norms * scale).clamp_min(1e-10)
    return renormalise * scale * keep_norm


def _norm_over_lines(line_norms: Tensor) -> Tensor:
    """Frobenius norms of a stack from its line norms: (K, M, 1) or (K, 1, N) → (K, 1, 1)."""
    return line_norms.norm(dim=(-2, -1), keepdim=True)
