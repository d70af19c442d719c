"""What tests of whole runs share: a tiny network with samples, the command line as a process, a third-party package."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

CLASSES = 4
SIDE = 8


def conv_net(seed: int = 0) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, mean, Gemm over x:float32[n,1,8,8]; y:float32[n,4]."""
    random = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["conv"], name="/conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "scale", "shift", "mean", "var"], ["norm"], name="/norm"),
        helper.make_node("Relu", ["norm"], ["relu"], name="/relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="/pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="/flat"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], name="/fc", transB=1),
    ]
    weights = [
        weight("conv.weight", 8, 1, 3, 3), weight("scale", 8), weight("shift", 8), weight("mean", 8),
        numpy_helper.from_array(np.linspace(0.5, 2, 8, dtype=np.float32), "var"),
        weight("fc.weight", CLASSES, 8), weight("fc.bias", CLASSES),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def images(count: int, seed: int = 1) -> np.ndarray:
    """Inputs for `conv_net`."""
    return np.random.default_rng(seed).standard_normal((count, 1, SIDE, SIDE)).astype(np.float32)


def outputs(model: Path, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of `x`, without fusing anything."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def put_net(folder: Path, count: int = 200) -> Path:
    """`net.onnx`, whose classes are about equally common, and `samples.npz` with labels that it gets right nine times
    out of ten."""
    model, x = conv_net(), images(count)
    onnx.save(model, str(folder / "net.onnx"))
    logits = outputs(folder / "net.onnx", x)
    bias = next(weight for weight in model.graph.initializer if weight.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - np.median(logits, axis=0), "fc.bias"))
    onnx.save(model, str(folder / "net.onnx"))
    labels = outputs(folder / "net.onnx", x).argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % CLASSES
    np.savez(folder / "samples.npz", x=x, labels=labels)
    return folder / "net.onnx"


def command(*arguments: object) -> list[str]:
    """`optimize …`, whether or not the script is on the path."""
    return [sys.executable, "-m", "perwatt.cli", *map(str, arguments)]


def optimize(
    *arguments: object, cwd: Path, path: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `cwd`; `path` is importable there and in the workers."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(path), capture_output=True, text=True, timeout=timeout
    )


def environment(path: Path | None = None) -> dict[str, str]:
    """This process's environment, with `path` importable."""
    known = os.environ.get("PYTHONPATH")
    parts = [str(part) for part in (path, known) if part]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(parts)} if parts else {})}


def package(folder: Path, group: str, name: str, source: str) -> Path:
    """A third-party package that is not installed but importable from `folder`: the module, and what it announces."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    classes = [
        line.split("(")[0].removeprefix("class ")
        for line in textwrap.dedent(source).split("\n")
        if line.startswith("class ")
    ]
    (facts / "entry_points.txt").write_text(f"[perwatt.{group}]\n{name} = {module}:{classes[0]}\n")
    return folder


def workers_of(text: str) -> list[psutil.Process]:
    """Worker processes whose environment mentions `text`, or a path below it."""

    def mentions(value: str) -> bool:
        return value == text or value.startswith(f"{text}/")

    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "perwatt.worker" in (process.info["cmdline"] or []) and any(map(mentions, process.environ().values())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(processes: list[psutil.Process], within_s: float = 20) -> bool:
    """Whether all have ended; waits for a while."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not alive


def until(condition, within_s: float = 60):
    """Wait for something true; returns it."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def files_in(folder: Path) -> set[str]:
    """Names of all files below `folder`, as posix paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit code `code`, and one line on standard error that holds `words`."""
    lines = done.stderr.strip().split("\n")
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("optimize: ")
    for word in words:
        assert word in lines[0], lines[0]
