"""How many operations a model asks for, how many one core could do at most, and which operators take the time.

Operations are those of convolutions and matrix products, counted from the graph by its shapes; a multiplication and
its addition are two. All else (activations, normalization, softmax) counts as none, which is what makes it hold down the
share of the peak.

    python _operations.py MODEL.xml OPERATING_POINT      prints the operators by time, as JSON
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

AMX_OPERATIONS_PER_CYCLE = {"int8": 2048, "bf16": 1024}
"""One core's matrix unit: a tile product of 16 × 16 × 64 bytes every 16 cycles (Intel 64 and IA-32 Architectures
Optimization Reference Manual, "Intel AMX"): 1024 multiply-adds in int8, 512 in bf16. f32 has no unit of its own."""
CHAIN_STEPS = 400_000
CHAIN_CYCLES = 4
"""A multiplication (3 cycles) and an addition (1), each waiting for the one before: on Intel's cores since 2006 and on
AMD's since 2017 a chain of steps takes just that, whatever else the core can do at once."""


# Operations -----------------------------------------------------------------------------------------------------------


def count_operations(path: Path, batch: int = 1) -> dict[str, int]:
    """Operations of one call with `batch` items, by operator type, for an ONNX file or an OpenVINO IR. Shapes are those
    that OpenVINO infers, since onnx's own inference stops at the first shape that is computed (the padding of a CIFAR
    ResNet's shortcut). Raises ValueError where one stays open, or for a matrix operator that isn't known here."""
    import openvino as ov

    model = ov.Core().read_model(path)
    reshape_batch(model, batch)
    found: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in UNCOUNTED:
            raise ValueError(f"{path.name}: operations of {kind} are not counted here")
        if kind in COUNTED:
            ports = [node.input_value(i) for i in range(node.get_input_size())]
            found[kind] += 2 * COUNTED[kind](node, [_shape(p, path) for p in ports[:3]], _shape(node.output(0), path))
    return dict(found)


def reshape_batch(model: Any, batch: int) -> None:
    """Make the leading dimension of every input `batch` where it is dynamic."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        if len(shape) and shape[0].is_dynamic:
            shape[0] = batch
        shapes[port] = shape
    model.reshape(shapes)


def _shape(port: Any, path: Path) -> list[int]:
    shape = port.get_partial_shape()
    if shape.is_dynamic:
        raise ValueError(f"{path.name}: the shape of {port.get_node().get_friendly_name()} can't be inferred")
    return list(shape.to_shape())


def _convolution(node: Any, inputs: list[list[int]], out: list[int]) -> int:
    return math.prod(out) * math.prod(inputs[1][1:])


def _group_convolution(node: Any, inputs: list[list[int]], out: list[int]) -> int:
    # [groups, outputs of a group, inputs of a group, kernel…]
    return math.prod(out) * math.prod(inputs[1][2:])


def _matrix_product(node: Any, inputs: list[list[int]], out: list[int]) -> int:
    across = node.get_attributes()["transpose_a"] and len(inputs[0]) > 1
    return math.prod(out) * inputs[0][-2 if across else -1]


def _attention(node: Any, inputs: list[list[int]], out: list[int]) -> int:
    query, key, value = inputs
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


COUNTED = {
    "Convolution": _convolution, "GroupConvolution": _group_convolution, "MatMul": _matrix_product,
    "ScaledDotProductAttention": _attention,
}  # fmt: skip
"""Operator type → multiply-adds, from the shapes of its inputs and of its output."""
UNCOUNTED = {
    "ConvolutionBackpropData", "GroupConvolutionBackpropData", "LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell",
    "GRUCell", "RNNCell", "DeformableConvolution", "Einsum", "Loop", "TensorIterator", "If",
}  # fmt: skip


# Peaks ----------------------------------------------------------------------------------------------------------------


def clock_ghz(repeats: int = 2000) -> float:
    """The clock that one core runs at under light load, measured by a chain of dependent instructions; the best of many
    short repeats, since most of them are disturbed on a machine that is shared. Under the matrix unit's load a core may
    run slower, so a share of a peak at this clock is not overstated."""
    import numba

    @numba.njit(cache=False)
    def chain(steps: int, seed: int) -> int:
        value = np.uint64(seed)
        for _ in range(steps):
            # A square, because a compiler sums up several steps of a linear chain in one.
            value = value * value + np.uint64(1442695040888963407)
        return value

    chain(10, 1)
    best = math.inf
    for number in range(repeats):
        begun = time.perf_counter()
        chain(CHAIN_STEPS, number)
        best = min(best, time.perf_counter() - begun)
    return CHAIN_STEPS * CHAIN_CYCLES / best / 1e9


def theoretical_tops(ghz: float, isa: Sequence[str]) -> dict[str, float]:
    """Tera-operations a second of one core's AMX unit, by type; empty where there is none."""
    kinds = [kind for kind in AMX_OPERATIONS_PER_CYCLE if f"amx_{kind}" in isa]
    return {kind: AMX_OPERATIONS_PER_CYCLE[kind] * ghz / 1e3 for kind in kinds}


# Operators by time ----------------------------------------------------------------------------------------------------


def operators_by_time(model: Path, point: dict[str, Any], calls: int = 10) -> list[dict[str, Any]]:
    """Layer type and kernel of an OpenVINO IR, with their share of the time of one call at that operating point, most
    first; one stream with that stream's threads, since the times of calls side by side would hold each other's waits."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    reshape_batch(network, point["batch"])
    threads = max(1, (point.get("threads") or 1) // (point.get("streams") or 1))
    settings = {"PERF_COUNT": True, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    if point.get("floating_precision"):
        settings["INFERENCE_PRECISION_HINT"] = point["floating_precision"]
    compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    spent: Counter[tuple[str, str]] = Counter()
    for number in range(calls + 1):
        request.infer(
            {i: np.ones(list(port.shape), port.element_type.to_dtype()) for i, port in enumerate(compiled.inputs)}
        )
        for layer in request.profiling_info if number else ():
            if layer.status == ov.ProfilingInfo.Status.EXECUTED:
                spent[layer.node_type, layer.exec_type] += layer.real_time.total_seconds()
    whole = sum(spent.values()) or 1.0
    return [
        {
            "layer": layer,
            "kernel": kernel,
            "share": round(seconds / whole, 4),
            "ms_per_call": round(seconds / calls * 1e3, 4),
        }
        for (layer, kernel), seconds in spent.most_common()
    ]


if __name__ == "__main__":
    print(json.dumps(operators_by_time(Path(sys.argv[1]), json.loads(sys.argv[2]))))
