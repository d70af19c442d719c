"""The account of a winner as a waterfall: from the original's cost down to that of what ships, a bar for each pass.

Inline SVG, in percent of the original's cost on a linear axis from 0, so that a bar is as long as what the pass saves. The
line across the end of a bar is the 95 % interval. Positions are percentages of the width: the drawing fits any page while
its letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from perwatt.account_words import besides_words, cost_words
from perwatt.report import AccountReport, ChangeReport
from perwatt.report_chart import BAR_HEIGHT, BAR_TOP, whisker
from perwatt.report_table import judged
from perwatt.report_units import known, plain, with_interval

HEIGHT, DETAIL = 58, 46
"""Of a row, and where in it the line under the bar stands."""
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Of the axis: the smallest that leaves at most `TICKS` of them."""
TICKS = 6
LONGEST = 60
"""Letters under a bar."""


@dataclass(frozen=True)
class Bar:
    """One row, in shares of the original's cost: from `start` to `end`, which lies between `low` and `high`. `css` says
    whether that is better or worse; without an `end` nothing is known. `detail`: what else changed."""

    label: str
    words: str
    start: float
    end: float | None
    low: float | None = None
    high: float | None = None
    css: str = "same"
    detail: str = ""


def bars(account: AccountReport, unit: str = "") -> list[Bar]:
    """The original, where and how it runs, each pass, what was left out in the end, and what ships."""
    rows, running = [Bar("the original", "100 %", 0.0, 1.0)], 1.0
    for label, change in _changes(account):
        row = _bar(plain(label), change, running, unit)
        rows.append(row)
        running = running if row.end is None else row.end
    return [*rows, Bar("what ships", f"{100 * running:.3g} %", 0.0, running)]


def _changes(account: AccountReport) -> Iterator[tuple[str, ChangeReport]]:
    if account.point is not None:
        yield "where and how it runs", account.point
    for share in account.shares:
        yield f"{share.name} ({len(share.settings)} times)" if len(share.settings) > 1 else share.name, share.prefix
    if account.dropped and account.without_them is not None:
        yield f"without {', '.join(account.droppable)}", account.without_them


def _bar(label: str, change: ChangeReport, start: float, unit: str) -> Bar:
    value, low, high = known(change.cost.value), known(change.cost.low), known(change.cost.high)
    detail = besides_words(change, unit)
    if value is None:
        why = f": {plain(change.reason)}" if change.reason else ""
        return Bar(label, "not measured", start, None, detail=f"{detail}{why}".removeprefix(": "))
    verdict = judged(change.cost, more_is_better=False)
    css = verdict if verdict in ("better", "worse") else "same"
    bounds = (start * low, start * high) if low and high and low < high else (None, None)
    return Bar(label, with_interval(change.cost), start, start * value, bounds[0], bounds[1], css, detail)


def waterfall(account: AccountReport, unit: str = "") -> str:
    """The figure with its caption; nothing where no share is known. `unit` is that of a drop in accuracy."""
    if not any(known(share.prefix.cost.value) is not None for share in account.shares):
        return ""
    rows = bars(account, unit)
    most = max(end for row in rows for end in (row.start, row.end, row.high) if end is not None)
    height = HEIGHT * len(rows) + 24
    said = "; ".join(f"{row.label}: {', '.join(filter(None, [row.words, row.detail]))}" for row in rows)
    drawn = [part for index, row in enumerate(rows) for part in _row(row, index, len(rows), most)]
    drawn += [_tick_label(tick, most, height - 4) for tick in ticks(most)]
    return (
        "<figure>\n"
        f'<svg role="img" aria-labelledby="waterfall-title waterfall-desc" height="{height}">\n'
        '<title id="waterfall-title">What is left of the original\'s cost after each pass</title>\n'
        f'<desc id="waterfall-desc">{escape(said)}</desc>\n' + "\n".join(drawn) + "\n</svg>\n"
        f"<figcaption>What an inference costs in {escape(cost_words(account))}, in percent of the original's, after each "
        "pass in its turn; the line across a bar's end is the 95 % interval of that pass.</figcaption>\n</figure>"
    )


def ticks(most: float) -> list[float]:
    """Round shares from 0 to `most`."""
    step = next((step for step in STEPS if most / step <= TICKS), STEPS[-1])
    return [step * number for number in range(math.floor(most / step + 1e-9) + 1)]


def _at(share: float, most: float) -> float:
    """In percent of the width."""
    return 100 * min(1.0, max(0.0, share / most)) if most else 0.0


def _tick_label(tick: float, most: float, y: int) -> str:
    at = _at(tick, most)
    # At the edges letters would leave the page.
    anchor = "start" if at < 3 else "end" if at > 97 else "middle"
    return f'<text class="tick" x="{at:.2f}%" y="{y}" text-anchor="{anchor}">{100 * tick:.3g} %</text>'


def _row(row: Bar, index: int, count: int, most: float) -> Iterator[str]:
    top = HEIGHT * index
    yield from _grid(ticks(most), top, most)
    yield f'<text x="0" y="{top + 14}">{escape(row.label)}</text>'
    yield f'<text class="{row.css}" x="100%" y="{top + 14}" text-anchor="end">{escape(row.words)}</text>'
    if row.end is not None:
        left, right = (_at(end, most) for end in sorted((row.start, row.end)))
        yield (
            f'<rect class="{row.css}" x="{left:.2f}%" y="{top + BAR_TOP}" width="{max(0.2, right - left):.2f}%" '
            f'height="{BAR_HEIGHT}"/>'
        )
    if row.low is not None and row.high is not None:
        yield whisker(f"{_at(row.low, most):.2f}%", f"{_at(row.high, most):.2f}%", top + BAR_TOP + BAR_HEIGHT // 2)
    if row.detail:
        yield f'<text class="tick" x="0" y="{top + DETAIL}">{escape(_shortened(row.detail))}</text>'
    if index + 1 < count:
        x = f"{_at(row.start if row.end is None else row.end, most):.2f}%"
        bottom = top + BAR_TOP + BAR_HEIGHT
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{top + HEIGHT + BAR_TOP}"/>'


def _shortened(text: str) -> str:
    """A line that does not wrap: what is longer stands in the description and in the table."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _grid(shown: Sequence[float], top: int, most: float) -> Iterator[str]:
    """Beside the bars only: a line through the words above them would make them hard to read."""
    for tick in shown:
        x = _at(tick, most)
        yield (
            f'<line class="{"one" if tick == 0 else "grid"}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top + BAR_TOP - 3}" '
            f'y2="{top + BAR_TOP + BAR_HEIGHT + 3}"/>'
        )
