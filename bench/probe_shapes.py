"""Which multiple of channels a backend's kernels reward, measured: a 3×3 convolution and a matrix product, swept.

Registers and matrix tiles hold a fixed number of channels, so cost goes up in steps: on a processor with AMX a product of
68 int8 channels takes half as long again as one of 64. For each power of two, 8 to 64, the counts half-way between two of
its multiples are compared with the mean of those two. Cost without steps grows at least as fast as the count, so that the
mean is then at least as much as what lies between: what is above it is a step. The multiple that pays is the largest one
whose median count between costs more than `STEP` on top.

Each size is compiled once in OpenVINO on one thread; then all are timed in turn, a few rounds long, and the best of each
counts, so that a disturbance of a moment hits one round and not one size. About 1 s a type and shape. Sizes above what
fits the second-level cache are left out: there memory decides, and steps blur.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perwatt.bench.fingerprint import isa
from perwatt.bench.probe import KERNEL_ENDINGS, aligned, rewarded
from perwatt.errors import BackendError

MULTIPLES = (8, 16, 32, 64)
CHANNELS = (*range(32, 52, 8), *range(48, 100, 4), *range(104, 129, 8), 160, 192)
STEP = 0.05
"""What a count between two multiples must cost above their mean for the multiple to pay."""
ROUNDS = 12
CALLS = 3
"""Timed calls of a size in one round, after one that brings its data back into the cache."""
MOST_S = 1.5
"""For the rounds of one type and shape; slow types get fewer."""
DEPTH = 4
SIDE = 14
LAYERS = {"convolution": ("Convolution",), "matmul": ("FullyConnected", "MatMul")}


def sweep(
    types: Sequence[str] | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, dict[str, Any]]]:
    """By shape ("convolution", "matmul") and type: {"multiple": None where none pays, "extra": {multiple: share},
    "latency_us": {channels: of one layer}, "kernels"}. A type that no kernel here runs in is left out. Raises
    BackendError where OpenVINO can't compile the models."""
    asked = rewarded(isa()) if types is None else tuple(types)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for shape in LAYERS:
        for kind in asked:
            progress(f"channels: {shape}, {kind}")
            measured = _times(shape, kind)
            if measured is not None:
                found.setdefault(shape, {})[kind] = measured
    return found


def judge(latency: Mapping[int, float]) -> tuple[int | None, dict[int, float]]:
    """The multiple that pays (None: none of `MULTIPLES` does), and for each multiple what a count half-way between two
    of its multiples costs above their mean, as a share: the median over the counts that `latency` has."""
    extra = {}
    for multiple in MULTIPLES:
        half = multiple // 2
        between = [n for n in latency if n % multiple == half and n - half in latency and n + half in latency]
        if between:
            shares = [2 * latency[n] / (latency[n - half] + latency[n + half]) - 1 for n in between]
            extra[multiple] = statistics.median(shares)
    paying = [multiple for multiple, share in extra.items() if share > STEP]
    return max(paying, default=None), extra


def smallest(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, int]:
    """By type, the multiple that pays in every shape that was swept: what a pass can round channels up to without
    knowing more. A type for which some shape has none is left out."""
    kinds = dict.fromkeys(kind for shapes in found.values() for kind in shapes)
    by_kind = {kind: [shapes[kind]["multiple"] for shapes in found.values() if kind in shapes] for kind in kinds}
    return {kind: min(multiples) for kind, multiples in by_kind.items() if None not in multiples}


def _times(shape: str, kind: str) -> dict[str, Any] | None:
    requests: dict[int, Any] = {}
    kernels: set[str] = set()
    for channels in CHANNELS:
        request, ran = _compiled(shape, kind, channels)
        if not ran or not all(name.lower().endswith(KERNEL_ENDINGS[kind]) for name in ran):
            return None
        requests[channels] = request
        kernels.update(ran)
    best = dict.fromkeys(CHANNELS, math.inf)
    until = time.perf_counter() + MOST_S
    for turn in range(ROUNDS):
        if turn >= 2 and time.perf_counter() > until:
            break
        for channels, request in requests.items():
            request.infer()
            for _ in range(CALLS):
                begun = time.perf_counter()
                request.infer()
                best[channels] = min(best[channels], time.perf_counter() - begun)
    multiple, extra = judge(best)
    return {
        "multiple": multiple,
        "extra": {str(n): round(share, 3) for n, share in extra.items()},
        "latency_us": {str(n): round(seconds / DEPTH * 1e6, 2) for n, seconds in sorted(best.items())},
        "kernels": sorted(kernels),
    }


def _compiled(shape: str, kind: str, channels: int) -> tuple[Any, list[str]]:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    model, values = _model(shape, kind, channels)
    try:
        compiled = ov.Core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise BackendError(f"the {kind} {shape} of {channels} channels does not compile: {words}") from error
    request = compiled.create_infer_request()
    request.set_input_tensor(values)
    request.infer()
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return request, [
        str(info["primitiveType"].astype(str))
        for info in facts
        if str(info["layerType"].astype(str)) in (*LAYERS[shape], "Convolution")
    ]


def _model(shape: str, kind: str, channels: int) -> tuple[Any, Any]:
    """A few layers in a row, as many channels in as out, so that the values stay in the backend's own layout."""
    import openvino as ov
    import openvino.opset13 as op

    rng = np.random.default_rng(0)
    dims = [1, channels, SIDE, SIDE] if shape == "convolution" else [SIDE * SIDE, channels]
    weight_dims = (channels, channels, 3, 3) if shape == "convolution" else (channels, channels)
    norm = math.sqrt(math.prod(weight_dims[1:]))
    x = op.parameter(dims, np.float32)
    y, low, high = x, np.float32(-4), np.float32(4 * 127 / 128)
    for _ in range(DEPTH):
        if kind == "int8":
            y = op.fake_quantize(y, low, high, low, high, 256)
            codes = op.constant(rng.integers(-127, 128, weight_dims).astype(np.int8))
            weight = op.multiply(op.convert(codes, "f32"), np.float32(1 / (73 * norm)))
        else:
            weight = op.constant((rng.standard_normal(weight_dims) / norm).astype(np.float32))
        y = (
            op.convolution(y, weight, [1, 1], [1, 1], [1, 1], [1, 1])
            if shape == "convolution"
            else op.matmul(y, weight, False, True)
        )
        y = op.relu(y)
    values = ov.Tensor(aligned(rng.standard_normal(dims).astype(np.float32)))
    return ov.Model([y], [x]), values
