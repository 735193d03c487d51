"""The Markdown of a report as one self-contained HTML page: no script, nothing that is loaded, drawings within it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from nanochat_pl.report.format import BLOCKS, markdown_inline, show
from nanochat_pl.report.plots import within_page

# No script may run and nothing may be loaded, whatever a model has written.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · nanochat_pl</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def render(template: str, shown: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """A template of the report with what it shows; it has the filters ``inline``, ``show`` and those that are given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nanochat_pl.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(inline=markdown_inline, show=show, **filters)
    return environment.get_template(template).render(shown)


def page(title: str, markdown: str, drawings: Mapping[str, str]) -> str:
    """The page.

    What a model or a user has written is escaped in the Markdown; here HTML in Markdown is off as well.

    Args:
        drawings: SVG by the names of the files that the Markdown shows.
    """
    from markdown_it import MarkdownIt

    def image(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
        name = str(tokens[index].attrs["src"])
        return within_page(drawings[name], name.removesuffix(".svg"), tokens[index].content)

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.add_render_rule("fence", _block)
    renderer.add_render_rule("image", image)
    renderer.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    first, *sections = re.split("(?=<h2>)", renderer.render(markdown))
    body = "".join([f"<header>\n{first}</header>\n", *map(_section, sections)])
    style = resources.files("nanochat_pl.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=html.escape(title), style=style, body=body)


def _section(text: str) -> str:
    """A chapter, of a class that is the first word of its heading; what stands under a heading within it is folded."""
    (kind,) = re.findall(r"^<h2>(\w+)", text)
    folded = re.sub(
        r"<h3>(.*?)</h3>(.*?)(?=<h3>|\Z)", r"<details><summary>\1</summary>\2</details>" + "\n", text, flags=re.S
    )
    return f'<section class="{kind.lower()}">\n{folded}</section>\n'


def _block(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    """Text as somebody wrote it: a message, a question, a sample."""
    kinds = [word for word in tokens[index].info.split() if word in BLOCKS]
    return f'<div class="{" ".join(["block", *kinds])}">{html.escape(tokens[index].content.rstrip(chr(10)))}</div>\n'
