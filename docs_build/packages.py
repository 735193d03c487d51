"""A hook of mkdocs: the picture of the packages in docs/architecture.md, from the imports of their files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "nanochat_pl"
MARK = "<!-- picture of the packages -->"
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, EDGE = 104, 30, 18, 44, 12


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the picture where the page says so."""
    return markdown.replace(MARK, svg_of(imports())) if page.file.src_uri == "architecture.md" else markdown


def imports() -> dict[str, set[str]]:
    """The packages that each package imports, itself left out."""
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: dict[str, set[str]] = {name: set() for name in sorted(names)}
    for name, others in found.items():
        for path in (PACKAGE / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    modules = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                else:
                    continue
                parts = [module.split(".") for module in modules]
                others |= {part[1] for part in parts if part[0] == "nanochat_pl" and part[1:2]} & names
        others.discard(name)
    return found


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """How high each package stands: one above the highest that it imports."""
    height: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((of(other) for other in graph[name]), default=-1)
        return height[name]

    return {name: of(name) for name in graph}


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others: of a → b → c and a → c the last is left out."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    return {name: {o for o in others if not any(o in reach(p) for p in others - {o})} for name, others in graph.items()}


def svg_of(graph: dict[str, set[str]]) -> str:
    """The packages in rows, each above all that it imports, as an SVG element in the colours of the page."""
    level = levels(graph)
    rows = [[name for name in graph if level[name] == height] for height in range(max(level.values()), -1, -1)]
    columns = max(map(len, rows))
    width = columns * (BOX_WIDTH + GAP_X) - GAP_X + 2 * EDGE
    height = len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * EDGE
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        own_width = len(row) * (BOX_WIDTH + GAP_X) - GAP_X
        for column, name in enumerate(row):
            x = (width - own_width) / 2 + column * (BOX_WIDTH + GAP_X)
            place[name] = x, EDGE + number * (BOX_HEIGHT + GAP_Y)
    parts = []
    for name, others in direct(graph).items():
        for other in sorted(others):
            (x, y), (to_x, to_y) = place[name], place[other]
            start, end = (x + BOX_WIDTH / 2, y + BOX_HEIGHT), (to_x + BOX_WIDTH / 2, to_y)
            bend = min(GAP_Y, (end[1] - start[1]) / 2)
            parts.append(
                f'<path d="M{start[0]:.0f},{start[1]:.0f} C{start[0]:.0f},{start[1] + bend:.0f} '
                f'{end[0]:.0f},{end[1] - bend:.0f} {end[0]:.0f},{end[1]:.0f}" fill="none" '
                'stroke="var(--md-default-fg-color--lighter)" stroke-width="1.2"/>'
            )
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
            'fill="var(--md-code-bg-color)" stroke="var(--md-primary-fg-color)"/>'
            f'<text x="{x + BOX_WIDTH / 2:.0f}" y="{y + BOX_HEIGHT / 2 + 4.5:.0f}" text-anchor="middle" '
            f'font-size="13" fill="var(--md-default-fg-color)">{name}</text>'
        )
    words = "The packages of nanochat_pl in rows: each stands above all that it imports."
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}" style="max-width: 100%">'
        f"{''.join(parts)}</svg>"
    )
