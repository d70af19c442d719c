"""`optimize bench`: one or several models, measured side by side, at an operating point or at a person's own traffic."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perwatt.bench.capacity import highest_rate, window_s
from perwatt.bench.statistics import figure_interval, percentile
from perwatt.bench.traffic import Price, poisson_arrivals
from perwatt.bench_report import BenchReport, Capacity, Figure, Traffic
from perwatt.bench_report import Subject as SubjectReport
from perwatt.comparison import compare_figure, noise_floor, subject_figure
from perwatt.errors import InputError
from perwatt.figures import FIGURES, MEASURED
from perwatt.gating import measuring_facts
from perwatt.isolation import Worker, workspace
from perwatt.job import Measured, Profile, Progress, make_ready, open_conductor, run_job
from perwatt.measurement import Window
from perwatt.measuring import Conductor, Effort
from perwatt.report import RatioFigure
from perwatt.subjects import Subject, give_samples, load, open_subject

BENCH = Effort(window_s=0.1, warm_up_s=0.3, min_blocks=20, max_s=12.0, tight=0.01, steady_s=3.0)
TRAFFIC_BLOCKS = 2
TRAFFIC_S, TRAFFIC_REQUESTS, TRAFFIC_MOST_S = 3.0, 50, 60.0
"""A window of traffic: this long at least, and long enough for so many requests, but no longer than the last."""
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
    `options` as for `optimize`: target, scenario, batch, threads, data, …; scenario `server` wants `latency_bound_ms`
    and finds the highest sustainable rate.

    Raises InputError for what was given, TargetError where a backend can't be used here."""
    started = time.perf_counter()
    if not models:
        raise InputError("nothing to measure", fix="optimize bench BUNDLE_OR_MODEL …")
    server = options.get("scenario") == "server"
    if server and latency_bound_ms is None:
        raise InputError("the server scenario wants a latency bound", fix="add --latency-bound 20ms")
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
                report.capacity = _capacity(subject, report, latency_bound_ms, conductor, seed)
        if rate_per_s:
            seconds = _traffic_window_s(rate_per_s, conductor)
            served = _traffic(
                subjects, rate_per_s, seconds, conductor, seed, lambda share: progress("traffic", 0.65 + 0.3 * share)
            )
            for report, windows in zip(found, served, strict=True):
                report.traffic = _traffic_report(windows, rate_per_s, seconds, price, measured)
        return BenchReport(
            perwatt_version=version("perwatt"),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started, 2),
            profile=profile,
            subjects=found,
            noise_floor={name: _fraction(noise_floor(name, measured.blocks[0])) for name in MEASURED}
            if measured.two_processes
            else {},
            disturbed=measured.disturbed,
            machine=measured.machine,
            measuring=measuring_facts(measured, subjects, inputs, seed),
            energy=measured.energy,
            notes=[*dict.fromkeys([*notes, *measured.notes])],
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


def _fraction(floor: float | None) -> float | None:
    return None if floor is None else math.expm1(floor)


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
        size_bytes=subject.main.saved_bytes(folder / f"saved-{number}"),
        peak_memory_bytes=max(peaks, default=None),
        warm_up=subject.main.warm_up,
        figures=figures,
        ratio_to_first=to_first,
        notes=subject.notes,
    )


# Traffic --------------------------------------------------------------------------------------------------------


def _traffic_window_s(rate_per_s: float, conductor: Conductor) -> float:
    return max(TRAFFIC_S, conductor.counter_window_s or 0.0, min(TRAFFIC_REQUESTS / rate_per_s, TRAFFIC_MOST_S))


def _traffic(
    subjects: Sequence[Subject], rate_per_s: float, seconds: float, conductor: Conductor, seed: int,
    share: Callable[[float], None],
) -> list[list[Window]]:  # fmt: skip
    """Windows of Poisson arrivals at this rate, for every subject the same arrivals, interleaved. Their number is what
    the rate says (arrivals given their number are still those of a Poisson process), so that joules per request do not
    vary with how many happened to come."""
    windows: dict[int, list[Window]] = {number: [] for number in range(len(subjects))}
    index = {id(side): number for number, subject in enumerate(subjects) for side in subject.replicas}
    for block in range(TRAFFIC_BLOCKS):
        arrivals = poisson_arrivals(
            rate_per_s, seed + block, seconds=seconds, count=max(1, round(rate_per_s * seconds))
        )

        def give(side: Any, due: Sequence[float] = arrivals) -> Window:
            window = conductor.served(side, due)
            windows[index[id(side)]].append(window)
            return window

        conductor.block([subject.replicas for subject in subjects], give)
        share((block + 1) / TRAFFIC_BLOCKS)
    return list(windows.values())


def _traffic_report(
    windows: Sequence[Window], rate_per_s: float, seconds: float, price: Price | None, measured: Measured
) -> Traffic:
    energy = measured.energy
    joules = [w.energy_j / w.inferences for w in windows if w.energy_j is not None and w.inferences]
    watts = [w.energy_j / w.wall_s for w in windows if w.energy_j is not None]
    latencies = [latency for window in windows for latency in window.latencies_ms]
    wall = sum(window.wall_s for window in windows)
    cpus = os.cpu_count() or 1

    def labelled(values: Sequence[float], unit: str) -> Figure:
        where = {"method": energy["method"], "boundary": energy["boundary"]}
        if len(values) < len(windows):
            return Figure(value=None, unit=unit, **where)
        value, low, high = figure_interval(values)
        return Figure(value=value, unit=unit, low=low, high=high, n=len(values), **where)

    per_request = labelled(joules, "J")
    kwh = per_request.value * 1e6 / 3.6e6 if per_request.value is not None else None
    return Traffic(
        rate_per_s=rate_per_s,
        seconds=wall,
        requests=sum(window.inferences for window in windows),
        energy_j_per_request=per_request,
        power_w=labelled(watts, "W"),
        idle_power_w=Figure(
            value=energy["idle_power_w"], unit="W", n=1, method=energy["method"], boundary=energy["boundary"]
        ),
        latency_p50_ms=percentile(latencies, 0.5),
        latency_p99_ms=percentile(latencies, 0.99),
        utilisation=sum(window.cpu_s for window in windows) / (wall * cpus) if wall else None,
        sustained=all(window.wall_s <= LATE * seconds for window in windows),
        kwh_per_million=kwh,
        cost_per_million=kwh * price.amount if kwh is not None and price is not None else None,
        currency=price.currency if price is not None else None,
        price_per_kwh=price.amount if price is not None else None,
    )


def _capacity(subject: Subject, report: SubjectReport, bound_ms: float, conductor: Conductor, seed: int) -> Capacity:
    """The highest rate of Poisson arrivals that stays within the bound."""
    start = report.figures["throughput_per_s"].value or 1.0
    tried = 0

    def serve(rate_per_s: float) -> Window:
        nonlocal tried
        tried += 1
        seconds = window_s(rate_per_s, bound_ms, at_most_s=TRAFFIC_MOST_S)
        return conductor.served(subject.main, poisson_arrivals(rate_per_s, seed + tried, seconds=seconds))

    found = highest_rate(serve, bound_ms=bound_ms, start_rate=start)
    return Capacity(
        rate_per_s=found.rate_per_s,
        bound_ms=bound_ms,
        percentile=100 * found.share,
        tries=[asdict(one) for one in found.tries],
        ended=found.reason,
    )
