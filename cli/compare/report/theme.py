"""Colours of the report, as one table for both themes, and the markers that tell series apart without colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PALETTE", "SERIES", "SeriesStyle", "sentinel", "series_style", "theme_css", "variables_of_sentinels"]

# Name of a CSS variable -> colour in the light and in the dark theme. The series are the colours of Okabe and Ito
# (https://jfly.uni-koeln.de/color/), darkened or lightened until each has a contrast of 3 against both surfaces.
PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#f6f5f2", "#131518"),
    "surface": ("#ffffff", "#1b1e22"),
    "ink": ("#1c1e21", "#e8e6e1"),
    "muted": ("#585c63", "#a9adb4"),
    "rule": ("#d9d7d1", "#363b42"),
    "grid": ("#e7e5e0", "#2b3036"),
    "accent": ("#00598c", "#7cc4f2"),
    "good-ink": ("#00533b", "#7fe0ba"),
    "good-fill": ("#d9f0e6", "#103a2d"),
    "bad-ink": ("#8a2f00", "#ffb48c"),
    "bad-fill": ("#fbe3d6", "#472010"),
    "even-ink": ("#44484f", "#c6cad0"),
    "even-fill": ("#e9e8e4", "#30353b"),
    "series-1": ("#0072b2", "#4aa8e8"),
    "series-2": ("#d55e00", "#ff8f4d"),
    "series-3": ("#00845f", "#2fc598"),
    "series-4": ("#b0508a", "#e79ac7"),
    "series-5": ("#936300", "#f0b73a"),
    "series-6": ("#3b87b5", "#9bd6f7"),
    "series-7": ("#5c6068", "#b9bec6"),
    "series-8": ("#7d7600", "#f0e442"),
}
NAMES = list(PALETTE)


@dataclass(frozen=True)
class SeriesStyle:
    """How one optimizer is drawn in every chart.

    Args:
        variable: Name of its CSS variable.
        marker: Marker of matplotlib.
        linestyle: Line style of matplotlib.
    """

    variable: str
    marker: str
    linestyle: Any


SERIES = tuple(
    SeriesStyle(f"series-{number}", marker, linestyle)
    for number, (marker, linestyle) in enumerate(
        [
            ("o", "-"),
            ("s", (0, (6, 2))),
            ("^", (0, (2, 1.2))),
            ("D", (0, (7, 2, 1.5, 2))),
            ("v", (0, (1, 1.2))),
            ("P", (0, (5, 1.5, 1, 1.5, 1, 1.5))),
            ("X", (0, (10, 3))),
            ("*", (0, (3, 3))),
        ],
        start=1,
    )
)


def series_style(number: int) -> SeriesStyle:
    """Style of the optimizer with this number: eight differ in colour; further ones repeat it with another marker."""
    colour, lap = number % len(SERIES), number // len(SERIES)
    other = SERIES[(colour + 3 * lap) % len(SERIES)]
    return SeriesStyle(SERIES[colour].variable, other.marker, other.linestyle)


def sentinel(name: str) -> str:
    """A colour for matplotlib that stands for a CSS variable: `#fe01NN`, which nothing else is drawn in."""
    return f"#fe01{NAMES.index(name):02x}"


def variables_of_sentinels() -> dict[str, str]:
    """What to write in a drawing in place of each sentinel."""
    return {sentinel(name): f"var(--{name})" for name in NAMES}


def theme_css(*, choosable: bool = False) -> str:
    """The variables as CSS: light, dark where the reader's system is dark, light on paper.

    Args:
        choosable: Whether the page has the inputs `#theme-light` and `#theme-dark`, which win over the system.
    """
    light, dark = (
        "".join(f"--{name}:{colours[theme]};" for name, colours in PALETTE.items()) + f"color-scheme:{scheme}"
        for theme, scheme in enumerate(("light", "dark"))
    )
    rules = f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    if choosable:
        rules += (
            f"\n@media screen{{:root:has(#theme-light:checked){{{light}}}:root:has(#theme-dark:checked){{{dark}}}}}"
        )
    return rules
