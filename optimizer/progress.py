"""Progress with time left, on standard error: standard output stays clean for `--json`.

One overall bar. A stage says which share of the whole is done when it starts; time left follows from elapsed time and
share, smoothed, and is not guessed in the first moments. Where standard error is no terminal, the bar stays silent;
`lines` prints one plain line per stage and note instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from perwatt.report_units import duration, plain

if TYPE_CHECKING:
    from rich.console import Console

Mode = Literal["bar", "lines", "silent"]
NAME_WIDTH = 36
# Redrawing costs CPU time on the machine that is being measured: twice a second is enough for a person.
REDRAWS_PER_S = 2
SMOOTHING_S = 4.0
FIRST_GUESS_S = 2.0
FIRST_GUESS_SHARE = 0.1
# A stage that doesn't say where it ends moves the bar by at most this share.
OPEN_STAGE = 0.1


class TimeLeft:
    """Estimates the seconds left from the share done, smoothed over a few seconds. `clock` is for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start = clock()
        self._total: float | None = None
        self._seen = self.start

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self, share: float) -> float | None:
        """Seconds left with `share` (0..1) of the work done; None while it is too early to tell."""
        elapsed = self.elapsed()
        if elapsed < FIRST_GUESS_S or share < FIRST_GUESS_SHARE:
            return None
        total = elapsed / share
        now = self.clock()
        weight = 1.0 if self._total is None else 1 - math.exp(-(now - self._seen) / SMOOTHING_S)
        self._total = total if self._total is None else self._total + weight * (total - self._total)
        self._seen = now
        return max(0.0, self._total - elapsed)


class Progress:
    """Progress of one run, as a context manager: `stage`, `update` within the stage, `note`.

    `mode`: `bar` (silent where standard error is no terminal), `lines` (plain lines, for --verbose) or `silent`."""

    def __init__(self, mode: Mode, console: Console | None = None) -> None:
        self.mode = mode
        self.share = 0.0
        self._console = console
        self._span = (0.0, 0.0)
        self._name = ""
        self._time = TimeLeft()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.mode == "silent":
            return self
        from rich.console import Console

        self._console = self._console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._time = TimeLeft()
        if self.mode == "bar" and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _bar(self._console, self._time)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stage(self, name: str, weight_done: float, until: float | None = None) -> None:
        """A new stage begins, with the share `weight_done` (0..1) of the whole run behind it; it ends at `until`.

        Who reports shares of the whole run instead of the stage's calls `stage_at`."""
        self._name = plain(name)
        begin = min(1.0, max(0.0, weight_done))
        self._span = (begin, min(1.0, begin + OPEN_STAGE) if until is None else until)
        self._advance(begin)
        self._say(self._name)

    def stage_at(self, share: float) -> None:
        """The stage goes on; `share` (0..1) of the whole run is done."""
        self._advance(share)

    def update(self, share_of_stage: float) -> None:
        """So much (0..1) of the stage is done."""
        begin, end = self._span
        self._advance(begin + min(1.0, max(0.0, share_of_stage)) * (end - begin))

    def note(self, text: str) -> None:
        """A word on what is going on within the stage: shown beside its name, or as a line of its own."""
        said = plain(text)
        if self._bar is not None:
            self._bar.update(self._task, description=_fitted(f"{self._name}: {said}"))
        self._print(f"    {said}")

    def tell(self, lines: Sequence[str]) -> None:
        """Lines to keep: above the bar; on standard error even where it is no terminal."""
        if self._console is not None:
            for line in lines:
                self._console.print(plain(line), markup=False, highlight=False, soft_wrap=True)

    def _advance(self, share: float) -> None:
        # Stages may overlap a little; a bar that goes backwards helps nobody.
        self.share = max(self.share, min(1.0, share))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.share)

    def _say(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=_fitted(name))
        self._print(f"{self._time.elapsed():6.1f} s  {100 * self.share:3.0f} %  {name}")

    def _print(self, line: str) -> None:
        if self.mode == "lines" and self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fitted(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _bar(console: Console, times: TimeLeft) -> Any:
    from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Times(ProgressColumn):
        """Elapsed, and about how long it still takes."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = times.left(float(task.completed))
            return Text(time_words(times.elapsed(), left), style="dim")

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        Times(),
        console=console,
        refresh_per_second=REDRAWS_PER_S,
        transient=True,
        # What goes to standard output is the answer: it must not be drawn into the bar.
        redirect_stdout=False,
    )


def time_words(elapsed: float, left: float | None) -> str:
    """ "12 s, about 30 s left", or only the elapsed time while it is too early to tell."""
    spent = _whole(math.floor(elapsed))
    return spent if left is None else f"{spent}, about {_whole(math.ceil(left))} left"


def _whole(seconds: int) -> str:
    return f"{seconds} s" if seconds < 100 else duration(seconds)
