"""The plan of a stage: every value that follows from the settings, with its formula, its inputs and its override."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from nanochat_pl.common.durations import rough_duration
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import build, setting, to_plain
from nanochat_pl.model.config import MAX_LAYERS
from nanochat_pl.optim.rules import RECIPE

LONG_LIST = 8  # a longer one is shown by how often each of its items occurs


@dataclass(frozen=True)
class Derived:
    """A value and its reason.

    ``inputs`` are the names and values that ``formula`` speaks of. Where the user (or an earlier stage) set the
    value, ``overridden_by`` says how and ``by_formula`` is what it would have been. A null value is not known.
    ``section`` is what it belongs to, for people.
    """

    value: Any
    formula: str
    inputs: dict[str, Any] = field(default_factory=dict)
    overridden_by: str | None = None
    by_formula: Any = None
    section: str = ""


@dataclass
class Plan:
    """Derived values by name, in the order in which they were derived. ``plan["num_steps"]`` is a value.

    ``section`` is that of the values that are derived next.
    """

    values: dict[str, Derived] = field(default_factory=dict)
    section: str = ""

    def __getitem__(self, name: str) -> Any:
        return self._find(name).value

    def __contains__(self, name: object) -> bool:
        return name in self.values

    @property
    def horizon_given(self) -> bool:
        """Whether the user set the length of the stage, by steps, FLOPs or the ratio."""
        names = ("num_steps", "tokens_per_parameter")
        return any(name in self.values and self.values[name].overridden_by is not None for name in names)

    def derive(
        self, name: str, value: Any, formula: str, inputs: tuple[str, ...] = (), given: tuple[str, Any] | None = None
    ) -> Any:
        """Add a value and give it back.

        Args:
            value: what the formula gives.
            inputs: names of values derived before.
            given: what overrides it: (how, value), e.g. ``("max_steps=20", 20)``; a null value overrides nothing.
        """
        assert name not in self.values, name
        numbers = {each: self[each] for each in inputs}
        if given is None or given[1] is None:
            self.values[name] = Derived(value, formula, numbers, section=self.section)
        else:
            self.values[name] = Derived(given[1], formula, numbers, given[0], value, self.section)
        return self.values[name].value

    def explain(self, name: str) -> str:
        """A value's formula, its inputs with their numbers, and what overrode it.

        Raises:
            UserError: there is no such value; names the nearest.
        """
        derived = self._find(name)
        lines = [f"{name} = {show(derived.value, name)}", f"  formula: {derived.formula}"]
        lines += [f"  with {each} = {show(value, each)}" for each, value in derived.inputs.items()]
        if derived.overridden_by is not None:
            by_formula = show(derived.by_formula, name)
            lines.append(f"  overridden by {derived.overridden_by}; the formula gives {by_formula}")
        return "\n".join(lines)

    def to_inherit(self) -> dict[str, float]:
        """The optimizer's hyperparameters, for the stages that come after this one."""
        return {name: self[name] for name in RECIPE}

    def to_plain(self) -> dict[str, Any]:
        return {name: to_plain(derived) for name, derived in self.values.items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], where: str = "plan") -> Plan:
        """The inverse of :meth:`to_plain`.

        Raises:
            UserError: it is not the data of a plan.
        """
        return cls({name: build(Derived, value, f"{where}.{name}") for name, value in values.items()})

    def _find(self, name: str) -> Derived:
        if name not in self.values:
            raise UserError(
                f"plan: there is no value {name!r}; {did_you_mean(name, self.values)}",
                fix="nanochat-pl plan lists them all.",
            )
        return self.values[name]


@dataclass(frozen=True)
class Inherited:
    """What a later stage takes from its parent's plan, types and bounds checked: that may be an untrusted file."""

    total_batch_tokens: int = setting(doc="Tokens of one optimizer step.", at_least=1, at_most=2**40)
    matrix_lr: float = setting(at_least=0, at_most=1e6)
    embedding_lr: float = setting(at_least=0, at_most=1e6)
    unembedding_lr: float = setting(at_least=0, at_most=1e6)
    scalar_lr: float = setting(at_least=0, at_most=1e6)
    smear_lr: float = setting(at_least=0, at_most=1e6)
    weight_decay: float = setting(at_least=0, at_most=1e6)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], where: str) -> Inherited:
        """Read it out of the plain data of a plan.

        Raises:
            UserError: it is not the data of a plan, lacks a value, or has one that cannot be.
        """
        plan = Plan.from_plain(values, where)
        found = {field.name: plan[field.name] for field in fields(cls) if field.name in plan}
        return build(cls, found, where)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Those of the optimizer, as :meth:`Plan.to_inherit` gives them."""
        return {name: getattr(self, name) for name in RECIPE}


def show(value: Any, name: str = "") -> str:
    """A value for people: thousands separated, floats with at most six digits; bytes, seconds and FLOPs by its name."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and (suffix := name.rpartition("_")[2]) in _SHOWN:
        return _SHOWN[suffix](value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:,.6g}"
    if isinstance(value, (list, tuple)):
        if len(value) > LONG_LIST:  # the windows of many layers
            return ", ".join(f"{count} × {show(item)}" for item, count in Counter(value).items())
        return " ".join(show(item) for item in value)
    return str(value)


class PlanRow(NamedTuple):
    """One line of the plan's table."""

    name: str
    value: str
    formula: str
    source: str  # "derived", or what overrode it


def plan_rows(plan: Plan) -> list[PlanRow]:
    """All values of a plan, in the order in which they follow from each other."""
    return [
        PlanRow(name, show(derived.value, name), derived.formula, derived.overridden_by or "derived")
        for name, derived in plan.values.items()
    ]


def plan_sections(plan: Plan) -> dict[str, list[PlanRow]]:
    """The same rows by section."""
    sections: dict[str, list[PlanRow]] = {}
    for row in plan_rows(plan):
        sections.setdefault(plan.values[row.name].section, []).append(row)
    return sections


def width_remark(plan: Plan) -> str | None:
    """Says where the width had to be rounded up to whole heads, and which depths near it need none."""
    if "aspect_ratio" not in plan:
        return None
    depth, aspect, head = plan["depth"], plan["aspect_ratio"], plan["head_dim"]
    if depth * aspect == plan["width"]:
        return None
    every = head // math.gcd(aspect, head)  # depths that give whole heads are multiples of this
    near = [good for good in (depth // every * every, depth // every * every + every) if 1 <= good <= MAX_LAYERS]
    depths = f"model.depth={' or '.join(str(each) for each in near)}" if near else "none"
    return (
        f"model.depth={depth}: width {plan['width']:,} instead of {depth * aspect:,}, for whole heads of {head};"
        f" nearest that divide: {depths}."
    )


def _size(num_bytes: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:,.2f} {unit}"
    return f"{num_bytes:,.0f} bytes"


_SHOWN = {
    "bytes": _size,
    "seconds": rough_duration,
    "cost": lambda cost: f"{cost:,.2f}",
    "flops": lambda flops: f"{flops:,.0f}" if flops < 1e9 else f"{flops:.4g}",
}
