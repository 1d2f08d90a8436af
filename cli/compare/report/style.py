"""Figures of matplotlib as SVG that follows the colours of the page it stands in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from .theme import sentinel, theme_css, variables_of_sentinels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "draw"]

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDTH_INCHES, HEIGHT_INCHES = 4.4, 3.1  # 317 points wide: text of 10 points is 11 pixels high in a column of 350
FONT_POINTS = 10.2


@dataclass(frozen=True)
class Drawing:
    """One chart.

    Args:
        name: Name of its file, without the ending; unique in the report.
        title: What it shows, in a few words.
        caption: How to read it, one or two sentences.
        words: Its numbers in words, for those who do not see it.
        svg: The element `<svg>`, with colours as CSS variables and ids that are unique in the report.
    """

    name: str
    title: str
    caption: str
    words: str
    svg: str

    def file_text(self) -> str:
        """The drawing as a file of its own, which follows the reader's theme wherever it is shown."""
        style = f"<style>{theme_css()}\n:root{{background:var(--surface);font-family:sans-serif}}</style>"
        opening, rest = self.svg.split(">", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>{style}{rest}\n'


def draw(
    name: str,
    *,
    title: str,
    caption: str,
    words: str,
    paint: Callable[[Axes], None],
    height: float = HEIGHT_INCHES,
) -> Drawing:
    """Paint one pair of axes and keep it as a `Drawing`.

    Args:
        name: Unique in the report; letters, digits and hyphens.
        title: What it shows.
        caption: How to read it.
        words: Its numbers in words.
        paint: Draws into the axes, in colours of `theme.sentinel`.
        height: Height in inches.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **_look()}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        paint(axes)
        text = _text(figure)
    return Drawing(name, title, caption, words, _svg(text, name, words))


def _look() -> dict[Any, Any]:  # matplotlib names its settings one by one
    ink, muted, grid, surface = (sentinel(each) for each in ("ink", "muted", "grid", "surface"))
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same on every machine
        "font.size": FONT_POINTS,
        "text.color": ink,
        "text.parse_math": False,  # labels are the user's, and `$` is a character
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": FONT_POINTS,
        "axes.formatter.useoffset": False,
        "axes.formatter.use_mathtext": False,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelsize": FONT_POINTS,
        "ytick.labelsize": FONT_POINTS,
        "lines.linewidth": 1.7,
        "lines.markersize": 5,
        "lines.markeredgecolor": surface,
        "lines.markeredgewidth": 0.6,
    }


def _text(figure: Figure) -> str:
    stream = StringIO()
    # No date: the same comparison gives the same bytes.
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _svg(text: str, name: str, words: str) -> str:
    """The element alone, scalable, named for screen readers, its ids and colours made those of the page."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # a style here would hold for the whole page
                parent.remove(child)
    replaced = variables_of_sentinels()
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            element.set(key, _attribute(key, value, name, replaced))
        if element.tag == f"{{{SVG}}}g" and re.fullmatch(rf"{name}-(?:[a-z_]+_)?\d+", element.get("id", "")):
            del element.attrib["id"]  # matplotlib numbers its groups; nothing refers to them
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", words)
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")  # what the removed style said
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str, replaced: dict[str, str]) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{XLINK}}}href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key in ("style", "fill", "stroke"):
        value = re.sub(r"#fe01[0-9a-f]{2}", lambda found: replaced[found[0]], value)
        value = re.sub(r"'DejaVu Sans'(?:, [\w', -]+)?", "inherit", value) if "font" in value else value
    return value
