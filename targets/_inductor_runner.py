"""Runs a loaded AOTInductor package: tensors in and out, and load right beside it, on the CPU or on CUDA.

Inputs become tensors before the clock starts. On CUDA the copies to the device and back count, because whoever uses the
model pays them: inputs lie in pinned memory, each stream has its own results, and the end of a call is waited for asleep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perwatt.contract import Clock, OperatingPoint
from perwatt.errors import BackendError
from perwatt.signature import Array, Batch, Signature
from perwatt.targets._cpu import cpu_isa, cpu_name
from perwatt.targets._inductor_compile import Plan, allow_tf32, telling_line

Tensors = list[Any]


def runner(path: Path, signature: Signature, point: OperatingPoint) -> tuple[Runner, Plan]:
    """The package at `path`, ready to run, and what it was compiled for. Raises BackendError where it can't run here."""
    from torch._inductor.package import load_package

    try:
        # One caller at a time, and without locks, which could not be recorded into a CUDA graph.
        model = load_package(str(path), run_single_threaded=True)
    except Exception as error:
        raise BackendError(f"torch can't load the package {path}: {telling_line(error)}") from error
    metadata = dict(model.get_metadata())
    plan = Plan.of(metadata)
    lacking = sorted(set(metadata["perwatt.isa"].split()) - set(cpu_isa())) if plan.device == "cpu" else []
    if lacking:
        raise BackendError(
            f"the package was compiled for a processor with {', '.join(lacking)}, which this one lacks",
            fix="compile the model here: optimize MODEL --target inductor",
        )
    if plan.device == "cuda":
        allow_tf32(plan.precision == "tf32")
        return CudaRunner(model.loader.boxed_run, signature, plan, point), plan
    # Kernels that are not Inductor's own go by this.
    torch.set_num_threads(plan.threads)
    return Runner(model.loader.boxed_run, signature, plan), plan


class Runner:
    """On the CPU."""

    streams = 1
    graphs = False

    def __init__(self, run: Any, signature: Signature, plan: Plan) -> None:
        self.run, self.signature, self.plan = run, signature, plan

    def device_name(self) -> str:
        """Of what does the arithmetic."""
        return cpu_name()

    def tensors(self, batch: Batch) -> Tensors:
        """The inputs by position. Raises BackendError where sizes don't fit together: native code would not look."""
        sizes: dict[str, int] = {}
        for spec in self.signature.inputs:
            for dim, size in zip(spec.shape or (), batch[spec.name].shape, strict=True):
                wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if isinstance(dim, str) and dim == self.signature.batch:
                    wanted = self.plan.batch or size
                if size != wanted:
                    raise BackendError(f"input {spec} has size {size} where {wanted} is wanted for {dim}")
        return [tensor(batch[spec.name]) for spec in self.signature.inputs]

    def call(self, feeds: Tensors) -> list[Array]:
        """One call. The arrays are the caller's."""
        # Copies: an output may be a view of an input, or of another output.
        return [self._declared(position, array(value).copy()) for position, value in enumerate(self._run(feeds))]

    def load(
        self,
        feeds: Sequence[Tensors],
        clock: Clock,
        start: float,
        seconds: float,
        arrivals_s: Sequence[float] | None,
        at_once: int,
    ) -> list[float]:
        """Latencies in ms of calls with `feeds` round and round: for at least `seconds` after `start`, or, where
        `arrivals_s` says when they are due, of those. `at_once` of them are under way at most."""
        latencies: list[float] = []
        for begun in _moments(clock, start, seconds, arrivals_s):
            self._run(feeds[len(latencies) % len(feeds)])
            latencies.append((clock.now() - begun) * 1e3)
        return latencies

    def _run(self, feeds: Tensors) -> Tensors:
        try:
            found: Tensors = self.run(list(feeds))  # a list of its own: the call empties it
        except RuntimeError as error:
            raise BackendError(f"Inductor's program failed on this input: {telling_line(error)}") from error
        return found

    def _declared(self, position: int, found: Array) -> Array:
        kind = self.signature.outputs[position].dtype
        return found if kind in ("unknown", str(found.dtype)) else found.astype(kind)


def _moments(clock: Clock, start: float, seconds: float, arrivals_s: Sequence[float] | None) -> Any:
    """When each call begins to count; the next one is asked for when a call may begin."""
    if arrivals_s is not None:
        for due in arrivals_s:
            clock.wait_until(start + due)
            yield start + due
        return
    now = start
    first = True
    while first or now - start < seconds:
        yield now
        first, now = False, clock.now()


def tensor(given: Array) -> Any:
    """`given` as a tensor, in the array's own memory where that is contiguous and writable."""
    # Zeros of no axes would get one.
    held = given if given.flags.c_contiguous and given.flags.writeable else np.array(given, order="C")
    if str(held.dtype) == "bfloat16":
        return torch.from_numpy(held.view(np.uint16)).view(torch.bfloat16)
    if str(held.dtype).startswith("float8"):
        return torch.from_numpy(held.view(np.uint8)).view(getattr(torch, str(held.dtype)))
    return torch.from_numpy(held)


def array(value: Any) -> Array:
    """A tensor on the CPU as a NumPy array of the same memory."""
    from perwatt.interpreter_values import to_numpy

    found: Array = to_numpy(value)
    return found


# CUDA -----------------------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """The kernels of a call for inputs of one shape, and where they read and write."""

    graph: Any
    inputs: Tensors
    outputs: Tensors


class CudaRunner(Runner):
    """On CUDA: the operating point's number of streams, each with a call under way."""

    def __init__(self, run: Any, signature: Signature, plan: Plan, point: OperatingPoint) -> None:
        super().__init__(run, signature, plan)
        self.streams = 1 if point.scenario == "single-stream" else point.streams or 1
        self.graphs = bool(point.graphs)
        self.lanes = [Lane(self._run, self.graphs) for _ in range(self.streams)]

    def device_name(self) -> str:
        return str(torch.cuda.get_device_name())

    def tensors(self, batch: Batch) -> Tensors:
        return [one.pin_memory() for one in super().tensors(batch)]

    def call(self, feeds: Tensors) -> list[Array]:
        lane = self.lanes[0]
        lane.begin(feeds)
        return [self._declared(at, array(value).copy()) for at, value in enumerate(lane.finish())]

    def load(
        self,
        feeds: Sequence[Tensors],
        clock: Clock,
        start: float,
        seconds: float,
        arrivals_s: Sequence[float] | None,
        at_once: int,
    ) -> list[float]:
        latencies: list[float] = []
        free, under_way = deque(self.lanes[:at_once]), deque[tuple[Lane, int, float]]()

        def end_oldest() -> None:
            lane, turn, waited_ms = under_way.popleft()
            lane.finish()
            # By the GPU's clock: when this thread comes to look says nothing of when the call was done.
            latencies[turn] = waited_ms + lane.took_ms()
            free.append(lane)

        for begun in _moments(clock, start, seconds, arrivals_s):
            lane = free.popleft()
            waited_ms = (clock.now() - begun) * 1e3
            lane.begin(feeds[len(latencies) % len(feeds)])
            under_way.append((lane, len(latencies), waited_ms))
            latencies.append(0.0)
            # Before the next is asked for, so that its time does not begin while it waits for a stream. Requests that are
            # due later must not keep those that are done from being counted.
            while under_way and (not free or (arrivals_s is not None and under_way[0][0].done())):
                end_oldest()
        while under_way:
            end_oldest()
        return latencies


class Lane:
    """One stream with its memory on both sides."""

    def __init__(self, run: Any, graphs: bool) -> None:
        self.run, self.graphs = run, graphs
        self.stream = torch.cuda.Stream()
        self.started = torch.cuda.Event(enable_timing=True)
        # Blocking: the thread that waits sleeps.
        self.ended = torch.cuda.Event(enable_timing=True, blocking=True)
        self.recorded: dict[tuple[Any, ...], Recorded] = {}
        self.results: dict[tuple[Any, ...], Tensors] = {}
        self.current: Tensors = []

    def begin(self, feeds: Tensors) -> None:
        """Copy in, run, copy out, without waiting for any of it."""
        key = tuple(tuple(one.shape) for one in feeds)
        with torch.cuda.stream(self.stream):
            self.started.record(self.stream)
            found = self._replayed(key, feeds) if self.graphs else self._launched(feeds)
            if key not in self.results:
                self.results[key] = [torch.empty(o.shape, dtype=o.dtype, pin_memory=True) for o in found]
            self.current = self.results[key]
            for host, made in zip(self.current, found, strict=True):
                host.copy_(made, non_blocking=True)
            self.ended.record(self.stream)

    def done(self) -> bool:
        return bool(self.ended.query())

    def took_ms(self) -> float:
        """From the beginning of the last call to its end, by the GPU's clock. It has ended."""
        return float(self.started.elapsed_time(self.ended))

    def finish(self) -> Tensors:
        """Wait for the end; the results are overwritten by the next call on this stream."""
        self.ended.synchronize()
        return self.current

    def _launched(self, feeds: Tensors) -> Tensors:
        found: Tensors = self.run([one.to("cuda", non_blocking=True) for one in feeds])
        return found

    def _replayed(self, key: tuple[Any, ...], feeds: Tensors) -> Tensors:
        if key not in self.recorded:
            self.recorded[key] = self._record(feeds)
        held = self.recorded[key]
        for inside, given in zip(held.inputs, feeds, strict=True):
            inside.copy_(given, non_blocking=True)
        held.graph.replay()
        return held.outputs

    def _record(self, feeds: Tensors) -> Recorded:
        inputs = [one.to("cuda") for one in feeds]
        for _ in range(2):  # what is set up in the first call can't be recorded
            self.run(list(inputs))
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = self.run(list(inputs))
        return Recorded(graph, inputs, outputs)
