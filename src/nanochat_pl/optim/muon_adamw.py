"""MuonAdamW: one optimizer for all parameters, Muon for the matrices in the blocks, AdamW for the rest.

Each Muon group is one stack of matrices of one shape: its state lives in two stacked tensors, and ``state[parameter]``
holds views of them, so that the state by parameter name (what is saved and handed on) does not depend on how the work
is stacked or divided over processes.

With several processes each has a share of every group (:mod:`nanochat_pl.optim.sharding`) and the state of that share
alone. A step sums the gradients, each process getting its share of the sum, updates the share, and gathers the
parameters. With one process there are no shares: gradients and parameters are used where they lie. Of parameters that
FSDP2 keeps sharded the gradients are summed already (:mod:`nanochat_pl.optim.fully_sharded`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.config import MuonSettings, hyperparameter_differences
from nanochat_pl.optim.early_reduction import EarlyReduction
from nanochat_pl.optim.fully_sharded import make_shards
from nanochat_pl.optim.gradient_norm import gradient_norm
from nanochat_pl.optim.muon import Scalar, adamw_update, muon_update
from nanochat_pl.optim.schedules import StepValues
from nanochat_pl.optim.sharding import Shape, Shard, moment_shapes

logger = logging.getLogger(__name__)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer.

    Args:
        groups: of :func:`~nanochat_pl.optim.param_groups.make_groups`, parameters as (name, parameter).
        muon: the parts of a Muon step; the recipe's by default. Newton-Schulz alone (``optim=classic_muon``) is
            ``torch.optim.Muon`` with ``adjust_lr_fn="original"`` and Nesterov momentum (which both take as a mean,
            ``lerp``), as long as ``muon_dtype`` is bfloat16 and the weight decay 0.
        muon_dtype: of the matrix products in the orthogonalization. All else is float32.
        compile_muon: compile the Muon update at its first use.

    Attributes:
        overlaps_backward: whether :meth:`reducing` does anything: on GPUs. On CPUs it gains nothing (docs/LOG.md).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        muon: MuonSettings | None = None,
        muon_dtype: torch.dtype = torch.float32,
        compile_muon: bool = False,
    ) -> None:
        super().__init__(groups, defaults={})
        self.muon = muon or MuonSettings()
        self.muon_dtype = muon_dtype
        self._compile_muon = compile_muon
        self._muon_update: Callable[..., None] | None = None
        self._stacks: dict[int, tuple[Tensor, Tensor]] = {}  # group number → (momentum, second moment)
        self._shards: list[list[Shard]] = []  # of each group; none with one process
        self._early = EarlyReduction([])
        self._reduced = self._skipping = False
        self._consolidated: dict[str, dict[str, Tensor]] | None = None
        self.overlaps_backward = self.param_groups[0]["params"][0].device.type != "cpu"
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
        if self._shards:
            return
        if collectives.world_size() > 1:
            assert not self.state, "the processes began to train together after the state was allocated"
            self._shards = [list(self._make_shards(*each)) for each in enumerate(self.param_groups)]
            self._early = EarlyReduction([shard for shards in self._shards for shard in shards])
            return
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

    def _make_shards(self, number: int, group: dict[str, Any]) -> Iterator[Shard]:
        """One of a stack, which is cut between matrices; one of each parameter of AdamW.

        With fewer matrices than processes, every other stack is that of the last processes: the two of the feed-forward
        part, the largest, are of one size and follow each other (groups are sorted by shape).
        """
        shards = make_shards(group["kind"], group["param_names"], group["params"], at_end=number % 2 == 1)
        for shard in shards:
            shard.allocate(moment_shapes(group["kind"], shard.parameters[0].shape))
            yield shard

    def _allocate_stack(self, number: int, group: dict[str, Any]) -> None:
        first = group["params"][0]
        shapes = moment_shapes("muon", first.shape)
        momentum, second_moment = (
            torch.zeros(len(group["params"]), *shape, device=first.device) for shape in shapes.values()
        )
        self._stacks[number] = (momentum, second_moment)
        for i, parameter in enumerate(group["params"]):
            self.state[parameter] = {"momentum": momentum[i], "second_moment": second_moment[i]}

    def reducing(self, in_backward: bool = True) -> AbstractContextManager[None]:
        """Around a backward, to begin the sums of several processes in it. Optional: no bit depends on it.

        Args:
            in_backward: whether it is the last backward of the step; else nothing is begun.
        """
        return self._early.reducing() if in_backward and self.overlaps_backward else nullcontext()

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        """Sum the gradients over all processes; each keeps its share of the sum, and its ``grad`` are given up.

        With one process there is nothing to sum, and the gradients stay where they are.

        Returns:
            The L2 norm of the summed gradient: float32, a scalar on the device, the same bits on every process (on
            CPUs also those of one process with the same summed gradient).

        Raises:
            RuntimeError: a parameter has no gradient on some process. Nothing has been changed then, on any.
        """
        self._reduce()
        return gradient_norm(self._shards, self.param_groups)

    @torch.no_grad()
    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply the summed gradient, after :meth:`reduce_gradients`: to clip it, or to undo the loss's scale."""
        assert self._reduced, "reduce_gradients comes first"
        torch._foreach_mul_(self._gradients(), factor)

    def skip_step(self) -> None:
        """Drop the summed gradients: the next :meth:`step` changes neither parameters nor state."""
        self._drop_gradients()
        self._skipping = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, the summed ones too."""
        self._drop_gradients()
        super().zero_grad(set_to_none)

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
        if self._skipping:
            self._skipping = False
            return result
        if not (self._shards and self._reduced):
            self._reduce()
        if self._shards:
            self._step_shards()
        else:
            for number, group in enumerate(self.param_groups):
                if group["kind"] == "adamw":
                    self._step_adamw(group)
                else:
                    self._step_muon(group, *self._stacks[number])
        self._drop_gradients()
        return result

    def _reduce(self) -> None:
        is_begun = bool(self._early.pending)
        missing = self._early.missing if is_begun else [name for name, each in self._named() if each.grad is None]
        if collectives.all_reduce_max(len(missing)):
            self._drop_gradients()
            names = ", ".join(missing) or "a parameter of another process"
            raise RuntimeError(f"no gradient for {names}: every parameter takes part in every step")
        self.allocate_state()
        if not is_begun:
            self._early.pending = [shard.start_reduce() for shards in self._shards for shard in shards]
        self._early.wait()
        self._early.agree_on_order()
        self._reduced, self._skipping = True, False

    def _gradients(self) -> list[Tensor]:
        """What this process has of the summed gradient."""
        if self._shards:
            return [shard.gradient for shards in self._shards for shard in shards if shard.gradient is not None]
        return [parameter.grad for _, parameter in self._named() if parameter.grad is not None]

    def _drop_gradients(self) -> None:
        self._reduced = False
        self._early.wait()
        for shards in self._shards:
            for shard in shards:
                shard.gradient = None

    def _step_shards(self) -> None:
        """Update the own shares; one is sent while the next is computed."""
        pending = []
        for group, shards in zip(self.param_groups, self._shards, strict=True):
            update = self._adamw_shards if group["kind"] == "adamw" else self._muon_shards
            for shard, own in zip(shards, update(group, shards), strict=True):
                pending.append((shard, shard.start_gather(own)))
        for shard, work in pending:
            work.wait()
            shard.finish_gather()

    def _adamw_shards(self, group: dict[str, Any], shards: list[Shard]) -> list[Tensor]:
        values = [shard.own_values() for shard in shards]
        adamw_update(group, values, [shard.take_gradient() for shard in shards], [shard.moments for shard in shards])
        return values

    def _muon_shards(self, group: dict[str, Any], shards: list[Shard]) -> list[Tensor]:
        (shard,) = shards
        values = shard.own_values()
        if values.numel():
            shape = group["params"][0].shape
            momentum, second_moment = (
                shard.moments[key].view(-1, *whole) for key, whole in moment_shapes("muon", shape).items()
            )
            gradients = shard.take_gradient()
            self._muon(group, values.view(-1, *shape), gradients.view(-1, *shape), momentum, second_moment)
        return [values]

    def _step_adamw(self, group: dict[str, Any]) -> None:
        # In float32 whatever the parameters' dtype; float() of a float32 tensor is the tensor itself.
        values = [parameter.float() for parameter in group["params"]]
        gradients = [parameter.grad.float() for parameter in group["params"]]
        adamw_update(group, values, gradients, [self.state[parameter] for parameter in group["params"]])
        for parameter, value in zip(group["params"], values, strict=True):
            if value.dtype != parameter.dtype:
                parameter.copy_(value)

    def _step_muon(self, group: dict[str, Any], momentum_stack: Tensor, second_moment: Tensor) -> None:
        values = torch.stack(group["params"]).float()
        gradients = torch.stack([parameter.grad for parameter in group["params"]]).float()
        self._muon(group, values, gradients, momentum_stack, second_moment)
        torch._foreach_copy_(group["params"], list(values.unbind()))

    def _muon(
        self, group: dict[str, Any], values: Tensor, gradients: Tensor, momentum_stack: Tensor, second_moment: Tensor
    ) -> None:
        """Muon in place, on float32 stacks; the gradients are used up."""
        rows, columns = values.shape[-2:]
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        scalars: list[Scalar] = [lr, lr * group["weight_decay"], group["momentum"], group["beta2"]]
        if self._muon_update is None:
            self._muon_update = torch.compile(muon_update, dynamic=False) if self._compile_muon else muon_update
        update: Callable[..., None] = self._muon_update
        if self._compile_muon:  # a float would be compiled in as a constant, again for every new value
            scalars = [torch.tensor(value) for value in scalars]
        update(values, gradients, momentum_stack, second_moment, *scalars, self.muon, self.muon_dtype)

    def _named(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    # What is saved. By name, so that it depends on neither order nor stacking of the groups, nor on the processes.

    def consolidate_state_dict(self) -> None:
        """Put the state together for :meth:`state_dict`, on the CPU of process 0. Called on all processes."""
        self.allocate_state()
        if self._shards:
            self._consolidated = {}
            for whole_name, moment in self.whole_moments():
                name, _, key = whole_name.rpartition(".")
                self._consolidated.setdefault(name, {})[key] = moment

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name and the groups' hyperparameters, all plain: loads with ``weights_only=True``.

        With several processes :meth:`consolidate_state_dict` comes first, each time, and process 0 alone has the state.
        """
        self.allocate_state()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        if not self._shards:
            return {"state": {name: dict(self.state[parameter]) for name, parameter in self._named()}, "groups": groups}
        if self._consolidated is None:
            raise RuntimeError("with several processes consolidate_state_dict() comes first, on all of them")
        states, self._consolidated = self._consolidated, None
        return {"state": states, "groups": groups}

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
            differences = hyperparameter_differences(self.param_groups, state_dict["groups"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError("optimizer state: it is not a state of MuonAdamW.") from error
        self.load_moments(moments)
        for line in differences:
            logger.warning(line)
        return differences

    def moments_by_name(self) -> dict[str, Tensor]:
        """A copy of the state, one flat dict ``<parameter>.<moment>``, for warm starts (safetensors).

        Moments: ``step``, ``exp_avg``, ``exp_avg_sq`` (AdamW); ``momentum`` (M, N), ``second_moment`` (M, 1) or
        (1, N) (Muon). All float32. With several processes it is called on all of them, process 0 gets the dict, on the
        CPU, and the others an empty one.
        """
        return {name: moment if self._shards else moment.clone() for name, moment in self.whole_moments()}

    def whole_moments(self) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`moments_by_name` gives, one at a time; on one process the moments themselves.

        All processes iterate to the end; process 0 gets each when it asks for it, and the others wait for that.
        """
        self.allocate_state()
        if not self._shards:
            yield from self._moments().items()
        for shard, i, key, shape in self._shared_moments() if self._shards else ():
            if (moment := shard.gather_moment(i, key, shape)) is not None:
                yield f"{shard.names[i]}.{key}", moment
            del moment  # before the next one is put together

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over moments of :meth:`moments_by_name`. With several processes each reads its share alone.

        Raises:
            UserError: a moment is missing, unknown or of another shape. Nothing has been changed then.
        """
        shapes = self.moment_shapes()
        problems = [f"optimizer state: {key} is missing." for key in shapes if key not in moments]
        problems += [f"optimizer state: {key} is unknown." for key in moments if key not in shapes]
        problems += [
            f"optimizer state: {key} has the shape {tuple(moments[key].shape)}, not {tuple(shape)}."
            for key, shape in shapes.items()
            if key in moments and moments[key].shape != shape
        ]
        if problems:
            shown = problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])
            raise UserError(shown, fix="It belongs to another model, or another matrix optimizer.")
        self.allocate_state()
        with torch.no_grad():
            if self._shards:
                for shard, i, key, _ in self._shared_moments():
                    shard.load_moment(i, key, moments[f"{shard.names[i]}.{key}"])
            else:
                for key, moment in self._moments().items():
                    moment.copy_(moments[key])

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": moment
            for name, parameter in self._named()
            for key, moment in self.state[parameter].items()
        }

    def moment_shapes(self) -> dict[str, Shape]:
        """Shapes of :meth:`moments_by_name`, on every process."""
        return {
            f"{name}.{key}": shape
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for key, shape in moment_shapes(group["kind"], parameter.shape).items()
        }

    def _shared_moments(self) -> Iterator[tuple[Shard, int, str, Shape]]:
        """Every moment of every parameter: the share, the parameter's number in it, the moment and its whole shape."""
        for group, shards in zip(self.param_groups, self._shards, strict=True):
            for shard in shards:
                for i, parameter in enumerate(shard.parameters):
                    for key, shape in moment_shapes(group["kind"], parameter.shape).items():
                        yield shard, i, key, shape
