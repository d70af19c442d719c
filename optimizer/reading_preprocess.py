"""Preprocessing compiled into the head of the graph, (x·scale − mean) ÷ std: the deployed model takes raw bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from perwatt.errors import InputError, nearest
from perwatt.recipe import RawInput


def add_preprocessing(model: Any, raw_inputs: Mapping[str, RawInput]) -> list[str]:
    """Put preprocessing before the named inputs of `model`, in place; returns what was done, in words."""
    names = {value.name: index for index, value in enumerate(model.graph.inputs)}
    changes = []
    for name, raw in raw_inputs.items():
        if name not in names:
            raise InputError(f"inputs: {nearest(name, names, 'input')}")
        changes.append(_prepend(model, names[name], raw))
    return changes


def _prepend(model: Any, index: int, raw: RawInput) -> str:
    import onnx_ir as ir

    graph = model.graph
    old = graph.inputs[index]
    name = old.name
    if old.shape is None or old.dtype is None:
        raise InputError(f"inputs.{name}: the model does not say its type and rank, so nothing can be put before it")
    if not old.dtype.is_floating_point():
        raise InputError(f"inputs.{name}: the model takes {old.dtype.numpy()} there, which needs no preprocessing")
    rank = len(old.shape)
    swap = raw.layout is not None and rank == 4 and raw.layout != _layout(old.shape)
    # From the model's layout to the raw one, and back.
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if raw.layout == "NHWC" else ((0, 3, 1, 2), (0, 2, 3, 1))
    shape = ir.Shape([old.shape[axis] for axis in there]) if swap else old.shape
    last = (raw.layout or _layout(old.shape)) == "NHWC" if rank == 4 else rank <= 2
    channels = _channels(name, shape, last, raw)

    taken = {v.name for node in graph.all_nodes() for v in node.outputs} | set(graph.initializers)
    fresh = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(raw.dtype))))
    before = [ir.node("Cast", [fresh], {"to": ir.DataType.FLOAT})]
    for operator, setting, neutral in (("Mul", raw.scale, 1.0), ("Sub", raw.mean, 0.0), ("Div", raw.std, 1.0)):
        constant = _constant(setting, channels, last, rank)
        if np.all(constant == neutral):
            continue
        value = ir.Value(
            name=_unused(f"{name}_{operator.lower()}", taken),
            shape=ir.Shape(constant.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(constant),
        )
        graph.register_initializer(value)
        before.append(ir.node(operator, [before[-1].outputs[0], value]))
    if swap:
        before.append(ir.node("Transpose", [before[-1].outputs[0]], {"perm": list(back)}))
    if old.dtype != ir.DataType.FLOAT:
        before.append(ir.node("Cast", [before[-1].outputs[0]], {"to": old.dtype}))
    for node in before:
        node.name = _unused(f"{name}_{node.op_type.lower()}_node", taken)
        output = node.outputs[0]
        output.name = _unused(f"{name}_{node.op_type.lower()}_out", taken)
        output.type = ir.TensorType(ir.DataType.FLOAT)
        output.shape = shape
    made = before[-1].outputs[0]
    made.shape, made.type = old.shape, ir.TensorType(old.dtype)
    first = next(iter(graph), None)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.inputs[index] = fresh
    if first is None:
        graph.extend(before)
    else:
        graph.insert_before(first, before)
    return f"input {name} takes {raw.dtype}{' ' + raw.layout if raw.layout else ''}: preprocessing compiled in"


def _layout(shape: Any) -> str:
    """Where the channels are: the small axis; channels first where that does not decide."""
    small = [axis for axis in (1, 3) if isinstance(shape[axis], int) and shape[axis] <= 4] if len(shape) == 4 else []
    return "NHWC" if small == [3] else "NCHW"


def _channels(name: str, shape: Any, last: bool, raw: RawInput) -> int:
    lengths = {len(s) for s in (raw.mean, raw.std) if isinstance(s, list) and len(s) > 1}
    if not lengths:
        return 1
    dim = shape[-1 if last else 1]
    if len(lengths) > 1 or (isinstance(dim, int) and lengths != {dim}):
        given = " and ".join(str(n) for n in sorted(lengths))
        raise InputError(f"inputs.{name}: mean and std have {given} values, the input has {dim} channels")
    return lengths.pop()


def _constant(setting: list[float] | float, channels: int, last: bool, rank: int) -> Any:
    values = np.asarray(setting, dtype=np.float32).reshape(-1)
    if len(values) == 1 or np.all(values == values[0]):
        return values[0].reshape(())
    return values if last else values.reshape(channels, *[1] * (rank - 2))


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
