"""A scripted machine whose GPUs real processes share (tests/bench/scripted_power.py), seen by a test."""

import importlib.util
import json
import os
import shutil
import sys

import scripted_power

SET_LIMIT, LOCK, UNLOCK = (
    "nvmlDeviceSetPowerManagementLimit",
    "nvmlDeviceSetGpuLockedClocks",
    "nvmlDeviceResetGpuLockedClocks",
)
MINE = os.getpid()


class Machine:
    """The scripted machine, seen by the test."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "gpus.json"
        self.records = folder / "cache" / "perwatt" / "power"

    def put(self, *gpus):
        gpus = [{**scripted_power.GPU, "uuid": f"GPU-{number}", **gpu} for number, gpu in enumerate(gpus)]
        self.path.write_text(json.dumps({"gpus": gpus, "refuses": [], "holds": {}, "log": []}))

    def change(self, **fields):
        with scripted_power.machine() as state:
            state["gpus"][0].update(fields)

    def refuse(self, call, code=scripted_power.GPU_IS_LOST, **whom):
        with scripted_power.machine() as state:
            state["refuses"].append({"call": call, "code": code, **whom})

    def allow_everything(self):
        with scripted_power.machine() as state:
            state["refuses"] = []

    def state(self):
        return json.loads(self.path.read_text())

    def now(self, number=0):
        """(power limit in watts, locked clock in MHz) of a GPU."""
        gpu = self.state()["gpus"][number]
        return gpu["limit_mw"] / 1e3, gpu["locked_mhz"] and gpu["locked_mhz"][0]

    def log(self):
        """What was set, as (call, value), in order."""
        return [(call, value) for _, call, _, value, *_ in self.state()["log"]]

    def left(self):
        return [path.name for path in self.records.glob("*") if path.suffix != ".lock"]


def scripted_machine(monkeypatch, tmp_path):
    """A machine with one GPU of 300 W behind `import pynvml`, here and in every process started from here."""
    shutil.copy(scripted_power.__file__, tmp_path / "pynvml.py")
    specification = importlib.util.spec_from_file_location("pynvml", tmp_path / "pynvml.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SCRIPTED_GPUS", str(tmp_path / "gpus.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = Machine(tmp_path)
    machine.put({})
    return machine
