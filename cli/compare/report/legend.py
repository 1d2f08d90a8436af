"""Keys of the series: the line and marker of an optimizer, as a small drawing of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .theme import series_style, theme_css
from .wording import plain

__all__ = ["key", "legend_file"]

# Around the point (15, 6), by the names of matplotlib.
PLUS = "M13.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"
MARKERS = {
    "o": "M11.3 6a3.7 3.7 0 1 0 7.4 0a3.7 3.7 0 1 0 -7.4 0z",
    "s": "M11.7 2.7h6.6v6.6h-6.6z",
    "^": "M15 1.6l4.2 8h-8.4z",
    "D": "M15 1.4l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
    "v": "M15 10.4l4.2 -8h-8.4z",
    "P": PLUS,
    "X": PLUS,
    "*": "M15 .6l1.6 3.4l3.7 .5l-2.7 2.6l.7 3.7l-3.3 -1.8l-3.3 1.8l.7 -3.7l-2.7 -2.6l3.7 -.5z",
}


def key(number: int) -> str:
    """The key of a series as `<svg>`; the name beside it says what it is, so screen readers pass over it."""
    return f'<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">{_shapes(number)}</svg>'


def legend_file(names: Sequence[str]) -> str:
    """All keys with their names, as a file."""
    height = 22 * len(names) + 8
    rows = "".join(
        f'<g transform="translate(4 {22 * number + 9})">{_shapes(number)}'
        f'<text x="40" y="10.5" font-size="14">{escape(plain(name))}</text></g>'
        for number, name in enumerate(names)
    )
    style = f"{theme_css()}\n:root{{background:var(--surface);font-family:sans-serif}}text{{fill:var(--ink)}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="440" height="{height}" viewBox="0 0 440 {height}" role="img" '
        f'aria-label="{escape("Series: " + ", ".join(map(plain, names)))}"><style>{style}</style>{rows}</svg>\n'
    )


def _shapes(number: int) -> str:
    style = series_style(number)
    colour = f"var(--{style.variable})"
    dashes = ""
    if style.linestyle != "-":
        offset, lengths = style.linestyle
        dashes = (
            f' stroke-dasharray="{" ".join(f"{1.6 * length:g}" for length in lengths)}" stroke-dashoffset="{offset}"'
        )
    turn = ' transform="rotate(45 15 6)"' if style.marker == "X" else ""
    line = f'<path d="M0 6H30" stroke="{colour}" stroke-width="2" fill="none"{dashes}/>'
    return f'{line}<path d="{MARKERS[style.marker]}" fill="{colour}" stroke="var(--surface)" stroke-width=".7"{turn}/>'
