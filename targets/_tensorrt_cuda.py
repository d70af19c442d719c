"""What TensorRT leaves to its caller of CUDA: memory, streams, events and graphs, by NVIDIA's own bindings or by torch.

`cuda.bindings` (pip: cuda-python) is small and comes first; torch is taken where it is there instead, because a machine
that trains has it. TensorRT itself wants neither, only addresses and the handle of a stream.

Waiting comes in two kinds. `Stream.synchronize` spins, which answers soonest and costs a core; `Event.wait` sleeps,
which costs tens of microseconds and no joules.
"""

from __future__ import annotations

import ctypes
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from perwatt.errors import BackendError, TargetError
from perwatt.signature import Array

if TYPE_CHECKING:
    pass  # type: ignore[import-not-found, unused-ignore]

FIX = "pip install cuda-python, with an NVIDIA driver that fits (nvidia-smi shows it)"


class Memory:
    """Bytes on the GPU, from `address`."""

    address: int
    nbytes: int


class Pinned:
    """Bytes of the host that the GPU copies from and to by itself; `array` is uint8 over them."""

    array: Array


class Event(ABC):
    """A moment in a stream, taken anew by each `record`."""

    @abstractmethod
    def record(self) -> None:
        """The moment when all that was asked of the stream so far is done."""

    @abstractmethod
    def wait(self) -> None:
        """Come back, asleep until then, when the stream has got there."""

    @abstractmethod
    def since(self, earlier: Event) -> float:
        """Milliseconds on the GPU from `earlier` to this one; both have come."""


class Stream(ABC):
    """Work for the GPU, done in order. `handle` is what TensorRT wants."""

    handle: int

    @abstractmethod
    def upload(self, memory: Memory, pinned: Pinned, nbytes: int) -> None:
        """Copy from host to device."""

    @abstractmethod
    def download(self, pinned: Pinned, memory: Memory, nbytes: int) -> None:
        """Copy from device to host."""

    @abstractmethod
    def event(self) -> Event:
        """An event of this stream, not recorded yet."""

    @abstractmethod
    def synchronize(self) -> None:
        """Come back, spinning until then, when all is done."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` asks for as a CUDA graph, without doing it; returns what replays it in this stream.
        Raises BackendError where it can't be recorded."""


class Device(ABC):
    """One GPU."""

    name: str
    compute_capability: tuple[int, int]

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that nobody uses now."""

    @abstractmethod
    def memory(self, nbytes: int) -> Memory: ...

    @abstractmethod
    def pinned(self, nbytes: int) -> Pinned: ...

    @abstractmethod
    def stream(self) -> Stream: ...

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the package by which CUDA is reached."""


def find_device() -> Device:
    """The current GPU. Raises TargetError that says what is missing."""
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _find_by_torch()
    return BoundDevice(runtime)


def _find_by_torch() -> Device:
    try:
        import torch
    except ImportError as error:
        raise TargetError("neither cuda.bindings nor torch is there to reach CUDA", fix=FIX) from error
    if not torch.cuda.is_available():
        raise TargetError("torch finds no CUDA GPU here, and cuda.bindings is not installed", fix=FIX)
    from perwatt.targets._tensorrt_torch import TorchDevice

    return TorchDevice()


def done(answer: tuple[Any, ...]) -> Any:
    """What a call of `cuda.bindings` gave besides its error code. Raises BackendError in CUDA's words."""
    code, *found = answer
    if code != type(code).cudaSuccess:
        raise BackendError(f"CUDA failed: {code.name}")
    return found[0] if len(found) == 1 else tuple(found)


def _freed_with(owner: object, free: Callable[[Any], Any], handle: Any) -> None:
    # At exit CUDA may be gone already, and the driver frees everything anyway.
    weakref.finalize(owner, free, handle).atexit = False


class BoundMemory(Memory):
    def __init__(self, cudart: Any, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)
        self.address = int(done(cudart.cudaMalloc(self.nbytes)))
        _freed_with(self, cudart.cudaFree, self.address)


class BoundPinned(Pinned):
    def __init__(self, cudart: Any, nbytes: int) -> None:
        size = max(nbytes, 1)
        self.address = int(done(cudart.cudaHostAlloc(size, cudart.cudaHostAllocDefault)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        _freed_with(self, cudart.cudaFreeHost, self.address)


class BoundEvent(Event):
    def __init__(self, cudart: Any, stream: Any) -> None:
        self.cudart, self.stream = cudart, stream
        self.event = done(cudart.cudaEventCreateWithFlags(cudart.cudaEventBlockingSync))
        _freed_with(self, cudart.cudaEventDestroy, self.event)

    def record(self) -> None:
        cudart = self.cudart
        done(cudart.cudaEventRecord(self.event, self.stream))

    def wait(self) -> None:
        cudart = self.cudart
        done(cudart.cudaEventSynchronize(self.event))

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, BoundEvent)
        cudart = self.cudart
        return float(done(cudart.cudaEventElapsedTime(earlier.event, self.event)))


class BoundStream(Stream):
    """A stream by `cuda.bindings`."""

    def __init__(self, cudart: Any) -> None:
        self.cudart = cudart
        # The default stream would wait for, and hold up, all others.
        self.stream = done(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.handle = int(self.stream)
        _freed_with(self, cudart.cudaStreamDestroy, self.stream)

    def upload(self, memory: Memory, pinned: Pinned, nbytes: int) -> None:
        assert isinstance(pinned, BoundPinned)
        cudart = self.cudart
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        done(cudart.cudaMemcpyAsync(memory.address, pinned.address, nbytes, kind, self.stream))

    def download(self, pinned: Pinned, memory: Memory, nbytes: int) -> None:
        assert isinstance(pinned, BoundPinned)
        cudart = self.cudart
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        done(cudart.cudaMemcpyAsync(pinned.address, memory.address, nbytes, kind, self.stream))

    def event(self) -> Event:
        return BoundEvent(self.cudart, self.stream)

    def synchronize(self) -> None:
        cudart = self.cudart
        done(cudart.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        cudart = self.cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        done(cudart.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        except BaseException:
            # The stream has to leave its capture, or nothing runs in it any more.
            cudart.cudaStreamEndCapture(self.stream)
            raise
        recorded = done(cudart.cudaStreamEndCapture(self.stream))
        graph = done(cudart.cudaGraphInstantiate(recorded, 0))
        done(cudart.cudaGraphDestroy(recorded))
        return BoundGraph(cudart, graph, self.stream)


class BoundGraph:
    def __init__(self, cudart: Any, graph: Any, stream: Any) -> None:
        self.cudart, self.graph, self.stream = cudart, graph, stream
        _freed_with(self, cudart.cudaGraphExecDestroy, graph)

    def __call__(self) -> None:
        cudart = self.cudart
        done(cudart.cudaGraphLaunch(self.graph, self.stream))


class BoundDevice(Device):
    """The current GPU by `cuda.bindings`."""

    def __init__(self, cudart: Any) -> None:
        self.cudart = cudart
        try:
            properties = done(cudart.cudaGetDeviceProperties(done(cudart.cudaGetDevice())))
        except (BackendError, RuntimeError) as error:
            raise TargetError(f"no NVIDIA GPU can be used here ({error})", fix="see what nvidia-smi says") from error
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        self.compute_capability = (int(properties.major), int(properties.minor))

    def free_bytes(self) -> int:
        cudart = self.cudart
        return int(done(cudart.cudaMemGetInfo())[0])

    def memory(self, nbytes: int) -> Memory:
        return BoundMemory(self.cudart, nbytes)

    def pinned(self, nbytes: int) -> Pinned:
        return BoundPinned(self.cudart, nbytes)

    def stream(self) -> Stream:
        return BoundStream(self.cudart)

    def versions(self) -> dict[str, str]:
        cudart = self.cudart
        number = int(done(cudart.cudaRuntimeGetVersion()))
        return {"cuda": f"{number // 1000}.{number % 1000 // 10}"}
