"""The trend in the terminal: a table, a plot in braille that fits the width, and the latest change in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from perwatt import history_words as words
from perwatt.history import Entry, Series, of_machine
from perwatt.terminal import STYLES, Output, as_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 100
"""From this width on, a table has room for everything."""

PLOT_HEIGHT = 9
WIDEST_STEP = 6
"""Columns between two entries at most: three entries need no whole screen."""

LABELS = {"label", "what"}
GAP, SHORTEST = 2, 8
"""What rich puts between two columns, and how short a label may become before everything is squeezed."""

VERDICT_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
# Bits of a braille character by column and row of its dots, from top left.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BRAILLE = 0x2800


def print_history(series: Sequence[Series], console: Console | None = None, *, here: str | None = None) -> None:
    """Show every series; where `here` is a machine's fingerprint digest, only those of that machine, and how many entries
    others have. Each series stands alone: nothing of two machines is ever in one table or plot."""
    out = Output(console)
    shown, others = of_machine(series, here) if here is not None else (list(series), [])
    if not shown:
        out.line(words.NOTHING_HERE if others else words.NOTHING_YET)
    for one in shown:
        _print_series(out, one)
    elsewhere = words.elsewhere(others)
    if elsewhere:
        out.line(elsewhere, "dim")


def _print_series(out: Output, series: Series) -> None:
    unicode = out.console.encoding.lower().startswith("utf")
    mark = "…" if unicode else "..."

    def say(text: str, style: str = "") -> None:
        """Wrapped at words; a word that fits in no line is cut, not broken."""
        out.line(" ".join(fitting(word, out.console.width, mark) for word in text.split(" ")), style)

    say(words.title(series), "bold")
    say(words.subject(series), "dim")
    say(words.circumstances(series), "dim")
    out.gap()
    out.show(new_table(series, out.console.width, mark))
    for note in words.legend(series):
        say(note, "dim")
    out.gap()
    drawn = plot(series, min(out.console.width, WIDE), unicode=unicode)
    for line in drawn:
        out.line(line)
    if drawn:
        out.gap()
    for said in words.latest(series):
        say(said)
    out.gap()


def fitting(text: str, room: int, mark: str = "…") -> str:
    """`text` in so many columns of a terminal, in which some letters take two."""
    from rich.cells import cell_len

    return next(
        (cut for size in range(room, 0, -1) if cell_len(cut := words.shortened(text, size, mark)) <= room), text
    )


def new_table(series: Series, width: int, mark: str = "…") -> Table:
    """As much as fits: in a narrow terminal, commits stand for labels, and intervals are written as spreads, under their
    ratios if need be, or left out. Labels are cut in the middle, so that everything else stays whole."""
    from rich import box
    from rich.table import Table

    rows = words.rows(series)
    ways = [_wide(rows)] if width >= WIDE else []
    ways += [_narrow(rows, " "), _narrow(rows, "\n")]
    shown = next((way for way in ways if _least_width(way) <= width), ways[-1])
    for name in LABELS & shown.keys():
        rest = _least_width({other: cells for other, cells in shown.items() if other != name})
        shown[name] = [fitting(cell, max(width - rest - GAP, SHORTEST), mark) for cell in shown[name]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for name in shown:
        numeric = name.startswith(("value", "change", "÷"))
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for index, row in enumerate(rows):
        meaning, verdict = STYLES.get(row.meaning, ""), VERDICT_STYLES.get(row.verdict.split()[0], "dim")
        styles = {"change": meaning, "÷ base": meaning, "": meaning, "verdict": verdict}
        table.add_row(*(as_text(cells[index], styles.get(name, "")) for name, cells in shown.items()))
    return table


def _least_width(columns: dict[str, list[str]]) -> int:
    """Columns of the terminal that a table takes once its labels are cut as short as may be."""
    widths = {
        name: max(len(line) for cell in [name, *cells] for line in cell.split("\n")) for name, cells in columns.items()
    }
    return sum(GAP + (min(width, SHORTEST) if name in LABELS else width) for name, width in widths.items())


def _wide(rows: Sequence[words.Row]) -> dict[str, list[str]]:
    """The columns by title; those that stay empty are left out."""
    return _filled({
        "when": [row.when for row in rows],
        "commit": [row.commit for row in rows],
        "label": [row.label for row in rows],
        "value [95 %]": [f"{row.value} {row.interval}".strip() for row in rows],
        "change": [f"{row.change} {row.change_interval}".strip() for row in rows],
        "÷ base": [f"{row.base} {row.base_interval}".strip() for row in rows],
        "": [row.meaning for row in rows],
        "verdict": [row.verdict for row in rows],
    })  # fmt: skip


def _narrow(rows: Sequence[words.Row], gap: str) -> dict[str, list[str]]:
    """The same for a narrow terminal; `gap` stands between a ratio and its spread."""
    room = not any(row.base for row in rows)
    return _filled({
        "when": [row.when for row in rows],
        "what": [row.commit or row.label for row in rows],
        "value": [f"{row.value} {row.interval if room else ''}".strip() for row in rows],
        "change": [f"{row.change}{gap}{row.change_spread}".strip() for row in rows],
        "÷ base": [f"{row.base}{gap}{row.base_spread}".strip() for row in rows],
        "verdict": [row.verdict for row in rows],
    })  # fmt: skip


def _filled(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: cells for name, cells in columns.items() if any(cells)}


# The plot ---------------------------------------------------------------------------------------------------------


def plot(series: Series, width: int, height: int = PLOT_HEIGHT, *, unicode: bool = True) -> list[str]:
    """Lines of text: values joined by a line, their 95 % intervals as upright strokes, failed heads off the line. The
    entries stand evenly, the newest to the right; the axis does not begin at 0. Nothing where there is but one entry, or
    no room."""
    low, high = words.bounds(series)
    scale = words.Scale.of(series)
    ticks = {row: scale.words(high - (high - low) * (row + 0.5) / height) for row in (0, height // 2, height - 1)}
    margin = max(map(len, ticks.values()))
    room = width - margin - 3
    entries = series.entries[-max(room, 0) :]
    if len(entries) < 2 or room < 8:
        return []
    canvas = _Canvas(_columns(len(entries), room), height, low, high, unicode)
    canvas.draw(entries)
    axis = "┤" if unicode else "+"
    lines = [
        f"{ticks.get(row, ''):>{margin}} {axis if row in ticks else '│' if unicode else '|'} " for row in range(height)
    ]
    drawn = [(start + text).rstrip() for start, text in zip(lines, canvas.lines(), strict=True)]
    return [*drawn, _dates(entries, margin, canvas.width), _key(entries, margin, unicode)]


def _columns(count: int, room: int) -> list[int]:
    """Where each entry stands."""
    step = min(WIDEST_STEP, (room - 1) / (count - 1))
    return [round(index * step) for index in range(count)]


def _dates(entries: Sequence[Entry], margin: int, width: int) -> str:
    """The first and the last day under the axis; of one day, the times too."""
    first, last = words.when(entries[0]), words.when(entries[-1])
    one_day = first[:10] == last[:10]
    first, last = (first, last[11:]) if one_day else (first[:10], last[:10])
    gap = width - len(first) - len(last)
    between = " " * gap if gap > 0 else " to "
    return " " * (margin + 3) + (first if first.endswith(last) else f"{first}{between}{last}")


def _key(entries: Sequence[Entry], margin: int, unicode: bool) -> str:
    """What the marks mean, those that are there."""
    dot, stroke, cross = ("●", "│", "✗") if unicode else ("o", "|", "x")
    said = [f"{dot} value"]
    if any(entry.low is not None and entry.low != entry.high for entry in entries):
        said.append(f"{stroke} 95 % interval")
    if any(not entry.on_line for entry in entries):
        said.append(f"{cross} failed")
    return " " * (margin + 3) + "   ".join(said)


class _Canvas:
    """Characters, and finer dots beneath them for the line: two columns and four rows of dots in each character."""

    def __init__(self, columns: list[int], height: int, low: float, high: float, unicode: bool) -> None:
        self.columns, self.height, self.low, self.high = columns, height, low, high
        self.unicode, self.width = unicode, columns[-1] + 1
        self.dots = [[0] * self.width for _ in range(height)]
        self.marks: dict[tuple[int, int], str] = {}

    def draw(self, entries: Sequence[Entry]) -> None:
        """The line first, then intervals, then values, each over what was there."""
        line = [(x, entry) for x, entry in zip(self.columns, entries, strict=True) if entry.on_line]
        for (x1, one), (x2, two) in pairwise(line):
            self._join(x1, self._share(one.value), x2, self._share(two.value))
        for x, entry in zip(self.columns, entries, strict=True):
            if entry.low is not None and entry.high is not None:
                for row in range(self._row(entry.high), self._row(entry.low) + 1):
                    self.marks[row, x] = "│" if self.unicode else "|"
            value = ("●" if self.unicode else "o") if entry.on_line else ("✗" if self.unicode else "x")
            self.marks[self._row(entry.value), x] = value

    def _share(self, value: float) -> float:
        """0 at the top, 1 at the bottom."""
        return min(max((self.high - value) / (self.high - self.low), 0.0), 1.0)

    def _row(self, value: float) -> int:
        return min(int(self._share(value) * self.height), self.height - 1)

    def _join(self, x1: int, share1: float, x2: int, share2: float) -> None:
        """Dots from the middle of one character's column to that of another."""
        for x in range(2 * x1, 2 * x2 + 1):
            along = (x - 2 * x1) / (2 * (x2 - x1))
            y = min(int((share1 + along * (share2 - share1)) * 4 * self.height), 4 * self.height - 1)
            self.dots[y // 4][x // 2] |= DOTS[x % 2][y % 4]

    def lines(self) -> list[str]:
        """The drawing, row by row."""

        def shown(row: int, x: int) -> str:
            dots = self.dots[row][x]
            return self.marks.get((row, x)) or (" " if not dots else chr(BRAILLE + dots) if self.unicode else ".")

        return ["".join(shown(row, x) for x in range(self.width)) for row in range(self.height)]
