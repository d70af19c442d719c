"""Every CUDA kernel is typed, lowered and compiled to PTX, with the types that host code launches it with, for compute
capability 8.0; what was lowered for that is compiled to PTX for 9.0 as well.

Numba's simulator takes any Python; the compiler doesn't: `min` and `max` are an example. `cuda_compiling.py` says how that is
had without a GPU, and which pieces of Numba it replaces. Where one of them moves in a new version of Numba these tests fail
and say which, and the script has to follow.

What this does not show: that NVVM, whose language differs in details, takes what LLVM takes; that the PTX assembles, has the
registers it needs, runs, and gives the right results (the simulator's tests show the last for the Python in it).
"""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perwatt.kernels import histogram, normalize_images, sparse_gpt
from perwatt.kernels.group_quantize import Scheme

SCRIPT = Path(__file__).with_name("cuda_compiling.py")
KERNELS = Path(histogram.__file__).parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("numba_cuda") is not None,
        reason="numba-cuda has taken the place of Numba's own CUDA target, and compiles by other pieces",
    ),
    pytest.mark.skipif(importlib.util.find_spec("numba.cuda") is None, reason="this Numba has no CUDA target"),
]


def launched(calls):
    """What `cuda_compiling.py` finds; AssertionError with its words where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)],
        input=pickle.dumps(calls),
        capture_output=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return pickle.loads(done.stdout)


def call(module, name, *args, **kwargs):
    return f"perwatt.kernels.{module}", name, args, kwargs


def there(module, name, *args):
    """The same with arrays that lie on the device already."""
    return "__main__", "on_device", (f"perwatt.kernels.{module}", name, *args), {}


def calls():
    """Each kernel, with each type and layout of its arguments that host code makes of what it is given."""
    made = []
    for kind in (np.float32, np.float64):
        x = np.ones((70, 3, 130), kind)
        made += [call("channel_statistics", "compute_cuda", x, axis) for axis in (1, 2)]
    for shape in ((70, 3, 130), (70, 3)):
        most = histogram.empty(histogram.MOST_BINS, 3)
        made.append(call("histogram", "compute_cuda", most, np.ones(shape, np.float16), 1))
    for kind in (np.int64, np.uint64):
        counts, edges = np.ones((3, 300), kind), [np.full(3, -1.0), np.full(3, 1.0)]
        for symmetric in (True, False):
            low = edges[0] if symmetric else 0 * edges[0]
            made.append(there("clip_search", "compute_mse_cuda", counts, low, edges[1], 16, symmetric))
            made.append(there("clip_search", "compute_entropy_cuda", counts, low, edges[1], 16, symmetric))
    for symmetric in (True, False):
        for ordered in (True, False):
            settings = {"group_size": 4, "search": True, "symmetric": symmetric, "ordered": ordered}
            made.append(call("gptq", "compute_cuda", np.ones((3, 12), np.float32), np.eye(12), 4, **settings))
        made.append(call("gptq", "compute_cuda", np.ones((0, 12), np.float32), np.eye(12), symmetric=symmetric))
    for kind in ("int4", "uint4", "int8", "uint8"):
        for axis in (0, 1):
            made.append(
                call("group_quantize", "compute_cuda_quantize", np.ones((70, 9)), 32, axis, Scheme(kind, search=True))
            )
    for kind in (np.int8, np.uint8):
        codes, scales, zeros = np.ones((8, 6), kind), np.ones((2, 6), np.float32), np.ones((2, 6), kind)
        made += [call("group_quantize", "compute_cuda_dequantize", codes, scales, given, 4) for given in (None, zeros)]
        made.append(call("group_quantize", "compute_cuda_pack", codes))
        made.append(call("group_quantize", "compute_cuda_unpack", np.ones(5, np.uint8), (9,), f"{kind.__name__[:-1]}4"))
    ones = np.ones((6, 12), np.float32)
    made += [call("n_of_m", "compute_cuda", ones, 2, 4), call("n_of_m", "compute_pruned_cuda", ones, ones, 2, 4)]
    for pattern in (sparse_gpt.Pattern(ratio=0.5), sparse_gpt.Pattern(n=2, m=4)):
        made.append(call("sparse_gpt", "compute_cuda", ones, np.eye(12), pattern))
    for shape, axis in (((70, 3, 130), 1), ((70, 9), 1)):
        made.append(
            call("importance", "compute_cuda", np.ones(shape, np.float32), axis, norms=np.ones(70), norms_axis=0)
        )
    for channels in normalize_images.CHANNELS:
        for kind in (np.float32, np.float16):
            levels = normalize_images.normalization(0.5, 0.25, kind)
            pictures = np.ones((2, 5, 7, channels), np.uint8)
            made.append(call("normalize_images", "compute_cuda", pictures, levels, swap_red_blue=channels > 1))
    return made


@pytest.fixture(scope="module")
def found():
    return launched(calls())


def by_kernel(found):
    return {launch["kernel"]: launch for launch in found["launches"]}


def test_every_kernel_compiles(found):
    modules = {path.stem for path in KERNELS.glob("*.py") if "cuda.jit" in path.read_text()}
    launching = {name.partition(".")[0] for name in by_kernel(found)}
    assert launching == modules - {"_cuda_functions"}, "a file has CUDA kernels that calls() doesn't launch"
    assert found["left"] == [], "no call needed these, so they were not compiled"
    assert len(by_kernel(found)) == 23


def test_all_types_of_arguments_were_met(found):
    met = {}
    for launch in found["launches"]:
        met.setdefault(launch["kernel"], set()).add(launch["types"][0].removeprefix("array(").split(",")[0])
    assert met["_channel_statistics_cuda.runs"] == met["_channel_statistics_cuda.columns"] == {"float32", "float64"}
    assert met["_histogram_cuda.count_runs"] == met["_histogram_cuda.survey_columns"] == {"float32"}
    assert met["_clip_search_cuda.tables"] == met["_clip_search_cuda.sums"] == {"int64", "uint64"}
    assert met["_group_quantize_cuda._pack"] == {"int8", "uint8"}
    results = {launch["types"][-1] for launch in found["launches"] if launch["kernel"] == "normalize_images.kernel"}
    assert results == {"array(float32, 3d, C)", "array(uint16, 3d, C)"}


def test_launches_keep_the_limits_of_a_gpu(found):
    for launch in found["launches"]:
        x, y, z = launch["grid"]
        assert 1 <= x < 2**31 and 1 <= y <= 65535 and 1 <= z <= 65535, launch
        assert 1 <= launch["block"] <= 1024 and launch["shared_bytes"] <= 48 * 1024, launch
    # What is declared is found: a table of as many counters of 4 bytes as there are bins, and the pictures' of all levels.
    assert by_kernel(found)["_histogram_cuda.count_runs"]["shared_bytes"] == 4 * histogram.MOST_BINS
    assert by_kernel(found)["_group_quantize_cuda._quantize"]["shared_bytes"] == 32 * 33 * 4 + 2 * 32 * 8


def test_nothing_is_called_that_numba_and_libdevice_lack(found):
    from numba.cuda.libdevicefuncs import functions

    called = set().union(*(launch["unresolved"] for launch in found["launches"]))
    # Numba writes its atomic functions itself, where NVVM takes over.
    assert {name for name in called if not name.startswith("___numba_atomic_")} <= set(functions)
    assert {"__nv_llrint", "__nv_log", "___numba_atomic_float_max"} <= called


def test_float32_stays_float32(found):
    kernels = by_kernel(found)
    single = (
        "_histogram_cuda.", "normalize_images.", "_group_quantize_cuda._pack", "_group_quantize_cuda._deq", "_n_of_m_cuda.",
        "_sparse_gpt_cuda.",
    )  # fmt: skip
    assert {name: its["double"] for name, its in kernels.items() if name.startswith(single) and its["double"]} == {}
    # The step of asymmetric codes is a difference and a quotient in float64, as the reference's is; nothing else is.
    for name in ("_gptq_cuda.block", "_gptq_cuda.find_scales"):
        assert sorted(operation.split(".")[0] for operation in kernels[name]["double"]) == ["div", "sub"], name


def test_more_than_65535_candidates_fit_in_a_launch():
    counts, low, high = np.ones((2, 70_000), np.int64), np.zeros(2), np.ones(2)
    fractions = np.linspace(1e-3, 1, 66_000)
    found = launched(
        [
            call("clip_search", "compute_entropy_cuda", counts, low, high, 16, False),
            call("clip_search", "compute_mse_cuda", counts, low, high, 16, False, fractions),
        ]
    )
    assert by_kernel(found)["_clip_search_cuda.search"]["grid"] == (2 * 66_000, 1, 1)
    assert by_kernel(found)["_clip_search_cuda.divergences"]["grid"] == (2 * (70_000 - 16 + 1), 1, 1)


def test_what_does_not_compile_is_told(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "from numba import cuda, float32\n@cuda.jit\ndef kernel(x):\n"
        "    room = cuda.shared.array(len(x), float32)\n    room[0] = x[0]\ndef run(x):\n    kernel[1, 32](x)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(AssertionError, match=r"shared\.array at .* found for signature"):
        launched([("wrong", "run", (np.ones(3),), {})])
