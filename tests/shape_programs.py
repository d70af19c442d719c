"""Random programs that compute with shapes the way exporters let them, for Hypothesis.

A program is built step by step on arrays at three batch sizes at once; a step that fails at one of them is left out, so
that what comes out is always a valid model.
"""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from models import build, node

from perwatt.artifact import Artifact
from perwatt.signature import Signature

BATCHES = (1, 2, 7)
_MOST = 4000


@dataclass
class Program:
    """Nodes so far, stored tensors, and what each value is at each batch size."""

    nodes: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)

    def add(self, operator, inputs, function, **attributes):
        """A node, where `function` of its inputs works at every batch size; its name or None."""
        try:
            made = [
                np.asarray(function(*arrays)) for arrays in zip(*(self.values[name] for name in inputs), strict=True)
            ]
        except (ValueError, IndexError, ZeroDivisionError):
            return None
        if any(array.size > _MOST or array.ndim > 6 for array in made):
            return None
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(operator, " ".join(inputs), name, **attributes))
        self.values[name] = made
        return name

    def stored(self, array):
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(array)
        self.values[name] = [self.weights[name]] * len(BATCHES)
        return name

    def those(self, kind):
        """Names of values: `tensor` (float), `list` and `one` (int64 of rank 1 and 0), `mask` (bool)."""
        wanted = {"tensor": ("f", None), "list": ("i", 1), "one": ("i", 0), "mask": ("b", None)}[kind]
        return [
            name for name, (array, *_) in self.values.items()
            if array.dtype.kind == wanted[0] and wanted[1] in (None, array.ndim) and name not in self.weights
        ]  # fmt: skip

    def artifact(self, everything=False):
        """The model; its outputs are what nobody uses, or every value. Its batch counts as one, whatever the outputs are:
        a symbol that is never 0."""
        inner = {name for n in self.nodes for name in n.input}
        names = [n.output[0] for n in self.nodes if everything or n.output[0] not in inner]
        weights = {name: array for name, array in self.weights.items() if name in inner}
        made = build(self.nodes, " ".join(self.inputs.values()), " ".join(map(self._spec, names)), weights)
        return Artifact(model=made.model, signature=Signature(made.signature.inputs, ()))

    def _spec(self, name):
        array = self.values[name][0]
        dtype = {"f": "float32", "i": "int64", "b": "bool"}[array.dtype.kind]
        return f"{name}:{dtype}[{','.join('?' * array.ndim)}]"

    def batches(self):
        return [{name: self.values[name][turn] for name in self.inputs} for turn in range(len(BATCHES))]


def _factors(draw, size):
    """Some divisor of a size."""
    return draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) if size > 0 else 1


def _size(program, draw, tensor):
    """x.size(axis), by Gather or by Shape and Squeeze."""
    axis = draw(st.integers(0, max(program.values[tensor][0].ndim - 1, 0)))
    if draw(st.booleans()):
        shape = program.add("Shape", [tensor], lambda x: np.array(x.shape, np.int64))
        return shape and program.add("Gather", [shape, program.stored(np.int64(axis))], lambda s, i: s[i])
    shape = program.add(
        "Shape", [tensor], lambda x: np.array(x.shape[axis : axis + 1], np.int64), start=axis, end=axis + 1
    )
    return shape and program.add("Squeeze", [shape], lambda s: s.reshape(()) if s.size == 1 else s[9])


def _arithmetic(program, draw, tensor):
    ones = program.those("one")
    if not ones:
        return
    operator, function = draw(st.sampled_from([
        ("Add", np.add), ("Sub", np.subtract), ("Mul", np.multiply), ("Div", lambda a, b: np.trunc(a / b).astype(np.int64)),
        ("Mod", np.mod), ("Min", np.minimum), ("Max", np.maximum),
    ]))  # fmt: skip
    other = draw(st.sampled_from(ones)) if draw(st.booleans()) else program.stored(np.int64(draw(st.integers(1, 4))))
    pair = [draw(st.sampled_from(ones)), other]
    if operator in ("Div", "Mod") and any(np.any(array <= 0) for array in program.values[pair[1]]):
        return
    program.add(operator, pair[:: draw(st.sampled_from([1, -1])) if operator not in ("Div", "Mod") else 1], function)


def _list(program, draw, parts):
    """A list of numbers: computed ones, which are unsqueezed, and stored ones."""
    pieces = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(program.add("Unsqueeze", [part, program.stored(np.array([0]))], lambda s, a: s.reshape(1)))
        else:
            pieces.append(program.stored(np.array([part])))
    return program.add("Concat", pieces, lambda *all: np.concatenate(all), axis=0)


def _reshape(program, draw, tensor):
    """To a shape in which some sizes are read off, some stored, at most one left to -1."""
    arrays = program.values[tensor]
    shape = arrays[0].shape
    parts = []
    for axis, size in enumerate(shape):
        fixed = all(array.shape[axis] == size for array in arrays)
        if not fixed:
            here = program.add("Shape", [tensor], lambda x: np.array(x.shape, np.int64))
            parts.append(program.add("Gather", [here, program.stored(np.int64(axis))], lambda s, i: s[i]))
        elif draw(st.booleans()):
            factor = _factors(draw, size)
            parts += [size // factor, factor] if size else [size]
        else:
            parts.append(size)
    if draw(st.booleans()) and parts:
        parts[draw(st.integers(0, len(parts) - 1))] = -1
    if draw(st.integers(0, 3)) == 0 and len(parts) > 1:
        parts = parts[::-1]
    if not parts:
        return
    # What the simulation makes of 0 must be what ONNX does.
    zero = draw(st.booleans())
    program.add(
        "Reshape", [tensor, _list(program, draw, parts)], lambda x, s: _reshaped(x, s, zero), allowzero=int(zero)
    )


def _reshaped(array, sizes, zero):
    if zero and -1 in sizes and 0 in sizes:
        raise ValueError
    sizes = [array.shape[axis] if size == 0 and not zero else size for axis, size in enumerate(sizes)]
    if -1 in sizes and 0 in sizes:
        raise ValueError
    return array.reshape(sizes)


def _expand(program, draw, tensor):
    lists = program.those("list")
    if not lists:
        return
    sizes = draw(st.sampled_from(lists))
    if any(np.any(array < 0) or array.size > 6 for array in program.values[sizes]):
        return
    program.add("Expand", [tensor, sizes], lambda x, s: x * np.ones(tuple(s), x.dtype))


def _torchscript_expand(program, draw, tensor):
    """Sizes with -1 in them, replaced by 1 with Equal and Where."""
    sizes = _list(
        program, draw, [draw(st.sampled_from([*program.those("one"), -1])) for _ in program.values[tensor][0].shape]
    )
    if sizes is None or any(np.any(array < -1) for array in program.values[sizes]):
        return
    minus = program.stored(np.int64(-1))
    equal = program.add("Equal", [sizes, minus], np.equal)
    where = equal and program.add("Where", [equal, program.stored(np.int64([1])), sizes], np.where)
    if where:
        program.add("Expand", [tensor, where], lambda x, s: x * np.ones(tuple(s), x.dtype))


def _slice(program, draw, tensor):
    rank = program.values[tensor][0].ndim
    if not rank:
        return
    ones = program.those("one")
    axis, start = draw(st.integers(0, rank - 1)), draw(st.integers(-2, 2))
    end = draw(st.sampled_from([2**63 - 1, 4, -1, *ones]))
    step = draw(st.sampled_from([1, 1, 2]))
    stop = _list(program, draw, [end])
    fixed = [program.stored(np.array([number])) for number in (start, axis, step)]
    program.add("Slice", [tensor, fixed[0], stop, fixed[1], fixed[2]],
                lambda x, a, b, i, s: x[(slice(None),) * int(i[0]) + (slice(int(a[0]), int(b[0]), int(s[0])),)])  # fmt: skip


def _transpose(program, draw, tensor):
    perm = draw(st.permutations(range(program.values[tensor][0].ndim)))
    if perm:
        program.add("Transpose", [tensor], lambda x: x.transpose(perm), perm=perm)


def _combine(program, draw, tensor):
    other = draw(st.sampled_from(program.those("tensor")))
    operator, function = draw(st.sampled_from([("Add", np.add), ("Mul", np.multiply), ("Sub", np.subtract)]))
    program.add(operator, [tensor, other], function)


def _count(program, draw, tensor):
    """A Range as long as some number, as a row of coordinates, or compared with something."""
    ones = program.those("one")
    if not ones:
        return
    limit = draw(st.sampled_from(ones))
    steps = [program.stored(np.int64(0)), limit, program.stored(np.int64(1))]
    counted = program.add("Range", steps, lambda a, b, s: np.arange(a, b, s))
    if counted and draw(st.booleans()):
        operator, function = draw(
            st.sampled_from([("GreaterOrEqual", np.greater_equal), ("Less", np.less), ("Equal", np.equal)])
        )
        program.add(operator, [counted, draw(st.sampled_from(ones))], function)
    elif counted:
        program.add("Gather", [tensor, counted], lambda x, i: np.take(x, i, axis=0) if np.all(i < len(x)) else x[:, 99, 99],
                    axis=0)  # fmt: skip


def _whole(program, draw, tensor):
    """All elements by places that are counted, which may be those of the flattened tensor in order, or not."""
    shape = program.values[tensor][0].shape
    if len(shape) != 2:
        return
    flat = program.add("Reshape", [tensor, program.stored(np.array([-1]))], lambda x, s: x.reshape(-1))
    sizes = program.add("Shape", [tensor], lambda x: np.array(x.shape, np.int64))
    rows, columns = (program.add("Gather", [sizes, program.stored(np.int64(i))], lambda s, i: s[i]) for i in (0, 1))
    zero, one = program.stored(np.int64(0)), program.stored(np.int64(1))
    if draw(st.booleans()):
        rows, columns = columns, rows
    across = program.add("Range", [zero, columns, one], lambda a, b, s: np.arange(a, b, s))
    down = program.add("Range", [zero, rows, one], lambda a, b, s: np.arange(a, b, s))
    down = program.add("Unsqueeze", [down, program.stored(np.array([1]))], lambda x, a: x.reshape(-1, 1))
    down = program.add("Mul", [down, draw(st.sampled_from([columns, rows]))], np.multiply)
    places = down and program.add("Add", [down, across], np.add)
    if places and not draw(st.integers(0, 2)):
        places = program.add("Transpose", [places], np.transpose, perm=[1, 0])
    if places:
        program.add("Gather", [flat, places], lambda x, i: np.take(x, i), axis=0)


def _mask(program, draw, tensor):
    masks = program.those("mask")
    if masks:
        low, high = program.stored(np.float32(-1)), program.stored(np.float32(1))
        program.add("Where", [draw(st.sampled_from(masks)), low, high], np.where)


def _pick(program, draw, tensor):
    program_size = _size(program, draw, tensor)
    if program_size and draw(st.booleans()):
        _list(program, draw, [program_size, draw(st.sampled_from(program.those("one")))])


STEPS = (_pick, _pick, _arithmetic, _arithmetic, _reshape, _reshape, _expand, _torchscript_expand, _slice, _transpose,
         _combine, _count, _whole, _mask)  # fmt: skip


@st.composite
def programs(draw):
    """Programs of up to about 40 nodes with inputs x[batch, a, b] and z[1, c]."""
    program = Program()
    tail = draw(st.sampled_from([(6,), (2, 4), (1, 3), (4, 1), (3, 2, 2)]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    for name, shapes in (("x", [(n, *tail) for n in BATCHES]), ("z", [(1, tail[-1])] * 3)):
        program.values[name] = [random.integers(-4, 5, shape).astype(np.float32) for shape in shapes]
    program.inputs = {"x": f"x:float32[batch,{','.join(map(str, tail))}]", "z": f"z:float32[1,{tail[-1]}]"}
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=3, max_size=14)):
        step(program, draw, draw(st.sampled_from(program.those("tensor"))))
    if not program.nodes:
        program.add("Neg", ["x"], np.negative)
    return program
