"""Fits laws of scaling to the runs of a ladder: the best size for a budget of FLOPs, or a power law.

nanochat-pl scaling 'scaling_laws-*'
nanochat-pl scaling 'miniseries-*' fit=power_law over=parameters to=miniseries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_pl.cli._choose_runs import ChoiceSettings, choose
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.errors import UserError, listed
from nanochat_pl.common.files import read_object
from nanochat_pl.common.schema import UserPath, is_finite_number, setting
from nanochat_pl.comparison import Run, groups
from nanochat_pl.comparison.metrics import DEFAULT, require_known
from nanochat_pl.comparison.scaling import IsoFlops, Point, PowerLaw, fit_isoflops, fit_power_law
from nanochat_pl.comparison.words import OPTIMUM_COLUMNS, POINT_COLUMNS, exponents, law, optimum_cells, point_cells
from nanochat_pl.planning import Plan
from nanochat_pl.report.scaling import write_scaling

_MATRICES, _HEAD, _ALL = "parameters_transformer_matrices", "parameters_lm_head", "parameters_total"
_COUNTED = {"scaling": (_MATRICES, _HEAD), "matrices": (_MATRICES,), "all": (_ALL,)}
# What the runs of a ladder differ in; what else differs is said.
_LADDER = {"model.depth", "flops_budget", "tokens_per_parameter", "max_steps", "total_batch_tokens"}


@dataclass(frozen=True)
class ScalingConfig(ChoiceSettings):
    """The root of configs/scaling.yaml."""

    fit: Literal["isoflop", "power_law"] = setting(
        "isoflop",
        "isoflop: the best size of each flops_budget, and its exponents; power_law: E + A x^-alpha over all runs.",
    )
    over: Literal["parameters", "tokens", "flops", "depth"] = setting("flops", "The x of a power law.")
    counted: Literal["scaling", "matrices", "all"] = setting(
        "scaling",
        "Parameters that count: scaling: matrices in the blocks and lm_head; matrices: those without it; all.",
    )
    metric: str = setting(DEFAULT, "What is fitted, a metric that falls.")
    to: UserPath | None = setting(None, "Folder for a page with drawings: scaling.html, .md, .json; null: none.")


Config = ScalingConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config, stage, runs, remarks = choose("scaling", ScalingConfig, arguments, lambda config: [config.metric])
    plans = {run.name: _plan(Path(config.paths.runs) / run.name / stage / "plan.json") for run in runs}
    points = _points(runs, plans, config)
    others = [key for key in groups.differing([run.settings for run in runs]) if key not in _LADDER]
    if others:
        remarks = [
            *remarks,
            f"The runs also differ in {listed(others, groups.MAX_NAMED)}: the fit takes no account of it.",
        ]
    found: IsoFlops | PowerLaw
    if config.fit == "isoflop":
        found = fit_isoflops(points)
        print_table(
            OPTIMUM_COLUMNS, map(optimum_cells, found.optima), title=f"{stage}, {config.metric}: the best sizes"
        )
        lines = exponents(found)
    else:
        found = fit_power_law([_x(point, plans, config.over) for point in points], [point.loss for point in points])
        print_table(POINT_COLUMNS, map(point_cells, points), title=f"{stage}, {config.metric}: the runs")
        lines = law(found, config.metric, config.over)
    for line in [*lines, *remarks]:
        rank_zero_print(line)
    if config.to is not None:
        page = write_scaling(Path(config.to), found, points, config.metric, config.over, [*lines, *remarks])
        rank_zero_print(f"page: {page}")
    return 0


def _with_budgets(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs if is_finite_number(run.entry.settings.get("flops_budget"))]
    return f", as these: {listed(names, groups.MAX_NAMED)}" if names else ""


def _points(runs: Sequence[Run], plans: dict[str, Plan], config: ScalingConfig) -> list[Point]:
    require_known([config.metric], {name for run in runs for name in run.metrics}, "metric")
    found = []
    for run in runs:
        budget = run.entry.settings.get("flops_budget")
        if config.fit == "isoflop" and not is_finite_number(budget):
            raise UserError(
                f"fit=isoflop: {run.name} was not trained for a flops_budget.",
                f"Choose other runs{_with_budgets(runs)}; or fit=power_law, which needs none.",
            )
        if config.metric in run.metrics:
            parameters = float(sum(plans[run.name][name] for name in _COUNTED[config.counted]))
            loss = run.metrics[config.metric]
            found.append(Point(run.name, float(budget or run.entry.flops), parameters, float(run.entry.tokens), loss))
    return found


def _x(point: Point, plans: dict[str, Plan], over: str) -> float:
    x = {
        "parameters": point.parameters,
        "tokens": point.tokens,
        "flops": plans[point.name]["flops_per_token"] * point.tokens,
        "depth": plans[point.name]["depth"],
    }[over]
    if x <= 0:
        raise UserError(f"over={over}: of {point.name} the ledger knows none.")
    return float(x)


def _plan(path: Path) -> Plan:
    if not path.is_file():
        raise UserError(f"{path}: is not there, and it has the number of parameters.", "Bring the run's folder back.")
    return Plan.from_plain(read_object(path), str(path))
