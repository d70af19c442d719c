"""The chart of a report: how many times better or worse each figure got, with its 95 % interval, as inline SVG.

Every ratio is turned so that more is better, and drawn from 1 on a logarithmic axis: twice as good and half as good are
equally long. Positions are percentages, so that the drawing fits any width while its letters keep their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from perwatt.report import AccuracyReport, RatioFigure, Report
from perwatt.report_table import FIGURES, Verdict, energy_known, judged
from perwatt.report_units import inverse, known, ratio_words

ROW_HEIGHT = 46
BAR_TOP, BAR_HEIGHT = 20, 12
CLASSES = {"better": "better", "worse": "worse"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
FINE_TICKS = (0.8, 0.9, 1.0, 1.1, 1.25)


@dataclass(frozen=True)
class Bar:
    """One row: `gain` is the ratio turned so that more is better."""

    label: str
    gain: RatioFigure
    verdict: Verdict

    def words(self) -> str:
        """ "1.62× better [1.58, 1.66]", "1.10× worse", or "≈ same [0.98, 1.03]"."""
        shown = inverse(self.gain) if self.verdict == "worse" else self.gain
        value, interval = ratio_words(shown)
        return " ".join(filter(None, [value if self.verdict in CLASSES else "", self.verdict, interval]))


def bars(report: Report) -> list[Bar]:
    """The figures that have a ratio."""
    found = []
    for figure in FIGURES:
        ratio: RatioFigure = getattr(report.ratio, figure.key)
        missing = figure.key == "throughput_per_watt" and not energy_known(report)
        if missing or not known(ratio.value):
            continue
        gain = ratio if figure.more_is_better else inverse(ratio)
        found.append(Bar(figure.label, gain, judged(ratio, figure.more_is_better)))
    return found


def chart(report: Report) -> str:
    """The figure with its caption; nothing where there is no ratio, or nothing but one program on both sides."""
    rows = bars(report)
    if all(row.verdict == "same" for row in rows):
        return ""
    axis = Axis.over(rows)
    height = ROW_HEIGHT * len(rows) + 24
    said = "; ".join(f"{row.label}: {row.words()}" for row in rows)
    drawn = "\n".join([*(_row(row, index, axis) for index, row in enumerate(rows)), _tick_labels(axis, height - 4)])
    return (
        "<figure>\n"
        f'<svg role="img" aria-labelledby="chart-title chart-desc" height="{height}">\n'
        '<title id="chart-title">How many times better or worse each figure got</title>\n'
        f'<desc id="chart-desc">{escape(said)}</desc>\n{drawn}\n</svg>\n'
        "<figcaption>How many times better (to the right of 1×) or worse (to the left) each figure got, on a "
        "logarithmic scale; the line across a bar's end is the 95 % interval.</figcaption>\n</figure>"
    )


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def over(cls, rows: list[Bar]) -> Axis:
        """Wide enough for every bar and whisker, 1 included, and never so narrow that noise looks like news."""
        ends = [end for row in rows for end in (row.gain.value, row.gain.low, row.gain.high) if known(end) and end]
        low, high = min([*ends, 0.85]), max([*ends, 1.2])
        return cls(max(low, TICKS[0]) / 1.04, min(high, TICKS[-1]) * 1.04)

    def at(self, value: float) -> str:
        """The position of `value`, in percent of the width."""
        inside = min(self.high, max(self.low, value))
        share = math.log(inside / self.low) / math.log(self.high / self.low)
        return f"{100 * share:.2f}%"

    def ticks(self) -> list[float]:
        """Round numbers inside the axis."""
        coarse = [tick for tick in TICKS if self.low < tick < self.high]
        return coarse if len(coarse) > 1 else [tick for tick in FINE_TICKS if self.low < tick < self.high]


def _tick_labels(axis: Axis, y: int) -> str:
    return "\n".join(
        f'<text class="tick" x="{axis.at(tick)}" y="{y}" text-anchor="middle">{tick:g}×</text>' for tick in axis.ticks()
    )


def _tick_lines(axis: Axis, top: int) -> list[str]:
    """Beside the bars only: a line through the words above them would make them hard to read."""
    return [
        f'<line class="{"one" if tick == 1 else "grid"}" x1="{axis.at(tick)}" x2="{axis.at(tick)}" '
        f'y1="{top + BAR_TOP - 3}" y2="{top + BAR_TOP + BAR_HEIGHT + 3}"/>'
        for tick in axis.ticks()
    ]


def _row(row: Bar, index: int, axis: Axis) -> str:
    top = ROW_HEIGHT * index
    value = row.gain.value or 1.0
    css = CLASSES.get(row.verdict, "same")
    left, right = sorted((1.0, value))
    start, end = float(axis.at(left)[:-1]), float(axis.at(right)[:-1])
    drawn = [
        *_tick_lines(axis, top),
        f'<text x="0" y="{top + 14}">{escape(row.label)}</text>',
        f'<text class="{css}" x="100%" y="{top + 14}" text-anchor="end">{escape(row.words())}</text>',
        f'<rect class="{css}" x="{start:.2f}%" y="{top + BAR_TOP}" width="{max(0.2, end - start):.2f}%" '
        f'height="{BAR_HEIGHT}"/>',
    ]
    low, high = known(row.gain.low), known(row.gain.high)
    if low and high and low < high:
        drawn.append(whisker(axis.at(low), axis.at(high), top + BAR_TOP + BAR_HEIGHT // 2))
    return "\n".join(drawn)


def whisker(low: str, high: str, middle: int) -> str:
    """The line of an interval from `low` to `high`, positions in percent, at the height `middle`."""
    ends = "".join(
        f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 5}" y2="{middle + 5}"/>' for x in (low, high)
    )
    return f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>{ends}'


def flips(found: AccuracyReport) -> str:
    """Samples lost and gained as two bars, each with its number; nothing where flips don't exist."""
    lost, gained = found.flips_lost, found.flips_gained
    if lost is None or gained is None or lost + gained == 0:
        return ""
    share = 100 * lost / (lost + gained)
    said = f"Right before and wrong now: {lost:,} of {found.n:,}. Wrong before and right now: {gained:,}."
    return (
        '<figure>\n<svg role="img" aria-labelledby="flips-title flips-desc" height="40">\n'
        f'<title id="flips-title">Samples lost and gained</title>\n<desc id="flips-desc">{escape(said)}</desc>\n'
        f'<text class="worse" x="0" y="14">{lost:,} lost</text>\n'
        f'<text class="better" x="100%" y="14" text-anchor="end">{gained:,} gained</text>\n'
        f'<rect class="worse" x="0" y="{BAR_TOP}" width="{share:.2f}%" height="{BAR_HEIGHT}"/>\n'
        f'<rect class="better" x="{share:.2f}%" y="{BAR_TOP}" width="{100 - share:.2f}%" height="{BAR_HEIGHT}"/>\n'
        f"</svg>\n<figcaption>{escape(said)}</figcaption>\n</figure>"
    )
