"""The report as one page that needs no other file, no network and no script."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

from .content import Page
from .legend import key
from .theme import theme_css

__all__ = ["render_html"]

TEMPLATES = Path(__file__).parent / "templates"


def render_html(page: Page) -> str:
    """The page; every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals["zip"] = zip
    environment.filters["breakable"] = _breakable
    style = f"{theme_css(choosable=True)}\n{(TEMPLATES / 'report.css').read_text('utf-8')}"
    keys = [key(number) for number in range(len(page.optimizers))]
    return environment.get_template("report.html.j2").render(page=page, keys=keys, style=style)


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line behind a mark between its words, and not within a word."""
    return Markup(re.sub(r"([_=:,./])", r"\1<wbr>", str(escape(name))))
