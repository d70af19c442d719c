"""What the worker does around a window of load: the calls it feeds, what disturbs it, waiting until all is quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from perwatt.bench.machine import ticks
from perwatt.bench.probe import aligned
from perwatt.contract import Program, as_calls, cpu_seconds
from perwatt.data import Samples
from perwatt.measurement import Window
from perwatt.signature import Batch

SETTLE_S = 1.0
SETTLE_STEP_S = 0.0015
LEAD_IN_S = 0.005
"""Before each window, unmeasured: threads wake up, and caches that another process used are filled again."""
LONGEST_LED_IN_S = 0.02
"""A single call that takes longer needs no lead-in: what it would spare is a small part of it."""
TIMED_ITEMS = 64
TIMED_BYTES = 256_000_000


def timed_calls(program: Program, samples: Samples) -> list[Batch]:
    """Calls of the program's own size, enough for variety and few enough for memory, in mixed order."""
    drawn = samples.take(max(TIMED_ITEMS, program.batch_size or 1))
    calls: list[Batch] = []
    size = 0
    for call in as_calls(program.signature, list(drawn), program.batch_size or 1):
        size += sum(array.nbytes for array in call.values())
        if calls and size > TIMED_BYTES:
            break
        # Where NumPy's memory begins differs from process to process, and matrix units care: up to 1.7× in bf16.
        calls.append({name: aligned(array) for name, array in call.items()})
    # Calls come grouped by shape; in traffic they do not.
    np.random.default_rng(0).shuffle(calls)
    return calls


def watched(load: Callable[[], Window]) -> Window:
    """A window with what the hypervisor took and other processes used meanwhile."""
    before = ticks()
    window = load()
    after = ticks()
    if before is not None and after is not None:
        passed = after.since(before)
        window.steal_s = passed.steal_s
        # Below zero where the ticks are coarser than the window; over many windows that evens out.
        window.other_cpu_s = passed.busy_s - window.cpu_s
    return window


def run_each(program: Program, calls: Sequence[Batch], most_s: float) -> None:
    """Run every call once, or, where that takes longer than `most_s`, one of each shape: the first of a shape may be
    compiled for it."""
    start, shapes = time.perf_counter(), set()
    for call in calls:
        shape = tuple(array.shape for array in call.values())
        if shape not in shapes or time.perf_counter() - start < most_s:
            program.call(call)
        shapes.add(shape)


def settle() -> None:
    """Wait until this process is idle."""
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        before = cpu_seconds()
        time.sleep(SETTLE_STEP_S)
        if cpu_seconds() - before < SETTLE_STEP_S / 5:
            return
