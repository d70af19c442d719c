"""`optimize bench`: one or several models, measured side by side, at an operating point or at a person's own traffic."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perwatt.bench.capacity import Try, highest_rate, window_s
from perwatt.bench.statistics import figure_interval
from perwatt.bench.traffic import JOULES_PER_KWH, Price, known_percentile, poisson_arrivals
from perwatt.bench_report import BenchReport, Capacity, Figure, Traffic
from perwatt.bench_report import Subject as SubjectReport
from perwatt.comparison import compare_figure, noise_floor, subject_figure
from perwatt.errors import InputError
from perwatt.figure_words import rate_words, values
from perwatt.figures import FIGURES, MEASURED
from perwatt.gating import measuring_facts
from perwatt.isolation import Worker, workspace
from perwatt.job import Measured, Profile, Progress, make_ready, open_conductor, run_job
from perwatt.measurement import Window
from perwatt.measuring import COUNTER_REFRESHES, Conductor, Effort
from perwatt.report import RatioFigure
from perwatt.report_units import duration
from perwatt.subjects import Subject, give_samples, load, open_subject

BENCH = Effort(window_s=0.1, warm_up_s=0.3, min_blocks=20, max_s=12.0, tight=0.01, steady_s=3.0)
TRAFFIC_BLOCKS = 2
TRAFFIC_S, TRAFFIC_REQUESTS, TRAFFIC_MOST_S = 3.0, 50, 60.0
"""A window of traffic: this long at least, and long enough for so many requests, but no longer than the last."""
DROWNING = 3.0
LATE = 1.05
"""A window that ends later than this share of its time had more requests than could be served."""


def benchmark(
    *models: str | Path,
    rate_per_s: float | None = None,
    price: Price | None = None,
    latency_bound_ms: float | None = None,
    profile: Profile = "quick",
    meter: str = "auto",
    time_s: float | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
    **options: Any,
) -> BenchReport:
    """Measure bundles, models or backends' own files side by side; the first is what the others are compared with.

    `rate_per_s` adds joules per request at that traffic, idle time included, and `price` what a million of them cost.
    `options` as for `optimize`: target, scenario, batch, threads, precision, data, …; scenario `server` wants `latency_bound_ms`
    and finds the highest sustainable rate.

    Raises InputError for what was given, TargetError where a backend can't be used here."""
    started = time.perf_counter()
    server = options.get("scenario") == "server"
    _check(models, server, latency_bound_ms, profile, time_s)
    with workspace() as scratch, Worker("checks") as checks, ExitStack() as cleanup:
        folder = Path(scratch)
        subjects = _open([Path(model) for model in models], options, folder, checks, cleanup, progress)
        inputs = give_samples(subjects, folder, seed)
        conductor, notes = open_conductor(subjects, meter, seed, cleanup)
        effort = BENCH if time_s is None else Effort(BENCH.window_s, BENCH.warm_up_s, 2, time_s, 0.0, BENCH.steady_s)
        make_ready(subjects, effort, lambda text, share: progress(text, 0.15 + 0.1 * share))
        last = 0.65 if server or rate_per_s else 0.95
        measured = run_job(
            subjects, effort, conductor, profile, lambda text, share: progress(text, 0.25 + (last - 0.25) * share)
        )
        found = [_subject(subject, measured, number, folder) for number, subject in enumerate(subjects)]
        if server:
            assert latency_bound_ms is not None
            for subject, report in zip(subjects, found, strict=True):
                progress(f"finding the highest rate of {subject.label}", last)
                report.capacity = _capacity(
                    subject, report, latency_bound_ms, conductor, seed, measured.energy, progress
                )
        if rate_per_s and _can_serve(rate_per_s, subjects, found):
            seconds = _traffic_window_s(rate_per_s, conductor)
            served = _traffic(subjects, rate_per_s, seconds, conductor, seed, progress)
            for subject, report, windows in zip(subjects, found, served, strict=True):
                report.traffic = _traffic_report(windows, rate_per_s, seconds, price, measured.energy, _items(subject))
        return BenchReport(
            perwatt_version=version("perwatt"),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started, 2),
            profile=profile,
            subjects=found,
            noise_floor=_floors(measured),
            disturbed=measured.disturbed,
            machine=measured.machine,
            measuring=measuring_facts(measured, subjects, inputs, seed),
            energy=measured.energy,
            notes=[*dict.fromkeys([*notes, *_scenario_words(subjects)])],
        )


def _scenario_words(subjects: Sequence[Subject]) -> list[str]:
    """That bundles made for different scenarios are each loaded as they were made for."""
    found = {subject.label: subject.point.scenario for subject in subjects}
    if len(set(found.values())) < 2:
        return []
    each = ", ".join(f"{label} {scenario}" for label, scenario in found.items())
    return [f"not loaded alike ({each}): ratios compare scenarios too; --scenario loads all in one way"]


def _check(
    models: Sequence[str | Path], server: bool, latency_bound_ms: float | None, profile: Profile, time_s: float | None
) -> None:
    """Refuse what does not go together, before anything is opened."""
    if not models:
        raise InputError("nothing to measure", fix="optimize bench BUNDLE_OR_MODEL …")
    if server and latency_bound_ms is None:
        raise InputError("the server scenario wants a latency bound", fix="add --latency-bound 20ms")
    if latency_bound_ms is not None and not server:
        raise InputError("a latency bound is for the server scenario", fix="add --scenario server")
    if latency_bound_ms is not None and latency_bound_ms <= 0:
        raise InputError("a latency bound must be above 0", fix="write --latency-bound 20ms")
    if profile == "long" and time_s is not None:
        raise InputError(
            "--profile long measures 600 s for each model", fix="leave out --time, or take --profile quick"
        )


def _open(
    paths: Sequence[Path], options: dict[str, Any], folder: Path, checks: Worker, cleanup: ExitStack, progress: Progress
) -> list[Subject]:
    subjects = []
    for number, path in enumerate(paths):
        progress(f"opening {path}", 0.1 * number / len(paths))
        (folder / str(number)).mkdir()
        subject = open_subject(path, _label(path, paths), options, folder / str(number), checks)
        cleanup.callback(subject.close)
        subjects.append(subject)
    load(subjects)
    return subjects


def _label(path: Path, paths: Sequence[Path]) -> str:
    """The shortest name that tells it from the others."""
    name = path.resolve().name
    return name if [other.resolve().name for other in paths].count(name) == 1 else str(path)


def _floors(measured: Measured) -> dict[str, float | None]:
    """By figure, how far apart two processes of any of the models were, as a fraction."""
    if not measured.two_processes:
        return {}
    found = {}
    for name in MEASURED:
        known = [floor for blocks in measured.blocks if (floor := noise_floor(name, blocks)) is not None]
        found[name] = math.expm1(max(known)) if known else None
    return found


def _subject(subject: Subject, measured: Measured, number: int, folder: Path) -> SubjectReport:
    blocks, first = measured.blocks[number], measured.blocks[0]
    energy = measured.energy
    figures, to_first = {}, {}
    for name in MEASURED:
        value, low, high, n = subject_figure(name, blocks)
        of_energy = FIGURES[name].of_energy
        figures[name] = Figure(
            value=value, unit=FIGURES[name].unit, low=low, high=high, n=n,
            method=energy["method"] if of_energy else None, boundary=energy["boundary"] if of_energy else None,
        )  # fmt: skip
        if number:
            ratio = compare_figure(name, first, blocks)[0]
            to_first[name] = RatioFigure(value=ratio.value, low=ratio.low, high=ratio.high)
    peaks = [side.peak_memory_bytes for side in subject.replicas if side.peak_memory_bytes is not None]
    return SubjectReport(
        label=subject.label,
        name=subject.name,
        path=str(subject.path),
        kind=subject.kind,
        target=subject.target,
        scenario=subject.point.scenario,
        operating_point=subject.main.facts["operating_point"],
        execution_precision=subject.main.facts.get("execution_precision"),
        digest=subject.digest(),
        size_bytes=subject.main.saved_bytes(folder / f"saved-{number}"),
        peak_memory_bytes=max(peaks, default=None),
        warm_up=subject.main.warm_up,
        figures=figures,
        ratio_to_first=to_first,
        notes=subject.notes,
    )


# Traffic --------------------------------------------------------------------------------------------------------


def _can_serve(rate_per_s: float, subjects: Sequence[Subject], reports: Sequence[SubjectReport]) -> bool:
    """Whether no subject would drown: far beyond what it does, serving the backlog would take for ever."""
    all_can = True
    for subject, report in zip(subjects, reports, strict=True):
        most = (report.figures["throughput_per_s"].value or 0.0) / _items(subject)
        if rate_per_s > DROWNING * most:
            all_can = False
            report.notes.append(
                f"traffic of {rate_words(rate_per_s)} was not tried: it serves about {rate_words(most)}"
            )
    return all_can


def _items(subject: Subject) -> int:
    """Items in one request, which is one call."""
    return 1 if subject.signature.batch is None else int(subject.main.facts["operating_point"]["batch"])


def _traffic_window_s(rate_per_s: float, conductor: Conductor) -> float:
    return max(TRAFFIC_S, conductor.counter_window_s or 0.0, min(TRAFFIC_REQUESTS / rate_per_s, TRAFFIC_MOST_S))


def _traffic(
    subjects: Sequence[Subject],
    rate_per_s: float,
    seconds: float,
    conductor: Conductor,
    seed: int,
    progress: Progress,
) -> list[list[Window]]:
    """Windows of Poisson arrivals at this rate, for every subject the same arrivals, interleaved. Their number is what
    the rate says (arrivals given their number are still those of a Poisson process), so that joules per request do not
    vary with how many happened to come."""
    windows: dict[int, list[Window]] = {number: [] for number in range(len(subjects))}
    index = {id(side): number for number, subject in enumerate(subjects) for side in subject.replicas}
    # A block gives every subject two windows.
    planned = 2 * TRAFFIC_BLOCKS * len(subjects)
    for block in range(TRAFFIC_BLOCKS):
        arrivals = poisson_arrivals(
            rate_per_s, seed + block, seconds=seconds, count=max(1, round(rate_per_s * seconds))
        )

        def give(side: Any, due: Sequence[float] = arrivals) -> Window:
            done = sum(map(len, windows.values()))
            share = 0.65 + 0.3 * done / planned
            progress(f"traffic: {done + 1} of {planned} windows of {duration(seconds)}", share)
            window = conductor.served(side, due)
            windows[index[id(side)]].append(window)
            return window

        conductor.block([subject.replicas for subject in subjects], give)
    return list(windows.values())


def _traffic_report(
    windows: Sequence[Window],
    rate_per_s: float,
    seconds: float,
    price: Price | None,
    energy: Mapping[str, Any],
    items: int,
) -> Traffic:
    idle_w = energy["idle_power_w"]
    own = _joules_above_idle(windows, idle_w)
    joules = [one + idle_w / rate_per_s for one in own]
    latencies = [latency for window in windows for latency in window.latencies_ms]
    per_request = _of_energy(joules, len(windows), "J", energy)
    per_million = per_request.value * 1e6 if per_request.value is not None else None
    return Traffic(
        rate_per_s=rate_per_s,
        seconds=sum(window.wall_s for window in windows),
        requests=len(latencies),
        energy_j_per_request=per_request,
        above_idle_j_per_request=_of_energy(own, len(windows), "J", energy),
        idle_j_per_request=_constant(None if idle_w is None else idle_w / rate_per_s, "J", energy),
        power_w=_of_energy([one * rate_per_s for one in joules], len(windows), "W", energy),
        idle_power_w=_constant(idle_w, "W", energy),
        latency_p50_ms=known_percentile(latencies, 0.5),
        latency_p99_ms=known_percentile(latencies, 0.99),
        utilisation=_utilisation(windows),
        sustained=all(window.wall_s <= LATE * seconds for window in windows),
        items_per_request=items,
        kwh_per_million=per_million / JOULES_PER_KWH if per_million is not None else None,
        cost_per_million=price.of_joules(per_million) if per_million is not None and price is not None else None,
        currency=price.currency if price is not None else None,
        price_per_kwh=price.amount if price is not None else None,
    )


def _joules_above_idle(windows: Sequence[Window], idle_w: float | None) -> list[float]:
    """What a request takes above idle. Its share of idle time is added at the rate that was asked for: a window of a minute
    can't hold one request an hour, and ends with its last request."""
    return [
        (w.energy_j - idle_w * w.wall_s) / len(w.latencies_ms)
        for w in windows
        if w.energy_j is not None and idle_w is not None
    ]


def _constant(value: float | None, unit: str, energy: Mapping[str, Any]) -> Figure:
    return Figure(value=value, unit=unit, n=1, method=energy["method"], boundary=energy["boundary"])


def _of_energy(values: Sequence[float], windows: int, unit: str, energy: Mapping[str, Any]) -> Figure:
    """A figure from `windows` windows, labelled; without a value where one of them has no energy."""
    where = {"method": energy["method"], "boundary": energy["boundary"]}
    if len(values) < windows:
        return Figure(value=None, unit=unit, **where)
    value, low, high = figure_interval(values)
    return Figure(value=value, unit=unit, low=low, high=high, n=len(values), **where)


def _utilisation(windows: Sequence[Window]) -> float | None:
    wall = sum(window.wall_s for window in windows)
    return sum(window.cpu_s for window in windows) / (wall * (os.cpu_count() or 1)) if wall else None


def _capacity(
    subject: Subject,
    report: SubjectReport,
    bound_ms: float,
    conductor: Conductor,
    seed: int,
    energy: Mapping[str, Any],
    progress: Progress,
) -> Capacity:
    """The highest rate of Poisson arrivals, of calls, that stays within the bound."""
    start = (report.figures["throughput_per_s"].value or 1.0) / _items(subject)
    tried = 0

    def shown(one: Try) -> None:
        progress(f"{_try_words(one, bound_ms)} ({subject.label})", 0.65 + 0.02 * min(tried, 15))

    def serve(rate_per_s: float) -> Window:
        nonlocal tried
        tried += 1
        seconds = window_s(rate_per_s, bound_ms, at_most_s=TRAFFIC_MOST_S)
        count = max(1, round(rate_per_s * seconds))
        return conductor.served(subject.main, poisson_arrivals(rate_per_s, seed + tried, seconds=seconds, count=count))

    found = highest_rate(serve, bound_ms=bound_ms, start_rate=start, progress=shown)
    reached = [latency for window in found.windows for latency in window.latencies_ms]
    return Capacity(
        rate_per_s=found.rate_per_s,
        bound_ms=bound_ms,
        percentile=100 * found.share,
        failed_rate_per_s=min(
            (t.rate_per_s for t in found.tries if not t.ok and t.rate_per_s > (found.rate_per_s or 0.0)), default=None
        ),
        tries=[asdict(one) for one in found.tries],
        ended=found.reason,
        items_per_request=_items(subject),
        latency_ms=known_percentile(reached, found.share),
        utilisation=_utilisation(found.windows),
        energy_j_per_request=_joules_at_capacity(found.windows, found.rate_per_s, energy),
    )


def _try_words(one: Try, bound_ms: float) -> str:
    """What a tried rate came to: "412 /s: p99 18.3 ms, held"."""
    end = "held" if one.ok else "too slow" if one.latency_ms > bound_ms else "backlog grew"
    return f"{rate_words(one.rate_per_s)}: p99 {values('ms', [one.latency_ms])[0]}, {end}"


def _joules_at_capacity(
    windows: Sequence[Window], rate_per_s: float | None, energy: Mapping[str, Any]
) -> Figure | None:
    """As for traffic; None where a counter moved too seldom in a window, whose length the search chose."""
    if rate_per_s is None or any(w.refreshes is not None and w.refreshes < COUNTER_REFRESHES for w in windows):
        return None
    idle_w = energy["idle_power_w"]
    joules = [one + idle_w / rate_per_s for one in _joules_above_idle(windows, idle_w)]
    return _of_energy(joules, len(windows), "J", energy) if len(joules) == len(windows) else None
