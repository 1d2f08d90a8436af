"""Numbers as readers want them: no more digits than they carry, one unit, and a dash for missing values."""

from __future__ import annotations

import math
import re

__all__ = [
    "BYTE_UNITS",
    "MISSING",
    "count",
    "decimals_for",
    "duration",
    "factor",
    "learning_rate",
    "milliseconds",
    "number",
    "plain",
    "shorten",
    "signed",
    "size",
    "spread_decimals",
    "with_spread",
]

MISSING = "–"
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
MINUS = "−"


def decimals_for(value: float, digits: int) -> int:
    """Decimal places that show so many significant digits of a value."""
    if value == 0 or not math.isfinite(value):
        return 0
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.9996 has that of 10
    return max(0, digits - 1 - exponent)


def number(value: float | None, *, decimals: int | None = None) -> str:
    """Four significant digits, or so many decimals; a dash for nothing, words for what is not finite."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinite" if value > 0 else f"{MINUS}infinite")
    if decimals is None and value != 0 and not 1e-4 <= abs(value) < 1e7:
        return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3e}").replace("-", MINUS)
    places = decimals_for(value, 4) if decimals is None else decimals
    return f"{value:,.{places}f}".replace("-", MINUS)


def spread_decimals(spread: float | None) -> int | None:
    """Decimals that show two digits of a spread; None if there is none."""
    if spread is None or not math.isfinite(spread) or spread <= 0:
        return None
    return min(decimals_for(spread, 2), 8)


def with_spread(value: float, spread: float | None) -> str:
    """`4.736 ± 0.091`: the spread with two digits, the value with as many decimals."""
    if spread is None or not math.isfinite(spread) or not math.isfinite(value):
        return number(value)
    places = spread_decimals(spread)
    return f"{number(value, decimals=places)} ± {number(spread, decimals=places)}"


def signed(value: float | None, *, decimals: int | None = None) -> str:
    """A number with its sign, as differences are written."""
    text = number(value, decimals=decimals)
    return f"+{text}" if value is not None and value > 0 else text


def count(value: float | None) -> str:
    """Steps and the like: whole, with separators."""
    return f"{round(value):,}" if value is not None and math.isfinite(value) else MISSING


def milliseconds(value: float | None) -> str:
    """Three significant digits, in milliseconds."""
    return _three_digits(value, "ms")


def duration(seconds: float | None) -> str:
    """`8.41 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 99.95:
        return _three_digits(seconds, "s")
    if seconds < 3599.5:
        return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number_of_bytes: float | None) -> str:
    """Bytes in units of a power of 1000, three significant digits."""
    if number_of_bytes is None or not math.isfinite(number_of_bytes):
        return MISSING
    for scale, unit in BYTE_UNITS:
        if abs(number_of_bytes) >= 0.9995 * scale:
            return _three_digits(number_of_bytes / scale, unit)
    return f"{round(number_of_bytes)} B"


def factor(value: float) -> str:
    """`0.52×`: a value divided by the reference's."""
    return f"{value:.{2 if value >= 0.095 else 3}f}×"


def learning_rate(value: float | None) -> str:
    """`0.003`, `1e-5`: as one would type it."""
    return MISSING if value is None else re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:g}")


def shorten(text: str, length: int) -> str:
    """A label for a chart: on one line, at most so long."""
    text = plain(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plain(text: str) -> str:
    """Without control characters, which neither a drawing nor a table can hold."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", text).strip()


def _three_digits(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.{decimals_for(value, 3)}f} {unit}"
