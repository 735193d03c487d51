"""The plan as plain rows of text, for whoever prints them, and what a person should know of it."""

from __future__ import annotations

import math
from typing import NamedTuple

from nanochat_pl.model.config import MAX_LAYERS
from nanochat_pl.planning.plan import Plan, show


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
