"""Our use of TensorRT against its real Python bindings, of both generations: they import without a GPU where the three
libraries that they link are there, so empty ones are built on the spot. Likewise CUDA's own bindings, and torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TARGETS = Path(str(files("perwatt.targets")))
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRIES = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
BINDINGS = {11: "tensorrt-cu13-bindings>=11,<12", 10: "tensorrt-cu12-bindings>=10,<11"}


def ours():
    """Every file of the target's, the run script included."""
    found = sorted([*TARGETS.glob("tensorrt*.py"), *TARGETS.glob("_tensorrt*.py"), *TARGETS.glob("tensorrt_*.txt")])
    assert len(found) > 8
    return found


def installed(cache, requirements, name):
    """A folder with these packages from the registry, made once; skips where they can't be had."""
    folder = cache.mkdir("perwatt-tensorrt") / f"{name}-{sys.version_info.major}{sys.version_info.minor}"
    if not folder.exists():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", str(aside), *requirements]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"pip could not get {requirements}: {error}")
        if done.returncode:
            shutil.rmtree(aside, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"no wheel of {requirements} for this Python, or no network: {last}")
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
    return folder


def empty_libraries(folder, generation):
    """Libraries of the names that the bindings link, in which every entry returns null; skips without a C compiler."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler to build the empty libraries that TensorRT's bindings link")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{entry}(void) {{ return 0; }}\n" for entry in ENTRIES))
    for library in LIBRARIES:
        soname = f"lib{library}.so.{generation}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(folder / soname), str(source)]
        subprocess.run(command, check=True, timeout=60)


def ask(request, packages, libraries):
    """The answer of `tensorrt_contract.py`, in a process of its own; skips where the bindings don't import."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(libraries)}
    tried = [sys.executable, "-c", f"import {request['library']}"]
    done = subprocess.run(tried, capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode:
        pytest.skip(f"{request['library']} does not import here: {done.stderr.strip().splitlines()[-1]}")
    command = [sys.executable, str(HERE / "tensorrt_contract.py"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=[11, 10])
def bindings(request, tmp_path):
    """Asks the real bindings of a generation: `bindings(files, **options)`."""
    packages = installed(request.config.cache, [BINDINGS[request.param]], f"tensorrt-{request.param}")
    empty_libraries(tmp_path, request.param)

    def check(sources, **options):
        listed = {"library": "tensorrt_bindings", "alias": "trt", "files": [str(file) for file in sources]}
        return ask(listed | options, packages, tmp_path)

    check.generation = request.param
    return check


def test_every_use_of_tensorrt_is_as_its_bindings_have_it(bindings):
    answer = bindings(ours(), stand_in=True)
    assert answer["problems"] == []
    # The stand-in that the flow runs against has nothing that the real classes have not.
    assert answer["stand_in"] == []
    assert answer["uses"] > 100 and {"set_shape", "execute_async_v3", "SPARSE_WEIGHTS"} <= set(answer["names"])


@pytest.mark.slow
def test_any_name_of_tensorrt_misspelt_is_noticed(bindings):
    if bindings.generation != 11:
        pytest.skip("once is enough")
    answer = bindings(ours(), mutate=True)
    assert answer["unnoticed"] == [] and answer["mutated"] == answer["uses"]


WRONG = [
    ("_tensorrt_build.py", "trt.BuilderFlag.SPARSE_WEIGHTS", "trt.BuilderFlag.SPARSE_WEIGHT", "no SPARSE_WEIGHT"),
    ("_tensorrt_build.py", "create_optimization_profile", "create_optimisation_profile", "no create_optimisation"),
    ("_tensorrt_build.py", "ignore_mismatch=False", "strict=True", "no argument strict"),
    ("_tensorrt_build.py", "(name, low, usual, high)", "(name, low, high)", "4 to 4|takes 4"),
    ("_tensorrt_build.py", "OnnxParser(network, log.logger)", "OnnxParser(log.logger, network)", "network is INetwork"),
    ("_tensorrt_build.py", "config.profiling_verbosity =", "config.num_optimization_profiles =", "can't be set"),
    ("_tensorrt_build.py", "network: trt.INetworkDefinition", "network: Any", "annotate network"),
    ("_tensorrt_slot.py", "(port.name, self._memory[port.name].address)", "(port.name)", "1 arguments given"),
    ("_tensorrt_slot.py", "self.context: trt.IExecutionContext =", "self.context: Any =", "annotate"),
    ("_tensorrt_bindings.py", "def log(self, severity: Any, msg: str)", "def log(self, msg: str)", "ILogger.log takes"),
    ("_tensorrt_engine.py", "LayerInformationFormat.JSON", "LayerInformationFormat.YAML", "no YAML"),
    ("tensorrt_run.py.txt", "trt.nptype", "trt.np_type", "no np_type"),
]


def test_what_is_wrong_in_a_copy_of_our_files_is_named(bindings):
    answer = bindings(ours(), changes=[change[:3] for change in WRONG])
    assert len(answer["changes"]) == len(WRONG)
    for (file, _, wrong, words), problems in zip(WRONG, answer["changes"], strict=True):
        assert any(problem.startswith(f"{file}:") and re.search(words, problem) for problem in problems), (
            wrong,
            problems,
        )


def test_every_use_of_cuda_is_as_its_bindings_have_it(request, tmp_path):
    packages = installed(request.config.cache, ["cuda-bindings", "cuda-pathfinder"], "cuda")
    listed = {"library": "cuda.bindings.runtime", "alias": "cudart", "files": [str(file) for file in ours()]}
    answer = ask(listed | {"mutate": True, "stand_in": True}, packages, tmp_path)
    assert answer["problems"] == answer["stand_in"] == answer["unnoticed"] == []
    assert answer["mutated"] == answer["uses"] > 40


def test_every_use_of_torch_for_cuda_is_as_torch_has_it(tmp_path):
    listed = {"library": "torch", "alias": "torch", "files": [str(file) for file in ours()], "mutate": True}
    answer = ask(listed, tmp_path, tmp_path)
    assert answer["problems"] == answer["unnoticed"] == []
    assert {"CUDAGraph", "mem_get_info"} <= set(answer["names"])
