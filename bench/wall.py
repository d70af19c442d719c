"""An external meter: a wall socket, a power analyser, a bench supply, whatever writes one line a sample.

    wall:COMMAND…            a command that writes lines; it is started, and ended on close
    wall:tcp://HOST:PORT     a socket that lines come from

Lines are JSON objects with watts, cumulative joules, or both (docs/wall-meter.md). Joules are preferred; watts are
integrated by trapezoids. Both are interpolated at the window's edges, so the sample after the window is waited for. A
meter with a clock of its own is brought to ours by the line that was on its way the shortest; its delay can't be told
from the clocks' difference, and shifts the window by as much.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

from perwatt.bench.sampling import changes, integrate, value_at
from perwatt.bench.wall_lines import GRACE_S, LINE_BYTES, Command, Header, Sample, Socket, Source, parse_line
from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Reading, Window

PATIENCE_S = 10.0
"""How long a meter may take until its first useful samples."""

SILENT_INTERVALS = 5
LEAST_SILENCE_S = 0.5
"""A shorter pause is how a busy machine schedules, whatever the interval."""

KEPT_OFFSETS = 500
KEPT_SAMPLES = 1000
KEPT_S = 1.0


class Wall(Meter):
    """The meter behind `source`: a command, or `tcp://HOST:PORT`. A leading `wall:` is passed over."""

    method: Method = "metered"
    boundary: Boundary | None = "wall"

    def __init__(self, source: str, patience_s: float = PATIENCE_S) -> None:
        self.source = source.removeprefix("wall:").strip()
        self._patience_s = patience_s
        self._line: Source | None = None
        self._reasons: list[str] | None = None
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._header = Header()
        self._samples: list[tuple[float, Sample]] = []
        self._offsets: deque[float] = deque(maxlen=KEPT_OFFSETS)
        self._ended = False
        self._malformed, self._example = 0, ""
        self._reader_cpu_s = self._cpu_s = 0.0
        self._began: float | None = None

    def missing(self) -> list[str]:
        if self._reasons is None:
            reason = self._open() or self._await_use()
            self._reasons = [reason] if reason else []
            self.refresh_s = self._interval_s()
        return list(self._reasons)

    def start(self) -> None:
        if self.missing():
            return
        recent = time.monotonic() - KEPT_S
        with self._news:
            kept = max(2, sum(received > recent for received, _ in self._samples))
            del self._samples[:-kept]
        self._cpu_s = self._cost_s()
        self._began = time.monotonic()

    def stop(self, window: Window) -> Reading:
        end, began = time.monotonic(), self._began
        try:
            return self._stopped(began, end)
        finally:
            # Until here nothing is thrown away: a quick meter's window holds more samples than are kept otherwise.
            self._began = None

    def _stopped(self, began: float | None, end: float) -> Reading:
        if reasons := self.missing():
            return Reading(None, "; ".join(reasons))
        if began is None:
            return Reading(None, "the meter was not started")
        cost = self._cost_s() - self._cpu_s
        limit_s = self._silence_s()
        with self._news:
            self._news.wait_for(lambda: self._ended or self._latest() >= end, timeout=limit_s)
        reading = self._read(began, end, limit_s)
        self.refresh_s = self._interval_s()
        return Reading(reading.energy_j, reading.reason, reading.refreshes, max(0.0, cost))

    def describe(self) -> dict[str, Any]:
        reasons = self.missing()
        energies = any(sample.energy_j is not None for _, sample in self._samples)
        way = "cumulative joules" if energies else "watts by trapezoids"
        return {
            "method": self.method, "boundary": self.boundary,
            "how": "; ".join(reasons) or f"external meter {self._header.meter or self.source}, {way}",
            "source": self.source,
            "uncertainty": "the meter's own; edges of a window are interpolated between two samples",
            "refresh_s": self.refresh_s,
            **({"malformed_lines": self._malformed, "first_malformed": self._example} if self._malformed else {}),
        }  # fmt: skip

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._thread is not None:
            # A process that left its group may hold the pipe open: the thread is left to it.
            self._thread.join(GRACE_S)
            self._thread = None

    def _open(self) -> str | None:
        """Start the command or connect; why that failed."""
        try:
            if self.source.startswith("tcp://"):
                self._line = Socket(self.source.removeprefix("tcp://"), self._patience_s)
            else:
                self._line = Command(self.source)
        except (OSError, ValueError, IndexError) as error:
            return f"the meter {self.source!r} can't be opened: {error}"
        self._thread = threading.Thread(target=self._listen, args=(self._line,), daemon=True, name="perwatt-wall")
        self._thread.start()
        return None

    def _await_use(self) -> str | None:
        """Wait until there are samples that are good for something; why there are none."""
        with self._news:
            self._news.wait_for(lambda: self._ended or not self._useless(), timeout=self._patience_s)
            reason, ended = self._useless(), self._ended
        if not reason:
            return None
        if ended and self._line is not None:
            reason = self._line.last_words()
        return reason + self._garbled()

    def _useless(self) -> str | None:
        """What is wrong with the samples so far: silence, or figures that stand still at nothing."""
        energies = {sample.energy_j for _, sample in self._samples if sample.energy_j is not None}
        if any(sample.power_w for _, sample in self._samples) or len(energies) > 1:
            return None
        if not self._samples:
            return f"the meter {self.source!r} gave no sample in {self._patience_s:g} s"
        still = "its energy_j does not advance" if energies else "its power_w is 0"
        return f"the meter {self.source!r} measures nothing: {still}"

    def _garbled(self) -> str:
        return f" ({self._malformed} lines not understood, the first: {self._example})" if self._malformed else ""

    def _listen(self, line: Source) -> None:
        """Take in lines until there are no more."""
        first = True
        try:
            with line.lines as lines:
                while text := lines.readline(LINE_BYTES):
                    if text.strip():
                        self._take(text, time.monotonic(), first)
                        first = False
        except (OSError, ValueError):
            pass
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _take(self, text: bytes, received: float, first: bool) -> None:
        try:
            parsed = parse_line(text)
            if isinstance(parsed, Header) and not first:
                raise ValueError("neither power_w nor energy_j")
            if isinstance(parsed, Sample) and self._runs_back(parsed):
                raise ValueError("time_s runs backwards")
        except ValueError as error:
            self._example = self._example or f"{error}: {text[:80].decode(errors='replace').strip()}"
            self._malformed += 1
            return
        with self._news:
            if isinstance(parsed, Header):
                self._header, self.boundary = parsed, parsed.boundary
            else:
                self._samples.append((received, parsed))
                if parsed.time_s is not None:
                    self._offsets.append(received - parsed.time_s)
                if self._began is None and len(self._samples) > KEPT_SAMPLES:
                    del self._samples[: KEPT_SAMPLES // 2]
            self._reader_cpu_s = time.thread_time()
            self._news.notify_all()

    def _runs_back(self, sample: Sample) -> bool:
        before = self._samples[-1][1].time_s if self._samples else None
        return sample.time_s is not None and before is not None and sample.time_s < before

    def _moments(self) -> list[tuple[float, Sample]]:
        """The samples at their moments on our clock."""
        offset = min(self._offsets, default=0.0)
        return [
            (received if sample.time_s is None else sample.time_s + offset, sample)
            for received, sample in self._samples
        ]

    def _latest(self) -> float:
        moments = self._moments()
        return moments[-1][0] if moments else float("-inf")

    def _interval_s(self) -> float:
        """Seconds between samples: what the header says, else what was seen, else a second."""
        if self._header.interval_s is not None:
            return self._header.interval_s
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(self._moments())]
        return median(gaps) if gaps else 1.0

    def _silence_s(self) -> float:
        return max(LEAST_SILENCE_S, SILENT_INTERVALS * self._interval_s())

    def _cost_s(self) -> float:
        return self._reader_cpu_s + (self._line.cpu_seconds() if self._line is not None else 0.0)

    def _read(self, began: float, end: float, limit_s: float) -> Reading:
        with self._news:
            moments = self._moments()
        if reason := self._gap(moments, began, end, limit_s):
            return Reading(None, reason)
        joules = [(moment, sample.energy_j) for moment, sample in moments if sample.energy_j is not None]
        first, last = value_at(joules, began), value_at(joules, end)
        if first is not None and last is not None:
            inside = [joule for moment, joule in joules if began < moment < end]
            if any(later < earlier for earlier, later in pairwise([first, *inside, last])):
                return Reading(None, "the meter's energy_j ran backwards: was it reset?")
            energy_j, moved = last - first, changes(joules, began, end)
        else:
            watts = [(moment, sample.power_w) for moment, sample in moments if sample.power_w is not None]
            area = integrate(watts, began, end)
            if area is None:
                return Reading(None, "the meter changed between power_w and energy_j within the window")
            energy_j, moved = area, sum(began < moment <= end for moment, _ in watts)
        if energy_j <= 0:
            return Reading(None, f"the meter measured nothing in {end - began:.3g} s")
        return Reading(energy_j, None, moved)

    def _gap(self, moments: list[tuple[float, Sample]], began: float, end: float, limit_s: float) -> str | None:
        """Why the samples don't cover the window."""
        if not moments or moments[-1][0] < end:
            if self._ended and self._line is not None:
                return self._line.last_words() + self._garbled()
            return f"the meter was silent for more than {limit_s:.3g} s" + self._garbled()
        if moments[0][0] > began:
            return "the meter's first sample came after the window began"
        for (earlier, _), (later, _) in pairwise(moments):
            if later > began and earlier < end and later - earlier > limit_s:
                return f"the meter was silent for {later - earlier:.3g} s in the window" + self._garbled()
        return None
