"""A scripted stand-in for `cuda.bindings.runtime`; see `tensorrt_standin.py`, which has the machine that it runs on.

Work in a stream is done only when somebody waits for it, copies are checked against what was allocated where, and while
a stream is captured nothing runs.
"""

from __future__ import annotations

import ctypes
import enum
import types

STEP_MS = 1.0
"""Scripted time that the GPU takes for an engine's execution; a copy takes a tenth."""


class Stream:
    """Work that waits; `recording` is a list while a graph is captured."""

    def __init__(self, machine, handle):
        self.machine, self.handle = machine, handle
        self.waiting, self.recording = [], None

    def __int__(self):
        return self.handle

    def add(self, work):
        (self.waiting if self.recording is None else self.recording).append(work)

    def work_off(self, until=None):
        while self.waiting:
            work = self.waiting.pop(0)
            work()
            if work is until:
                return


def cuda_module(machine):
    """The functions of `cuda.bindings.runtime` that are used, for that machine."""
    module = types.ModuleType("cuda.bindings.runtime")

    class cudaError_t(enum.IntEnum):
        cudaSuccess = 0
        cudaErrorInvalidValue = 1
        cudaErrorNotReady = 600
        cudaErrorStreamCaptureUnsupported = 900
        cudaErrorStreamCaptureInvalidated = 901

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    fine = cudaError_t.cudaSuccess

    def allocate(where, size):
        assert size > 0
        memory = ctypes.create_string_buffer(size)
        where[ctypes.addressof(memory)] = size, memory
        return fine, ctypes.addressof(memory)

    def cudaMalloc(size):
        return allocate(machine.device, size)

    def cudaHostAlloc(size, flags):
        return allocate(machine.pinned, size)

    def cudaFree(devPtr):
        del machine.device[devPtr]
        return (fine,)

    def cudaFreeHost(ptr):
        del machine.pinned[ptr]
        return (fine,)

    def cudaMemcpyAsync(dst, src, count, kind, stream):
        up = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        machine.block(machine.device if up else machine.pinned, dst, count)
        machine.block(machine.pinned if up else machine.device, src, count)

        def copy():
            ctypes.memmove(dst, src, count)
            machine.time_ms += STEP_MS / 10

        machine.say("upload" if up else "download", count)
        stream.add(copy)
        return (fine,)

    def cudaStreamCreateWithFlags(flags):
        stream = Stream(machine, 1000 + len(machine.streams))
        machine.streams[stream.handle] = stream
        return fine, stream

    def cudaStreamDestroy(stream):
        return (fine,)

    def cudaStreamSynchronize(stream):
        if stream.recording is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        machine.say("synchronize", stream.handle)
        stream.work_off()
        return (fine,)

    def cudaEventCreateWithFlags(flags):
        return fine, types.SimpleNamespace(moment=None, work=None, stream=None, flags=flags)

    def cudaEventDestroy(event):
        return (fine,)

    def cudaEventRecord(event, stream):
        def note():
            event.moment = machine.time_ms

        event.moment, event.work, event.stream = None, note, stream
        stream.add(note)
        return (fine,)

    def cudaEventSynchronize(event):
        machine.say("wait", event.stream.handle)
        if event.moment is None:
            event.stream.work_off(event.work)
        return (fine,)

    def cudaEventElapsedTime(start, end):
        if start.moment is None or end.moment is None:
            return cudaError_t.cudaErrorNotReady, None
        return fine, end.moment - start.moment

    def cudaStreamBeginCapture(stream, mode):
        stream.recording = []
        machine.say("capture", stream.handle)
        return (fine,)

    def cudaStreamEndCapture(stream):
        recorded, stream.recording = stream.recording, None
        return (fine, recorded) if recorded else (cudaError_t.cudaErrorStreamCaptureInvalidated, None)

    def cudaGraphInstantiate(graph, flags):
        return fine, list(graph)

    def cudaGraphDestroy(graph):
        return (fine,)

    def cudaGraphExecDestroy(graphExec):
        return (fine,)

    def cudaGraphLaunch(graphExec, stream):
        machine.say("replay", stream.handle)
        for work in graphExec:
            stream.add(work)
        return (fine,)

    def cudaGetDevice():
        return fine, 0

    def cudaGetDeviceProperties(device):
        major, minor = machine.capability
        return fine, types.SimpleNamespace(name=machine.gpu.encode() + b"\0\0", major=major, minor=minor)

    def cudaMemGetInfo():
        return fine, 10_000_000_000, 20_000_000_000

    def cudaRuntimeGetVersion():
        return fine, 13020

    constants = {"cudaHostAllocDefault": 0, "cudaEventBlockingSync": 1, "cudaStreamNonBlocking": 1}
    found = {name: value for name, value in locals().items() if name.startswith("cuda")}
    vars(module).update(found | constants)
    return module
