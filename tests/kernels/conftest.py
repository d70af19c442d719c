"""Kernels for GPUs run here under Numba's CUDA simulator, in a process of its own: it replaces CUDA when Numba is imported."""

import os
import pickle
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, pickle, sys
calls = pickle.load(sys.stdin.buffer)
found = [getattr(importlib.import_module(module), name)(*args, **kwargs) for module, name, args, kwargs in calls]
sys.stdout.buffer.write(pickle.dumps(found))
"""


def simulate(calls):
    """What these calls, each (module, function, positional arguments, named arguments), return under the CUDA simulator."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=pickle.dumps(calls),
        capture_output=True,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return pickle.loads(done.stdout)


@pytest.fixture(scope="session")
def simulated():
    """`simulated([(module, function, args, kwargs), …])`: many calls in one process, which takes a second to start."""
    return simulate
