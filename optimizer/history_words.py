"""What a trend says, in words: the terminal, the picture and the page say the same thing.

A change that was measured in one job carries its interval; one across two jobs is marked `~`, because the machine's own
drift is in it. Dates are local, to the minute. Nothing here knows colours, columns or tags.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from perwatt.figure_words import UNITS, Change, change, spread
from perwatt.figures import FIGURES
from perwatt.history import Entry, Series
from perwatt.history_record import BUILT
from perwatt.measurement import Ratio
from perwatt.report import RatioFigure
from perwatt.report_table import METRICS, SAME_BETWEEN_RUNS, SAME_WITHIN, judged
from perwatt.report_units import MISSING, PLAIN, known, number, plain, ratio_words, signed, with_interval
from perwatt.report_words import facts

PERCENT = ((0.01, "%"),)


@dataclass(frozen=True)
class Scale:
    """The one unit in which a series is shown: as fine as its smallest value needs."""

    factor: float
    unit: str
    digits: int

    @classmethod
    def of(cls, series: Series) -> Scale:
        # How many of the figure's own unit each unit for people is.
        base, known_units = UNITS.get(series.unit, (1.0, PLAIN))
        units = PERCENT if series.unit == "fraction" else [(factor / base, name) for factor, name in known_units]
        sizes = [abs(entry.value) for entry in series.entries if entry.value] or [1.0]
        fits = [unit for unit in units if max(sizes) >= unit[0] and min(sizes) >= 0.1 * unit[0]]
        factor, name = fits[-1] if fits else units[0]
        return cls(factor, name, digits=4 if series.unit == "fraction" else 3)

    def bare(self, value: float | None) -> str:
        """The number without its unit."""
        value = known(value)
        return number(None if value is None else value / self.factor, self.digits)

    def words(self, value: float | None) -> str:
        """The number with its unit."""
        shown = self.bare(value)
        return shown if shown == MISSING or not self.unit else f"{shown} {self.unit}"

    def interval(self, entry: Entry) -> str:
        """ "[79.9, 80.5]"; empty where there is none, or nothing but the value."""
        if entry.low is None or entry.high is None or entry.low == entry.high:
            return ""
        return f"[{self.bare(entry.low)}, {self.bare(entry.high)}]"


@dataclass(frozen=True)
class Row:
    """An entry as words. `change` is against the entry before on the line, `base` against the gate's base where that is
    another one; `meaning` says what the better known of the two says. Intervals stand apart, in both ways to write them:
    with its bounds, or as a spread."""

    when: str
    commit: str
    label: str
    value: str
    interval: str
    change: str
    change_interval: str
    change_spread: str
    base: str
    base_interval: str
    base_spread: str
    meaning: Change
    verdict: str


def rows(series: Series) -> list[Row]:
    """The table, oldest first."""
    scale = Scale.of(series)
    return [_row(series, scale, entry) for entry in series.entries]


def _row(series: Series, scale: Scale, entry: Entry) -> Row:
    ratio = _figure(entry.ratio)
    in_job = ("", "", "") if ratio.value is None else (*ratio_words(ratio), spread(ratio.value, ratio.low, ratio.high))
    # Where the gate's base is the entry before, one ratio says both.
    both = entry.together and bool(in_job[0])
    against_last = in_job if both else (_across(series, entry), "", "")
    against_base = ("", "", "") if both else in_job
    return Row(
        when(entry),
        commit_words(entry),
        plain(entry.label),
        scale.words(entry.value),
        scale.interval(entry),
        *against_last,
        *against_base,
        meaning(series, entry),
        (entry.verdict or entry.kind) + (" !" if entry.disturbed else ""),
    )


def when(entry: Entry) -> str:
    """Its local date and time: "2026-09-01 10:11"."""
    return f"{datetime.fromisoformat(entry.created).astimezone():%Y-%m-%d %H:%M}"


def shortened(text: str, room: int, mark: str = "…") -> str:
    """`text` in `room` characters: the middle gives way, as names tell themselves apart by beginning and end."""
    if len(text) <= room:
        return text
    kept = max(room - len(mark), 2)
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


def commit_words(entry: Entry) -> str:
    """ "3f2c1aa", with a plus where there were changes that were not committed; empty where there is none."""
    return "" if not entry.commit else plain(entry.commit)[:7] + ("+" if entry.dirty else "")


def figure_title(series: Series) -> str:
    """The figure, as a sentence begins: "CPU time per inference"; the metric's own name where it is an accuracy."""
    name = METRICS.get(series.metric, plain(series.metric)) if series.metric else FIGURES[series.figure].title
    return name[:1].upper() + name[1:]


def title(series: Series) -> str:
    """What is shown of what: "CPU time per inference of resnet20 on cpu"."""
    return f"{figure_title(series)} of {plain(series.name)} on {plain(series.target)}"


def subject(series: Series) -> str:
    """What was measured and where it lay: "bundle models/resnet20 in github.com/acme/vision"."""
    if series.place is None:
        return "entries of an earlier perwatt, which kept no paths"
    # At a repository's top, the repository says it all.
    parts = [series.repository] if series.repository and series.place == "." else [series.place, series.repository]
    where = " in ".join(plain(_from_home(part)) for part in parts if part)
    return (
        f"built from a recipe in {where}" if series.subject_kind == BUILT else f"{plain(series.subject_kind)} {where}"
    )


def _from_home(path: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    return f"~{path[len(home) :]}" if home and path.startswith(f"{home}/") else path


def circumstances(series: Series) -> str:
    """How it was run and on what: scenario, operating point, method and boundary, machine."""
    point = {name: value for name, value in series.operating_point.items() if value is not None and name != "scenario"}
    said = [plain(series.scenario), *(f"{name} {value}" for name, value in facts(point))]
    if series.method:
        said.append(f"joules {series.method} ({series.boundary or 'boundary not stated'})")
    return ", ".join([*filter(None, said), machine_words(series)])


def machine_words(series: Series) -> str:
    """The machine by the beginning of its fingerprint's digest, and its processor where the system names it."""
    short = plain(series.fingerprint).removeprefix("sha256:")[:12]
    name = series.machine.get("name")
    return f"machine {short}" + (f" ({plain(name)})" if name else "")


# Changes ----------------------------------------------------------------------------------------------------------


def _words(ratio: Ratio) -> str:
    return with_interval(_figure(ratio))


def _figure(ratio: Ratio) -> RatioFigure:
    return RatioFigure(value=ratio.value, low=ratio.low, high=ratio.high)


def across_jobs(entry: Entry) -> Ratio | None:
    """This value ÷ the one before it on the line: of two jobs, so without an interval. None where it means nothing."""
    if entry.previous is None or entry.previous <= 0 or entry.value <= 0:
        return None
    return Ratio(entry.value / entry.previous)


def _across(series: Series, entry: Entry) -> str:
    """The change against the entry before, across two jobs: points for an accuracy, else a ratio, with a tilde unless the
    figure is counted."""
    if series.unit == "fraction":
        return "" if entry.previous is None else f"{signed(100 * (entry.value - entry.previous), 2)} points"
    ratio = across_jobs(entry)
    return "" if ratio is None else drifting(series) + ratio_words(_figure(ratio))[0]


def drifting(series: Series) -> str:
    """The mark of what two jobs say of a figure that is measured, not counted."""
    return "" if FIGURES[series.figure].exact else "~"


def meaning(series: Series, entry: Entry) -> Change:
    """Whether the change is one, and for the better: by the ratio of the job where there is one. What two runs of the same
    model differed by in that job (the floor) is no change, and neither is, across two jobs, what leaves the intervals of
    both overlapping."""
    kind = FIGURES[series.figure]
    if kind.name == "accuracy":
        return _accuracy_meaning(series, entry)
    if entry.ratio.value is not None:
        return change(series.figure, _figure(entry.ratio), entry.floor)
    ratio = across_jobs(entry)
    if ratio is None:
        return ""
    if entry.unchanged and not kind.exact:
        # The same files: what moved is the machine.
        return "noise"
    verdict = judged(_figure(ratio), kind.better == "higher", SAME_WITHIN if kind.exact else SAME_BETWEEN_RUNS)
    if verdict in ("better", "worse") and _overlap(entry):
        return "noise"
    return "" if verdict == "over budget" else verdict


def _overlap(entry: Entry) -> bool:
    """Whether its interval and that of the entry before have values in common."""
    low, high, low_before, high_before = entry.low, entry.high, entry.previous_low, entry.previous_high
    if low is None or high is None or low_before is None or high_before is None:
        return False
    return low <= high_before and low_before <= high


def _accuracy_meaning(series: Series, entry: Entry) -> Change:
    """Of fractions only: of any other metric nobody knows here which way is better."""
    if series.unit != "fraction" or entry.previous is None:
        return ""
    moved = entry.value - entry.previous
    return "same" if moved == 0 else "better" if moved > 0 else "worse"


# Sentences --------------------------------------------------------------------------------------------------------


def latest(series: Series) -> list[str]:
    """The last entry's change, and what the gates chain up to."""
    entry, scale = series.entries[-1], Scale.of(series)
    value = f"{scale.words(entry.value)} {scale.interval(entry)}".strip()
    said = ["; ".join([f"Latest: {name_words(entry)}, {when(entry)}, {value}", *_changes(series, entry)])]
    chain = entry.chain
    if chain is not None and chain.jobs > 1:
        said.append(
            f"{_words(chain.ratio)} since {plain(chain.since)}: {chain.jobs} gates chained, each against the head before "
            "it, so that the machine's drift between jobs is not in it"
        )
    return said


def name_words(entry: Entry) -> str:
    """An entry's commit, else its label."""
    return commit_words(entry) or plain(entry.label)


def _changes(series: Series, entry: Entry) -> list[str]:
    said = []
    verdict, in_job = _verdict_words(meaning(series, entry)), entry.ratio.value is not None
    if in_job:
        said.append(f"{_words(entry.ratio)} of its base, measured in one job: {verdict}")
    across = _across(series, entry)
    if across and not (in_job and entry.together):
        jobs = ", across two jobs" if drifting(series) else ""
        said.append(f"{across} against the entry before{jobs}" + ("" if in_job else f": {verdict}"))
    if not entry.on_line:
        said.append("its gate failed, so it is no part of the line")
    return said


def _verdict_words(verdict: Change) -> str:
    return {"": "not judged", "noise": "no change that can be told from noise", "≈ same": "about the same"}.get(
        verdict, verdict
    )


def legend(series: Series) -> list[str]:
    """What the marks of the table mean, those that are there."""
    shown = rows(series)
    marks = (
        ("~ across two jobs: the machine's drift is in it", any(row.change.startswith("~") for row in shown)),
        ("! a disturbed run", any(entry.disturbed for entry in series.entries)),
        ("+ with changes that were not committed", any(row.commit.endswith("+") for row in shown)),
        ("a failed head is no part of the line", any(not entry.on_line for entry in series.entries)),
    )
    said = ["; ".join(text for text, there in marks if there)]
    if series.older:
        said.append(f"{series.older:,} older not shown: --limit {len(series.entries) + series.older}")
    return list(filter(None, said))


def elsewhere(others: Sequence[Series]) -> str:
    """How much other machines have, in a line; empty where they have nothing."""
    if not others:
        return ""
    entries = sum(len(one.entries) + one.older for one in others)
    machines = len({one.fingerprint for one in others})
    return (
        f"{entries:,} {_plural('entry', 'entries', entries)} of {machines} other "
        f"{_plural('machine', 'machines', machines)} {_plural('is', 'are', entries)} not shown: --all-machines"
    )


def _plural(one: str, many: str, count: int) -> str:
    return one if count == 1 else many


NOTHING_YET = "no entries yet: `optimize gate` and `optimize bench` write them down"
NOTHING_HERE = "no entries of this machine"


def bounds(series: Series) -> tuple[float, float]:
    """The lowest and highest value to draw, intervals included, never so close that noise looks like news."""
    ends: Iterable[float | None] = (x for entry in series.entries for x in (entry.value, entry.low, entry.high))
    found = [end for end in ends if known(end) is not None and end is not None]
    low, high = min(found), max(found)
    least = 0.04 * max(abs(low), abs(high)) or 1.0
    spare = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - spare, high + spare
