"""A stand-in for the module pynvml whose machine lies in a file, so that several processes see and set the same GPUs.

A test copies this file as `pynvml.py` to where PYTHONPATH leads; the machine is the JSON file that SCRIPTED_GPUS names:
`gpus` as below, a `log` of who set what, and `refuses`: {"call", "code", and "pid" or "unless_pid"}. A call that `holds`
names waits, in every process but the given one, until the file `hold` beside it is gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

NVML_DEVICE_MIG_ENABLE = 1
nvmlClocksEventReasonApplicationsClocksSetting = 2

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, LIBRARY_NOT_FOUND, GPU_IS_LOST = 2, 3, 4, 6, 12, 15
WORDS = {
    1: "Uninitialized", INVALID_ARGUMENT: "Invalid Argument", NOT_SUPPORTED: "Not Supported", NOT_FOUND: "Not Found",
    NO_PERMISSION: "Insufficient Permissions", LIBRARY_NOT_FOUND: "NVML Shared Library Not Found",
    GPU_IS_LOST: "GPU is lost",
}  # fmt: skip

GPU = {
    "uuid": "GPU-0", "name": "NVIDIA Scripted", "limit_mw": 300_000, "default_mw": 300_000, "limits_mw": [100_000, 300_000],
    "locked_mhz": None, "memory_mhz": [5001, 9001], "clocks_mhz": list(range(1980, 200, -15)), "event_reasons": 1,
    "mig": None, "stays": False,
}  # fmt: skip

_started = 0


class NVMLError(Exception):
    def __init__(self, code):
        super().__init__(WORDS[code])


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


def _fail(code):
    raise {NOT_SUPPORTED: NVMLError_NotSupported, NO_PERMISSION: NVMLError_NoPermission}.get(code, NVMLError)(code)


@contextlib.contextmanager
def machine():
    """The machine, written back at the end; one process at a time."""
    path = Path(os.environ["SCRIPTED_GPUS"])
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(path.read_text())
        yield state
        path.with_suffix(".aside").write_text(json.dumps(state))
        path.with_suffix(".aside").replace(path)


@contextlib.contextmanager
def _call(name, uuid=None, *given):
    """The machine, or the GPU, in a call of that name; a call that is `given` something is logged."""
    hold, me = Path(os.environ["SCRIPTED_GPUS"]).with_name("hold"), os.getpid()
    with machine() as state:
        holds = state["holds"].get(name, me) != me
    while holds and hold.exists():
        time.sleep(0.005)
    with machine() as state:
        for rule in state["refuses"]:
            concerns = rule.get("pid", me) == me and rule.get("unless_pid") != me and rule.get("uuid", uuid) == uuid
            if rule["call"] == name and concerns:
                _fail(rule["code"])
        if name != "nvmlInit" and not _started:
            _fail(1)
        if given:
            state["log"].append([me, name, uuid, *given])
        yield state if uuid is None else next(gpu for gpu in state["gpus"] if gpu["uuid"] == uuid)


def nvmlInit():
    global _started
    with _call("nvmlInit"):
        _started += 1


def nvmlShutdown():
    global _started
    with _call("nvmlShutdown"):
        _started -= 1


def nvmlDeviceGetCount():
    with _call("nvmlDeviceGetCount") as state:
        return len(state["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    with _call("nvmlDeviceGetHandleByIndex") as state:
        return state["gpus"][index]["uuid"] if index < len(state["gpus"]) else _fail(INVALID_ARGUMENT)


def nvmlDeviceGetHandleByUUID(uuid):
    with _call("nvmlDeviceGetHandleByUUID") as state:
        return uuid if any(gpu["uuid"] == uuid for gpu in state["gpus"]) else _fail(NOT_FOUND)


def nvmlDeviceGetUUID(handle):
    with _call("nvmlDeviceGetUUID", handle) as gpu:
        return gpu["uuid"]


def nvmlDeviceGetName(handle):
    with _call("nvmlDeviceGetName", handle) as gpu:
        return gpu["name"]


def nvmlDeviceGetMigMode(handle):
    with _call("nvmlDeviceGetMigMode", handle) as gpu:
        return [gpu["mig"], gpu["mig"]] if gpu["mig"] is not None else _fail(NOT_SUPPORTED)


def nvmlDeviceGetPowerManagementLimit(handle):
    with _call("nvmlDeviceGetPowerManagementLimit", handle) as gpu:
        return gpu["limit_mw"]


def nvmlDeviceGetPowerManagementLimitConstraints(handle):
    with _call("nvmlDeviceGetPowerManagementLimitConstraints", handle) as gpu:
        return gpu["limits_mw"]


def nvmlDeviceGetPowerManagementDefaultLimit(handle):
    with _call("nvmlDeviceGetPowerManagementDefaultLimit", handle) as gpu:
        return gpu["default_mw"]


def nvmlDeviceSetPowerManagementLimit(handle, limit):
    with _call("nvmlDeviceSetPowerManagementLimit", handle, limit) as gpu:
        if not gpu["limits_mw"][0] <= limit <= gpu["limits_mw"][1]:
            _fail(INVALID_ARGUMENT)
        gpu["limit_mw"] = gpu["limit_mw"] if gpu["stays"] else limit


def nvmlDeviceSetGpuLockedClocks(handle, minGpuClockMHz, maxGpuClockMHz):
    with _call("nvmlDeviceSetGpuLockedClocks", handle, minGpuClockMHz, maxGpuClockMHz) as gpu:
        gpu["locked_mhz"] = [minGpuClockMHz, maxGpuClockMHz]


def nvmlDeviceResetGpuLockedClocks(handle):
    with _call("nvmlDeviceResetGpuLockedClocks", handle, None) as gpu:
        gpu["locked_mhz"] = None


def nvmlDeviceGetSupportedMemoryClocks(handle):
    with _call("nvmlDeviceGetSupportedMemoryClocks", handle) as gpu:
        return gpu["memory_mhz"]


def nvmlDeviceGetSupportedGraphicsClocks(handle, memoryClockMHz):
    with _call("nvmlDeviceGetSupportedGraphicsClocks", handle) as gpu:
        return gpu["clocks_mhz"] if memoryClockMHz == max(gpu["memory_mhz"]) else gpu["clocks_mhz"][-3:]


def nvmlDeviceGetCurrentClocksEventReasons(handle):
    with _call("nvmlDeviceGetCurrentClocksEventReasons", handle) as gpu:
        return gpu["event_reasons"]
