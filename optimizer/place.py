"""Where workers run: on this machine, or on another one over ssh (`--on`). The one place that decides.

    with place.open_place(recipe_or_flag) as here:
        worker = here.worker("candidate")            # isolation.Worker, or one that is told from it by nothing
        meter, notes = here.meter("auto", "cpu")     # instead of bench.meters.open_meter
        facts = here.machine()                       # instead of machine.facts(), fingerprint(), os.cpu_count()

Reading, passes, verification and quantization stay on this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Literal

from perwatt.bench.meters import open_meter
from perwatt.bench.modelled import Modelled, Processor, Size
from perwatt.bench.unavailable import Unavailable
from perwatt.contract import Meter
from perwatt.errors import PerwattError
from perwatt.isolation import Worker
from perwatt.measurement import Reading, Window
from perwatt.remote import Connections, RemoteWorker
from perwatt.remote_address import parse
from perwatt.worker_meter import this_machine

METER_TIMEOUT_S = 120.0
LINK_TRIES = 5


class Place:
    """This machine."""

    words: str | None = None
    """`user@host`, as reports name another machine; None for this one."""

    def worker(
        self, name: str, *, memory_limit_bytes: int | None = None, on_progress: Callable[[str], None] | None = None
    ) -> Worker:
        """A worker here; it starts with its first call."""
        return Worker(name, memory_limit_bytes=memory_limit_bytes, on_progress=on_progress)

    def meter(self, choice: str = "auto", device: Literal["cpu", "gpu"] = "cpu") -> tuple[Meter, list[str]]:
        """The meter for `choice`, and notes for a person; raises as `bench.meters.open_meter` does."""
        return open_meter(choice, device)

    def machine(self) -> dict[str, Any]:
        """What `worker_meter.this_machine` says of it."""
        return this_machine()

    def close(self) -> None:
        """Let go of the machine. Workers and meters are closed by who asked for them, before."""

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class There(Place):
    """Another machine. Its first worker answers for the machine, and keeps the run's files there until `close`."""

    def __init__(self, text: str) -> None:
        """Connect. Raises InputError for what is no address, TargetError where perwatt can't be used there."""
        self.connections = Connections(parse(text))
        self.words = self.connections.address.words
        self._keeper = RemoteWorker("the machine", self.connections)
        self._keeper.start()

    def worker(
        self, name: str, *, memory_limit_bytes: int | None = None, on_progress: Callable[[str], None] | None = None
    ) -> Worker:
        return RemoteWorker(name, self.connections, memory_limit_bytes=memory_limit_bytes, on_progress=on_progress)

    def meter(self, choice: str = "auto", device: Literal["cpu", "gpu"] = "cpu") -> tuple[Meter, list[str]]:
        worker = self.worker("the meter")
        try:
            asked = {"choice": choice, "device": device}
            opened = worker.call("meter_open", timeout_s=METER_TIMEOUT_S, **asked)
            if opened["model"] is None and opened["method"] != "unavailable":
                return RemoteMeter(worker, asked, opened, _link_s(worker)), opened["notes"]
        except BaseException:
            worker.close()
            raise
        worker.close()
        # Nothing to read: what there is to know of that machine is known now, and windows need not ask it.
        if opened["model"] is None:
            return Unavailable(opened["how"]), opened["notes"]
        found = opened["model"]
        processor = Processor(**found["processor"]) if found["processor"] else None
        return Modelled(processor, Size(**found["size"])), opened["notes"]

    def machine(self) -> dict[str, Any]:
        return self._keeper.call("machine", timeout_s=METER_TIMEOUT_S)

    def close(self) -> None:
        self._keeper.close()


class RemoteMeter(Meter):
    """Counters or an external meter on another machine, in a worker of its own there.

    A window's energy is read there, but asked for from here: the link's way there and back is in the window twice, once
    before the load and once after it, and the machine is idle meanwhile. `describe` tells how long one way there and back
    takes (`link_ms`). A meter whose worker was lost says so for that window, and is opened anew for the next one."""

    def __init__(self, worker: Worker, asked: dict[str, str], opened: dict[str, Any], link_s: float) -> None:
        self.worker = worker
        self.link_s = link_s
        self._asked = asked
        self._failure: str | None = None
        self._closed = False
        self._take(opened)

    def start(self) -> None:
        self._failure = "the meter was closed" if self._closed else None
        if self._closed:
            return
        try:
            if not self.worker.running:
                self._take(self.worker.call("meter_open", timeout_s=METER_TIMEOUT_S, **self._asked))
            self.worker.call("meter_start", timeout_s=METER_TIMEOUT_S)
        except PerwattError as error:
            self._failure = str(error)

    def stop(self, window: Window) -> Reading:
        if self._failure is not None or self._closed:
            return Reading(None, self._failure or "the meter was closed")
        # A meter has no use for latencies, and there may be many.
        told = asdict(replace(window, latencies_ms=[]))
        try:
            answer = self.worker.call("meter_stop", timeout_s=METER_TIMEOUT_S, window=told)
        except PerwattError as error:
            return Reading(None, str(error))
        self._take(answer)
        return Reading(**answer["reading"])

    def describe(self) -> dict[str, Any]:
        described = self.worker.call("meter_describe", timeout_s=METER_TIMEOUT_S)
        return {**described, "link_ms": round(1e3 * self.link_s, 3)}

    def close(self) -> None:
        self._closed = True
        self.worker.close()

    def _take(self, told: dict[str, Any]) -> None:
        self.method, self.boundary, self.refresh_s = told["method"], told["boundary"], told["refresh_s"]


def _link_s(worker: Worker) -> float:
    """Seconds for a question and its answer when there is nothing to do."""
    taken = []
    for _ in range(LINK_TRIES):
        start = time.perf_counter()
        worker.call("memory")
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def open_place(on: str | None = None) -> Place:
    """The machine that `on` names (`ssh://user@host`), this one where it is None.

    Raises InputError for what is no address, TargetError where perwatt can't be used there."""
    return There(on) if on else Place()
