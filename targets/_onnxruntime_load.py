"""Load right beside ONNX Runtime: as many calls at a time as there are streams, closed loop or as requests come.

Streams are Python threads that call one session at the same time; `run_with_iobinding` lets go of the interpreter. What
the generator does must not count as the model's work: inputs become the runtime's own values before the clock starts,
threads, bindings and what they hold stay from window to window, turns are taken from one counter without a lock, and there
is one reading of the clock for each call. On a convnet of 0.04 ms a call this costs what a bare loop of `session.run`
costs.

What counts as an inference is the same on every device: input in host memory, output in host memory. Inputs are bound
anew for each call, and on a GPU binding is what copies them there; outputs are bound to host memory, so that copying them
back is part of the call.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from perwatt.contract import Clock, cpu_seconds
from perwatt.errors import BackendError, PerwattError
from perwatt.measurement import Window
from perwatt.signature import Array, Signature, inferences

BFLOAT16 = 16
"""Of ONNX's TensorProto.DataType; the bindings know no NumPy type for it."""


class Caller(Protocol):
    """One stream's way to call the session. `values` go by position."""

    def __call__(self, values: Sequence[Any]) -> None: ...

    def outputs(self) -> list[Array]:
        """Of the last call, in memory of their own."""


class Bound:
    """Inputs bound for each call; outputs too where their shape may change, as a binding writes into those it has."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.names = [value.name for value in session.get_inputs()]
        self.changing = []
        for value in session.get_outputs():
            self.binding.bind_output(value.name)
            # An unknown rank looks like that of a scalar.
            if not value.shape or not all(isinstance(d, int) for d in value.shape):
                self.changing.append(value.name)

    def __call__(self, values: Sequence[Any]) -> None:
        for name, value in zip(self.names, values, strict=True):
            self.binding.bind_ortvalue_input(name, value)
        for name in self.changing:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Array]:
        return [to_array(value) for value in self.binding.get_outputs()]


class Replayed:
    """Inputs and outputs that stay where they are in the memory of `device`, which recorded calls (CUDA graphs) need.
    Raises BackendError where a shape is not known beforehand."""

    def __init__(self, session: Any, device: str) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.inputs = [self._fixed(value, device) for value in session.get_inputs()]
        self.results = [self._fixed(value, device) for value in session.get_outputs()]
        for meta, value in zip(session.get_inputs(), self.inputs, strict=True):
            self.binding.bind_ortvalue_input(meta.name, value)
        for meta, value in zip(session.get_outputs(), self.results, strict=True):
            self.binding.bind_ortvalue_output(meta.name, value)

    def _fixed(self, meta: Any, device: str) -> Any:
        import onnxruntime

        dtype = NUMPY_TYPES.get(meta.type)
        if dtype in (None, "bfloat16") or not all(isinstance(d, int) for d in meta.shape):
            raise BackendError(
                f"calls can't be recorded: {meta.name} is {meta.type}{meta.shape}, and a graph needs numbers of fixed shape",
                fix="leave `graphs` off for this model",
            )
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(meta.shape, np.dtype(dtype), device, 0)

    def __call__(self, values: Sequence[Any]) -> None:
        for own, value in zip(self.inputs, values, strict=True):
            own.update_inplace(value.numpy())
        self.session.run_with_iobinding(self.binding)
        self.copied = [value.numpy() for value in self.results]

    def outputs(self) -> list[Array]:
        return [np.array(array) for array in self.copied]


NUMPY_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int16)": "int16", "tensor(int8)": "int8", "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64", "tensor(bool)": "bool",
    "tensor(bfloat16)": "bfloat16",
}  # fmt: skip


class Load:
    """Drives one session by `streams` threads, each with a caller of its own that `caller()` makes."""

    def __init__(self, caller: Callable[[], Caller], signature: Signature, streams: int) -> None:
        self.callers = [caller() for _ in range(streams)]
        self.signature = signature
        self.pool = ThreadPoolExecutor(max(1, streams - 1), thread_name_prefix="stream")

    def saturated(self, samples: Sequence[Any], seconds: float, streams: int) -> Window:
        """One call after the other on each of `streams`, for at least `seconds`."""
        feeds = self._feeds(samples)

        def work(caller: Caller, turns: Iterator[int], start: float, done: list[tuple[int, float]]) -> None:
            now = time.perf_counter()
            for turn in turns:
                if turn and now - start >= seconds:
                    return
                caller(feeds[turn % len(feeds)])
                then, now = now, time.perf_counter()
                done.append((turn, (now - then) * 1e3))

        return self._window(samples, streams, time.perf_counter, work)

    def arriving(self, samples: Sequence[Any], arrivals_s: Sequence[float], clock: Clock, streams: int) -> Window:
        """Request i is due `arrivals_s[i]` seconds after the start, and waits its turn where all streams are busy;
        latency counts from when it was due. Latencies come in the order of arrival."""
        feeds = self._feeds(samples)

        def work(caller: Caller, turns: Iterator[int], start: float, done: list[tuple[int, float]]) -> None:
            for turn in turns:
                if turn >= len(arrivals_s):
                    return
                due = start + arrivals_s[turn]
                clock.wait_until(due)
                caller(feeds[turn % len(feeds)])
                done.append((turn, (clock.now() - due) * 1e3))

        return self._window(samples, streams, clock.now, work)

    def _window(
        self, samples: Sequence[Any], streams: int, now: Callable[[], float], work: Callable[..., None]
    ) -> Window:
        counts = [inferences(self.signature, batch) for batch in samples]
        turns = _Turns()
        done: list[list[tuple[int, float]]] = [[] for _ in range(streams)]
        others: list[Future[None]] = []
        cpu, start = cpu_seconds(), now()
        with in_words():
            try:
                for caller, own in zip(self.callers[1:streams], done[1:], strict=True):
                    others.append(self.pool.submit(turns.ended_by_failure, work, caller, start, own))
                turns.ended_by_failure(work, self.callers[0], start, done[0])
            finally:
                # Streams that are in the middle of a call, or wait for a request, end with it.
                failures = [other.exception() for other in others]
            for failure in failures:
                if failure is not None:
                    raise failure
        wall, spent = now() - start, cpu_seconds() - cpu
        in_order = sorted(itertools.chain.from_iterable(done))
        return Window(sum(counts[turn % len(counts)] for turn, _ in in_order), wall, spent, [ms for _, ms in in_order])

    def _feeds(self, samples: Sequence[Any]) -> list[list[Any]]:
        names = [spec.name for spec in self.signature.inputs]
        return [[to_value(batch[name]) for name in names] for batch in samples]


class _Turns:
    """0, 1, 2, … shared by all streams, until one of them fails. Taking one is a single step of the interpreter."""

    def __init__(self) -> None:
        self.iterator = itertools.count()
        self.failed = False

    def __iter__(self) -> Iterator[int]:
        for turn in self.iterator:
            if self.failed:
                return
            yield turn

    def ended_by_failure(self, work: Callable[..., None], caller: Caller, start: float, done: list[Any]) -> None:
        """Do the `work` of one stream; what it raises ends the others too."""
        try:
            work(caller, iter(self), start, done)
        except BaseException:
            self.failed = True
            raise


def to_value(array: Any) -> Any:
    """`array` as ONNX Runtime's own value, in the array's memory where it is contiguous."""
    import onnxruntime

    contiguous = np.asarray(array, order="C")
    if str(contiguous.dtype) == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous.view(np.uint16), BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(contiguous)


def to_array(value: Any) -> Array:
    """A value in host memory as an array that owns its memory."""
    if value.element_type() != BFLOAT16:
        return np.array(value.numpy())
    import ml_dtypes

    held = (ctypes.c_uint8 * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    found: Array = np.frombuffer(held, np.uint16).view(ml_dtypes.bfloat16).reshape(value.shape())
    return found.copy()


@contextmanager
def in_words() -> Iterator[None]:
    """What ONNX Runtime raises, as BackendError with the telling part of its message."""
    try:
        yield
    except PerwattError:
        raise
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed on this input: {telling_words(error)}") from error


def telling_words(error: BaseException) -> str:
    """ONNX Runtime's message in one line, without its code and the trail of source files."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ", r"\1: ", str(error))
    text = re.sub(r"\S*/onnxruntime/\S+:\d+ |\b\S+\.(?:cc|h):\d+ ", "", text)
    return re.sub(r"\s+", " ", text).strip()[:400]
