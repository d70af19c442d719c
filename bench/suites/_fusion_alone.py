"""What each pass brings by itself: a small graph with what it looks for, as exporters write it, before and after that one pass.

A layer of the size that it has in a real network stands around it, because backends fuse into what comes before. Passes
whose operators stand in _fusion_forms.py are measured there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _fusion_counts as counts
import numpy as np
from _fusion_forms import (
    BATCH,
    CHANNELS,
    HEADS,
    NARROW,
    SCALE,
    SEQUENCE,
    SIDE,
    SIZE,
    WIDTH,
    Form,
    Graph,
    between_convolutions,
    between_products,
    compared,
    heads,
    joined,
    normal,
)  # fmt: skip
from _fusion_speed import Effort, fed, words

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.measurement import Ratio
from perwatt.recipe import PassStep

SHIFT = normal(WIDTH, scale=0.1)
SPREAD = normal(96, CHANNELS, 3, 3, scale=0.05)
BESIDE = normal(96, CHANNELS, 1, 1, scale=0.1)
PER_CHANNEL = 1 + np.abs(normal(96, scale=0.1))
DENSE = normal(WIDTH, WIDTH, scale=0.03)


def layer_normalization(graph: Graph) -> str:
    total = graph.op("Add", "x", "r")
    centred = graph.op("Sub", total, graph.op("ReduceMean", total, np.int64([-1])))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), np.int64([-1]))
    even = graph.op("Div", centred, graph.op("Sqrt", graph.op("Add", variance, 1e-5)))
    return str(graph.op("MatMul", graph.op("Add", graph.op("Mul", even, SCALE), SHIFT), NARROW))


def instance_normalization(graph: Graph) -> str:
    x = graph.op("Conv", "x", BESIDE)
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, np.int64([2, 3])))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), np.int64([2, 3]))
    even = graph.op("Div", centred, graph.op("Sqrt", graph.op("Add", variance, 1e-5)))
    scale, shift = PER_CHANNEL[None, :, None, None], np.zeros((1, 96, 1, 1), np.float32) + np.float32(0.1)
    return str(graph.op("Relu", graph.op("Add", graph.op("Mul", even, scale), shift)))


def gelu(graph: Graph, x: str) -> str:
    erf = graph.op("Erf", graph.op("Div", x, math.sqrt(2)))
    return str(graph.op("Mul", graph.op("Mul", x, graph.op("Add", erf, 1.0)), 0.5))


def mish(graph: Graph, x: str) -> str:
    return str(graph.op("Mul", x, graph.op("Tanh", graph.op("Softplus", x))))


def batchnorm(graph: Graph) -> str:
    found = graph.op("Conv", "x", SPREAD, pads=[1, 1, 1, 1])
    statistics = PER_CHANNEL, 0 * PER_CHANNEL, 0.1 * PER_CHANNEL, PER_CHANNEL
    return str(graph.op("Relu", graph.op("BatchNormalization", found, *statistics, epsilon=1e-5)))


def scales(graph: Graph) -> str:
    found = graph.op("MatMul", graph.op("Mul", "x", SCALE), DENSE)
    return str(graph.op("MatMul", graph.op("Add", graph.op("Mul", found, SCALE), SHIFT), NARROW))


def pad(graph: Graph) -> str:
    return str(graph.op("Relu", graph.op("Conv", graph.op("Pad", "x", np.int64([0, 0, 1, 1, 0, 0, 1, 1])), SPREAD)))


def product_and_bias(graph: Graph) -> str:
    return str(graph.op("Relu", graph.op("Add", graph.op("MatMul", "x", DENSE), SHIFT)))


def parallel_convolutions(graph: Graph) -> str:
    """As an Inception block: what is merged goes on to different convolutions."""
    branches = [graph.op("Relu", graph.op("Conv", "x", part)) for part in (BESIDE[:32], BESIDE[32:64], BESIDE[64:])]
    wider = [graph.op("Conv", branch, normal(32, 32, 3, 3, scale=0.1), pads=[1, 1, 1, 1]) for branch in branches[1:]]
    return str(graph.op("Relu", graph.op("Concat", branches[0], *wider, axis=1)))


def requantized(graph: Graph) -> str:
    """Quantized, read back, and quantized in the same way again, as tools leave it between two layers."""
    scale, zero = np.float32(0.02), np.int8(0)
    weights = np.clip(np.rint(SPREAD / 0.002), -127, 127).astype(np.int8)

    def kept(x: Any) -> Any:
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scale, zero), scale, zero)

    kernel = graph.op("DequantizeLinear", weights, np.float32(0.002), zero)
    found = graph.op("Conv", kept(kept("x")), kernel, pads=[1, 1, 1, 1])
    return str(graph.op("Relu", graph.op("MaxPool", kept(kept(found)), kernel_shape=[2, 2], strides=[2, 2])))


def guarded_softmax(graph: Graph) -> str:
    query, value = (heads(graph, name, 0, 2, 1, 3) for name in ("q", "v"))
    key = graph.op("Transpose", heads(graph, "k", 0, 2, 1, 3), perm=[0, 1, 3, 2])
    found = graph.op("Softmax", graph.op("Mul", graph.op("MatMul", query, key), SIZE**-0.5), axis=-1)
    found = graph.op("Where", graph.op("IsNaN", found), 0.0, found)
    return joined(graph, graph.op("MatMul", found, value))


def shape_arithmetic(graph: Graph) -> str:
    """Heads taken apart as TorchScript writes it."""
    found = graph.op("MatMul", "x", DENSE)
    sizes = graph.op("Shape", found)
    parts = [graph.op("Gather", sizes, np.int64([place])) for place in (0, 1)]
    apart = graph.op("Concat", *parts, np.int64([HEADS]), graph.op("Div", np.int64([WIDTH]), np.int64([HEADS])), axis=0)
    turned = graph.op("Transpose", graph.op("Reshape", found, apart), perm=[0, 2, 1, 3])
    return str(graph.op("MatMul", turned, DENSE[:SIZE, :SIZE]))


def casts(graph: Graph) -> str:
    found = graph.op("Cast", graph.op("MatMul", "x", DENSE), to=11)
    return str(graph.op("MatMul", graph.op("Cast", found, to=1), NARROW))


def transposes(graph: Graph) -> str:
    found = graph.op("Transpose", graph.op("Conv", "x", BESIDE), perm=[0, 2, 3, 1])
    return str(
        graph.op("Relu", graph.op("Conv", graph.op("Transpose", found, perm=[0, 3, 1, 2]), normal(32, 96, 1, 1)))
    )


def transposes_apart(graph: Graph) -> str:
    """As converters from channels-last frameworks leave it."""
    found = graph.op("Transpose", graph.op("Conv", "x", BESIDE), perm=[0, 2, 3, 1])
    found = graph.op("Relu", graph.op("Add", found, PER_CHANNEL))
    return str(
        graph.op("Relu", graph.op("Conv", graph.op("Transpose", found, perm=[0, 3, 1, 2]), normal(32, 96, 1, 1)))
    )


def reshapes(graph: Graph) -> str:
    found = graph.op("Reshape", graph.op("MatMul", "x", DENSE), np.int64([-1, WIDTH]))
    found = graph.op(
        "Reshape", graph.op("Reshape", found, np.int64([BATCH, SEQUENCE, HEADS, SIZE])), np.int64([0, 0, -1])
    )
    return str(graph.op("MatMul", found, NARROW))


def flattened(graph: Graph) -> str:
    """A linear layer as GPT-2's Conv1D."""
    found = graph.op("Gemm", graph.op("Reshape", "x", np.int64([-1, WIDTH])), DENSE, SHIFT)
    found = graph.op("Relu", graph.op("Reshape", found, np.int64([BATCH, SEQUENCE, WIDTH])))
    found = graph.op("Gemm", graph.op("Reshape", found, np.int64([-1, WIDTH])), DENSE, SHIFT)
    return str(graph.op("Reshape", found, np.int64([BATCH, SEQUENCE, WIDTH])))


def idle_arithmetic(graph: Graph) -> str:
    found = graph.op("Mul", graph.op("Add", graph.op("MatMul", "x", DENSE), 0.0), 1.0)
    return str(graph.op("MatMul", graph.op("Div", found, 1.0), NARROW))


def cases() -> dict[str, tuple[dict[str, Any], Form]]:
    """Pass → (inputs, the graph as exported)."""
    wide, small = {"x": normal(BATCH, SEQUENCE, WIDTH)}, {"x": normal(BATCH, SEQUENCE, 256)}
    pictures, narrow = {"x": normal(BATCH, CHANNELS, SIDE, SIDE)}, {"x": normal(BATCH, 32, SIDE, SIDE)}
    return {
        "fuse-layer-normalization": ({**wide, "r": normal(BATCH, SEQUENCE, WIDTH)}, layer_normalization),
        "fuse-instance-normalization": (pictures, instance_normalization),
        "fuse-gelu": (small, between_products(gelu)),
        "fuse-mish": (narrow, between_convolutions(mish)),
        "fold-batchnorm": (pictures, batchnorm),
        "fold-scales": (wide, scales),
        "fold-pad": (pictures, pad),
        "fuse-gemm": ({"x": normal(BATCH * SEQUENCE, WIDTH)}, product_and_bias),
        "merge-convolutions": (pictures, parallel_convolutions),
        "remove-redundant-quantization": (pictures, requantized),
        "remove-softmax-guards": ({name: normal(BATCH, SEQUENCE, WIDTH) for name in "qkv"}, guarded_softmax),
        "fold-shapes": (wide, shape_arithmetic),
        "cancel-casts": (wide, casts),
        "cancel-transposes": (pictures, transposes),
        "move-transposes": (pictures, transposes_apart),
        "cancel-reshapes": (wide, reshapes),
        "unflatten-gemm": (wide, flattened),
        "simplify-arithmetic": (wide, idle_arithmetic),
    }


def after(made: str, path: Path, target: str, folder: Path) -> Path:
    """The file after that one pass with the target's capabilities, and what cleans up behind it."""
    artifact = Artifact.load(path)
    chosen = [registry.bind(PassStep(name=name)) for name in (made, "remove-dead")]
    capabilities = registry.target(target).capabilities()
    found, _ = counts.pipeline(artifact, None, folder).for_target(capabilities).run(artifact, chosen)
    return found.file(folder)


def alone(passes: Sequence[str], sides: Sequence[str], effort: Effort, folder: Path) -> dict[str, Any]:
    """These passes on every side, one thread: CPU seconds of the graph after the pass ÷ before it, or why there is none."""
    result: dict[str, Any] = {}
    for made, (inputs, form) in cases().items():
        if passes and made not in passes:
            continue
        np.savez(folder / f"{made}.npz", **inputs)
        samples, graph = fed(folder / f"{made}.npz", folder / f"samples-{made}"), Graph()
        path = graph.save(inputs, form(graph), folder / f"{made}.onnx")
        result[made] = {}
        for side in sides:
            files = {"as exported": path, made: after(made, path, side.partition(":")[0], folder)}
            result[made][side] = compared(files, side, samples, effort)[made]
        print(f"{made}: {result[made]}", file=sys.stderr, flush=True)
    return result


def alone_table(results: dict[str, Any]) -> str:
    """Ratios to the graph as exported, as Markdown."""
    sides = list(next(iter(results.values())))
    lines = [
        "| pass | " + " | ".join(f"{side}, after ÷ before" for side in sides) + " |",
        "| --- |" + " --- |" * len(sides),
    ]
    for made, by_side in results.items():
        cells = [by_side[side] for side in sides]
        lines.append(f"| {made} | " + " | ".join("fails" if "failed" in c else words(Ratio(**c)) for c in cells) + " |")
    return "\n".join(lines)
