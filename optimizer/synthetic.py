"""Made-up inputs for a model that comes without data: they respect what the graph does with each input.

Indices stay inside the table that they look up, masks are ones, token types zeros, bytes 0..255, floats unit normal.
Sizes that the model leaves open: the batch axis gets the asked count, sequence-like axes 32, height and width of
pictures 224, channels 3, anything else 32; one symbol has one size everywhere, and sums of symbols add up. Good for
speed and for drift; they say nothing about accuracy.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.data import Samples
from perwatt.datasets_fit import dtype_of, is_float
from perwatt.datasets_source import whole_calls
from perwatt.errors import InputError
from perwatt.signature import Array, Batch, Signature, TensorSpec

SEQUENCE_LENGTH = 32
PICTURE_SIDE = 224
OTHER_SIZE = 32

_FOLLOWED = {
    "Abs", "Cast", "CastLike", "Clip", "Concat", "Expand", "Flatten", "Identity", "Max", "Min", "Mod", "Pad", "Reshape",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that hand values on (more or less) as they are."""

_FIRST_INPUT_ONLY = {"CastLike", "Expand", "Mod", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Unsqueeze"}

_MASKS = re.compile(r"mask", re.IGNORECASE)
_TYPES = re.compile(r"token_type|segment", re.IGNORECASE)
_POSITIONS = re.compile(r"position", re.IGNORECASE)


def synthetic(artifact: Artifact, count: int = 64, seed: int = 0) -> Samples:
    """`count` made-up samples (rounded up to whole calls where the batch is fixed; that many calls where the model has
    no batch axis). Raises InputError for inputs that can't be made up: text, sequences, unknown type or rank."""
    import onnx_ir as ir

    signature = artifact.signature
    values = {value.name: value for value in artifact.model.graph.inputs}
    for spec in signature.inputs:
        kind = values[spec.name].type
        if kind is not None and not isinstance(kind, ir.TensorType):
            raise _impossible(spec, f"is a {type(kind).__name__.removesuffix('Type').lower()}")
        if spec.dtype in ("object", "str"):
            raise _impossible(spec, "takes text")
        if spec.dtype == "unknown" or spec.shape is None:
            raise _impossible(spec, "has no known type or shape")
    limits = {spec.name: index_limit(values[spec.name]) for spec in signature.inputs if dtype_of(spec).kind in "iu"}
    return made_up(signature, count, seed, limits)


def made_up(
    signature: Signature, count: int = 64, seed: int = 0, limits: Mapping[str, int | None] | None = None
) -> Samples:
    """The same for a signature alone; `limits` of indices, by input, where the graph is known (ones, where it is not)."""
    known = limits or {}
    random = np.random.default_rng(seed)
    sizes = _Sizes(signature)

    def call(leading: int | None) -> Batch:
        shapes = {spec: sizes.shape(spec, leading) for spec in signature.inputs}
        return {spec.name: _array(spec, shape, known.get(spec.name), random) for spec, shape in shapes.items()}

    if signature.batch is None:
        return whole_calls([call(None) for _ in range(count)])
    fixed = signature.batch if isinstance(signature.batch, int) else 1
    return Samples([call(-(-count // max(fixed, 1)) * max(fixed, 1))])


def _impossible(spec: TensorSpec, why: str) -> InputError:
    return InputError(f"input {spec} {why}, so no samples can be made up for it", fix="give some with --data")


class _Sizes:
    """Sizes for the dimensions that the model leaves open."""

    def __init__(self, signature: Signature) -> None:
        self.batch = signature.batch
        self.known: dict[str, int] = {}
        for spec in signature.inputs:
            for axis, dim in enumerate(spec.shape or ()):
                if isinstance(dim, str) and dim.isidentifier():
                    self.known.setdefault(dim, self._guess(dim, axis, spec))

    def _guess(self, symbol: str, axis: int, spec: TensorSpec) -> int:
        shape = spec.shape or ()
        if axis == 0 and not re.search(r"seq|len|time|token", symbol, re.IGNORECASE):
            return 1
        if len(shape) == 4 and is_float(dtype_of(spec)) and not re.search(r"seq|past|len", symbol, re.IGNORECASE):
            channels = 3 if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) else 1
            return 3 if axis == channels else PICTURE_SIDE
        return SEQUENCE_LENGTH if re.search(r"seq|len|time|token|past|frame", symbol, re.IGNORECASE) else OTHER_SIZE

    def shape(self, spec: TensorSpec, leading: int | None) -> tuple[int, ...]:
        dims = [self._value(dim) if isinstance(dim, str) else dim for dim in spec.shape or ()]
        # Some old exporters write -1 where a dimension is open.
        dims = [dim if dim >= 0 else self._guess("", axis, spec) for axis, dim in enumerate(dims)]
        if leading is not None:
            dims[0] = leading
        return tuple(dims)

    def _value(self, symbol: str) -> int:
        if symbol in self.known:
            return self.known[symbol]
        try:
            return max(_evaluate(ast.parse(symbol, mode="eval").body, self.known), 1)
        except (SyntaxError, ValueError, ZeroDivisionError):
            return self.known.setdefault(symbol, OTHER_SIZE)


_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def _evaluate(node: ast.expr, known: dict[str, int]) -> int:
    """Value of sums and products of symbols. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return known.setdefault(node.id, SEQUENCE_LENGTH)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, known), _evaluate(node.right, known))
    raise ValueError("no sum of symbols")


def _array(spec: TensorSpec, shape: tuple[int, ...], limit: int | None, random: np.random.Generator) -> Array:
    dtype = dtype_of(spec)
    if _MASKS.search(spec.name) or dtype.kind == "b":
        return np.ones(shape, dtype) if limit != 1 else np.zeros(shape, dtype)
    if dtype.kind == "c":
        return (random.standard_normal(shape) + 1j * random.standard_normal(shape)).astype(dtype)
    if is_float(dtype):
        return random.standard_normal(shape, dtype=np.float32).astype(dtype)
    if _TYPES.search(spec.name):
        return np.zeros(shape, dtype)
    if _POSITIONS.search(spec.name) and shape:
        return np.broadcast_to(np.arange(shape[-1]) % (limit or shape[-1] or 1), shape).astype(dtype)
    if limit is not None:
        return random.integers(0, min(limit, np.iinfo(dtype).max), shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize == 1:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        return random.integers(low, high, shape, dtype=dtype, endpoint=True)
    return np.ones(shape, dtype)


def index_limit(value: Any) -> int | None:
    """The smallest table that `value` (an `onnx_ir.Value`) looks up, itself or handed on by operators that keep values;
    None where it looks up nothing, 1 where the table's size isn't known."""
    found: list[int] = []
    seen, queue = {value}, deque([value])
    while queue:
        for node, position in queue.popleft().uses():
            table = _looked_up(node, position)
            if table is not None:
                found.append(table)
            for output in _handed_on(node, position):
                if output not in seen:
                    seen.add(output)
                    queue.append(output)
    return min(found) if found else None


def _looked_up(node: Any, position: int) -> int | None:
    """Size of the table that `node` looks up with its input at `position`."""
    if node.op_type in ("Gather", "GatherElements") and position == 1:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return _size_of(node.inputs[0], axis)
    if node.op_type == "OneHot" and position == 0:
        depth = _constant(node.inputs[1])
        return int(depth.reshape(-1)[0]) if depth is not None and depth.size else 1
    if node.op_type == "EmbedLayerNormalization" and position in (0, 1):
        table = node.inputs[2 if position == 0 else 4]
        return None if table is None else _size_of(table, 0)
    if node.op_type in ("GatherND", "ScatterND") and position == 1:
        return 1
    return None


def _size_of(table: Any, axis: int) -> int:
    for value in _origins(table):
        shape = value.const_value.shape if value.const_value is not None else value.shape
        if shape is not None and -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
            return max(int(shape[axis]), 1)
    return 1


def _origins(value: Any) -> Iterator[Any]:
    """`value`, and what it is a copy of in the same shape."""
    while value is not None:
        yield value
        node = value.producer()
        if node is None or node.op_type not in ("Identity", "Cast", "DequantizeLinear", "QuantizeLinear"):
            return
        value = node.inputs[0]


def _constant(value: Any) -> Array | None:
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def _handed_on(node: Any, position: int) -> list[Any]:
    if node.op_type not in _FOLLOWED:
        return []
    if node.op_type == "Where" and position == 0:
        return []
    if position and node.op_type in _FIRST_INPUT_ONLY:
        return []
    if node.op_type == "Cast" and "to" in node.attributes and node.attributes["to"].as_int() not in _INTEGERS:
        return []
    return list(node.outputs)


_INTEGERS = {2, 3, 4, 5, 6, 7, 12, 13}
"""ONNX element types of 8 to 64 bit integers."""
