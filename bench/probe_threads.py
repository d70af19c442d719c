"""What the processor reaches in each type on one thread and on all, and what a core's second hardware thread adds.

Two hardware threads of one core share its arithmetic units: where one thread keeps them busy, a second one adds nothing
and costs a CPU second for each second. A virtual machine often does not tell that its CPUs are such threads. So a pair of
CPUs is measured against the first of them alone: siblings where the system tells any, else the first two that this
process may use. Two that share a core reach about as much as one, two cores twice as much.

Each thread runs a request of its own, compiled for one thread, and is bound to its CPU; OpenVINO does the work in the
calling thread then. Slices of one CPU, the pair and all CPUs follow each other in turn: the best slice is the peak, medians
make the ratios. What counts is the rate by each thread's own CPU time, which is the one by the clock on a quiet machine: on
a busy one, by the clock, two CPUs were seen to reach 1.07 and 4.5 times what one did within minutes. `share` tells how much
of the time the threads ran; below `QUIET_SHARE` others were at work, and a ratio says little. The products are those of the
short probe (`perwatt.bench.probe`): what is reached is OpenVINO's, and about half of what the units could do.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perwatt.bench import machine
from perwatt.bench.fingerprint import isa
from perwatt.bench.probe import KERNEL_ENDINGS, MODELS, matmul_kernels, rewarded
from perwatt.errors import BackendError

SLICE_S = 0.08
QUIET_SHARE = 0.9
"""Of the time, what the threads must have run for their figures to be the machine's."""
ROUNDS = 6


def measure(
    types: Sequence[str] | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """By type: {"one_tops", "all_tops", "cpus", "kernels", "share", "pair"}, tera-operations a second of CPU time, a
    multiplication and its addition being two; "share" is the median share of the time that the threads ran. "pair" is
    None on one CPU, else {"cpus": [a, b], "siblings": whether the system says that they share a core (None: it does not
    tell), "throughput": of both over that of the first, "throughput_range": lowest and highest of the rounds, "cpu_s":
    CPU seconds for an operation on both over those on the first}. Raises BackendError where OpenVINO can't compile the
    models."""
    cpus = allowed()
    pair, siblings = pair_of(cpus)
    found = {}
    for kind in rewarded(isa()) if types is None else types:
        progress(f"arithmetic: {kind}")
        requests, operations, kernels = _requests(kind, len(cpus))
        if not kernels or not all(name.lower().endswith(KERNEL_ENDINGS[kind]) for name in kernels):
            continue
        groups = {"one": pair[:1] or cpus[:1], "pair": pair, "all": cpus}
        slices = _slices(requests, operations, {name: group for name, group in groups.items() if group})
        peak = {name: max(part.tops for part in measured) for name, measured in slices.items()}
        found[kind] = {
            "one_tops": peak["one"],
            "all_tops": max(peak.values()),
            "cpus": len(cpus),
            "kernels": sorted(set(kernels)),
            "share": statistics.median(part.share for measured in slices.values() for part in measured),
            "pair": _ratios(slices["one"], slices["pair"], pair, siblings) if pair else None,
        }
    return found


def allowed() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pair_of(cpus: Sequence[int], root: Path = machine.ROOT) -> tuple[list[int], bool | None]:
    """Two CPUs to compare and whether the system says that they share a core: siblings where it tells any, else the
    first two, False where it says that no core has two threads and None where it says nothing. Empty on one CPU."""
    told: list[bool] = []
    for cpu in cpus:
        said = machine.text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if said:
            shared = [n for n in numbers(said) if n in cpus]
            if len(shared) > 1:
                return shared[:2], True
            told.append(False)
    return list(cpus[:2]) if len(cpus) > 1 else [], False if told else None


def numbers(spans: str) -> list[int]:
    """The numbers that a list such as `0-3,8` stands for."""
    ends = [[int(end) for end in span.split("-")] for span in spans.split(",")]
    return [n for span in ends for n in range(span[0], span[-1] + 1)]


@dataclass(frozen=True)
class Slice:
    """One slice of load: tera-operations a second of CPU time, summed over the threads; CPU seconds for a
    tera-operation; the share of the time that the threads ran."""

    tops: float
    cpu_s: float
    share: float


def _ratios(one: Sequence[Slice], both: Sequence[Slice], pair: Sequence[int], siblings: bool | None) -> dict[str, Any]:
    gains = [b.tops / a.tops for a, b in zip(one, both, strict=True)]
    return {
        "cpus": list(pair),
        "siblings": siblings,
        "throughput": statistics.median(gains),
        "throughput_range": [min(gains), max(gains)],
        "cpu_s": statistics.median(b.cpu_s / a.cpu_s for a, b in zip(one, both, strict=True)),
    }


def _slices(requests: Sequence[Any], operations: int, groups: dict[str, list[int]]) -> dict[str, list[Slice]]:
    """By group, one slice a round. Equal groups share theirs."""
    measured: dict[tuple[int, ...], list[Slice]] = {tuple(group): [] for group in groups.values()}
    for _ in range(ROUNDS):
        for group, slices in measured.items():
            slices.append(_slice(requests, operations, group))
    return {name: measured[tuple(group)] for name, group in groups.items()}


def _slice(requests: Sequence[Any], operations: int, cpus: Sequence[int]) -> Slice:
    """All `cpus` at work for a slice of time, a thread each."""
    together = threading.Barrier(len(cpus))
    done: list[tuple[int, float, float]] = []
    threads = [
        threading.Thread(target=_work, args=(request, cpu, together, done))
        for request, cpu in zip(requests, cpus, strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = sum(cpu for _, _, cpu in done)
    return Slice(
        tops=sum(calls / cpu for calls, _, cpu in done) * operations / 1e12,
        cpu_s=used / (sum(calls for calls, _, _ in done) * operations / 1e12),
        share=used / sum(wall for _, wall, _ in done),
    )


def _work(request: Any, cpu: int, together: threading.Barrier, done: list[tuple[int, float, float]]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(threading.get_native_id(), {cpu})
    request.infer()
    together.wait()
    calls, begun, cpu_begun = 0, time.perf_counter(), time.thread_time()
    while calls == 0 or time.perf_counter() - begun < SLICE_S:
        request.infer()
        calls += 1
    done.append((calls, time.perf_counter() - begun, time.thread_time() - cpu_begun))


def _requests(kind: str, count: int) -> tuple[list[Any], int, list[str]]:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    model, values, operations = MODELS[kind]()
    requests = []
    kernels: list[str] = []
    for _ in range(count):
        try:
            compiled = ov.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"the {kind} probe does not compile: {' '.join(str(error).split())[:200]}") from error
        kernels = kernels or matmul_kernels(compiled)
        request = compiled.create_infer_request()
        # Read only: one tensor serves them all.
        request.set_input_tensor(values)
        requests.append(request)
    return requests, operations, kernels
