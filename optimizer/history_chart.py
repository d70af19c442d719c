"""The trend as a picture: a self-contained SVG file, or a page around it with every number in a table.

One panel for each series, never two machines in one. No script, no network, no font to fetch; light and dark as the
reader's system has it; names that come from reports are escaped. What the picture shows is also said in its description,
for those who hear it. Entries stand evenly, the newest to the right, and the axis does not begin at 0. Dates and times are
those of the place where it was drawn, which the page names; its table has them in UTC for programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from perwatt import history_words as words
from perwatt.errors import InputError
from perwatt.history import Entry, Series
from perwatt.report_units import plain

WIDTH, HEIGHT = 860, 334
LEFT, RIGHT, TOP, BOTTOM = 84, 830, 80, 264
HEADING = 68
"""Of this height; a page has its own headings, and leaves them out."""
LABEL_WIDTH = 92
"""Room for a date under the axis."""
LETTERS = {"name": 100, "quiet": 130}
"""As many fit in a line of the heading, by its class."""

STYLE = """
.trend { --ground: #fff; --ink: #1b1f1c; --quiet: #59615b; --line: #d5d9d4; --value: #1f5fbf; --worse: #b3351c; }
@media (prefers-color-scheme: dark) {
  .trend { --ground: #141715; --ink: #e7ebe7; --quiet: #a2aba4; --line: #363d38; --value: #8fb8ff; --worse: #ff8d73; }
}
.trend text { fill: var(--ink); font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.trend .name { font-weight: 600; } .trend .quiet { fill: var(--quiet); font-size: 12px; }
.trend .ground { fill: var(--ground); } .trend .grid { stroke: var(--line); }
.trend .line { fill: none; stroke: var(--value); stroke-width: 2; stroke-linejoin: round; }
.trend .whisker { stroke: var(--value); stroke-width: 1.5; opacity: .55; }
.trend circle { fill: var(--value); stroke: var(--ground); stroke-width: 1.5; }
.trend .disturbed circle { fill: var(--ground); stroke: var(--value); }
.trend .failed path { stroke: var(--worse); stroke-width: 2.5; } .trend .failed .whisker { stroke: var(--worse); }
""".strip()
PAGE_STYLE = """
figure { margin: .5rem 0; } figure svg.trend { min-width: 38rem; height: auto; }
body { max-width: 62rem; }
table { font-size: .9rem; } td, tbody th { white-space: nowrap; padding: .4rem .5rem; }
""".strip()

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{sections}
</main>
</body>
</html>
"""


def check_name(path: str | Path) -> None:
    """Raises InputError where `path` names no file that can be drawn into: another ending, no such folder."""
    file = Path(path)
    if file.suffix.lower() not in (".svg", ".html"):
        stem = file.with_suffix("") if file.suffix[1:].isalpha() else file
        raise InputError(f"{file} is neither .svg nor .html", fix=f"write it {stem}.svg or {stem}.html")
    if not file.parent.is_dir():
        raise InputError(f"{file} can't be written: there is no folder {file.parent}", fix=f"create {file.parent}")


def write_chart(series: Sequence[Series], path: str | Path) -> None:
    """Draw `series` into the file at `path`, which ends in .svg or .html. Raises InputError as `check_name` does, where
    there is nothing to draw, and where the file can't be written."""
    check_name(path)
    file = Path(path)
    if not series:
        raise InputError(f"there is nothing to draw into {file}: {words.NOTHING_YET}")
    try:
        file.write_text((render_svg if file.suffix.lower() == ".svg" else render_html)(series), encoding="utf-8")
    except OSError as error:
        fix = "name a file in a folder that you may write to"
        raise InputError(f"{file} can't be written: {error.strerror or error}", fix=fix) from None


def render_svg(series: Sequence[Series]) -> str:
    """A picture with a panel for each series, one under the other."""
    height = HEIGHT * len(series)
    panels = "\n".join(
        f'<g transform="translate(0 {HEIGHT * number})">{_headed(one)}{_panel(one, number)}</g>'
        for number, one in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="trend" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">\n<style>\n{STYLE}\n</style>\n'
        f'<rect class="ground" width="{WIDTH}" height="{height}"/>\n{panels}\n</svg>\n'
    )


def render_html(series: Sequence[Series]) -> str:
    """A page: each series with its picture, what it says, and its table."""
    style = (files("perwatt") / "report.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(one, number) for number, one in enumerate(series))
    title = _text(f"{words.figure_title(series[0])}: history") if series else "History"
    return PAGE.format(title=title, style=f"{style}\n{STYLE}\n{PAGE_STYLE}", sections=sections)


def _text(value: object) -> str:
    return escape(plain(value))


# One panel --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """From entries and values to points of the drawing."""

    count: int
    low: float
    high: float

    def x(self, index: int) -> float:
        return (LEFT + RIGHT) / 2 if self.count == 1 else LEFT + 12 + (RIGHT - LEFT - 24) * index / (self.count - 1)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def _headed(series: Series) -> str:
    lines = (
        ("name", 20, words.title(series)),
        ("quiet", 40, words.subject(series)),
        ("quiet", 58, words.circumstances(series)),
    )
    return "".join(
        f'<text class="{kind}" x="4" y="{y}">{escape(words.shortened(text, LETTERS[kind]))}</text>'
        for kind, y, text in lines
    )


def _panel(series: Series, number: int) -> str:
    """What stands below the heading, as an SVG of its own."""
    axes = _Axes(len(series.entries), *words.bounds(series))
    line = [(index, entry) for index, entry in enumerate(series.entries) if entry.on_line]
    drawn = [
        *_value_axis(series, axes),
        *_time_axis(series, axes),
        f'<polyline class="line" points="{" ".join(_at(axes, index, entry) for index, entry in line)}"/>',
        *(_mark(series, axes, index, entry) for index, entry in enumerate(series.entries)),
        _key(series),
    ]
    height = HEIGHT - HEADING
    return (
        f'<svg class="trend" role="img" aria-labelledby="trend-title-{number} trend-desc-{number}" y="{HEADING}" '
        f'width="{WIDTH}" height="{height}" viewBox="0 {HEADING} {WIDTH} {height}">\n'
        f'<title id="trend-title-{number}">{_text(words.title(series))}</title>\n'
        f'<desc id="trend-desc-{number}">{_text(_said(series))}</desc>\n' + "\n".join(drawn) + "\n</svg>"
    )


def _key(series: Series) -> str:
    """What the marks mean, those that are there."""
    marks = (
        ("bar: 95 % interval", any(entry.low is not None and entry.low != entry.high for entry in series.entries)),
        ("hollow: a disturbed run", any(entry.disturbed for entry in series.entries)),
        ("cross: a failed head, no part of the line", any(not entry.on_line for entry in series.entries)),
    )
    said = "; ".join(text for text, there in marks if there)
    return f'<text class="quiet" x="{LEFT}" y="{BOTTOM + 56}">{said}</text>' if said else ""


def _said(series: Series) -> str:
    """The picture for those who hear it: how it was run, every entry in order, the latest change."""
    entries = "; ".join(_entry_words(series, entry) for entry in series.entries)
    how = f"{words.subject(series)}, {words.circumstances(series)}"
    return f"{how}. Oldest first: {entries}. {' '.join(words.latest(series))}"


def _entry_words(series: Series, entry: Entry) -> str:
    scale = words.Scale.of(series)
    value = f"{scale.words(entry.value)} {scale.interval(entry)}".strip()
    flags = [*([entry.verdict] if entry.verdict else []), *(["disturbed"] if entry.disturbed else [])]
    return ", ".join([words.when(entry), words.name_words(entry), value, *flags])


def _at(axes: _Axes, index: int, entry: Entry) -> str:
    return f"{axes.x(index):.1f},{axes.y(entry.value):.1f}"


def _mark(series: Series, axes: _Axes, index: int, entry: Entry) -> str:
    """An entry: its interval, and a dot, hollow where the run was disturbed, or a cross where the gate failed."""
    x, y = axes.x(index), axes.y(entry.value)
    kinds = [*(["disturbed"] if entry.disturbed else []), *([] if entry.on_line else ["failed"])]
    whisker = ""
    if entry.low is not None and entry.high is not None and entry.low < entry.high:
        ends = f'y1="{axes.y(entry.low):.1f}" y2="{axes.y(entry.high):.1f}"'
        whisker = f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
    cross = f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    value = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' if entry.on_line else cross
    return f'<g class="{" ".join(kinds)}"><title>{_text(_entry_words(series, entry))}</title>{whisker}{value}</g>'


def _value_axis(series: Series, axes: _Axes) -> Iterable[str]:
    scale = words.Scale.of(series)
    for tick in _ticks(axes.low, axes.high, scale.factor):
        y = axes.y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="quiet" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_text(scale.words(tick))}</text>'


def _ticks(low: float, high: float, factor: float) -> list[float]:
    """Three to eight round numbers from `low` to `high`, round in units of `factor`."""
    rough = (high - low) / factor / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1, 2, 5, 10) if nice * power >= 0.99 * rough)
    first, last = math.ceil(low / factor / step), math.floor(high / factor / step)
    return [number * step * factor for number in range(first, last + 1)]


def _time_axis(series: Series, axes: _Axes) -> Iterable[str]:
    """Dates and times under as many entries as there is room for, evenly, the first and the newest among them."""
    count = len(series.entries)
    most = max(1, min(count - 1, (RIGHT - LEFT) // LABEL_WIDTH))
    for index in dict.fromkeys([round(part * (count - 1) / most) for part in range(most + 1)]):
        for y, said in zip((BOTTOM + 20, BOTTOM + 35), words.when(series.entries[index]).split(), strict=True):
            yield f'<text class="quiet" x="{axes.x(index):.1f}" y="{y}" text-anchor="middle">{said}</text>'


# Around it --------------------------------------------------------------------------------------------------------


def _section(series: Series, number: int) -> str:
    said = "".join(f"<li>{_text(line)}</li>" for line in words.latest(series))
    zone = f"times are local ({datetime.fromisoformat(series.entries[-1].created).astimezone():%Z})"
    notes = "".join(f'<p class="quiet">{_text(line)}</p>' for line in [*words.legend(series), zone])
    title = _text(words.title(series))
    return (
        f'<section aria-labelledby="series-{number}">\n<h2 id="series-{number}">{title}</h2>\n'
        f'<p class="quiet">{_text(words.subject(series))}<br>{_text(words.circumstances(series))}</p>\n'
        f'<div class="scroll"><figure>{_panel(series, number)}</figure></div>\n<ul class="plain">{said}</ul>\n'
        f'<div class="scroll" role="region" aria-label="{title}, every entry" tabindex="0">{_table(series)}</div>\n'
        f"{notes}\n</section>"
    )


def _table(series: Series) -> str:
    titles = ("when", "commit", "label", "value [95 %]", "change", "÷ base", "judged", "verdict")
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "\n".join(
        f'<tr><th scope="row"><time datetime="{entry.created}">{row.when}</time></th>'
        + "".join(
            f"<td>{_text(cell)}</td>"
            for cell in (
                row.commit,
                row.label,
                f"{row.value} {row.interval}",
                f"{row.change} {row.change_interval}",
                f"{row.base} {row.base_interval}",
                row.meaning,
                row.verdict,
            )
        )
        + "</tr>"
        for entry, row in zip(series.entries, words.rows(series), strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
