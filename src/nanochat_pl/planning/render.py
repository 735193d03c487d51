"""The plan as plain rows of text, for whoever prints them."""

from __future__ import annotations

from typing import NamedTuple

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
        PlanRow(name, show(derived.value), derived.formula, derived.overridden_by or "derived")
        for name, derived in plan.values.items()
    ]
