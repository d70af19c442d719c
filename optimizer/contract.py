"""The contracts between the rooms: what a pass, a target, a program and a meter promise, and what they are given.

Nothing here does work. Passes branch on `Capabilities`, never on a target's name; a pass sees the world only through
`Context`.
"""

from __future__ import annotations

import ctypes
import enum
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from perwatt.artifact import Artifact, Step
from perwatt.data import Samples
from perwatt.errors import TargetError
from perwatt.measurement import Boundary, Method, Reading, Window
from perwatt.signature import Array, Batch, Signature, inferences, rows, split

if TYPE_CHECKING:
    from perwatt.recipe import Budget

PR_SET_TIMERSLACK = 29
"""Of Linux's prctl(2)."""

Scenario = Literal["single-stream", "offline", "server"]


@dataclass(frozen=True)
class QuantizationStyle:
    """One way in which a backend likes to see quantization in the graph. `unsigned_activations`: those that are never
    negative may have an unsigned type, which resolves them twice as finely. `operators`: those that may calculate in
    integers beside convolutions and matrix products."""

    name: str
    activation_type: str
    weight_type: str
    activation_symmetric: bool
    weight_per_channel: bool
    unsigned_activations: bool = True
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What the hardware and its backend reward, as plain data.

    `floating_precisions`: what the backend can run floating point in, its own default first.
    `sparse_patterns`: which zeros in weights make products of `sparse_types` faster: `unstructured` for zeros anywhere, `N:M`
    (`2:4`) for at most N others in every M neighbours.
    `quantization_styles`: ordered, best liked first. `channel_multiples`: per type, the multiple of channels that pays.
    `operators`: those of ONNX's young operators that the backend runs as one, no slower than their pieces (`Attention`,
    `Swish`); passes put no others of that kind in.
    """

    isa: tuple[str, ...] = ()
    floating_precisions: tuple[str, ...] = ("f32",)
    half_types: tuple[str, ...] = ()
    sparse_types: tuple[str, ...] = ()
    sparse_patterns: tuple[str, ...] = ()
    channel_multiples: dict[str, int] = field(default_factory=dict)
    quantization_styles: tuple[QuantizationStyle, ...] = ()
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """How far a pass may move an output: per output, max|Δ| ≤ atol + rtol · RMS of the output before."""

    atol: float = 1e-5
    rtol: float = 1e-4


class Stage(enum.IntEnum):
    """Where in a pipeline a pass belongs."""

    CLEAN = 1
    FUSE = 2
    PRUNE = 3
    PRECISION = 4


@dataclass(frozen=True)
class Loss:
    """What a graph loses on the samples to choose by, in the budget's metric, and whether the budget allows that."""

    drop: float
    allowed: bool


@dataclass(frozen=True)
class NodeCost:
    """What one operation of a compiled program costs: seconds an inference, and the names of the graph's nodes that it came
    from, or that its own name begins with (a conversion put in is called after what it stands beside)."""

    nodes: tuple[str, ...]
    kind: str
    seconds: float


class Execute(Protocol):
    """Runs the numeric reference."""

    def __call__(
        self,
        artifact: Artifact,
        batches: Samples,
        taps: Sequence[str] = (),
        optimized: bool = False,
        quick: bool = False,
    ) -> Iterator[Batch]:
        """One {name: array} a batch, as they come: the outputs, and the values named by `taps`. `optimized` lets the
        runtime fuse, which is faster and rounds otherwise; `quick` takes whatever runs fastest here, where 0.4 % is near
        enough. What is not asked for any more is not run."""


@dataclass(frozen=True)
class Context:
    """All that a pass gets besides its settings.

    `samples(role)` gives re-iterable batches for `calibrate`, `learn` or `select`; never `confirm`.
    `execute` runs the numeric reference in the worker. `measure(artifacts)` measures lowered artifacts against each other
    and returns what an inference costs with each (CPU seconds, or seconds on a GPU); `profile(artifact)` returns what each
    operation costs there, nothing where the backend doesn't tell; `judge(artifact)` lowers it and tells what it loses, None
    without anything to judge by. `original` is the model as it was read, which lossy passes may learn from.
    `deadline` is in `time.monotonic()` seconds. `made_up`: samples are synthetic, and say nothing of what matters in real data.
    """

    samples: Callable[[str], Samples]
    capabilities: Capabilities
    budget: Budget
    seed: int
    deadline: float | None
    progress: Callable[[str], None]
    execute: Execute
    measure: Callable[[Sequence[Artifact]], list[float]]
    profile: Callable[[Artifact], list[NodeCost]]
    judge: Callable[[Artifact], Loss | None]
    original: Artifact | None = None
    made_up: bool = False


class Pass(ABC):
    """One change to a model, with settings as dataclass fields. Subclasses are frozen dataclasses, one a file.

    `tolerance` is how far it may move outputs, or None when accuracy decides. A pass with `isolated` set runs in the
    worker, because what it leans on may crash or hang. `in_default` puts it into the default pipeline, within its
    stage after those that `after` names; passes of the stage PRECISION are alternatives there, and the measured best
    wins; one with several `variants`, each some settings, is an alternative in each of them. `also_after` puts it there
    once more, at the end of that stage, to tidy up what the stage left. A pass sees the target's capabilities only where
    it says `depends_on_target`: what the others make serves every target. One that `measures` asks the backend itself, so
    that what it makes is this backend's alone. One that `mends` gives back what lossy passes before it took: what it
    makes is as fast and more accurate, and takes the place of what it was given.

    `imports`: packages that take seconds to import and that it may run: the worker has them ready.
    `in_search`: a search puts it in, where the recipe leaves the passes to it. `searched`: settings → values that a search may
    try, in its own words those that `(search: …)` names; of a removal the first says how much, the more to the right the more is
    taken away, and others how.
    """

    stage: ClassVar[Stage]
    tolerance: ClassVar[Tolerance | None] = Tolerance()
    isolated: ClassVar[bool] = False
    in_default: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ()
    also_after: ClassVar[Stage | None] = None
    depends_on_target: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    mends: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    in_search: ClassVar[bool] = False
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def check_settings(self) -> None:  # noqa: B027
        """Raises PassError for settings that no model could do with; called before anything is read."""

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        """Reasons why this pass can't run on this model; silence means it can."""
        yield from ()

    @abstractmethod
    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        """The new artifact and what was changed, in words. An unchanged model returns the artifact it was given."""

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        """Reasons why the result breaks this pass's own promise; silence means it holds."""
        yield from ()

    @classmethod
    def name(cls) -> str:
        """The name in recipes and on the command line: the file's name in kebab case."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    def settings(self) -> dict[str, Any]:
        """This pass's settings as plain data."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def step(self, changes: Sequence[str]) -> Step:
        """The entry in an artifact's history for this pass."""
        return Step(self.name(), self.settings(), tuple(changes))


@dataclass(frozen=True)
class OperatingPoint:
    """How a program is run. None leaves it to the backend; what it takes is read back and recorded once lowered.

    `batch`: items in a call. `streams`: calls that are worked on side by side. `threads`: of all streams together.
    `floating_precision`: what the backend uses for what the graph leaves in fp32. `requests`: calls under way at once,
    those that wait their turn included. `pinned`: threads are bound to CPUs. `graphs`: calls are recorded once and
    replayed (CUDA graphs). `autotune`: the backend may try kernels while it compiles, for longer than it does by
    default. `power_limit_w` and `clock_mhz` of a GPU are set only where the user allows it."""

    scenario: Scenario = "single-stream"
    batch: int = 1
    threads: int | None = None
    streams: int | None = None
    floating_precision: str | None = None
    requests: int | None = None
    pinned: bool | None = None
    graphs: bool | None = None
    autotune: bool | None = None
    power_limit_w: float | None = None
    clock_mhz: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; switches that are left to the backend are not named."""
        always = ("scenario", "batch", "threads", "streams", "floating_precision")
        return {name: value for name, value in asdict(self).items() if name in always or value is not None}

    def words(self) -> str:
        """`batch 32, 2 streams, 2 threads, bf16`: what is set."""
        counts = [(self.streams, "stream"), (self.threads, "thread"), (self.requests, "request")]
        parts = [f"batch {self.batch}", *(f"{n} {word}{'s' * (n != 1)}" for n, word in counts if n is not None)]
        switches = [(self.pinned, "pinned"), (self.graphs, "CUDA graphs"), (self.autotune, "autotuned")]
        parts += [word for on, word in switches if on]
        parts += [self.floating_precision] if self.floating_precision else []
        parts += [f"{self.power_limit_w:g} W"] if self.power_limit_w is not None else []
        parts += [f"{self.clock_mhz} MHz"] if self.clock_mhz is not None else []
        return ", ".join(parts)


class Program(ABC):
    """A model lowered to a backend. `run` takes any leading batch; `drive` makes load right beside the backend.

    A subclass gives `call` for exactly `batch_size` items (None: any number), and `save`.
    """

    signature: Signature
    point: OperatingPoint
    batch_size: int | None

    @abstractmethod
    def call(self, batch: Batch) -> Batch:
        """One call of the backend, with exactly `batch_size` items where that is set."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write what is deployed into `folder` (which exists); returns the files."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What was really set: execution precision, threads, streams, versions; plain data for the report."""

    def run(self, batch: Batch) -> Batch:
        """{name: array} in, {name: array} out, by the source's names; any number of items on the batch axis."""
        reasons = self.signature.problems(batch)
        if reasons:
            raise ValueError("; ".join(reasons))
        if self.batch_size is None or rows(batch) == self.batch_size:
            return self.call(batch)
        pieces = [(self.call(piece), real) for piece, real in split(batch, self.batch_size)]
        return {name: np.concatenate([out[name][:real] for out, real in pieces]) for name in pieces[0][0]}

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        """Feed `samples` round and round, one call after the other, for at least `seconds`."""
        latencies: list[float] = []
        done = 0
        cpu, start = cpu_seconds(), time.perf_counter()
        now = start
        while now - start < seconds or not latencies:
            batch = samples[len(latencies) % len(samples)]
            self.call(batch)
            then, now = now, time.perf_counter()
            latencies.append((now - then) * 1e3)
            done += inferences(self.signature, batch)
        return Window(done, now - start, cpu_seconds() - cpu, latencies)

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """Serve requests that come by themselves: request i is due `arrivals_s[i]` seconds after the start and waits
        its turn where the backend is busy. Latency counts from when a request was due, not from when it was begun."""
        clock = clock or Clock()
        latencies: list[float] = []
        done = 0
        cpu, start = cpu_seconds(), clock.now()
        for turn, due in enumerate(arrivals_s):
            clock.wait_until(start + due)
            batch = samples[turn % len(samples)]
            self.call(batch)
            latencies.append((clock.now() - start - due) * 1e3)
            done += inferences(self.signature, batch)
        return Window(done, clock.now() - start, cpu_seconds() - cpu, latencies)


class Target(ABC):
    """A place to run. One a file; the file's name is the target's name. `formats` are the endings of model files of the
    backend's own that `open_file` takes; `device` is what does the arithmetic, and so what a meter has to watch.

    A backend with several devices has `variants`, written behind a colon (`onnxruntime:cuda`); the empty one is the
    backend's plain name. `serves` says which variant stands for it under an alias: {"cpu": "", "gpu": "cuda"}.
    `slow_to_lower`: compiling takes tens of seconds, so an alias tries this backend last, and only where there is time.
    `meter`: what counts its joules where nobody names a meter; "none" for devices that no meter here watches.
    `fixed_once_saved`: fields of the operating point that a saved program can't change.
    `preference`: where nothing is measured, an alias stands for the backend with the highest.
    A target is made anew for every question, so `__init__` only remembers the variant."""

    formats: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ("",)
    serves: ClassVar[Mapping[str, str]] = {}
    slow_to_lower: ClassVar[bool] = False
    fixed_once_saved: ClassVar[tuple[str, ...]] = ()
    preference: ClassVar[int] = 0
    device: Literal["cpu", "gpu"] = "cpu"
    meter: str = "auto"

    def __init__(self, variant: str = "") -> None:
        """`variant` is one of `variants`."""
        self.variant = variant

    @property
    def full_name(self) -> str:
        """Name and variant, as a person writes them: `onnxruntime:cuda`."""
        return f"{self.name()}:{self.variant}" if self.variant else self.name()

    @abstractmethod
    def missing(self) -> list[str]:
        """Why this target can't be used here, each with the command that mends it; empty means it can."""

    def missing_to_run(self) -> list[str]:
        """The same for a saved program, which may need less than making one does."""
        return self.missing()

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this machine and backend reward."""

    def knobs(self, point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
        """What of an operating point can be tuned here in the scenario of `point`: field of OperatingPoint → the values
        worth trying, None for the backend's own choice among them. Fields that are not named stay as `point` has them.
        `batch` is left out for single-stream, and wherever the model fixes it the caller leaves it out."""
        return {}

    @abstractmethod
    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Compile. Raises BackendError with the backend's own words where it refuses."""

    def profile(
        self, artifact: Artifact, point: OperatingPoint, samples: Sequence[Batch], seconds: float
    ) -> list[NodeCost]:
        """What each operation costs, over calls for about `seconds`; nothing where the backend doesn't tell."""
        return []

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """The program that `Program.save` wrote into `folder`, ready to run. Raises TargetError where there is no such way."""
        raise TargetError(f"{self.name()} programs can't be loaded from a bundle")

    def file_signature(self, path: Path) -> Signature:
        """Inputs and outputs of a model file in one of `formats`. Raises InputError where it is none."""
        raise TargetError(f"{self.name()} has no model files of its own")

    def open_file(self, path: Path, signature: Signature, point: OperatingPoint) -> Program:
        """Compile a model file in one of `formats` as it is. Raises BackendError with the backend's own words."""
        raise TargetError(f"{self.name()} has no model files of its own")

    def portable(self) -> Capabilities | None:
        """What such hardware rewards wherever it is, so that a bundle can be prepared where there is none; None where
        that makes no sense."""
        return None

    def build_script(self, models: Sequence[str], signature: Signature, batch: int) -> tuple[str, str] | None:
        """Name and text of a script that builds and times these ONNX files, named as seen from where it lies, with the
        backend's own tools and without perwatt; None where there is none."""
        return None

    def script(self) -> str | None:
        """A `run.py` that runs the saved program with the backend and NumPy only; None where there is none."""
        return None

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""

    @classmethod
    def name(cls) -> str:
        """The name in recipes and on the command line."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")


class Meter(ABC):
    """Reads the energy of a window, in the process that conducts the measurement. One a file, in `bench/`.

    `refresh_s` is how often a counter moves; None where nothing has to be waited for (a model of the machine)."""

    method: Method
    boundary: Boundary | None
    refresh_s: float | None = None

    def missing(self) -> list[str]:
        """Why this meter can't be used here, each with what mends it; empty means it can. A counter that does not
        advance is missing."""
        return []

    @abstractmethod
    def start(self) -> None:
        """A window begins. Raises nothing: what goes wrong is told by `stop`."""

    @abstractmethod
    def stop(self, window: Window) -> Reading:
        """The window is over; `window` is the load as its process saw it (no inferences and no CPU time while idle)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the joules are come by: method, boundary, how, source, uncertainty, refresh_s."""

    def close(self) -> None:  # noqa: B027 (most meters hold nothing)
        """Let go of devices, processes and sockets."""

    @classmethod
    def name(cls) -> str:
        """The name on the command line: the file's name in kebab case."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")


class Clock:
    """The time that a load generator goes by, in seconds. A scripted device brings a scripted one.

    It waits asleep to the very end, because spinning costs what is to be measured: half a millisecond of a core for each
    request. The overshoot, about 0.07 ms on a virtual machine, counts as latency."""

    def __init__(self) -> None:
        # Linux lets a sleep run 0.05 ms over so as to wake for several timers at once; a request that comes by the
        # network is not held up so.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        """Come back when `now()` has reached `moment`."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)


def cpu_seconds() -> float:
    """User + system time of this process, all threads, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def as_calls(signature: Signature, batches: Sequence[Batch], size: int) -> list[Batch]:
    """Rearrange `batches` into calls of exactly `size` items, the way `Program.drive` wants them."""
    if signature.batch is None:
        return list(batches)
    return [piece for batch in batches for piece, _ in split(batch, size)]


__all__ = [
    "Array",
    "Batch",
    "Capabilities",
    "Clock",
    "Context",
    "Execute",
    "Loss",
    "Meter",
    "NodeCost",
    "OperatingPoint",
    "Pass",
    "Program",
    "QuantizationStyle",
    "Samples",
    "Scenario",
    "Stage",
    "Target",
    "Tolerance",
    "as_calls",
    "cpu_seconds",
]
