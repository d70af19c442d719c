"""One measuring job: all subjects made ready, interleaved, watched, and the machine's state told beside the figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from perwatt.bench import fingerprint, machine, probe
from perwatt.bench.meters import open_meter
from perwatt.bench.statistics import half_width
from perwatt.comparison import Blocks, compare_figure
from perwatt.errors import InputError
from perwatt.isolation import Worker
from perwatt.measurement import Window
from perwatt.measuring import Conductor, Effort, run_blocks, run_energy_blocks
from perwatt.subjects import Subject

Profile = Literal["quick", "long"]
Progress = Callable[[str, float], None]

CALLS_ONE_BY_ONE, CALLS_OF_A_QUEUE = 4, 16
"""So many calls at least in a window: filling and draining a queue must be a small part of it."""
LONGEST_WINDOW_S = 1.0
COOL_DOWN_S = 5.0
"""Between load and the idle window of a counter: clocks and voltages fall back within seconds."""
IDLE_S = 0.2
"""Enough for a model of the machine; a counter gets a whole window."""
IDLE_STATE = "models loaded, their processes asleep"

LOOK_EVERY = 8
"""Blocks between two looks at whether the ratio is known well enough."""

LONG_S, LONG_WINDOW_S = 600.0, 60.0
"""MLPerf's inference rules: at least 600 s of load, performance and power from the same run."""

QUICK_ENERGY_BLOCKS = 4


@dataclass
class Measured:
    """What a job found: one `Blocks` for each subject, in order."""

    blocks: list[Blocks]
    kept: list[bool]
    two_processes: bool
    effort: Effort
    idle: Window
    seconds: float
    disturbed: list[str]
    machine: dict[str, Any]
    energy: dict[str, Any]
    probe: dict[str, Any] | None


def open_conductor(
    subjects: Sequence[Subject], meter: str, seed: int, cleanup: ExitStack
) -> tuple[Conductor, list[str]]:
    """A conductor with the meter that was asked for, and a probe where the processor has matrix units. Raises InputError
    where the subjects run on devices that one meter can't compare."""
    if len({subject.device for subject in subjects}) > 1:
        raise InputError("one runs on the CPU and another on a GPU: their energy can't be compared by one meter")
    opened, notes = open_meter(meter, subjects[0].device)  # type: ignore[arg-type]
    cleanup.callback(opened.close)
    prober = None
    if subjects[0].device == "cpu" and probe.pays():
        prober = Worker("probe")
        cleanup.callback(prober.close)
        prober.start()
    return Conductor(opened, probe=prober, seed=seed), notes


def make_ready(subjects: Sequence[Subject], effort: Effort, progress: Progress) -> None:
    """Give every process its calls, and warm it up alone on the machine, until steady."""
    for number, subject in enumerate(subjects):
        assert subject.samples is not None
        for side in subject.replicas:
            progress(f"warming up {subject.label}", number / len(subjects))
            side.prepare(subject.samples, effort.warm_up_s, effort.steady_s)
            side.settle()


def fitted(effort: Effort, subjects: Sequence[Subject]) -> Effort:
    """`effort` with windows long enough for the slowest subject."""
    longest = 0.0
    for subject in subjects:
        single = subject.main.window(0.0)
        calls = CALLS_ONE_BY_ONE if subject.point.scenario == "single-stream" else CALLS_OF_A_QUEUE
        longest = max(longest, calls * single.wall_s / max(1, len(single.latencies_ms)))
        subject.main.settle()
    window_s = min(max(effort.window_s, longest), max(LONGEST_WINDOW_S, effort.window_s))
    return replace(effort, window_s=window_s)


def run_job(
    subjects: Sequence[Subject], effort: Effort, conductor: Conductor, profile: Profile, progress: Progress
) -> Measured:
    """Measure all subjects side by side; they are loaded and ready."""
    started = time.perf_counter()
    before = machine.facts()
    groups = [subject.replicas for subject in subjects]
    effort = fitted(effort, subjects)

    def share(value: float) -> None:
        progress("measuring", value)

    if profile == "long":
        effort = replace(effort, window_s=LONG_WINDOW_S)
        blocks = _long_blocks(groups, conductor, share)
    else:
        asked = 0

        def enough() -> bool:
            nonlocal asked
            asked += 1
            # Looking costs about as much as a window: not after every block, and not at all where only time decides.
            if effort.tight <= 0 or asked % LOOK_EVERY:
                return False
            so_far = [Blocks.of(replicas) for replicas in groups]
            known = [compare_figure("cpu_s_per_inference", so_far[0], other)[0] for other in so_far[1:]]
            return all(half_width(ratio) < effort.tight for ratio in known) and bool(known)

        blocks = run_blocks(groups, effort, conductor, enough, share)
    conductor.take_probe()
    probed = conductor.probed
    if profile == "quick":
        run_energy_blocks(groups, QUICK_ENERGY_BLOCKS, conductor, lambda value: progress("measuring energy", value))
    progress("measuring idle power", 1.0)
    if conductor.counter_window_s is not None:
        time.sleep(COOL_DOWN_S)
    idle = conductor.idle(max(IDLE_S, conductor.counter_window_s or 0.0))
    for replicas in groups:
        for side in replicas:
            side.note_memory()
    kept = probe.keep(probed) if conductor.probe is not None else [True] * blocks
    idle_w = idle.energy_j / idle.wall_s if idle.energy_j is not None else None
    sides = [side for replicas in groups for side in replicas]
    windows = [window for side in sides for window in (*side.windows, *side.energy_windows)]
    after = machine.facts()
    return Measured(
        blocks=[Blocks.of(replicas, idle_w, kept) for replicas in groups],
        kept=kept,
        two_processes=all(len(replicas) > 1 for replicas in groups),
        effort=effort,
        idle=idle,
        seconds=time.perf_counter() - started,
        disturbed=[
            *machine.disturbance(windows, os.cpu_count() or 1, before, after),
            *(probe.disturbance(probed) if conductor.probe is not None else []),
        ],
        machine=_machine(before, after, windows),
        energy=energy_facts(conductor, groups, idle, profile),
        probe=_probe_facts(conductor, probed, kept),
    )


def _long_blocks(groups: Sequence[Sequence[Any]], conductor: Conductor, share: Callable[[float], None]) -> int:
    """MLPerf's: windows of a minute until every subject had 600 s, time and energy of the same windows."""
    blocks = int(-(-LONG_S // (2 * LONG_WINDOW_S)))

    def give(side: Any) -> Window:
        window = conductor.energy_window(side, LONG_WINDOW_S)
        side.windows.append(side.energy_windows.pop())
        return window

    for number in range(blocks):
        conductor.block(groups, give)
        share((number + 1) / blocks)
    return blocks


def _machine(before: dict[str, Any], after: dict[str, Any], windows: Sequence[Window]) -> dict[str, Any]:
    """What the machine is, and in what state it was before and after; what others took of it meanwhile."""
    found = fingerprint.fingerprint()
    cpu_s = (os.cpu_count() or 1) * sum(window.wall_s for window in windows)
    known = bool(windows) and all(w.steal_s is not None and w.other_cpu_s is not None for w in windows)
    shares = {
        "steal_share": sum(w.steal_s or 0.0 for w in windows) / cpu_s if known else None,
        "others_share": max(0.0, sum(w.other_cpu_s or 0.0 for w in windows)) / cpu_s if known else None,
    }
    return {
        "fingerprint": found, "digest": fingerprint.digest(found), "facts": before, "facts_after": after, **shares,
    }  # fmt: skip


def _probe_facts(
    conductor: Conductor, probed: Sequence[Sequence[dict[str, float]]], kept: Sequence[bool]
) -> dict[str, Any] | None:
    if conductor.probe is None or not any(probed):
        return None
    flat = [one for block in probed for one in block]
    fractions = probe.fractions(flat)
    ordered = {kind: sorted(one[kind] for one in fractions) for kind in flat[0]}
    return {
        "peak_tops": probe.peaks(flat),
        "fraction_of_peak": {
            kind: {"p5": found[len(found) // 20], "median": found[len(found) // 2]} for kind, found in ordered.items()
        },
        "n": len(flat),
        "blocks_discarded": list(kept).count(False),
        "rule": probe.RULE,
        "seconds": round(conductor.probe_s, 2),
    }


def energy_facts(
    conductor: Conductor, groups: Sequence[Sequence[Any]], idle: Window, profile: Profile
) -> dict[str, Any]:
    """How the joules were come by, with everything that a reader needs to believe them."""
    sides = [side for replicas in groups for side in replicas]
    windows = [window for side in sides for window in (side.energy_windows or side.windows)]
    read = [window for window in windows if window.energy_j is not None]
    reasons = sorted({window.energy_reason for window in windows if window.energy_reason})
    wall = sum(window.wall_s for window in windows)
    meter_cpu = sum(window.meter_cpu_s for window in windows)
    described = conductor.meter.describe()
    return {
        **described,
        "window_s": round(wall / len(windows), 3) if windows else None,
        "refresh_s": conductor.meter.refresh_s,
        "least_refreshes": min((w.refreshes for w in read if w.refreshes is not None), default=None),
        "n": len(read),
        "missing": reasons,
        "idle_policy": "gross is the headline; above idle = gross − idle power × time",
        "idle_state": IDLE_STATE,
        "idle_power_w": idle.energy_j / idle.wall_s if idle.energy_j is not None else None,
        "meter_overhead": {"cpu_s": round(meter_cpu, 6), "share_of_one_cpu": meter_cpu / wall if wall else None},
        "rules": "MLPerf: 600 s, performance and power from the same run"
        if profile == "long"
        else "quick: shorter than MLPerf's 600 s; --profile long follows its rules",
    }
