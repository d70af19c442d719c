"""What a person sees in the terminal: a report at a glance, what differs between two, and progress (`Progress`).

One headline, one table, one line per pass, then what the figures rest on, and the bundle. Better and worse are words
first and colours second. rich is imported when something is shown, so that `optimize --help` doesn't pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt import account_words
from perwatt import report_table as figures
from perwatt import report_words as words
from perwatt.progress import Progress as Progress
from perwatt.report_units import SIZES, duration, in_units, number, plain

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from perwatt.report import PassReport, Report

STYLES = {
    "better": "green",
    "worse": "red",
    "over budget": "bold red",
    "≈ same": "dim",
    "same": "dim",
    "✓": "green",
    "✗": "red",
    "–": "dim",
}
HEADLINE_STYLES = {"optimized": "bold green", "unchanged": "bold yellow", "budget_not_met": "bold red"}
LABEL_WIDTH = 20
# For the rare terminal that can't show them.
ASCII = str.maketrans({
    "×": "x", "→": "->", "−": "-", "–": "-", "—": "-", "µ": "u", "÷": "/", "≈": "~", "…": "...", "·": "-", "•": "*",
    "✓": "+", "✗": "x", "±": "+-", "─": "-", "━": "-", "�": "?",
})  # fmt: skip


IDLE_TOGETHER = 4
"""From so many passes on that found nothing to do, one line stands for them all."""
WARNING = "warning: "
"""Notes that begin so stand right under the headline: the figures below may not mean what they seem to."""


def print_report(report: Report, bundle: Path, *, console: Console | None = None, verbose: bool = False) -> None:
    """Show `report` of the bundle at `bundle`; `verbose` adds candidates, drift, settings, data and versions.

    The last line is the report's last word where it has one."""
    out = Output(console)
    out.line(words.headline(report), HEADLINE_STYLES[report.outcome])
    if report.outcome == "optimized":
        out.line(plain(report.reason))
    for note in report.notes:
        if note.startswith(WARNING):
            out.line(plain(note), "bold yellow")
    out.line(words.subject(report), "dim")
    out.gap()
    out.show(_figures(report, wide=out.console.width >= 100))
    out.gap()
    if report.accuracy is not None:
        out.section("Accuracy", words.accuracy_words(report.accuracy))
        out.gap()
    out.show(_ledger(report.passes, words.drop_unit(report), verbose))
    _tell_broken(out, report.passes)
    out.gap()
    if report.account is not None:
        out.section("Account", account_words.account_words(report.account, words.drop_unit(report), verbose))
    if report.search:
        cost = [account_words.run_words(report.run_cost)] if report.run_cost is not None else []
        out.section("Search", [account_words.search_words(report.search), *cost])
    out.section("Joules", words.joules_words(report))
    out.section("Ratios", words.point_words(report))
    eager = words.eager_words(report)
    out.section("torch eager", [eager] if eager else [])
    out.section("Backends", words.backend_words(report))
    if verbose:
        _details(out, report)
    out.section("Notes", [plain(note) for note in report.notes if not note.startswith(WARNING)])
    out.gap()
    _deployment(out, report, bundle)
    if report.last_word:
        out.whole(plain(report.last_word), "bold")


class Output:
    """A console that takes hostile names as they are, and speaks ASCII where nothing else can be shown."""

    def __init__(self, console: Console | None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False)

    def show(self, shown: RenderableType, soft_wrap: bool = False) -> None:
        """Print one renderable."""
        unicode = self.console.encoding.lower().startswith("utf")
        if unicode and self.console.is_terminal:
            self.console.print(shown, soft_wrap=soft_wrap, highlight=False)
            return
        with self.console.capture() as caught:
            self.console.print(shown, soft_wrap=soft_wrap, highlight=False)
        # In a file or a pipe, columns filled up with spaces are in the way.
        text = "\n".join(line.rstrip() for line in caught.get().split("\n"))
        if not unicode:
            text = text.translate(ASCII).encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.file.write(text)

    def line(self, text: str, style: str = "") -> None:
        """A line of prose, wrapped at words."""
        self.show(as_text(text, style))

    def whole(self, text: str, style: str = "") -> None:
        """A line that is not to be broken where it is read by a program or copied: a path, a command."""
        self.show(as_text(text, style), soft_wrap=not self.console.is_terminal)

    def gap(self) -> None:
        """An empty line."""
        self.show(as_text(""))

    def section(self, title: str, said: Iterable[str]) -> None:
        """A title with its lines beside it; nothing where there are none."""
        rows = list(said)
        if not rows:
            return
        grid = _grid((11, 0))
        for index, row in enumerate(rows):
            grid.add_row(as_text(title if index == 0 else "", "bold"), as_text(row))
        self.show(grid)


def as_text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style)


def _grid(widths: tuple[int, ...]) -> Table:
    """Columns side by side; 0 takes what is left and wraps under itself."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for width in widths:
        grid.add_column(width=width or None, overflow="fold")
    return grid


def _figures(report: Report, wide: bool) -> Table:
    table = new_table("", "before", "after", "ratio [95 % interval]", "")
    for row in figures.lines(report):
        style = STYLES.get(row.verdict, "")
        ratio = f"{row.ratio} {row.interval}".strip()
        lead = "bold" if table.row_count == 0 else ""
        table.add_row(
            as_text(_label(row, wide), lead),
            as_text(row.before),
            as_text(row.after, lead),
            as_text(ratio, style),
            as_text(row.verdict, style),
        )
    return table


def _label(row: figures.Line, wide: bool) -> str:
    """The label with its note: beside it where there is room, else under it, so that ratios stay on one line."""
    if not row.note:
        return row.label
    in_one_line = f"{row.label} ({row.note})"
    return in_one_line if wide or len(in_one_line) <= LABEL_WIDTH else f"{row.label}\n({row.note})"


def new_table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        numeric = 0 < index < len(titles) - 1
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    return table


def _ledger(passes: list[PassReport], unit: str, verbose: bool) -> Table:
    told = [row for row in passes if row.status != "unchanged" or row.reason not in (None, words.NOTHING)]
    if verbose or len(passes) - len(told) < IDLE_TOGETHER:
        told = passes
    grid = _grid((1, max((len(row.name) for row in told), default=1), 0))
    for row in told:
        symbol = words.SYMBOLS[row.status]
        text = words.pass_words(row, every_change=verbose, unit=unit)
        grid.add_row(as_text(symbol, STYLES[symbol]), as_text(plain(row.name), "bold"), as_text(text))
        if verbose:
            grid.add_row("", "", as_text(_pass_details(row), "dim"))
    if len(told) < len(passes):
        grid.add_row("–", f"{len(passes) - len(told)} more", f"had {words.NOTHING} (-v names them)")
    if not passes:
        grid.add_row("–", "", "no passes were run")
    return grid


def _tell_broken(out: Output, passes: list[PassReport]) -> None:
    broken = [row.name for row in passes if row.status == "rolled-back"]
    if broken:
        out.line(f"rolled back, so that the model stayed as it was before: {plain(', '.join(broken))}", "bold yellow")


def _pass_details(row: PassReport) -> str:
    said = [duration(row.seconds)]
    if row.drift is not None:
        said.append(f"drift {number(row.drift.max_abs)} (relative {number(row.drift.relative)})")
    if row.drift_from_original is not None:
        said.append(f"from the original {number(row.drift_from_original.max_abs)}")
    if row.settings:
        said.append(words.value_words(row.settings))
    return " · ".join(said)


def _details(out: Output, report: Report) -> None:
    unit = words.drop_unit(report)
    out.section(
        "Candidates",
        [f"{plain(row.name)}, {row.verdict}: {words.candidate_words(row, unit)}" for row in report.candidates],
    )
    for title, side in (("Before", report.original), ("After", report.optimized)):
        out.section(title, ["; ".join(f"{name}: {value}" for name, value in words.operating_point_words(side))])
    out.section("Tuning", words.tuning_words(report))
    for title, facts in (("Measuring", report.measuring), ("Data", report.data), ("Target", report.target)):
        out.section(title, [f"{name}: {said}" for name, said in words.facts(facts)])
    run = (f"perwatt {plain(report.perwatt_version)}", duration(report.seconds), plain(report.created))
    out.section("Run", [", ".join(run)])


def _deployment(out: Output, report: Report, bundle: Path) -> None:
    in_python, alone = words.deploy_words(bundle)
    kept = " (the best so far)" if report.outcome == "budget_not_met" else ""
    said = [f"{name} {value}" for name, value in words.operating_point_words(report.optimized)]
    out.line(f"Runs with: {plain(', '.join(said))}")
    out.whole(f"Bundle{kept}: {plain(bundle)}")
    out.whole(f"  in Python:        {in_python}")
    out.whole(f"  without perwatt:  {alone}")


# Rewritten models ------------------------------------------------------------------------------------------------


def print_rewritten(made: Mapping[str, Any], *, verbose: bool = False, console: Console | None = None) -> None:
    """Show what passes made of a model: `made` is `Rewritten.to_json()`."""
    from perwatt.report import PassReport

    out = Output(console)
    before, after = (sum(made["operators"][side].values()) for side in ("before", "after"))
    sizes = in_units([made["size_bytes"][side] for side in ("before", "after")], SIZES)
    out.line(
        f"{before:,} nodes → {after:,}; weights {sizes[0]} → {sizes[1]}", "bold green" if after < before else "bold"
    )
    for note in made["notes"]:
        if note.startswith(WARNING):
            out.line(plain(note), "bold yellow")
    out.gap()
    rows = [PassReport.model_validate(row) for row in made["passes"]]
    out.show(_ledger(rows, "", verbose))
    _tell_broken(out, rows)
    out.gap()
    moved = [row.drift_from_original for row in rows if row.status == "applied" and row.drift_from_original is not None]
    if moved:
        last = moved[-1]
        out.line(
            f"Outputs are off the original's by at most {number(last.max_abs)} ({number(last.relative)} of their RMS)."
        )
    out.section("Notes", [plain(note) for note in made["notes"] if not note.startswith(WARNING)])
    out.whole(f"Model: {plain(made['path'])}")


# Two reports ----------------------------------------------------------------------------------------------------


def print_difference(a: Report, b: Report, names: tuple[str, str], console: Console | None = None) -> None:
    """Show what differs between two reports; `names` are how the two are called.

    Figures of two runs were not interleaved: their ratios carry no interval, and the text says so."""
    out = Output(console)
    out.line(f"{plain(names[0])} (A) and {plain(names[1])} (B)", "bold")
    out.gap()
    facts = [(label, one, two) for label, one, two in _facts(a, b) if one != two]
    if facts:
        out.show(_two_sided(facts))
    else:
        out.line("same model, target, scenario, batch, outcome, passes and versions")
    out.gap()
    out.line("Optimized side of each", "bold")
    out.show(_figures_of_two(a, b))
    out.line(
        "The two were not measured in one run: other load, heat and clock rates are in these ratios, and small "
        "differences are noise.",
        "dim",
    )
    if a.model.get("digest") != b.model.get("digest"):
        out.line("They come from different models: the figures compare the models too.", "dim")


def _facts(a: Report, b: Report) -> list[tuple[str, str, str]]:
    """Everything but figures that may differ, as words: label, A, B."""
    pairs: list[tuple[str, Any, Any]] = [
        ("model", a.model.get("name"), b.model.get("name")),
        ("model digest", _short(a.model.get("digest")), _short(b.model.get("digest"))),
    ]
    for key in ("name", "backend", "device", "scenario", "batch"):
        label = "target" if key == "name" else key
        pairs.append((label, a.target.get(key), b.target.get(key)))
    pairs += [("outcome", a.outcome, b.outcome), ("reason", a.reason, b.reason)]
    pairs += [("precision", a.optimized.execution_precision, b.optimized.execution_precision)]
    ours, theirs = a.optimized.operating_point, b.optimized.operating_point
    for key in sorted({*ours, *theirs} - {"scenario", "batch"}):
        pairs.append((str(key).replace("_", " "), ours.get(key), theirs.get(key)))
    pairs += _accuracy_facts(a, b) + _pass_facts(a, b) + _version_facts(a, b)
    return [(plain(label), words.value_words(one), words.value_words(two)) for label, one, two in pairs]


def _short(digest: object) -> str | None:
    return None if digest is None else str(digest)[:19]


def _accuracy_facts(a: Report, b: Report) -> list[tuple[str, Any, Any]]:
    said = [None if found is None else words.accuracy_words(found)[0] for found in (a.accuracy, b.accuracy)]
    return [("accuracy", said[0], said[1])]


def _pass_facts(a: Report, b: Report) -> list[tuple[str, Any, Any]]:
    # Of a pass that stood on several branches, what became of it on the one that ships, which stands first.
    ours, theirs = ({row.name: row for row in reversed(report.passes)} for report in (a, b))
    return [
        (name, _pass_fact(ours.get(name)), _pass_fact(theirs.get(name)))
        for name in dict.fromkeys([*reversed(ours), *reversed(theirs)])
    ]


def _pass_fact(row: PassReport | None) -> str:
    if row is None:
        return "not in the recipe"
    settings = f" ({words.value_words(row.settings)})" if row.settings else ""
    return f"{words.SYMBOLS[row.status]} {words.STATUS_WORDS.get(row.status, row.status)}{settings}"


def _version_facts(a: Report, b: Report) -> list[tuple[str, Any, Any]]:
    pairs: list[tuple[str, Any, Any]] = [("perwatt", a.perwatt_version, b.perwatt_version)]
    found = [_mapping(report.target.get("versions")) for report in (a, b)]
    return pairs + [(f"{key} version", found[0].get(key), found[1].get(key)) for key in sorted({*found[0], *found[1]})]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _two_sided(facts: list[tuple[str, str, str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for title in ("differs", "A", "B"):
        table.add_column(title, overflow="fold")
    for row in facts:
        table.add_row(*map(as_text, row))
    return table


def _figures_of_two(a: Report, b: Report) -> Table:
    table = new_table("", "A", "B", "B ÷ A", "")
    for row in figures.lines_of_two(a, b):
        style = STYLES.get(row.verdict, "")
        shown = map(as_text, (row.label, row.before, row.after))
        table.add_row(*shown, as_text(row.ratio, style), as_text(row.verdict, style))
    return table
