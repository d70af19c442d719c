"""One call of a TensorRT engine under way: a context on a stream of its own, with its memory on both sides.

A call is: inputs up, execute, outputs down, all in the stream. Inputs come from pinned memory, so that the GPU fetches
them by itself while others compute. With graphs on, the execution is recorded the second time the same shapes come (the
first lets TensorRT settle what depends on shapes) and replayed from then on; copies stay outside, since every call has
its own inputs. A change of shapes makes the record void, and it is taken anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from perwatt.errors import BackendError
from perwatt.signature import Array, Batch
from perwatt.targets._tensorrt_bindings import Log, bindings, last_words
from perwatt.targets._tensorrt_cuda import Device, Memory, Pinned

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]


@dataclass(frozen=True)
class Port:
    """An input or output of an engine; `dtype` is NumPy's, or that of ml_dtypes."""

    name: str
    dtype: np.dtype[Any]


def ports(engine: trt.ICudaEngine) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs. Raises BackendError where one has to lie in the host's memory, or is of an unknown type."""
    trt = bindings()
    inputs: list[Port] = []
    outputs: list[Port] = []
    for position in range(engine.num_io_tensors):
        name = engine.get_tensor_name(position)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BackendError(f"TensorRT wants {name} in the host's memory, because its values decide shapes")
        port = Port(name, numpy_dtype(engine.get_tensor_dtype(name)))
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(port)
    return inputs, outputs


def numpy_dtype(kind: trt.DataType) -> np.dtype[Any]:
    """NumPy's type for one of TensorRT's. Raises BackendError for types that no array can hold."""
    import ml_dtypes

    trt = bindings()
    known: dict[Any, Any] = {
        trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16, trt.DataType.BF16: ml_dtypes.bfloat16,
        trt.DataType.INT8: np.int8, trt.DataType.INT32: np.int32, trt.DataType.INT64: np.int64,
        trt.DataType.BOOL: np.bool_, trt.DataType.UINT8: np.uint8, trt.DataType.FP8: ml_dtypes.float8_e4m3fn,
    }  # fmt: skip
    if kind not in known:
        raise BackendError(f"an input or output of type {kind.name} can't be fed here")
    found: np.dtype[Any] = np.dtype(known[kind])
    return found


class Staged:
    """The inputs of one call in pinned memory."""

    def __init__(self, device: Device, inputs: Sequence[Port], batch: Batch) -> None:
        self.pinned: dict[str, Pinned] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int] = {}
        for port in inputs:
            array = batch[port.name]
            self.nbytes[port.name] = array.size * port.dtype.itemsize
            self.pinned[port.name] = device.pinned(self.nbytes[port.name])
        self.fill(inputs, batch)

    def fits(self, inputs: Sequence[Port], batch: Batch) -> bool:
        """True where `fill` can put `batch` into the same memory."""
        return all(
            batch[port.name].size * port.dtype.itemsize <= self.pinned[port.name].array.nbytes for port in inputs
        )

    def fill(self, inputs: Sequence[Port], batch: Batch) -> None:
        """Put other inputs of this size into the same memory."""
        for port in inputs:
            array = batch[port.name]
            self.shapes[port.name] = array.shape
            self.nbytes[port.name] = array.size * port.dtype.itemsize
            there = self.pinned[port.name].array[: self.nbytes[port.name]].view(port.dtype).reshape(array.shape)
            np.copyto(there, array, casting="unsafe")


class Slot:
    """One call at a time. `begin` returns at once; outputs are there after `wait`, or after `stream.synchronize()`."""

    def __init__(self, engine: trt.ICudaEngine, device: Device, log: Log, graphs: bool) -> None:
        self.engine: trt.ICudaEngine = engine
        self.device, self.log, self.graphs = device, log, graphs
        self.inputs, self.outputs = ports(engine)
        self.context: trt.IExecutionContext = engine.create_execution_context()
        if self.context is None:
            raise BackendError(f"TensorRT could not make a context: {last_words(log, 'out of GPU memory')}")
        self.stream = device.stream()
        self.started, self.ended = self.stream.event(), self.stream.event()
        self.no_graph: str | None = None
        self._memory: dict[str, Memory] = {}
        self._host: dict[str, Pinned] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._given: dict[str, tuple[int, ...]] = {}
        self._executed = False
        self._replay: Callable[[], None] | None = None
        self.replays = 0

    def begin(self, staged: Staged) -> None:
        """Put the call into the stream. Raises BackendError in TensorRT's words."""
        if staged.shapes != self._given:
            self._bind(staged.shapes)
        try:
            self._enqueue(staged)
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Wait for whatever is under way after something failed: it reads memory that may be let go of next."""
        # A GPU in error says so with every call; the first error is the one to tell.
        with suppress(BackendError):
            self.stream.synchronize()

    def _enqueue(self, staged: Staged) -> None:
        stream = self.stream
        self.started.record()
        for port in self.inputs:
            stream.upload(self._memory[port.name], staged.pinned[port.name], staged.nbytes[port.name])
        self._run()
        for port in self.outputs:
            stream.download(self._host[port.name], self._memory[port.name], self._nbytes(port))
        self.ended.record()

    def wait(self) -> float:
        """Sleep until the call is done; returns how long the GPU took for it, copies included, in milliseconds."""
        self.ended.wait()
        return self.ended.since(self.started)

    def results(self) -> Batch:
        """The outputs of the last call, in memory of their own."""
        found = {}
        for port in self.outputs:
            raw: Array = self._host[port.name].array[: self._nbytes(port)]
            found[port.name] = raw.view(port.dtype).reshape(self._shapes[port.name]).copy()
        return found

    def _run(self) -> None:
        if self._replay is None and self.graphs and self._executed and self.no_graph is None:
            self._record()
        if self._replay is not None:
            self._replay()
            self.replays += 1
            return
        self._execute()
        self._executed = True

    def _record(self) -> None:
        try:
            self._replay = self.stream.capture(self._execute)
        except BackendError as error:
            # What decides something on the host in the middle can't be recorded: it runs as it did before.
            self.no_graph = str(error)

    def _execute(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise BackendError(f"TensorRT failed on this input: {last_words(self.log)}")

    def _nbytes(self, port: Port) -> int:
        return math.prod(self._shapes[port.name]) * port.dtype.itemsize

    def _bind(self, given: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes and addresses into the context; memory grows where it has to. Only while nothing is under way."""
        self._replay, self._executed, self._given = None, False, {}
        context = self.context
        for name, shape in given.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(self._outside(name, shape), fix="the engine's range is fixed when it is built")
        for port in [*self.inputs, *self.outputs]:
            shape = tuple(context.get_tensor_shape(port.name))
            if any(dim < 0 for dim in shape):
                raise BackendError(
                    f"the shape of output {port.name} depends on the data: this target can't run that yet"
                )
            self._shapes[port.name] = shape
            needed = self._nbytes(port)
            if port.name not in self._memory or self._memory[port.name].nbytes < needed:
                self._memory[port.name] = self.device.memory(needed)
            # Asked for with every binding, since a context forgets nothing but must never see memory that is gone.
            if not context.set_tensor_address(port.name, self._memory[port.name].address):
                raise BackendError(f"TensorRT refused the memory of {port.name}: {last_words(self.log)}")
        for port in self.outputs:
            if port.name not in self._host or self._host[port.name].array.nbytes < self._nbytes(port):
                self._host[port.name] = self.device.pinned(self._nbytes(port))
        self._given = dict(given)

    def _outside(self, name: str, shape: tuple[int, ...]) -> str:
        low, _, high = (list(dims) for dims in self.engine.get_tensor_profile_shape(name, 0))
        said = last_words(self.log, "")
        return f"input {name} was given shape {list(shape)}, this engine takes {low} to {high}{': ' + said if said else ''}"
