"""Which form of an operation each backend runs best: whole operators beside their pieces, in small graphs around them.

What a target's `Capabilities.operators` names rests on this. An activation stands between two products or convolutions, as
in a network, because backends fuse it into what comes before; attention begins and ends in [batch, sequence, width]. The
first form of each case is the one that the others are compared with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _fusion_speed import Effort, fed, interleaved, opened, window, words

from perwatt.bench.statistics import paired_ratio
from perwatt.contract import OperatingPoint
from perwatt.errors import PerwattError
from perwatt.measurement import Ratio

BATCH, SEQUENCE, HEADS, SIZE = 8, 128, 12, 64
WIDTH = HEADS * SIZE
OPSET = 24
SIDES = ("openvino:bf16", "openvino:f32", "onnxruntime:f32")
LEAST = float(np.finfo(np.float32).min)
RANDOM = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> Any:
    """Normally distributed numbers, float32."""
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


class Graph:
    """Nodes and weights of one form, under names that count up."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def op(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """A node's output (a list of several); arrays and numbers among the inputs become weights, None is left out."""
        import onnx

        given = [one if isinstance(one, str) else "" if one is None else self.weight(one) for one in inputs]
        names = [f"{kind.lower()}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(onnx.helper.make_node(kind, given, names, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, array: Any) -> str:
        import onnx

        name = f"w{len(self.weights)}"
        held = np.float32(array) if isinstance(array, float) else np.asarray(array)
        self.weights.append(onnx.numpy_helper.from_array(held, name))
        return name

    def save(self, inputs: dict[str, Any], output: str, path: Path) -> Path:
        import onnx

        helper = onnx.helper
        types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
        values = [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in inputs.items()]
        result = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "form", values, [result], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path


Form = Callable[[Graph], str]


# Forms ----------------------------------------------------------------------------------------------------------------


def heads(graph: Graph, value: str, *perm: int) -> str:
    """[batch, sequence, width] with its heads as an axis of their own."""
    return str(graph.op("Transpose", graph.op("Reshape", value, np.int64([0, SEQUENCE, HEADS, SIZE])), perm=perm))


def joined(graph: Graph, value: str) -> str:
    """The heads side by side again."""
    turned = graph.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(graph.op("Reshape", turned, np.int64([0, SEQUENCE, WIDTH])))


def attention_pieces(mask: str | None = None, composed: bool = False, scaled: str = "scores") -> Form:
    """`composed`: k is transposed in one go. `scaled`: whether the factor stands on the scores or on q."""

    def form(graph: Graph) -> str:
        query, value = (heads(graph, name, 0, 2, 1, 3) for name in ("q", "v"))
        key = (
            heads(graph, "k", 0, 2, 3, 1)
            if composed
            else graph.op("Transpose", heads(graph, "k", 0, 2, 1, 3), perm=[0, 1, 3, 2])
        )
        query = graph.op("Mul", query, SIZE**-0.5) if scaled == "q" else query
        scores = graph.op("MatMul", query, key)
        scores = graph.op("Mul", scores, SIZE**-0.5) if scaled == "scores" else scores
        scores = graph.op("Add", scores, mask) if mask else scores
        return joined(graph, graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value))

    return form


def attention_whole(mask: str | None = None) -> Form:
    return lambda graph: joined(graph, graph.op("Attention", *(heads(graph, name, 0, 2, 1, 3) for name in "qkv"), mask))


def attention_flat(mask: str | None = None) -> Form:
    return lambda graph: str(graph.op("Attention", "q", "k", "v", mask, q_num_heads=HEADS, kv_num_heads=HEADS))


ANGLES = np.outer(np.arange(SEQUENCE), 1e4 ** (-np.arange(SIZE // 2) / (SIZE // 2))).astype(np.float32)


def rotary_pieces(graph: Graph) -> str:
    cosine, sine = (np.concatenate([turn(ANGLES)] * 2, -1)[None, None] for turn in (np.cos, np.sin))
    left, right = (
        graph.op("Slice", "x", np.int64([a]), np.int64([b]), np.int64([-1]))
        for a, b in ((0, SIZE // 2), (SIZE // 2, SIZE))
    )
    turned = graph.op("Concat", graph.op("Neg", right), left, axis=-1)
    return str(graph.op("Add", graph.op("Mul", "x", cosine), graph.op("Mul", turned, sine)))


def rotary_whole(graph: Graph) -> str:
    positions = np.tile(np.arange(SEQUENCE), (BATCH, 1))
    return str(graph.op("RotaryEmbedding", "x", np.cos(ANGLES), np.sin(ANGLES), positions))


SCALE, NARROW = 1 + normal(WIDTH, scale=0.1), normal(WIDTH, 64, scale=0.03)


def rms_pieces(graph: Graph) -> str:
    total = graph.op("Add", "x", "r")
    mean = graph.op("ReduceMean", graph.op("Mul", total, total), np.int64([-1]))
    root = graph.op("Reciprocal", graph.op("Sqrt", graph.op("Add", mean, 1e-5)))
    return str(graph.op("MatMul", graph.op("Mul", graph.op("Mul", total, root), SCALE), NARROW))


def rms_whole(graph: Graph) -> str:
    return str(graph.op("MatMul", graph.op("RMSNormalization", graph.op("Add", "x", "r"), SCALE, epsilon=1e-5), NARROW))


CHANNELS, GROUPS, SIDE = 64, 32, 56
GROUP_SCALE, GROUP_SHIFT = 1 + normal(CHANNELS, scale=0.1), normal(CHANNELS, scale=0.1)


def group_pieces(graph: Graph) -> str:
    """As torch writes it: an instance normalization of groups, scaled by channel afterwards."""
    flat = graph.op("Reshape", "x", np.int64([0, GROUPS, -1]))
    ones = np.ones(GROUPS, np.float32)
    flat = graph.op("InstanceNormalization", flat, ones, 0 * ones, epsilon=1e-5)
    back = graph.op("Reshape", flat, np.int64([BATCH, CHANNELS, SIDE, SIDE]))
    return str(graph.op("Add", graph.op("Mul", back, GROUP_SCALE[:, None, None]), GROUP_SHIFT[:, None, None]))


def group_whole(graph: Graph) -> str:
    return str(graph.op("GroupNormalization", "x", GROUP_SCALE, GROUP_SHIFT, num_groups=GROUPS, epsilon=1e-5))


UP, DOWN = normal(256, 1024, scale=0.06), normal(1024, 256, scale=0.03)
WIDER, NARROWER = normal(96, 32, 1, 1, scale=0.2), normal(32, 96, 1, 1, scale=0.1)
GATE, ASIDE = normal(WIDTH, 1024, scale=0.03), normal(WIDTH, 1024, scale=0.03)


def between_products(activation: Callable[[Graph, str], str]) -> Form:
    return lambda graph: str(graph.op("MatMul", activation(graph, graph.op("MatMul", "x", UP)), DOWN))


def between_convolutions(activation: Callable[[Graph, str], str]) -> Form:
    return lambda graph: str(graph.op("Conv", activation(graph, graph.op("Conv", "x", WIDER)), NARROWER))


def swish_pieces(graph: Graph, x: str) -> str:
    return str(graph.op("Mul", x, graph.op("Sigmoid", x)))


def swish_whole(graph: Graph, x: str) -> str:
    return str(graph.op("Swish", x))


def hardswish_pieces(graph: Graph, x: str) -> str:
    return str(graph.op("Div", graph.op("Mul", x, graph.op("Clip", graph.op("Add", x, 3.0), 0.0, 6.0)), 6.0))


def hardswish_by_sigmoid(graph: Graph, x: str) -> str:
    return str(graph.op("Mul", x, graph.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)))


def hardswish_whole(graph: Graph, x: str) -> str:
    return str(graph.op("HardSwish", x))


def gelu_pieces(graph: Graph, x: str) -> str:
    cube = graph.op("Mul", graph.op("Pow", x, 3.0), 0.044715)
    inner = graph.op("Mul", graph.op("Add", x, cube), math.sqrt(2 / math.pi))
    return str(graph.op("Mul", graph.op("Mul", x, 0.5), graph.op("Add", graph.op("Tanh", inner), 1.0)))


def gelu_whole(graph: Graph, x: str) -> str:
    return str(graph.op("Gelu", x, approximate="tanh"))


def gated_apart(graph: Graph) -> str:
    return str(graph.op("Mul", swish_pieces(graph, graph.op("MatMul", "x", GATE)), graph.op("MatMul", "x", ASIDE)))


def gated_merged(graph: Graph) -> str:
    both = graph.op("MatMul", "x", np.concatenate([GATE, ASIDE], 1))
    gate, aside = graph.op("Split", both, outputs=2, axis=-1, num_outputs=2)
    return str(graph.op("Mul", swish_pieces(graph, gate), aside))


TOKENS, CUT, SHIFT = 96, 7, 3
"""Swin-tiny's first stage: width, and side and shift of a window."""
MIXED = normal(TOKENS, TOKENS, scale=0.1)


def windows_step_by_step(graph: Graph) -> str:
    """As torch writes roll, and transformers window_partition."""
    x = graph.op("Reshape", graph.op("Relu", "x"), np.int64([0, SIDE, SIDE, TOKENS]))
    for axis in (1, 2):
        late = graph.op("Slice", x, np.int64([SHIFT]), np.int64([SIDE]), np.int64([axis]))
        x = graph.op(
            "Concat", late, graph.op("Slice", x, np.int64([0]), np.int64([SHIFT]), np.int64([axis])), axis=axis
        )
    x = graph.op("Reshape", x, np.int64([-1, SIDE // CUT, CUT, SIDE // CUT, CUT, TOKENS]))
    x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return str(graph.op("MatMul", graph.op("Reshape", x, np.int64([-1, CUT * CUT, TOKENS])), MIXED))


def windows_at_once(graph: Graph) -> str:
    places = np.roll(np.arange(SIDE * SIDE).reshape(SIDE, SIDE), (-SHIFT, -SHIFT), (0, 1))
    order = places.reshape(SIDE // CUT, CUT, SIDE // CUT, CUT).transpose(0, 2, 1, 3).reshape(-1)
    x = graph.op("Gather", graph.op("Relu", "x"), order, axis=1)
    return str(graph.op("MatMul", graph.op("Reshape", x, np.int64([-1, CUT * CUT, TOKENS])), MIXED))


KERNELS = [normal(WIDTH, HEADS, SIZE, scale=0.03) for _ in "qkv"]
TOGETHER = normal(HEADS, SIZE, WIDTH, scale=0.03)


def keras_attention(product: Callable[[Graph, str, Any, Any], Any]) -> Form:
    """Keras' MultiHeadAttention; `product` writes one Einsum."""

    def form(graph: Graph) -> str:
        query, key, value = (product(graph, "abc,cde->abde", "x", kernel) for kernel in KERNELS)
        scores = product(graph, "aecd,abcd->acbe", key, graph.op("Mul", query, SIZE**-0.5))
        found = product(graph, "acbe,aecd->abcd", graph.op("Softmax", scores, axis=-1), value)
        return str(product(graph, "abcd,cde->abe", found, TOGETHER))

    return form


def as_einsum(graph: Graph, equation: str, first: Any, second: Any) -> Any:
    return graph.op("Einsum", first, second, equation=equation)


def as_product(graph: Graph, equation: str, first: Any, second: Any) -> Any:
    """What `decompose-einsum` and the passes behind it make of these four."""
    if equation == "abc,cde->abde":
        flat = graph.op("MatMul", first, second.reshape(WIDTH, WIDTH))
        return graph.op("Reshape", flat, np.int64([0, 0, HEADS, SIZE]))
    if equation == "aecd,abcd->acbe":
        key = graph.op("Transpose", graph.op("Transpose", first, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
        return graph.op("MatMul", graph.op("Transpose", second, perm=[0, 2, 1, 3]), key)
    if equation == "acbe,aecd->abcd":
        found = graph.op("MatMul", first, graph.op("Transpose", second, perm=[0, 2, 1, 3]))
        return graph.op("Transpose", found, perm=[0, 2, 1, 3])
    return graph.op("MatMul", graph.op("Reshape", first, np.int64([0, 0, -1])), second.reshape(WIDTH, WIDTH))


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Form]]]:
    """Title → (inputs, forms)."""
    wide = {"x": normal(BATCH, SEQUENCE, WIDTH)}
    projected = {name: normal(BATCH, SEQUENCE, WIDTH) for name in "qkv"}
    hidden = np.where(RANDOM.random((BATCH, 1, 1, SEQUENCE)) < 0.8, 0, LEAST).astype(np.float32)
    masked = {**projected, "m": np.ascontiguousarray(np.broadcast_to(hidden, (BATCH, 1, SEQUENCE, SEQUENCE)))}
    words_in, pictures = {"x": normal(BATCH, SEQUENCE, 256)}, {"x": normal(BATCH, 32, SIDE, SIDE)}
    return {
        "attention": (projected, {
            "pieces": attention_pieces(), "pieces, k transposed in one": attention_pieces(composed=True),
            "pieces, q scaled": attention_pieces(scaled="q"), "Attention": attention_whole(), "Attention, 3-D": attention_flat(),
        }),
        "attention with a mask": (masked, {
            "pieces": attention_pieces("m"), "Attention": attention_whole("m"), "Attention, 3-D": attention_flat("m"),
        }),
        "rotary embedding": ({"x": normal(BATCH, HEADS, SEQUENCE, SIZE)}, {
            "pieces": rotary_pieces, "RotaryEmbedding": rotary_whole,
        }),
        "RMS normalization": ({**wide, "r": normal(BATCH, SEQUENCE, WIDTH)}, {
            "pieces": rms_pieces, "RMSNormalization": rms_whole,
        }),
        "group normalization": ({"x": normal(BATCH, CHANNELS, SIDE, SIDE)}, {
            "pieces": group_pieces, "GroupNormalization": group_whole,
        }),
        "swish between products": (words_in, {
            "pieces": between_products(swish_pieces), "Swish": between_products(swish_whole),
        }),
        "swish between convolutions": (pictures, {
            "pieces": between_convolutions(swish_pieces), "Swish": between_convolutions(swish_whole),
        }),
        "hardswish between convolutions": (pictures, {
            "pieces": between_convolutions(hardswish_pieces), "x · HardSigmoid": between_convolutions(hardswish_by_sigmoid),
            "HardSwish": between_convolutions(hardswish_whole),
        }),
        "gelu (tanh) between products": (words_in, {
            "pieces": between_products(gelu_pieces), "Gelu": between_products(gelu_whole),
        }),
        "shift and windows": ({"x": normal(BATCH, SIDE * SIDE, TOKENS)}, {
            "step by step": windows_step_by_step, "one Gather": windows_at_once,
        }),
        "attention by Keras": (wide, {
            "Einsum": keras_attention(as_einsum), "products": keras_attention(as_product),
        }),
        "gate and up projections": (wide, {"two products": gated_apart, "one product": gated_merged}),
    }  # fmt: skip


# Measuring ------------------------------------------------------------------------------------------------------------


def forms(titles: Sequence[str], sides: Sequence[str], effort: Effort, folder: Path) -> dict[str, Any]:
    """These cases on every side, one thread: the ratio of each form's CPU seconds to the first one's, or why there is none."""
    result: dict[str, Any] = {}
    chosen = {title: case for title, case in cases().items() if title in titles}
    for number, (title, (inputs, its)) in enumerate(chosen.items()):
        np.savez(folder / f"{number}.npz", **inputs)
        samples = fed(folder / f"{number}.npz", folder / f"samples-{number}")
        paths = {}
        for position, (name, form) in enumerate(its.items()):
            graph = Graph()
            paths[name] = graph.save(inputs, form(graph), folder / f"{number}-{position}.onnx")
        result[title] = {side: compared(paths, side, samples, effort) for side in sides}
        print(f"{title}: {result[title]}", file=sys.stderr, flush=True)
    return result


def compared(paths: dict[str, Path], side: str, samples: Path, effort: Effort) -> dict[str, Any]:
    """All forms of one case on one side."""
    target, _, precision = side.partition(":")
    point = OperatingPoint("offline", BATCH, 1, 1, precision)
    windows, told = {}, {}
    with ExitStack() as cleanup:
        for name, path in paths.items():
            try:
                windows[name] = window(opened(cleanup, name, path, target, point, samples)[0], effort.seconds)
            except PerwattError as error:
                told[name] = {"failed": str(error)}
        found = interleaved(windows, effort.rounds)
    first = next(iter(paths))
    if first not in found:
        return told
    return told | {name: asdict(paired_ratio(costs, found[first])) for name, costs in found.items() if name != first}


def forms_table(results: dict[str, Any]) -> str:
    """Ratios to the first form, as Markdown."""
    sides = list(next(iter(results.values())))
    lines = [
        "| operation | form | " + " | ".join(f"{side}, ÷ the pieces" for side in sides) + " |",
        "| --- |" + " --- |" * (1 + len(sides)),
    ]
    for title, by_side in results.items():
        for name in dict.fromkeys(name for its in by_side.values() for name in its):
            cells = [by_side[side].get(name, {"value": None}) for side in sides]
            ratios = ["fails" if "failed" in cell else words(Ratio(**cell)) for cell in cells]
            lines.append(f"| {title} | {name} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)
