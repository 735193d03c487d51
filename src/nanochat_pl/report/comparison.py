"""The page of a comparison: tables with verdicts, curves over four axes, final values, what differs, every run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_pl.common.durations import duration
from nanochat_pl.common.files import ensure_folder, write_json, write_text
from nanochat_pl.common.schema import to_plain
from nanochat_pl.comparison import Comparison, Group
from nanochat_pl.comparison.curves import Band, Curve, band_of, difference_of_curves, resampled
from nanochat_pl.comparison.groups import shown, why_no_pairs
from nanochat_pl.comparison.words import COLUMNS, cells, direction, what_it_holds
from nanochat_pl.report.comparison_plots import Overlay, color_of, dots_svg, overlay_svg
from nanochat_pl.report.format import clean, compact
from nanochat_pl.report.page import page, render
from nanochat_pl.report.read import Series, read_curves

# By the column of metrics.csv that a curve is laid over: units, each with its size.
AXES: dict[str, tuple[tuple[str, float], ...]] = {
    "": (("steps", 1),),
    "train/tokens": (("tokens", 1),),
    "train/flops": (*((f"1e{power} FLOPs", 10.0**power) for power in range(30, 5, -3)), ("FLOPs", 1)),
    "train/seconds": (("hours", 3600), ("minutes", 60), ("seconds", 1)),
}
ALWAYS = "train/loss_smoothed"  # it has a curve wherever there is one
NAME = "compare"


def write_comparison(folder: Path, result: Comparison, groups: Sequence[Group], runs: Path) -> Path:
    """Write compare.html (self-contained), compare.md with its drawings, and compare.json into a folder.

    Args:
        groups: those that were compared, in their order.
        runs: folder of all runs, where their curves are.

    Returns:
        the path of compare.html.

    Raises:
        UserError: a file of curves is damaged, or the folder cannot be written.
    """
    ensure_folder(folder)
    curves = {
        run.name: read_curves(runs / run.name / result.stage / "metrics.csv") for group in groups for run in group.runs
    }
    overlays = {
        metric: found
        for metric in dict.fromkeys([*(each.metric for each in result.metrics), ALWAYS])
        if (found := overlays_of(metric, groups, curves))
    }
    drawings = {f"{each.key}.svg": overlay_svg(each) for found in overlays.values() for each in found}
    dots = {metric.metric: f"{file_name(metric.metric)}-values.svg" for metric in result.metrics}
    for metric in result.metrics:
        drawings[dots[metric.metric]] = dots_svg(metric, dots[metric.metric])
    for name, drawing in drawings.items():
        write_text(folder / name, drawing)
    title = " against ".join([", ".join(result.groups[1:]) or "runs", result.groups[0]])
    markdown = render(
        "compare.md.jinja",
        {
            "title": title,
            "result": result,
            "groups": groups,
            "tiles": list(_tiles(result)),
            "columns": COLUMNS,
            "overlays": overlays,
            "dots": dots,
        },
        cells=cells,
        direction=direction,
        holds=what_it_holds,
        duration=duration,
        typed=shown,
        compact=compact,
    )
    write_json(folder / f"{NAME}.json", _plain(result, groups))
    write_text(folder / f"{NAME}.md", markdown)
    write_text(folder / f"{NAME}.html", page(clean(title), markdown, drawings))
    return folder / f"{NAME}.html"


def overlays_of(metric: str, groups: Sequence[Group], curves: Mapping[str, Mapping[str, Series]]) -> list[Overlay]:
    """The curves of a metric over each axis, and their differences from the first group's over steps; none where no
    run has measured it more than once.

    Args:
        curves: columns of metrics.csv by the names of runs.
    """
    if not any(len(of_run[metric].steps) > 1 for of_run in curves.values() if metric in of_run):
        return []
    found = []
    for column, units in AXES.items():
        placed = [
            [curve for run in group.runs if (curve := _curve(curves[run.name], metric, column))] for group in groups
        ]
        last = max((curve[0][-1] for group in placed for curve in group), default=0.0)
        unit, size = next((each for each in units if last >= 2 * each[1]), units[-1])
        scaled = [[([x / size for x in xs], ys) for xs, ys in group] for group in placed]
        bands = _named(groups, [band_of(group) for group in scaled])
        if bands:
            name = column.rpartition("/")[2] or "steps"
            found.append(Overlay(f"{file_name(metric)}-{name}", metric, unit, bands))
    if others := _named(groups, [None, *(_apart(groups[0], group, metric, curves) for group in groups[1:])]):
        title = f"minus {groups[0].label}"
        found.append(Overlay(f"{file_name(metric)}-differences", title, AXES[""][0][0], others, from_zero=True))
    return found


def _named(groups: Sequence[Group], bands: Sequence[Band | None]) -> tuple[tuple[str, str, Band], ...]:
    found = enumerate(zip(groups, bands, strict=True))
    return tuple((group.label, color_of(n), band) for n, (group, band) in found if band is not None)


def _apart(base: Group, group: Group, metric: str, curves: Mapping[str, Mapping[str, Series]]) -> Band | None:
    """Differences of pairs of one seed, over steps; where there are none, of the mean curves."""
    own, others = (
        {seed: _curve(curves[run.name], metric, "") for seed, run in each.by_seed.items()} for each in (base, group)
    )
    if why_no_pairs(base, group) is None:
        pairs = [(own[seed], others[seed]) for seed in own if seed in others]
    else:
        means = [band_of([curve for curve in each.values() if curve]) for each in (own, others)]
        pairs = [tuple(None if band is None else (band.x, band.mean) for band in means)]  # type: ignore[list-item]
    return band_of([difference for a, b in pairs if a and b and (difference := difference_of_curves(a, b))])


def _curve(columns: Mapping[str, Series], metric: str, axis: str) -> Curve | None:
    """A curve over the steps, or over another column, which is 0 at step 0."""
    series, along = columns.get(metric, Series()), columns.get(axis, Series())
    if not series.steps:
        return None
    if not axis:
        return series.steps, series.values
    return (resampled(series.steps, (0, *along.steps), (0.0, *along.values)), series.values) if along.steps else None


def _tiles(result: Comparison) -> Any:
    """The few figures to see first: what, difference, verdict."""
    for metric in result.metrics:
        for row in metric.rows[1:]:
            yield f"{row.label}, {metric.metric}", f"{row.simple_difference:+.3g}", row.verdict


def _plain(result: Comparison, groups: Sequence[Group]) -> dict[str, Any]:
    """All figures for programs, and all that the ledger has of the runs."""
    runs = {group.label: [run.entry.to_plain() for run in group.runs] for group in groups}
    return {**figures(result), "runs": runs}


def figures(result: Comparison) -> dict[str, Any]:
    """The figures of a comparison as plain data for JSON; infinite ends of intervals are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and abs(value) == float("inf") else value

    plain: dict[str, Any] = finite(to_plain(result))
    return plain


def file_name(metric: str) -> str:
    """A metric's name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", metric).strip("-") or "metric"
