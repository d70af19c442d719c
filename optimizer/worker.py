"""The worker: `python -m perwatt.worker`. Whatever may crash, hang or disturb a measurement runs here.

Reads one JSON object a line, {"operation", "parameters"}, and answers {"result"} or {"error"}; models and samples come
as paths, never as pickles. A watchdog ends the process when its parent is gone or its memory limit is passed. Timing
happens here, right beside the backend.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from perwatt import worker_load
from perwatt.artifact import Artifact, signature_from_json
from perwatt.bench.steadiness import warm_up
from perwatt.bundle import no_room
from perwatt.contract import Capabilities, Context, OperatingPoint, Program, QuantizationStyle
from perwatt.data import Samples
from perwatt.errors import BackendError, InputError, PerwattError
from perwatt.measurement import Window
from perwatt.signature import Batch
from perwatt.worker_meter import MeterOperations

WATCH_S = 0.5


class Session(MeterOperations):
    """What one worker holds between operations: at most one opened program and its calls."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.say = say
        self.program: Program | None = None
        self.model: Path | None = None
        self.calls: list[Batch] = []
        self.call_s = 0.0
        self.latencies_ms: list[float] = []
        self.probe_models: Any = None

    # Checking and reference -------------------------------------------------------------------------------------

    def check(self, model: str) -> dict[str, Any]:
        """onnx's checker with full shape inference; {"problems": [...]}."""
        import onnx

        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return {"problems": [" ".join(str(error).split())[:300]]}
        return {"problems": []}

    def convert(self, model: str, opset: int, out: str) -> dict[str, Any]:
        """onnx's version converter, from the file `model` to the file `out`."""
        import onnx
        from onnx import version_converter

        try:
            converted = version_converter.convert_version(onnx.load(model), opset)
        except Exception as error:
            raise BackendError(
                f"onnx can't convert this model to opset {opset}: {' '.join(str(error).split())[:200]}"
            ) from error
        onnx.save(converted, out)
        return {"model": out}

    def reference(
        self, model: str, samples: str, out: str, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False
    ) -> dict[str, Any]:
        """Outputs of the numeric reference, one `.npz` for each batch."""
        found = _execute(
            Artifact.load(model), Samples.load(Path(samples)), taps, optimized, quick, folder=Path(model).parent
        )
        return {"batches": _store(found, Path(out))}

    def run_pass(self, step: dict[str, Any], model: str, roles: dict[str, str], capabilities: dict[str, Any],
                 budget: dict[str, Any], seed: int, folder: str) -> dict[str, Any]:  # fmt: skip
        """Run one pass here; {"model", "changes"}."""
        from perwatt import registry
        from perwatt.recipe import Budget, PassStep

        artifact = Artifact.load(model)
        loaded = {role: Samples.load(Path(where)) for role, where in roles.items()}
        context = Context(
            samples=loaded.__getitem__,
            capabilities=capabilities_from_json(capabilities),
            budget=Budget.model_validate(budget),
            seed=seed,
            deadline=None,
            progress=lambda text: self.say({"progress": text}),
            execute=functools.partial(_execute, folder=Path(folder)),
            measure=_not_here,
            profile=_not_here,
            judge=_not_here,
        )
        made_by = registry.bind(PassStep(**step))
        after, changes = made_by.run(artifact, context)
        if after is artifact:
            return {"model": model, "changes": changes}
        # Types and shapes alone don't change the digest that files go by, and the old one may be open.
        same = after.digest() == artifact.digest()
        where = Path(folder) / f"{after.digest()[:24]}-annotated.onnx"
        return {"model": str(after.save(where) if same else after.file(folder)), "changes": changes}

    # Targets ----------------------------------------------------------------------------------------------------

    def warm(self, imports: Sequence[str]) -> dict[str, Any]:
        """Import what checks and passes will need, these packages among it, while the caller does something else."""
        for package in ("onnxruntime", *imports):
            importlib.import_module(package)
        return {}

    def target(self, name: str, point: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a target says of itself here; its knobs are those for the scenario of `point`."""
        from perwatt import registry

        found = registry.target(name)
        missing = found.missing()
        facts = {
            "missing": missing, "device": found.device, "slow_to_lower": found.slow_to_lower, "meter": found.meter
        }  # fmt: skip
        if missing:
            return {**facts, "capabilities": None, "versions": {}, "knobs": {}}
        knobs = found.knobs(OperatingPoint(**(point or {})))
        return {
            **facts, "capabilities": asdict(found.capabilities()), "versions": found.versions(), "knobs": knobs
        }  # fmt: skip

    def open(self, target: str, model: str, point: dict[str, Any]) -> dict[str, Any]:
        """Lower `model`; the program stays open in this worker."""
        from perwatt import registry

        self.program, self.model = None, Path(model)
        self.program = registry.target(target).lower(Artifact.load(model), OperatingPoint(**point))
        return self.program.facts()

    def profile(self, target: str, model: str, point: dict[str, Any], samples: str, seconds: float) -> dict[str, Any]:
        """What each operation of `model` costs."""
        from perwatt import registry

        batches = list(Samples.load(Path(samples)))
        costs = registry.target(target).profile(Artifact.load(model), OperatingPoint(**point), batches, seconds)
        return {"costs": [asdict(cost) for cost in costs]}

    def open_eager(self, exported: str, model: str, point: dict[str, Any]) -> dict[str, Any]:
        """torch eager as the program of this worker."""
        from perwatt.eager import EagerProgram

        self.program = EagerProgram(Path(exported), Artifact.load(model).signature, OperatingPoint(**point))
        return self.program.facts()

    def load(self, target: str, folder: str, signature: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
        """The program that a bundle holds."""
        from perwatt import registry

        self.program, self.model = None, None
        found = registry.target(target)
        self.program = found.load(Path(folder), signature_from_json(signature), OperatingPoint(**point))
        return self.program.facts()

    def file_signature(self, target: str, path: str) -> dict[str, Any]:
        """Inputs and outputs of a model file of the backend's own."""
        from perwatt import registry

        return {"signature": asdict(registry.target(target).file_signature(Path(path)))}

    def open_file(self, target: str, path: str, signature: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
        """Compile a model file of the backend's own as it is."""
        from perwatt import registry

        self.program, self.model = None, Path(path)
        found = registry.target(target)
        self.program = found.open_file(Path(path), signature_from_json(signature), OperatingPoint(**point))
        return self.program.facts()

    def predict(self, samples: str, out: str) -> dict[str, Any]:
        """Outputs of the opened program over all samples, one `.npz` for each batch."""
        program = self._program()
        return {"batches": _store((program.run(batch) for batch in Samples.load(Path(samples))), Path(out))}

    # Load -------------------------------------------------------------------------------------------------------

    def prepare(self, samples: str, warm_up_s: float, most_s: float | None = None) -> dict[str, Any]:
        """Take the calls for timing from `samples`, and run them until the cost of a call is steady: for `warm_up_s` at
        least and, where it does not become so, `most_s` at most."""
        program = self._program()
        self.calls = worker_load.timed_calls(program, Samples.load(Path(samples)))
        program.drive(self.calls, 0.0)
        worker_load.run_each(program, self.calls, max(warm_up_s, most_s or 0.0))
        single = program.drive(self.calls, 0.0)
        self.call_s = single.wall_s / len(single.latencies_ms)

        def slice_cost(seconds: float) -> float:
            window = program.drive(self.calls, seconds)
            return window.cpu_s / window.inferences

        warmed = warm_up(slice_cost, min_s=warm_up_s, max_s=max(warm_up_s, most_s or warm_up_s))
        return {"calls": len(self.calls), **warmed}

    def drive(self, seconds: float, hold: bool = False) -> dict[str, Any]:
        """One window of load at the program's scenario. With `hold` the latencies are kept until they are asked for."""
        program = self._program()
        if self.call_s < worker_load.LONGEST_LED_IN_S:
            program.drive(self.calls, worker_load.LEAD_IN_S)
        window = worker_load.watched(lambda: program.drive(self.calls, seconds))
        # The next window goes on where this one ended: windows that always began with the same few calls would time
        # those alone, and a faster program another mix of them than a slower one.
        done = len(window.latencies_ms) % len(self.calls)
        self.calls = self.calls[done:] + self.calls[:done]
        return self._held(window) if hold else asdict(window)

    def serve(self, arrivals_s: Sequence[float]) -> dict[str, Any]:
        """One window of requests that come by themselves, at the given times after its start; latencies are held."""
        program = self._program()
        return self._held(worker_load.watched(lambda: program.serve(self.calls, arrivals_s)))

    def _held(self, window: Window) -> dict[str, Any]:
        """The window without its latencies: sending many takes time, which a meter would count as the model's."""
        self.latencies_ms, window.latencies_ms = window.latencies_ms, []
        return asdict(window)

    def latencies(self) -> dict[str, Any]:
        """Those of the last window that was held."""
        return {"latencies_ms": self.latencies_ms}

    def settle(self) -> dict[str, Any]:
        """Wait until this process is idle: a thread pool may spin for a while, and would disturb the other side."""
        worker_load.settle()
        return {}

    def probe(self) -> dict[str, Any]:
        """Tera-operations a second that the machine reaches at this moment, by type."""
        if self.probe_models is None:
            from perwatt.bench.probe import Probe

            self.probe_models = Probe()
        reached: dict[str, float] = self.probe_models.measure()
        return reached

    def save(self, folder: str) -> dict[str, Any]:
        """What is deployed, written into `folder`."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        program = self._program()
        try:
            return {"files": [str(path) for path in program.save(where)]}
        except Exception as error:
            # Backends tell of a full disk each in its own way: C++ streams don't say it at all.
            needed = self.model.stat().st_size if self.model is not None else 0
            if shutil.disk_usage(where).free < 2 * needed:
                raise InputError(f"no room on the disk that holds {where.parent}", fix="free some") from error
            raise

    def memory(self) -> dict[str, Any]:
        """The highest resident memory of this process so far, in bytes (None where the system doesn't say)."""
        return {"peak_memory_bytes": _status_bytes("VmHWM")}

    def _program(self) -> Program:
        if self.program is None:
            raise BackendError("no program is open in this worker")
        return self.program


def capabilities_from_json(plain: dict[str, Any]) -> Capabilities:
    """The capabilities that another process sent."""
    styles = tuple(
        QuantizationStyle(**{**style, "operators": tuple(style["operators"])}) for style in plain["quantization_styles"]
    )
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Capabilities(**{**lists, "quantization_styles": styles})


def load_outputs(folder: str | Path) -> list[Batch]:
    """What `predict` and `reference` stored."""
    batches = []
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            batches.append({name: archive[name] for name in archive.files})
    return batches


def _store(batches: Any, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, batch in enumerate(batches, 1):
        np.savez(folder / f"{count:06d}.npz", **batch)
    return count


def _execute(
    artifact: Artifact, batches: Samples, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False,
    *, folder: Path,
) -> Iterator[Batch]:  # fmt: skip
    from perwatt.reference import Reference, quickly

    return (quickly if quick and not taps else Reference)(artifact, folder, taps, optimized=optimized).run(batches)


def _not_here(_: Any) -> Any:
    raise BackendError("an isolated pass can't measure: measuring wants a worker for each side")


def _status_bytes(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((entry for entry in text.split("\n") if entry.startswith(field + ":")), None)
    return int(line.split()[1]) * 1024 if line else None


def _watch(parent: int, limit: int | None) -> None:
    """End this process when its parent is gone, or when it holds more memory than it may."""
    while True:
        if os.getppid() != parent:
            os._exit(0)
        used = _status_bytes("VmRSS")
        if limit and used and used > limit:
            sys.stderr.write(f"out of memory: {used / 1e9:.1f} GB used, {limit / 1e9:.1f} GB allowed\n")
            sys.stderr.flush()
            os._exit(137)
        time.sleep(WATCH_S)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _quiet() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _disk_error(operation: str, error: OSError) -> dict[str, Any]:
    if no_room(error):
        where = f" that holds {Path(error.filename).parent}" if error.filename else ""
        return {"type": "InputError", "message": f"no room on the disk{where}", "fix": "free some"}
    return {"type": "BackendError", "message": f"{operation} failed: {type(error).__name__}: {error}"}


def serve(parent: int, answers: int) -> None:
    """Answer on the file descriptor `answers` until standard input ends."""
    _die_with_parent()
    limit = os.environ.get("PERWATT_MEMORY_LIMIT")
    threading.Thread(target=_watch, args=(parent, int(limit) if limit else None), daemon=True).start()
    # Libraries print, and some read: questions and answers have files of their own, which no child inherits.
    os.set_inheritable(answers, False)
    protocol = os.fdopen(answers, "w")
    questions = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _quiet()

    def say(answer: dict[str, Any]) -> None:
        protocol.write(json.dumps(answer) + "\n")
        protocol.flush()

    session = Session(say)
    for line in questions:
        request = json.loads(line)
        try:
            say({"result": getattr(session, request["operation"])(**request["parameters"])})
        except PerwattError as error:
            say({"error": {"type": type(error).__name__, "message": error.message, "fix": error.fix}})
        except OSError as error:
            say({"error": _disk_error(request["operation"], error)})
        except MemoryError:
            say({"error": {"type": "BackendError", "message": f"out of memory during {request['operation']}"}})
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            say({"error": {"type": "BackendError", "message": f"{request['operation']} failed: {words}"}})


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
