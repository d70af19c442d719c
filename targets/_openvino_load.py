"""Load right beside OpenVINO: one call after the other, as many as it takes, or requests that come by themselves.

What the generator does must not count as the model's work, and on a small model it easily does: NumPy inputs dispatched
by every call and a completion callback in Python, which has to win the interpreter from the loop that starts requests,
cost a ResNet-20 a quarter of its throughput on two streams and raised its CPU seconds by a fifth. So inputs become
tensors before the clock starts, nothing of ours runs in the runtime's threads, and the time from start to completion is
the one that OpenVINO itself keeps of each request, as its `benchmark_app` does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from perwatt.contract import Clock, cpu_seconds
from perwatt.errors import BackendError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, inferences


class Load:
    """Drives one compiled model, with as many `requests` under way as are asked for, else as it likes. Inputs go by
    position: OpenVINO may give a port several names or none."""

    def __init__(self, compiled: Any, request: Any, signature: Signature, requests: int | None = None) -> None:
        self.compiled = compiled
        self.request = request
        self.signature = signature
        self.requests = requests
        self._queue: Any = None

    def one_by_one(self, samples: Sequence[Batch], seconds: float) -> Window:
        """One call after the other, for at least `seconds`."""
        feeds, counts = self._feeds(samples), self._counts(samples)
        latencies: list[float] = []
        done, request = 0, self.request
        with in_words():
            cpu, start = cpu_seconds(), time.perf_counter()
            while time.perf_counter() - start < seconds or not latencies:
                turn = len(latencies) % len(feeds)
                for position, value in enumerate(feeds[turn]):
                    request.set_input_tensor(position, value)
                request.infer(share_outputs=True)
                latencies.append(request.latency)
                done += counts[turn]
            wall = time.perf_counter() - start
            return Window(done, wall, cpu_seconds() - cpu, latencies)

    def saturated(self, samples: Sequence[Batch], seconds: float) -> Window:
        """As many calls under way as there are requests, for at least `seconds`."""
        with self._requests(samples) as requests:
            cpu, start = cpu_seconds(), time.perf_counter()
            # As many for each request: a last one that runs alone would be the window's, not the program's.
            while time.perf_counter() - start < seconds or not requests.latencies or not requests.even:
                requests.begin()
            requests.finish()
            wall = time.perf_counter() - start
            return Window(requests.inferences, wall, cpu_seconds() - cpu, requests.latencies)

    def arriving(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock) -> Window:
        """Request i is due `arrivals_s[i]` seconds after the start, and waits its turn where all are under way; latency
        counts from when it was due. Latencies come in the order of arrival."""
        with self._requests(samples) as requests:
            cpu, start = cpu_seconds(), clock.now()
            for due in arrivals_s:
                clock.wait_until(start + due)
                requests.begin(clock, start + due)
            requests.finish()
            wall = clock.now() - start
            return Window(requests.inferences, wall, cpu_seconds() - cpu, requests.latencies)

    def _feeds(self, samples: Sequence[Batch]) -> list[list[Any]]:
        types = [port.get_element_type() for port in self.compiled.inputs]
        names = [spec.name for spec in self.signature.inputs]
        return [[tensor(batch[name], kind) for name, kind in zip(names, types, strict=True)] for batch in samples]

    def _counts(self, samples: Sequence[Batch]) -> list[int]:
        return [inferences(self.signature, batch) for batch in samples]

    @contextmanager
    def _requests(self, samples: Sequence[Batch]) -> Iterator[_Requests]:
        import openvino

        # Kept from window to window: the first inference of a request is slower than all others.
        if self._queue is None:
            self._queue = openvino.AsyncInferQueue(self.compiled, self.requests or 0)
        try:
            with in_words():
                yield _Requests(self._queue, self._feeds(samples), self._counts(samples))
        except BaseException:
            # A request that failed, or was left under way, says so to whoever asks for it next.
            self._queue = None
            raise


class _Requests:
    """Requests of one window: which are under way, and the latencies of those done."""

    def __init__(self, queue: Any, feeds: list[list[Any]], counts: list[int]) -> None:
        self.queue, self.feeds, self.counts = queue, feeds, counts
        self.slots = [queue[position] for position in range(len(queue))]
        self.turns: dict[int, int] = {}
        self.latencies: list[float] = []
        self.inferences = 0

    @property
    def even(self) -> bool:
        """Whether every request had its turn equally often."""
        return len(self.latencies) % len(self.slots) == 0

    def begin(self, clock: Clock | None = None, due: float = 0.0) -> None:
        """Start the next request as soon as one is idle; what it waited since `due` is part of its latency."""
        slot = self.queue.get_idle_request_id()
        self._collect(slot)
        turn = len(self.latencies)
        for position, value in enumerate(self.feeds[turn % len(self.feeds)]):
            self.slots[slot].set_input_tensor(position, value)
        self.turns[slot] = turn
        self.inferences += self.counts[turn % len(self.counts)]
        self.latencies.append((clock.now() - due) * 1e3 if clock else 0.0)
        self.queue.start_async()

    def finish(self) -> None:
        """Wait for all that is under way."""
        self.queue.wait_all()
        for slot in list(self.turns):
            self._collect(slot)

    def _collect(self, slot: int) -> None:
        if slot in self.turns:
            self.latencies[self.turns.pop(slot)] += self.slots[slot].latency


def tensor(array: Any, kind: Any) -> Any:
    """`array` as an OpenVINO tensor of that type, in the array's own memory where it is contiguous and writable."""
    import openvino

    if kind == openvino.Type.bf16:
        # The bindings know no NumPy type for it: the bits, and what they are.
        bits = np.require(array, requirements=["C", "W"]).view(np.uint16)
        return openvino.Tensor(bits, list(array.shape), kind)
    return openvino.Tensor(np.require(array, kind.to_dtype(), ["C", "W"]), shared_memory=True)


@contextmanager
def in_words() -> Iterator[None]:
    """What OpenVINO raises, as BackendError with the telling lines of its message."""
    try:
        yield
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed on this input: {telling_lines(error)}") from error


def telling_lines(error: Exception) -> str:
    """The telling lines of an OpenVINO message: without the trail of source files and conditions before it."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    trail = r"Exception from src|While validating|FrontEnd API failed|Check '.*' failed at \S+$"
    telling = [line for line in lines if not re.match(trail, line)]
    return re.sub(r"\s+", " ", " ".join(telling or lines))[:400]
