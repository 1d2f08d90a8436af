"""How every chart looks: small SVG drawings in the text colour of their page, with one fixed style for each series."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

__all__ = ["FONT_POINTS", "HEIGHT_INCHES", "SERIES_COLOURS", "Chart", "draw", "series_style"]

WIDTH_INCHES, HEIGHT_INCHES = 4.4, 3.1  # 317 points wide: text of 10 points is 11 pixels high in a column of 350
FONT_POINTS = 10.2

# After Okabe and Ito (https://jfly.uni-koeln.de/color/); each has a contrast of 3 against white and against near-black.
SERIES_COLOURS = ("#0072b2", "#d55e00", "#00845f", "#b0508a", "#936300", "#3b87b5", "#7a7a7a", "#7d7600")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.2)),
    (0, (7, 2, 1.5, 2)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    (0, (10, 3)),
    (0, (3, 3)),
)

INK = "#000000"  # becomes currentColor
SETTINGS: dict[Any, Any] = {  # matplotlib declares its settings one by one
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": FONT_POINTS,
    "text.parse_math": False,  # labels are the user's, and `$` is a character
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": FONT_POINTS,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": FONT_POINTS,
    "ytick.labelsize": FONT_POINTS,
    "legend.fontsize": FONT_POINTS,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.0,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}

# An image has no page to take its text colour from.
FILE_STYLE = (
    "<style>:root{color:#1c1e21;background:#fff}"
    "@media (prefers-color-scheme:dark){:root{color:#e8e6e1;background:#1b1e22}}</style>"
)


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        name: Name of its file without the extension; unique in the report.
        title: What it shows, in a few words.
        caption: How to read it, one or two sentences.
        words: Its numbers in words, for screen readers.
        svg: The element `<svg>`, with ids that are unique in the report.
    """

    name: str
    title: str
    caption: str
    words: str
    svg: str

    def file_text(self) -> str:
        """The chart as a file of its own, in the light or dark scheme of its reader."""
        opening, rest = self.svg.split(">", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>{FILE_STYLE}{rest}\n'


def series_style(number: int) -> dict[str, Any]:
    """Colour, marker and line style of a series: eight colours; more series repeat them with other markers."""
    lap, colour = divmod(number, len(SERIES_COLOURS))
    shape = (colour + 3 * lap) % len(MARKERS)
    return {"color": SERIES_COLOURS[colour], "marker": MARKERS[shape], "linestyle": LINE_STYLES[shape]}


def draw(
    name: str,
    *,
    title: str,
    caption: str,
    words: str,
    paint: Callable[..., None],
    height: float = HEIGHT_INCHES,
    panels: int = 1,
) -> Chart:
    """Draw axes; lines with a label get a legend below, those of the first panel for all.

    Args:
        name: Unique in the report; letters, digits and hyphens.
        title: What it shows.
        caption: How to read it.
        words: Its numbers in words.
        paint: Draws into the axes, one argument for each panel.
        height: Height in inches of a row of panels, without the legend.
        panels: Number of panels, two in a row.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    stream = StringIO()
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": name}):  # ids are hashes of the content and this salt
        rows, columns = -(-panels // 2), min(panels, 2)
        height *= rows
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="none")
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for place in places[panels:]:
            place.remove()
        paint(*places[:panels])
        handles, labels = places[0].get_legend_handles_labels()
        if handles:
            num_columns = 2 if max(map(len, labels)) <= 16 else 1
            figure.set_figheight(height + 0.22 * -(-len(labels) // num_columns))
            figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)
        # No date: the same comparison gives the same bytes.
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(name, title, caption, words, _embedded(stream.getvalue(), words))


def _embedded(text: str, words: str) -> str:
    """The element `<svg>` alone, in the text colour of its page and labelled for screen readers."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"(?s)\s*<metadata>.*?</metadata>", "", svg)
    # In tags, not in texts. Nothing refers to the numbers that matplotlib gives its groups.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r' id="[A-Za-z2.]+_\d+"', "", tag[0]).replace(INK, "currentColor"), svg)
    attributes = f'class="chart" role="img" aria-label="{escape(words)}" style="fill:currentColor"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1).rstrip()
