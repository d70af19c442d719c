"""CUDA for the TensorRT target by torch, where NVIDIA's own bindings are not installed. See `_tensorrt_cuda.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perwatt.errors import BackendError
from perwatt.targets._tensorrt_cuda import Device, Event, Memory, Pinned, Stream


class TorchMemory(Memory):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)
        self.tensor = torch.empty(self.nbytes, dtype=torch.uint8, device="cuda")
        self.address = int(self.tensor.data_ptr())


class TorchPinned(Pinned):
    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True)
        self.array = self.tensor.numpy()


class TorchEvent(Event):
    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)

    def record(self) -> None:
        self.event.record(self.stream)

    def wait(self) -> None:
        self.event.synchronize()

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, TorchEvent)
        return float(earlier.event.elapsed_time(self.event))


class TorchStream(Stream):
    """A stream of torch's."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.handle = int(self.stream.cuda_stream)

    def upload(self, memory: Memory, pinned: Pinned, nbytes: int) -> None:
        assert isinstance(memory, TorchMemory) and isinstance(pinned, TorchPinned)
        with torch.cuda.stream(self.stream):
            memory.tensor[:nbytes].copy_(pinned.tensor[:nbytes], non_blocking=True)

    def download(self, pinned: Pinned, memory: Memory, nbytes: int) -> None:
        assert isinstance(memory, TorchMemory) and isinstance(pinned, TorchPinned)
        with torch.cuda.stream(self.stream):
            pinned.tensor[:nbytes].copy_(memory.tensor[:nbytes], non_blocking=True)

    def event(self) -> Event:
        return TorchEvent(self.stream)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise BackendError(f"CUDA failed: {str(error).splitlines()[0]}") from error

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay


class TorchDevice(Device):
    """The current GPU by torch."""

    def __init__(self) -> None:
        self.name = str(torch.cuda.get_device_name())
        large, small = torch.cuda.get_device_capability()
        self.compute_capability = (int(large), int(small))

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def memory(self, nbytes: int) -> Memory:
        return TorchMemory(nbytes)

    def pinned(self, nbytes: int) -> Pinned:
        return TorchPinned(nbytes)

    def stream(self) -> Stream:
        return TorchStream()

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
