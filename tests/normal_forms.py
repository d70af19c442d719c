"""Normalizations in pieces, in the ways in which exporters write them, for tests of the passes that put them together.

nodes, weights = Form(root="Reciprocal", scale=weight(8)).written(axes=[-1])          # from x to y
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from models import build, node
from onnx import helper

ROOTS = ("Div", "Div by Pow", "Reciprocal", "1/√", "Pow", "√ of Reciprocal", "√ of 1/")
BEHIND, TAKEN_APART = "behind", ("β − μ·f", "−μ·f + β", "−(μ·f) + β")
GROUPINGS = (BEHIND, "on the inverse", "over the root", "first")


@dataclass(frozen=True)
class Form:
    """One way to write (x − μ) / √(σ² + ε) · γ + β, or x / √(mean(x²) + ε) · γ where it isn't `centered`.

    `grouping`: where γ is multiplied in. `fast`: the variance is mean(x²) − μ², guarded by that operator where it is a
    name. `flip`: operands of commutative operators are swapped. `casts`: everything but γ and β is in float32, with casts
    before and after. `axes_input`: axes are an input, as since opset 18."""

    square: str = "Pow"
    root: str = "Div"
    grouping: str = BEHIND
    scale: Any = None
    shift: Any = None
    centered: bool = True
    fast: Any = False
    flip: bool = False
    epsilon: float = 1e-5
    dtype: Any = np.float32
    casts: bool = False
    means: str = "ReduceMean"
    axes_input: bool = True
    variance_axes: Any = None
    keepdims: int = 1
    exponent: float = -0.5
    two: float = 2.0
    half: float = 0.5
    source: str = "x"
    target: str = "y"

    def written(self, axes):
        """(nodes, weights) from x to y."""
        inner = np.float32 if self.casts else self.dtype
        numbers = {
            "epsilon": self.epsilon,
            "two": self.two,
            "one": 1,
            "half": self.half,
            "power": self.exponent,
            "zero": 0,
        }
        weights = {name: np.asarray(value, inner) for name, value in numbers.items()}
        weights |= {name: array for name, array in (("γ", self.scale), ("β", self.shift)) if array is not None}
        weights |= {"axes": np.int64(axes), "variance_axes": np.int64(self.variance_axes or axes)}
        nodes = self._up() + self._root(axes) + self._rest()
        used = {name for each in nodes for name in each.input}
        nodes = [each for each in nodes if each.output[0] in {*used, self.target}]
        return nodes, {name: array for name, array in weights.items() if name in used}

    @property
    def x(self):
        return "x32" if self.casts else self.source

    def _up(self):
        return [node("Cast", self.source, "x32", to=1)] if self.casts else []

    def _op(self, kind, left, right, out):
        swapped = self.flip and kind in ("Add", "Mul", "Max")
        return node(kind, f"{right} {left}" if swapped else f"{left} {right}", out)

    def _mean(self, of, out, axes, name="axes"):
        if self.means == "GlobalAveragePool":
            return node(self.means, of, out)
        if self.axes_input:
            return node("ReduceMean", f"{of} {name}", out, keepdims=self.keepdims)
        return node("ReduceMean", of, out, axes=axes, keepdims=self.keepdims)

    def _squared(self, of, out):
        return self._op("Mul", of, of, out) if self.square == "Mul" else node("Pow", f"{of} two", out)

    def _root(self, axes):
        """What is divided, `c`, and what it is divided by, `d`, or multiplied with, `inv`."""
        nodes = [self._mean(self.x, "μ", axes), node("Sub", f"{self.x} μ", "c")] if self.centered else []
        other = self.variance_axes or axes
        of = self.x if self.fast or not self.centered else "c"
        nodes += [self._squared(of, "sq"), self._mean("sq", "v", other, "variance_axes")]
        if self.fast:
            nodes += [self._squared("μ", "μ2"), node("Sub", "v μ2", "w")]
            nodes += [self._op("Max", "w", "zero", "w2")] if self.fast == "Max" else []
            nodes += [node("Relu", "w", "w2")] if self.fast == "Relu" else []
        nodes += [self._op("Add", ("w2" if isinstance(self.fast, str) else "w") if self.fast else "v", "epsilon", "e")]
        return (
            nodes
            + {
                "Div": [node("Sqrt", "e", "d")],
                "Div by Pow": [node("Pow", "e half", "d")],
                "Reciprocal": [node("Sqrt", "e", "d"), node("Reciprocal", "d", "inv")],
                "1/√": [node("Sqrt", "e", "d"), node("Div", "one d", "inv")],
                "Pow": [node("Pow", "e power", "inv")],
                "√ of Reciprocal": [node("Reciprocal", "e", "r"), node("Sqrt", "r", "inv")],
                "√ of 1/": [node("Div", "one e", "r"), node("Sqrt", "r", "inv")],
            }[self.root]
        )

    def _rest(self):
        c = "c" if self.centered else self.x
        if self.grouping in TAKEN_APART:
            return self._taken_apart()
        last = {
            BEHIND: [
                *self._by_root(c, "n"),
                *(
                    [node("Cast", "n", "n16", to=helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))]
                    if self.casts
                    else []
                ),
            ],
            "on the inverse": [self._op("Mul", "inv", "γ", "f"), self._op("Mul", c, "f", "s")],
            "over the root": [node("Div", "γ d", "f"), self._op("Mul", c, "f", "s")],
            "first": [self._op("Mul", c, "γ", "cγ"), *self._by_root("cγ", "s")],
        }[self.grouping]
        done = last[-1].output[0]
        if self.grouping == BEHIND and self.scale is not None:
            last.append(self._op("Mul", done, "γ", "s"))
        if self.shift is not None:
            last.append(self._op("Add", last[-1].output[0], "β", self.target))
        last[-1].output[0] = self.target
        return last

    def _by_root(self, what, out):
        return [node("Div", f"{what} d", out)] if self.root.startswith("Div") else [self._op("Mul", what, "inv", out)]

    def _taken_apart(self):
        factor = "inv" if self.scale is None else "f"
        by_div = self.root.startswith("Div")
        nodes = [] if self.scale is None else [node("Div", "γ d", "f") if by_div else self._op("Mul", "inv", "γ", "f")]
        nodes.append(self._op("Mul", self.x, factor, "xf"))
        if self.grouping == "−μ·f + β" and self.shift is None:
            nodes += [node("Neg", "μ", "nμ"), self._op("Mul", "nμ", factor, "nμf")]
            return [*nodes, self._op("Add", "xf", "nμf", self.target)]
        if self.grouping == "−(μ·f) + β":
            nodes += [self._op("Mul", "μ", factor, "μf"), node("Neg", "μf", "nμf")]
            return [*nodes, self._op("Add", "nμf", "β", "t"), self._op("Add", "xf", "t", self.target)]
        if self.shift is None:
            return [*nodes, self._op("Mul", "μ", factor, "μf"), node("Sub", "xf μf", self.target)]
        if self.grouping == "−μ·f + β":
            nodes += [node("Neg", "μ", "nμ"), self._op("Mul", "nμ", factor, "nμf"), self._op("Add", "nμf", "β", "t")]
        else:
            nodes += [self._op("Mul", "μ", factor, "μf"), node("Sub", "β μf", "t")]
        return [*nodes, self._op("Add", "xf", "t", self.target)]

    def net(self, axes, shape, opset=23, dtype=None, more=(), outputs="", extra=None):
        """The whole model: x of that shape through the pieces to y, and what `more` nodes make of it."""
        nodes, weights = self.written(axes)
        kind = dtype or np.dtype(self.dtype).name
        made = f"y:{kind}[{shape}]" if not outputs.startswith("only ") else ""
        given = f"{made} {outputs.removeprefix('only ')}".strip()
        return build([*nodes, *more], f"x:{kind}[{shape}]", given, weights | (extra or {}), opset=opset)


def varied(axes, restore, stored=(), noted="", shape="batch,3,8", scale=None):
    """As torch takes x.var() apart: the mean once more, its axes counted otherwise, and a variance without its axes, which
    the nodes of `restore` give back, from v0 to v."""
    nodes, weights = Form(square="Mul", scale=scale).written(axes)
    at = [n.output[0] for n in nodes].index("sq")
    nodes[at : at + 2] = [
        node("ReduceMean", "x inner", "μ2", keepdims=1), node("Sub", "x μ2", "c2"), node("Mul", "c2 c2", "sq"),
        node("ReduceMean", "sq other", "v0", keepdims=0), *restore,
    ]  # fmt: skip
    other = np.int64([axis + shape.count(",") + 1 for axis in axes])
    weights = {**weights, "other": other, "inner": other, **dict(stored)}
    del weights["variance_axes"]
    return build(nodes, f"x:float32[{shape}]", f"y:float32[{shape}]", weights, inner=noted)


UNPROVEN = "the shapes don't prove that the variance gets those axes back that it lost"


def possible(root, grouping, scaled):
    """Whether a form with these can be written: some groupings need γ, or a division, or its opposite."""
    by_div = root.startswith("Div")
    if grouping == "over the root":
        return by_div and scaled
    if grouping == "on the inverse":
        return not by_div and scaled
    if grouping in ("first", "−(μ·f) + β"):
        return scaled
    return grouping == BEHIND or not by_div or scaled


@st.composite
def forms(draw, groupings=GROUPINGS + TAKEN_APART[:2], centered=True, shifted=True):
    """Options of a Form, and whether it has a scale and a shift."""
    scaled, shift = draw(st.booleans()), shifted and draw(st.booleans())
    fits = [(r, g) for r in ROOTS for g in groupings if possible(r, g, scaled)]
    root, grouping = draw(st.sampled_from(fits))
    fast = draw(st.sampled_from([False, False, True, "Max", "Relu"])) if centered else False
    options = {
        "root": root, "grouping": grouping, "fast": fast, "centered": centered,
        "square": draw(st.sampled_from(["Pow", "Mul"])), "flip": draw(st.booleans()),
        # What mean(x²) − μ² loses to rounding, a small ε would lay bare.
        "epsilon": 1e-3 if fast else draw(st.sampled_from([1e-5, 1e-6, 1e-12])),
    }  # fmt: skip
    return options, scaled, shift
