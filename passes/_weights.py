"""Products with stored weights, and what becomes of weights and bias when a scale or a shift is folded into them.

Every product computes, for output channel m, y[m] = Σ W[m, c] · x[c] + b[m] (the sum running over the kernel too):

    y · s + t        is the product with        W[m, c] · s[m],        b[m] · s[m] + t[m]
    product of x · s + t        has        W[m, c] · s[c],        b[m] + Σ W[m, c] · t[c]

The second with t ≠ 0 only where every output sees all of the kernel: not beside padding, whose zeros nothing was added
to. All arithmetic is in float64 and rounded once, to the weight's own type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.fusion import Builder
from perwatt.patterns import given, is_stored, made_by, only_user, rank, stored

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = "Conv|ConvTranspose|Gemm|MatMul"
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product. `add`: the Add of a stored bias right after a MatMul, which has no input for it."""

    node: Any
    add: Any = None

    @property
    def kind(self) -> str:
        return str(self.node.op_type)

    @property
    def data(self) -> Any:
        return self.node.inputs[0]

    @property
    def weight(self) -> Any:
        return self.node.inputs[1]

    @property
    def bias(self) -> Any:
        """The value added to the product, or None."""
        if self.add is not None:
            return next(value for value in self.add.inputs if value is not self.node.outputs[0])
        inputs = given(self.node)
        return inputs[2] if len(inputs) > 2 else None

    @property
    def output(self) -> Any:
        return (self.add or self.node).outputs[0]

    @property
    def nodes(self) -> tuple[Any, ...]:
        return (self.node,) if self.add is None else (self.node, self.add)

    @property
    def rank(self) -> int | None:
        """How many axes input and output have, where that is known."""
        if self.kind == "MatMul":
            known = (rank(value) for value in (self.output, self.node.outputs[0], self.data))
            return next((axes for axes in known if axes is not None), None)
        return 2 if self.kind == "Gemm" else stored(self.weight).ndim

    @property
    def out_axis(self) -> int:
        """The axis of the weight that counts output channels; the other one of the first two counts input channels."""
        turned = self.kind == "Gemm" and self.node.attributes.get_int("transB", 0)
        return 0 if self.kind == "Conv" or turned else 1

    @property
    def group(self) -> int:
        return int(self.node.attributes.get_int("group", 1)) if self.kind in CONVOLUTIONS else 1

    @property
    def alpha(self) -> float:
        return float(self.node.attributes.get_float("alpha", 1.0)) if self.kind == "Gemm" else 1.0

    @property
    def outs(self) -> int:
        """Output channels."""
        return self._count(self.out_axis)

    @property
    def ins(self) -> int:
        """Input channels."""
        return self._count(1 - self.out_axis)

    @property
    def output_channels(self) -> int:
        """The axis of the output that its channels run along, from the end."""
        return 1 - stored(self.weight).ndim if self.kind in CONVOLUTIONS else -1

    @property
    def input_channels(self) -> int:
        """The axis of the data that its channels run along, from the end."""
        return -2 if self.data_turned else self.output_channels

    @property
    def data_turned(self) -> bool:
        """Whether the data has its channels on the first of its two axes."""
        return self.kind == "Gemm" and bool(self.node.attributes.get_int("transA", 0))

    @property
    def padded(self) -> bool:
        """Whether some outputs may see less than the whole kernel."""
        if self.kind == "ConvTranspose":
            return True
        attributes = self.node.attributes
        pads = attributes["pads"].as_ints() if "pads" in attributes else ()
        return self.kind == "Conv" and (any(pads) or attributes.get_string("auto_pad", "NOTSET").startswith("SAME"))

    def bias_numbers(self) -> Any:
        """What is added to each output channel, in float64; zeros without a bias, None where it differs otherwise."""
        if self.bias is None:
            return np.zeros(self.outs)
        numbers = along_axis(stored(self.bias), -1, self.rank, self.outs)
        beta = self.node.attributes.get_float("beta", 1.0) if self.kind == "Gemm" else 1.0
        return None if numbers is None else np.broadcast_to(numbers * beta, self.outs)

    def spread(self, vector: Any, axis: int) -> Any:
        """`vector`, one number a channel, shaped so that it multiplies the weight along `axis` (0 or 1). Groups share
        axis 1: each row has the channels of its own group there."""
        rows, columns, *kernel = stored(self.weight).shape
        ones = [1] * len(kernel)
        if axis == 0:
            return vector.reshape(-1, 1, *ones)
        if self.group == 1:
            return vector.reshape(1, -1, *ones)
        return np.repeat(vector.reshape(self.group, columns), rows // self.group, axis=0).reshape(rows, columns, *ones)

    def _count(self, axis: int) -> int:
        shape = stored(self.weight).shape
        return int(shape[axis]) * (self.group if axis == 1 else 1)


# Finding them ---------------------------------------------------------------------------------------------------------


def product_from(node: Any) -> Product:
    """The product that begins with this Conv, ConvTranspose, Gemm or MatMul; with the Add of its bias where it has one."""
    add = only_user(node.outputs[0]) if node.op_type == "MatMul" else None
    if add is None or made_by(add.outputs[0], "Add") is None or not is_plain(Product(node)):
        return Product(node)
    whole = Product(node, add)
    return whole if is_stored(whole.bias) and whole.bias_numbers() is not None else Product(node)


def product_at(value: Any, graph: Any) -> Product | None:
    """The product in `graph` that ends in `value`, or None."""
    if value is None or value.producer() is None or value.producer().graph is not graph:
        return None
    if (node := made_by(value, PRODUCTS)) is not None:
        return Product(node)
    if (add := made_by(value, "Add")) is None:
        return None
    starts = (made_by(operand, "MatMul") for operand in add.inputs)
    return next((whole for start in starts if start and (whole := product_from(start)).add is add), None)


def products_on(value: Any, graph: Any) -> list[Product]:
    """The products that take `value` as their data, if nobody else uses it and all lie in `graph`; else none."""
    uses = list(value.uses())
    ours = all(use.idx == 0 and use.node.graph is graph and made_by(use.node.outputs[0], PRODUCTS) for use in uses)
    return [product_from(use.node) for use in uses] if ours and not value.is_graph_output() else []


# Whether they may be changed ------------------------------------------------------------------------------------------


def unfit(product: Product, keeps_weight: bool = False) -> str | None:
    """Why weight and bias of `product` (its bias alone where it `keeps_weight`) can't be changed; None where they can."""
    if not is_stored(product.weight) or (product.bias is not None and not is_stored(product.bias)):
        return "weights are computed, not stored"
    if not is_plain(product):
        return "its weights are no floating-point matrix or kernel"
    if not keeps_weight and len(list(product.weight.uses())) != 1:
        return "its product shares weights with another one"
    return "its bias is not one number for each channel" if product.bias_numbers() is None else None


def is_plain(product: Product) -> bool:
    """Whether the weights of `product` are stored floating-point numbers, and one matrix or one convolution's kernel."""
    weight = stored(product.weight)
    if weight is None or weight.dtype.name not in FLOATS:
        return False
    return bool(weight.ndim > 2 if product.kind in CONVOLUTIONS else weight.ndim == 2)


def out_of_range(product: Product, scale: Any, shift: Any) -> str | None:
    """Why weights multiplied by `scale` would be no good: not finite, too large for their type, or all but zero in it."""
    import ml_dtypes

    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "a scale or shift is not finite"
    weight = stored(product.weight)
    limits = ml_dtypes.finfo(weight.dtype)  # type: ignore[no-untyped-call]
    peak = float(np.abs(weight).max(initial=0))
    scaled = peak * float(np.abs(scale).max(initial=0))
    vanishes = 0 < scaled < float(limits.smallest_normal) <= peak
    too_large = max(scaled, float(np.abs(shift).max(initial=0))) > float(limits.max)
    return f"scaled weights would leave the range of {weight.dtype.name}" if vanishes or too_large else None


def along_axis(array: Any, axis: int, of: int | None, channels: int) -> Any:
    """The numbers that a stored operand has along `axis` (from the end) of a value with `of` axes (None: nobody knows),
    in float64: one, or one for each channel. None where it runs along other axes too or would add some."""
    if array is None or array.ndim > (1 if of is None else of):
        return None
    length = array.shape[axis] if array.ndim >= -axis else 1
    fits = array.size == length and length in (1, channels)
    return array.reshape(-1).astype(np.float64) if fits else None


# Folding --------------------------------------------------------------------------------------------------------------


def folded_after(product: Product, scale: Any, shift: Any) -> tuple[Any, Any]:
    """Weight and bias of the product that gives `product` · scale + shift, in float64; None for a weight that stays as it
    is, and for no bias."""
    scale, shift = (np.broadcast_to(vector, product.outs) for vector in (scale, shift))
    bias = product.bias_numbers() * scale + shift
    return _times(product, scale, product.out_axis), _needed(product, bias, shift)


def folded_before(product: Product, scale: Any, shift: Any) -> tuple[Any, Any]:
    """Weight and bias of the product that makes of x what `product` makes of x · scale + shift; as `folded_after`."""
    scale, shift = (np.broadcast_to(vector, product.ins) for vector in (scale, shift))
    bias = product.bias_numbers()
    if shift.any():
        added = stored(product.weight).astype(np.float64) * product.spread(shift, 1 - product.out_axis)
        bias = bias + product.alpha * added.sum(
            axis=tuple(axis for axis in range(added.ndim) if axis != product.out_axis)
        )
    return _times(product, scale, 1 - product.out_axis), _needed(product, bias, shift)


def put_in(build: Builder, product: Product, data: Any, weight: Any, bias: Any) -> Any:
    """`product` again, on `data`, with these weights and bias as `folded_after` gives them; its output."""
    node, dtype = product.node, stored(product.weight).dtype
    name = node.outputs[0].name
    weight = product.weight if weight is None else build.constant(weight.astype(dtype), f"{name}_weight")
    added = [] if bias is None else [build.constant(bias.astype(dtype), f"{name}_bias")]
    attributes = {key: attribute for key, attribute in node.attributes.items() if key != "beta"}
    inside = [] if product.kind == "MatMul" else added
    made = build.op(product.kind, data, weight, *inside, **attributes)
    made.producer().name, made.shape = node.name, node.outputs[0].shape
    if added == inside:
        return made
    total = build.op("Add", made, *added)
    if product.add is not None:
        total.producer().name = product.add.name
    return total


def nodes_of(products: Iterable[Product]) -> tuple[Any, ...]:
    """The nodes of all of them."""
    return tuple(node for product in products for node in product.nodes)


def _times(product: Product, scale: Any, axis: int) -> Any:
    return None if (scale == 1).all() else stored(product.weight).astype(np.float64) * product.spread(scale, axis)


def _needed(product: Product, bias: Any, shift: Any) -> Any:
    return bias if product.bias is not None or shift.any() else None
