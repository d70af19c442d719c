"""Figures in human units: three significant digits, one unit for what is compared, intervals as fine as they deserve.

Missing figures read "–", never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perwatt.report import RatioFigure

MISSING = "–"
TIMES = ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
SIZES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"))
JOULES = ((1e-9, "nJ"), (1e-6, "µJ"), (1e-3, "mJ"), (1.0, "J"))
POWERS = ((1e-3, "mW"), (1.0, "W"))
PLAIN = ((1.0, ""),)
RATES = ((1.0, "/s"),)
Units = Sequence[tuple[float, str]]


def plain(text: object) -> str:
    """`text` without control characters: names from model files must not steer a terminal. Newlines become spaces."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(str(text).split()))


def known(value: float | None) -> float | None:
    """`value`, or None where it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, thousands separated: 0.617, 12.3, 7,690."""
    value = known(value)
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    # From 1,000 up, whole numbers say more than rounded ones.
    shown = value if exponent >= digits else rounded
    return f"{shown:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def in_units(values: Sequence[float | None], units: Units, digits: int = 3) -> list[str]:
    """All `values` in one unit, so that they compare at a glance: the largest that leaves the smallest readable."""
    found = [known(value) for value in values]
    sizes = [abs(value) for value in found if value]
    fits = [unit for unit in units if sizes and max(sizes) >= unit[0] and min(sizes) >= 0.1 * unit[0]]
    factor, name = fits[-1] if fits else units[0]
    return [MISSING if value is None else f"{number(value / factor, digits)} {name}".strip() for value in found]


def signed(value: float, decimals: int) -> str:
    """With its sign, a true minus, and no sign on what rounds to nothing."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def ratio_words(ratio: RatioFigure) -> tuple[str, str]:
    """The ratio and its interval: ("1.62×", "[1.58, 1.66]"); as many decimals as the interval deserves."""
    value, low, high = known(ratio.value), known(ratio.low), known(ratio.high)
    if value is None:
        return MISSING, ""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    if value < 0.1:
        decimals = 3
    # What is counted, not measured, comes with low = high = value: that is no interval.
    if low is None or high is None or low == high:
        return f"{value:.{decimals}f}×", ""
    half = (high - low) / 2
    if value < 10 and half < 0.01:
        decimals = max(decimals, min(4, math.ceil(-math.log10(half))))
    return f"{value:.{decimals}f}×", f"[{low:.{decimals}f}, {high:.{decimals}f}]"


def with_interval(ratio: RatioFigure) -> str:
    """The ratio and its interval in one string."""
    return " ".join(word for word in ratio_words(ratio) if word)


def inverse(ratio: RatioFigure) -> RatioFigure:
    """The ratio the other way round; nothing where a bound is 0 or missing."""

    def turned(value: float | None) -> float | None:
        return 1 / value if value else None

    made: RatioFigure = ratio.model_copy(
        update={"value": turned(ratio.value), "low": turned(ratio.high), "high": turned(ratio.low)}
    )
    return made


def compact(value: float | None, digits: int = 3) -> str:
    """`number` without trailing zeros, for settings and budgets: 0.5, not 0.500."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def percent_or_number(value: float | None, unit: str) -> str:
    """A fraction as percent, any other metric as it is."""
    value = known(value)
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if unit == "fraction" else number(value)


def duration(seconds: float) -> str:
    """Wall time for people: 0.02 s, 41 s, 3 min 05 s."""
    if seconds < 10:
        return f"{number(seconds, 2)} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
