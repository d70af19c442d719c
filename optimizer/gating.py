"""`optimize gate`: two sides, measured in one job, judged by the team's limits.

Baselines are bundles, models or git refs, never numbers: both sides are measured here and now, because a figure of
another machine, or of another hour of this one, says nothing about a change.
"""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from perwatt import building, metrics
from perwatt.bench.meters import VARIABLE, open_meter
from perwatt.building import Built
from perwatt.comparison import compare, exact_figure, judge, verdict_of, window_figure
from perwatt.errors import BackendError, InputError
from perwatt.gate_report import EXIT_CODES, ComparedAccuracy, ComparedFigure, GateReport, GateSide, Verdict
from perwatt.isolation import Worker, workspace
from perwatt.job import Measured, Profile, Progress, make_ready, open_conductor, run_job
from perwatt.limits import DEFAULT, GateFile, check_accuracy_limit, read_limits
from perwatt.measuring import Effort
from perwatt.metrics_paired import mcnemar
from perwatt.signature import Batch
from perwatt.subjects import Subject, check_named_data, give_samples, load, names_data, open_subject
from perwatt.worker import load_outputs

GATE = Effort(window_s=0.02, warm_up_s=0.1, min_blocks=40, max_s=20.0, tight=0.01, steady_s=1.0)
"""How long a gate measures unless it is told otherwise."""

MEMORY_GRAIN = 4 << 20
"""What an allocator keeps, and which pages of its libraries a process has touched, moves the peak by bytes like these."""
NO_LABELS = "no samples that accuracy could be judged on: give --eval, or bundles whose recipe names some that are here"
NOT_FINITE = "head's outputs are not finite on the labelled samples"


def gate(
    base: str,
    head: str | None = None,
    *,
    config: str | Path | None = None,
    limits: str | Path | GateFile | None = None,
    rebuild: bool = False,
    time_s: float | None = None,
    meter: str = "auto",
    profile: Profile = "quick",
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
    **options: Any,
) -> GateReport:
    """Compare `head` with `base` and judge the change by `limits` (a gate.yaml, or the default ones).

    Both are bundles, model files, or `git:REF` (built with the recipe `config`, from cache where it can); without
    `head` it is the working tree; `rebuild` builds anew, whatever the cache holds. `time_s`: seconds of measuring.
    `options`: data, eval, image, normalize, text, label, metric, target, scenario, batch, threads, precision and the like, as for
    `optimize`.

    Raises InputError for what was given, TargetError where a side can't run here at all."""
    started = time.perf_counter()
    asked = limits if isinstance(limits, GateFile) else read_limits(limits)
    where = Path(config) if config is not None else None
    check_named_data(options)
    if profile == "long" and time_s is not None:
        raise InputError("--profile long measures 600 s for each side", fix="leave out --time, or take --profile quick")
    if meter != "auto" or VARIABLE in os.environ:
        # What can't be used is better said before both sides are built.
        open_meter(meter)[0].close()
    sides = [
        building.resolve(spec, where, force=rebuild, progress=_part_of(progress, 0.25 * number, 0.25))
        for number, spec in enumerate((base, head))
    ]
    with workspace() as scratch, Worker("checks") as checks, ExitStack() as cleanup:
        folder = Path(scratch)
        progress("opening both sides", 0.5)
        subjects = _open(sides, options, folder, checks, cleanup)
        load(subjects)
        _same_question(subjects)
        inputs = give_samples(subjects, folder, seed)
        conductor, notes = open_conductor(subjects, meter, seed, cleanup)
        effort = _effort(time_s)
        make_ready(subjects, effort, _part_of(progress, 0.55, 0.1))
        measured = run_job(subjects, effort, conductor, profile, _part_of(progress, 0.65, 0.3))
        figures = _figures(subjects, measured, folder)
        accuracy, why_none = None, NO_LABELS
        if "accuracy" in asked.limits:
            progress("judging accuracy", 0.96)
            accuracy, why_none = _accuracy(subjects, folder, options.get("metric"))
            if accuracy is not None:
                check_accuracy_limit(asked, accuracy.unit)
            # Named samples that are not here, or outputs that are no numbers, are no reason to judge less.
            gone = any(names_data(subject.recipe.data) and subject.roles is None for subject in subjects)
            if accuracy is None and asked is DEFAULT and not gone and why_none != NOT_FINITE:
                asked = asked.model_copy(
                    update={"limits": {n: one for n, one in asked.limits.items() if n != "accuracy"}}
                )
                notes = [*notes, f"accuracy is not judged: {why_none}"]
        return _report(sides, subjects, asked, figures, accuracy, why_none, measured, inputs, notes, seed, started)


def _part_of(progress: Progress, first: float, share: float) -> Progress:
    return lambda text, done: progress(text, first + share * done)


def _effort(time_s: float | None) -> Effort:
    if time_s is None:
        return GATE
    return Effort(GATE.window_s, GATE.warm_up_s, 2, time_s, 0.0, min(GATE.steady_s or 1.0, time_s / 10))


def _open(
    sides: Sequence[Built], options: Mapping[str, Any], folder: Path, checks: Worker, cleanup: ExitStack
) -> list[Subject]:
    subjects = []
    for number, side in enumerate(sides):
        (folder / str(number)).mkdir()
        subject = open_subject(side.path, ("base", "head")[number], options, folder / str(number), checks)
        cleanup.callback(subject.close)
        subjects.append(subject)
    return subjects


def _same_question(subjects: Sequence[Subject]) -> None:
    """Both sides must be asked the same thing: the scenario, and the batch where latency is the question. In offline load
    the batch is part of the answer, and may have been tuned."""
    base, head = (subject.main.facts["operating_point"] for subject in subjects)
    asked = ("scenario",) if base["scenario"] == "offline" else ("scenario", "batch")
    if any(base[key] != head[key] for key in asked):
        raise InputError(
            f"base runs {base['scenario']} at batch {base['batch']}, head {head['scenario']} at batch {head['batch']}",
            fix="say which with --scenario and --batch",
        )


def _figures(subjects: Sequence[Subject], measured: Measured, folder: Path) -> dict[str, ComparedFigure]:
    base, head = measured.blocks
    energy = measured.energy
    found = compare(base, head, energy["method"], energy["boundary"], measured.two_processes)
    base_bytes, head_bytes = (
        subject.main.saved_bytes(folder / f"saved-{number}") for number, subject in enumerate(subjects)
    )
    found["size_bytes"] = exact_figure("size_bytes", base_bytes, head_bytes)
    found["peak_memory_bytes"] = _memory(subjects)
    return found


def _memory(subjects: Sequence[Subject]) -> ComparedFigure:
    """The higher of a subject's processes. The floor is what its two processes differ by, and `MEMORY_GRAIN` at least."""
    peaks = [[side.peak_memory_bytes or 0 for side in subject.replicas] for subject in subjects]
    base, head = (max(found) or None for found in peaks)
    floors = [
        max(max(found) - min(found), MEMORY_GRAIN) / min(found) for found in peaks if len(found) > 1 and all(found)
    ]
    return exact_figure("peak_memory_bytes", base, head, max(floors, default=None))


def _accuracy(
    subjects: Sequence[Subject], folder: Path, metric_asked: str | None
) -> tuple[ComparedAccuracy | None, str]:
    """Both sides on the same samples, and why not where that can't be. Without labels there is none, unless a metric was
    asked for: agreement with the base would blame a better head for every answer that it mends."""
    found = [subject.roles.evaluation if subject.roles is not None else None for subject in subjects]
    base, head = subjects
    if found[0] is None or found[1] is None:
        return None, NO_LABELS
    labels = [samples.labels for samples in found if samples is not None]
    if metric_asked is None and any(one is None for one in labels):
        return None, NO_LABELS
    if len(found[0]) != len(found[1]) or not _equal(*labels):
        return None, "base and head are judged on different samples, or in another order: accuracy can't be paired"
    outputs: list[list[Batch]] = []
    for number, (subject, samples) in enumerate(zip(subjects, found, strict=True)):
        assert samples is not None
        saved, out = samples.save(folder / f"evaluation-{number}"), folder / f"outputs-{number}"
        try:
            subject.main.worker.call("predict", samples=str(saved), out=str(out))
        except BackendError as error:
            return None, f"{subject.label} fails on the labelled samples: {error}"
        outputs.append(load_outputs(out))
    recorded = base.recipe.data.metric or head.recipe.data.metric
    metric = metrics.resolve(metric_asked or recorded, found[0], outputs[0])
    scores = [
        metric.score(given, samples, outputs[0]) for given, samples in zip(outputs, found, strict=True) if samples
    ]
    paired = metrics.compare(metric, scores[0], scores[1])
    chance = metrics.near_chance(metric, scores[0], found[0])
    if not math.isfinite(paired.drop):
        return None, NOT_FINITE
    flips = paired.flips_lost is not None and paired.flips_gained is not None
    return ComparedAccuracy(
        metric=metric.name, unit=metric.unit, higher_is_better=metric.higher_is_better, n=paired.n,
        base=scores[0].value, head=scores[1].value, drop=paired.drop,
        low=paired.low if math.isfinite(paired.low) else None,
        high=paired.high if math.isfinite(paired.high) else None,
        flips_lost=paired.flips_lost, flips_gained=paired.flips_gained,
        p_value=mcnemar(paired.flips_lost or 0, paired.flips_gained or 0) if flips else None, chance=chance,
    ), ""  # fmt: skip


def _equal(a: Any, b: Any) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _report(
    sides: Sequence[Built],
    subjects: Sequence[Subject],
    asked: GateFile,
    figures: dict[str, ComparedFigure],
    accuracy: ComparedAccuracy | None,
    why_none: str,
    measured: Measured,
    inputs: str,
    notes: Sequence[str],
    seed: int,
    started: float,
) -> GateReport:
    identical = _identical(subjects)
    without: Verdict = "fail" if why_none == NOT_FINITE else "inconclusive"
    checks = judge(asked.limits, figures, accuracy, why_none, without, identical)
    verdict = verdict_of(checks)
    deciding = [check for check in checks if check.verdict == verdict]
    reason = "; ".join(dict.fromkeys(check.reason for check in deciding)) if verdict != "pass" else "every limit holds"
    code = 0 if verdict == "inconclusive" and asked.on_inconclusive == "pass" else EXIT_CODES[verdict]
    return GateReport(
        perwatt_version=version("perwatt"),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 2),
        verdict=verdict,
        reason=reason,
        exit_code=code,
        name=subjects[1].name,
        base=_side(sides[0], subjects[0]),
        head=_side(sides[1], subjects[1]),
        checks=checks,
        figures=figures,
        accuracy=accuracy,
        identical=identical,
        disturbed=measured.disturbed,
        machine=measured.machine,
        measuring=measuring_facts(measured, subjects, inputs, seed),
        energy=measured.energy,
        samples={subject.label: _samples(subject) for subject in subjects},
        notes=[*dict.fromkeys(notes)],
    )


def _identical(subjects: Sequence[Subject]) -> bool:
    """Whether both sides are the same files, run in the same way."""
    base, head = subjects
    ways = [
        (one.target, one.main.facts["operating_point"], one.main.facts.get("execution_precision")) for one in subjects
    ]
    return ways[0] == ways[1] and base.digest() is not None and base.digest() == head.digest()


def measuring_facts(measured: Measured, subjects: Sequence[Subject], inputs: str, seed: int) -> dict[str, Any]:
    """How it was measured."""
    return {
        "scenario": subjects[0].point.scenario,
        "blocks": len(measured.kept),
        "discarded": measured.kept.count(False),
        "window_s": round(measured.effort.window_s, 4),
        "seconds": round(measured.seconds, 2),
        "seed": seed,
        "inputs": inputs,
        "processes_per_side": min(len(subject.replicas) for subject in subjects),
        "protocol": "windows interleaved in randomised ABBA blocks, each side in two processes of its own; log-ratios "
        "within blocks, 95 % bootstrap interval of their trimmed mean; noise floor (A/A) from the two processes of a side",
        "warm_up": {subject.label: subject.main.warm_up for subject in subjects},
        "probe": measured.probe,
    }


def _samples(subject: Subject) -> dict[str, list[float]]:
    """The figures of every window, for whoever wants to judge for himself."""
    windows = [window for pair in zip(*(side.windows for side in subject.replicas), strict=True) for window in pair]
    found = {
        name: [window_figure(name, window) for window in windows]
        for name in ("cpu_s_per_inference", "throughput_per_s")
    }
    return {name: [value for value in values if value is not None] for name, values in found.items()}


def _side(built: Built, subject: Subject) -> GateSide:
    return GateSide(
        label=built.label,
        path=str(built.path),
        kind=subject.kind,
        commit=built.commit,
        dirty=built.dirty,
        from_cache=built.from_cache,
        digest=subject.digest(),
        target=subject.target,
        operating_point=subject.main.facts["operating_point"],
        execution_precision=subject.main.facts.get("execution_precision"),
        notes=[*built.notes, *subject.notes],
    )
