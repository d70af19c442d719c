"""Load right beside TensorRT: one call after the other, as many as there are slots, or requests that come by themselves.

Inputs lie in pinned memory before the clock starts, as those of a server do that receives into it; copying them to the
GPU, and outputs back, is part of every inference. A call's latency is the time until it was put into its stream plus the
GPU's own time from its first copy to its last, told by events: nothing of ours has to be awake when it ends.
One call after the other is waited for spinning (a sleep costs tens of microseconds of each call); with several under
way the generator sleeps, since a spinning core would cost the joules that are to be saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from perwatt.contract import Clock, cpu_seconds
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, inferences
from perwatt.targets._tensorrt_cuda import Device
from perwatt.targets._tensorrt_slot import Slot, Staged


class Load:
    """Drives the slots of one program."""

    def __init__(self, slots: Sequence[Slot], device: Device, signature: Signature) -> None:
        self.slots, self.device, self.signature = slots, device, signature
        self._samples: list[Batch] = []
        self._staged: list[Staged] = []

    def staged(self, samples: Sequence[Batch]) -> list[Staged]:
        """`samples` in pinned memory; the same memory where they are the same as last time."""
        if len(samples) != len(self._samples) or any(a is not b for a, b in zip(samples, self._samples, strict=True)):
            self._staged = []
            self._staged = [Staged(self.device, self.slots[0].inputs, batch) for batch in samples]
            self._samples = list(samples)
        return self._staged

    def one_by_one(self, samples: Sequence[Batch], seconds: float) -> Window:
        """One call after the other, for at least `seconds`."""
        feeds, counts = self.staged(samples), self._counts(samples)
        latencies: list[float] = []
        done, slot = 0, self.slots[0]
        cpu, start = cpu_seconds(), time.perf_counter()
        now = start
        while now - start < seconds or not latencies:
            turn = len(latencies) % len(feeds)
            slot.begin(feeds[turn])
            slot.stream.synchronize()
            then, now = now, time.perf_counter()
            latencies.append((now - then) * 1e3)
            done += counts[turn]
        return Window(done, now - start, cpu_seconds() - cpu, latencies)

    def saturated(self, samples: Sequence[Batch], seconds: float) -> Window:
        """A call under way in every slot, for at least `seconds`."""
        with self._calls(samples) as calls:
            cpu, start = cpu_seconds(), time.perf_counter()
            while time.perf_counter() - start < seconds or not calls.latencies:
                calls.begin()
            calls.finish()
            wall = time.perf_counter() - start
            return Window(calls.inferences, wall, cpu_seconds() - cpu, calls.latencies)

    def arriving(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock) -> Window:
        """Request i is due `arrivals_s[i]` seconds after the start, and waits its turn where all slots are busy; latency
        counts from when it was due. Latencies come in the order of arrival."""
        with self._calls(samples) as calls:
            cpu, start = cpu_seconds(), clock.now()
            for due in arrivals_s:
                clock.wait_until(start + due)
                calls.begin(clock, start + due)
            calls.finish()
            wall = clock.now() - start
            return Window(calls.inferences, wall, cpu_seconds() - cpu, calls.latencies)

    @contextmanager
    def _calls(self, samples: Sequence[Batch]) -> Iterator[_Calls]:
        try:
            yield _Calls(self.slots, self.staged(samples), self._counts(samples))
        except BaseException:
            for slot in self.slots:
                slot.settle()
            raise

    def _counts(self, samples: Sequence[Batch]) -> list[int]:
        return [inferences(self.signature, batch) for batch in samples]


class _Calls:
    """Calls of one window, slot after slot: the one that has been under way longest is waited for."""

    def __init__(self, slots: Sequence[Slot], feeds: list[Staged], counts: list[int]) -> None:
        self.slots, self.feeds, self.counts = slots, feeds, counts
        self.latencies: list[float] = []
        self.inferences = 0

    def begin(self, clock: Clock | None = None, due: float = 0.0) -> None:
        """Start the next call as soon as its slot is free; what it waited since `due` is part of its latency."""
        turn = len(self.latencies)
        if turn >= len(self.slots):
            self._collect(turn - len(self.slots))
        slot, feed = self.slots[turn % len(self.slots)], turn % len(self.feeds)
        # Before the call is in its stream: should that fail, it was never under way.
        waited = (clock.now() - due) * 1e3 if clock else 0.0
        slot.begin(self.feeds[feed])
        self.latencies.append(waited)
        self.inferences += self.counts[feed]

    def finish(self) -> None:
        """Wait for all that is under way."""
        total = len(self.latencies)
        for turn in range(max(0, total - len(self.slots)), total):
            self._collect(turn)

    def _collect(self, turn: int) -> None:
        self.latencies[turn] += self.slots[turn % len(self.slots)].wait()
