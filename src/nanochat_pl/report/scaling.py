"""The page of a fit: the law in words, its drawings, and all of its points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanochat_pl.common.files import ensure_folder, write_json, write_text
from nanochat_pl.common.schema import to_plain
from nanochat_pl.comparison.scaling import IsoFlops, Point, PowerLaw
from nanochat_pl.comparison.words import OPTIMUM_COLUMNS, POINT_COLUMNS, optimum_cells, point_cells
from nanochat_pl.report.page import page, render
from nanochat_pl.report.scaling_plots import growth_svg, isoflops_svg, power_law_svg

NAME = "scaling"


def write_scaling(
    folder: Path, found: IsoFlops | PowerLaw, points: Sequence[Point], metric: str, over: str, remarks: Sequence[str]
) -> Path:
    """Write scaling.html (self-contained), scaling.md with its drawings, and scaling.json into a folder.

    Args:
        metric: what was fitted.
        over: the x of a power law.
        remarks: the law in words, and what else there is to say.

    Returns:
        the path of scaling.html.

    Raises:
        UserError: the folder cannot be written.
    """
    ensure_folder(folder)
    titles = {}
    if isinstance(found, PowerLaw):
        drawings = {"power_law.svg": power_law_svg(found, metric, over)}
        titles["power_law.svg"] = f"{metric} by {over}, with the power law"
    else:
        drawings = {"isoflops.svg": isoflops_svg(found, metric)}
        titles["isoflops.svg"] = f"{metric} by size, with a parabola for each budget"
        if found.parameters_exponent is not None:
            drawings["growth.svg"] = growth_svg(found)
            titles["growth.svg"] = "best size and tokens by budget"
    for name, drawing in drawings.items():
        write_text(folder / name, drawing)
    optima = [] if isinstance(found, PowerLaw) else [optimum_cells(optimum) for optimum in found.optima]
    title = f"Scaling of {metric}"
    markdown = render(
        "scaling.md.jinja",
        {
            "title": title,
            "remarks": list(remarks),
            "drawings": titles,
            "optimum_columns": OPTIMUM_COLUMNS,
            "optima": optima,
            "point_columns": POINT_COLUMNS,
            "points": [point_cells(point) for point in points],
        },
    )
    write_json(folder / f"{NAME}.json", {"fit": to_plain(found), "points": to_plain(list(points))})
    write_text(folder / f"{NAME}.md", markdown)
    write_text(folder / f"{NAME}.html", page(title, markdown, drawings))
    return folder / f"{NAME}.html"
