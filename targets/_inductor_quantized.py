"""Quantized products of the interpreter's graph, written as torch's own integer and float8 matrix products.

What stands in the model is explicit: QuantizeLinear and DequantizeLinear around a product in floating point. Compiled as
it stands, that product would really be computed in floating point. Three ways out, by device and type:

    product(DQ(Q(x)), DQ(W:int8))   becomes   product(dequantize_per_tensor(…), dequantize_per_channel(…))   on the CPU
                                    becomes   _int_mm(Q(x), W) · (scale of x · scale of W) + bias            on CUDA
    product(DQ(Q(x)), DQ(W:float8)) becomes   _scaled_mm(Q(x), W) · scale of W + bias                        on CUDA

On the CPU the operators of `quantized_decomposed` are those which Inductor, with freezing, turns into oneDNN's int8
kernels, together with the ReLU, the residual sum and the QuantizeLinear that follow. On CUDA, torch has integer and float8
products of matrices, and none for convolutions: those stay as they are, in floating point.

What is rewritten: Conv (CPU), MatMul and Gemm with a constant weight, symmetric and of one scale or one for each output;
the other factor with one scale. Everything else stays as the model says it, which is always right and seldom fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (defines torch.ops.quantized_decomposed)

from perwatt.interpreter_convolution import conv
from perwatt.interpreter_elementwise import add
from perwatt.interpreter_linear import gemm, matmul
from perwatt.interpreter_operators import find
from perwatt.interpreter_quantize import dequantize_linear, quantize_linear

INTEGERS = (torch.int8, torch.uint8)
FLOAT8 = torch.float8_e4m3fn
INT_MM_MORE_ROWS_THAN = 16
"""`torch._int_mm` on CUDA wants more rows than this, and multiples of 8 of columns and of what is summed over."""
INT_MM_MULTIPLE, SCALED_MM_MULTIPLE = 8, 16


@dataclass(frozen=True)
class Scaled:
    """What turns whole numbers or float8 back into numbers: (x - zero) · scale. `scale` has one element or one for each
    slice along `axis`; `zero` is 0 for float8."""

    scale: torch.Tensor
    zero: int
    dtype: torch.dtype
    axis: int = 0


def rewrite(module: fx.GraphModule, device: str) -> int:
    """Rewrite quantized products in `module` (an interpreter's `program`) in place for `device`, "cpu" or "cuda";
    returns how many. Weights must be on the device already."""
    _read_last(module)
    join_bias(module)
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in (conv, matmul, matmul_with_bias, gemm):
            count += _rewrite_product(module, node, device)
    if device == "cpu":
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is quantize_linear:
                _as_uint8(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return count


@cache
def _views() -> set[Any]:
    """Functions of the operators that move elements and leave them as they are."""
    names = ("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
    found = (find("", name, version) for name in names for version in range(1, 27))
    return {operator.function for operator in found if operator is not None}


def _read_last(module: fx.GraphModule) -> None:
    """View(DequantizeLinear(x)) as DequantizeLinear(View(x)), so that it stands right before the product."""
    views = _views()
    for node in list(module.graph.nodes):
        before = node.args[0] if node.op == "call_function" and node.target in views else None
        if not (isinstance(before, fx.Node) and before.target is dequantize_linear):
            continue
        known = _parameters(module, before, _kind(module, before.args[0]))
        if known is None or known.scale.numel() != 1 or constant(module, before.args[0]) is not None:
            continue
        with module.graph.inserting_before(node):
            moved = module.graph.call_function(node.target, (before.args[0], *node.args[1:]), dict(node.kwargs))
            read = module.graph.call_function(dequantize_linear, (moved, *before.args[1:]), dict(before.kwargs))
        node.replace_all_uses_with(read)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def join_bias(module: fx.GraphModule) -> None:
    """MatMul, then Add of a constant vector: as Gemm says it, so that the bias is part of the product."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not add:
            continue
        for product, bias in (node.args, reversed(node.args)):
            held = constant(module, bias)
            fits = isinstance(product, fx.Node) and product.target is matmul and len(product.users) == 1
            weight = _weight(module, product.args[1]) if fits else None
            if weight is None or held is None or held.ndim != 1 or held.numel() != weight[0].shape[-1]:
                continue
            with module.graph.inserting_before(node):
                made = module.graph.call_function(matmul_with_bias, (*product.args, bias))
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
            break
    module.graph.eliminate_dead_code()


def matmul_with_bias(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b) + bias


def constant(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """What a get_attr node holds; None where it is computed."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        held = getattr(module, str(node.target), None)
        return held if isinstance(held, torch.Tensor) else None
    return None


def _parameters(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> Scaled | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear, where they are constants that products know."""
    scale = constant(module, node.args[1])
    given = node.args[2] if len(node.args) > 2 else None
    zero = constant(module, given)
    if scale is None or scale.dtype is not torch.float32 or node.kwargs.get("block_size"):
        return None
    if (given is not None and zero is None) or node.kwargs.get("precision"):
        return None
    dtype = dtype or (zero.dtype if zero is not None else None)
    if dtype is None or (dtype not in INTEGERS and dtype is not FLOAT8):
        return None
    offset = 0.0 if zero is None else float(zero.float().reshape(-1)[0])
    if zero is not None and not bool((zero.float() == offset).all()):
        return None
    return Scaled(scale.detach().reshape(-1), int(offset), dtype, int(node.kwargs.get("axis", 1)))


def _kind(module: fx.GraphModule, node: Any) -> torch.dtype | None:
    """The type of what a QuantizeLinear gave, seen through views; None where it is anything else."""
    views = _views()
    while isinstance(node, fx.Node) and node.target in views:
        node = node.args[0]
    if not (isinstance(node, fx.Node) and node.target is quantize_linear):
        return None
    made = _parameters(module, node, None)
    return made.dtype if made is not None else None


def _activation(module: fx.GraphModule, node: Any) -> tuple[fx.Node, Scaled] | None:
    """The quantized tensor behind a DequantizeLinear of a QuantizeLinear, one scale for all of it."""
    if not (isinstance(node, fx.Node) and node.target is dequantize_linear):
        return None
    kind = _kind(module, node.args[0])
    read = _parameters(module, node, kind) if kind is not None else None
    return (node.args[0], read) if read is not None and read.scale.numel() == 1 else None


def _weight(module: fx.GraphModule, node: Any) -> tuple[torch.Tensor, Scaled] | None:
    """A constant behind a DequantizeLinear, signed and symmetric."""
    if not (isinstance(node, fx.Node) and node.target is dequantize_linear):
        return None
    held = constant(module, node.args[0])
    if held is None or held.dtype not in (torch.int8, FLOAT8):
        return None
    scaled = _parameters(module, node, held.dtype)
    return (held, scaled) if scaled is not None and scaled.zero == 0 else None


def _rewrite_product(module: fx.GraphModule, node: fx.Node, device: str) -> int:
    activation, weight = _activation(module, node.args[0]), _weight(module, node.args[1])
    if activation is None or weight is None or (activation[1].dtype is FLOAT8) != (weight[0].dtype is FLOAT8):
        return 0
    if node.target is conv:
        return _rewrite_conv(module, node, weight) if device == "cpu" else 0
    bias = node.args[2] if len(node.args) > 2 else None
    settings = node.kwargs
    plain = settings.get("alpha", 1.0) == 1.0 and settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
    vector = constant(module, bias)
    if not plain or weight[0].ndim != 2 or (bias is not None and (vector is None or vector.ndim != 1)):
        return 0
    held, scaled = weight
    outputs = held.shape[0] if settings.get("transB") else held.shape[1]
    along = 0 if settings.get("transB") else 1
    if scaled.scale.numel() not in (1, outputs) or (scaled.scale.numel() > 1 and scaled.axis % 2 != along):
        return 0
    if vector is not None and vector.numel() != outputs:
        return 0
    rows = held if settings.get("transB") else held.transpose(0, 1)
    turned = Scaled(scaled.scale.expand(outputs).contiguous(), 0, held.dtype)
    if device == "cpu" and held.dtype is not FLOAT8:
        made = _linear_of_onednn(module, node, rows.contiguous(), turned, bias)
    else:
        made = _matrix_product(module, node, activation, rows, turned, bias)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return 1


# CPU: what Inductor makes oneDNN's kernels of -----------------------------------------------------------------------


def _stored(module: fx.GraphModule, name: str, array: torch.Tensor) -> fx.Node:
    """A get_attr node of `array`, kept in `module` under `name` with a number."""
    number = 0
    while hasattr(module, f"{name}_{number}"):
        number += 1
    module.register_buffer(f"{name}_{number}", array)
    return module.graph.get_attr(f"{name}_{number}")


def _dequantized_rows(module: fx.GraphModule, rows: torch.Tensor, scaled: Scaled) -> fx.Node:
    """A weight with one scale for each slice of its first axis."""
    held = _stored(module, "int8_weight", rows)
    scale = _stored(module, "int8_scale", scaled.scale)
    zero = _stored(module, "int8_zero", torch.zeros(scaled.scale.numel(), dtype=torch.int64, device=rows.device))
    made: fx.Node = module.graph.call_function(
        torch.ops.quantized_decomposed.dequantize_per_channel.default, (held, scale, zero, 0, -128, 127, torch.int8)
    )
    return made


def _rewrite_conv(module: fx.GraphModule, node: fx.Node, weight: tuple[torch.Tensor, Scaled]) -> int:
    held, scaled = weight
    channels = held.shape[0]
    known = scaled.scale.numel() == 1 or (scaled.axis % held.ndim == 0 and scaled.scale.numel() == channels)
    if held.ndim not in (3, 4) or held.dtype is FLOAT8 or not known:
        return 0
    with module.graph.inserting_before(node):
        rows = Scaled(scaled.scale.expand(channels).contiguous(), 0, held.dtype)
        node.args = (node.args[0], _dequantized_rows(module, held, rows), *node.args[2:])
    return 1


def _linear_of_onednn(module: fx.GraphModule, node: fx.Node, rows: torch.Tensor, scaled: Scaled, bias: Any) -> fx.Node:
    with module.graph.inserting_before(node):
        weight = _dequantized_rows(module, rows, scaled)
        made: fx.Node = module.graph.call_function(F.linear, (node.args[0], weight, bias))
    return made


def _as_uint8(module: fx.GraphModule, node: fx.Node) -> None:
    """QuantizeLinear of one scale and the DequantizeLinear that read it, as Inductor's patterns know them. oneDNN's
    convolutions take uint8 only, so that int8 is moved by 128, the zero point with it: the same steps. The quantization
    multiplies by 1 / scale where ONNX divides: a value that lies halfway between two steps may fall to the other one."""
    scaled = _parameters(module, node, None)
    if scaled is None or scaled.scale.numel() != 1 or scaled.dtype is FLOAT8:
        return
    readers = _readers(node)
    for reader in readers:
        known = _parameters(module, reader, scaled.dtype) if reader.target is dequantize_linear else None
        if known is None or known.zero != scaled.zero or float(known.scale) != float(scaled.scale):
            return
    zero = scaled.zero + (128 if scaled.dtype is torch.int8 else 0)
    settings = (float(scaled.scale), zero, 0, 255, torch.uint8)
    operators = torch.ops.quantized_decomposed
    with module.graph.inserting_before(node):
        made = module.graph.call_function(operators.quantize_per_tensor.default, (node.args[0], *settings))
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    for reader in readers:
        with module.graph.inserting_before(reader):
            read = module.graph.call_function(operators.dequantize_per_tensor.default, (reader.args[0], *settings))
        reader.replace_all_uses_with(read)
        module.graph.erase_node(reader)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads what `node` gives, views of it included."""
    views, found = _views(), []
    for user in node.users:
        found += _readers(user) if user.target in views else [user]
    return found


# CUDA: products of matrices -----------------------------------------------------------------------------------------


def _matrix_product(
    module: fx.GraphModule,
    node: fx.Node,
    activation: tuple[fx.Node, Scaled],
    rows: torch.Tensor,
    scaled: Scaled,
    bias: Any,
) -> fx.Node:
    source, taken = activation
    multiple = SCALED_MM_MULTIPLE if scaled.dtype is FLOAT8 else INT_MM_MULTIPLE
    outputs, width = rows.shape
    padded = torch.zeros(_up(outputs, multiple), _up(width, multiple), dtype=torch.uint8, device=rows.device).view(
        rows.dtype
    )  # float8 zeros are bits of zero, as int8 ones are
    padded[:outputs, :width] = rows
    with module.graph.inserting_before(node):
        weight = _stored(module, "rows", padded)
        scale = _stored(module, "scale", (scaled.scale * taken.scale.to(scaled.scale.device)).contiguous())
        arguments: tuple[Any, ...] = (source, weight, scale, bias)
        if scaled.dtype is FLOAT8:
            made: fx.Node = module.graph.call_function(float8_product, arguments)
        else:
            sums = _stored(module, "sums", rows.sum(dim=1, dtype=torch.int32))
            made = module.graph.call_function(int8_product, (*arguments, sums, taken.zero))
    return made


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def int8_product(
    x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, sums: torch.Tensor, zero: int
) -> torch.Tensor:
    """Σ (x - zero) · rows, scaled, as float32: x int8 or uint8 of shape […, K]; rows int8, filled up with zeros to
    multiples of 8; `scale` and `sums` (of rows) for each output."""
    if x.dtype is torch.uint8:
        # The units multiply signed numbers: all is moved by 128, the zero point with it.
        x, zero = (x.to(torch.int16) - 128).to(torch.int8), zero - 128
    outputs, width = scale.shape[0], x.shape[-1]
    flat = x.reshape(-1, width)
    enough = isinstance(flat.shape[0], int) and flat.shape[0] > INT_MM_MORE_ROWS_THAN
    flat = F.pad(flat, (0, rows.shape[1] - width, 0, 0 if enough else INT_MM_MORE_ROWS_THAN + 1))
    found = torch._int_mm(flat, rows.t())[: x.numel() // width, :outputs]
    if zero:
        found = found - zero * sums
    scaled = found.to(torch.float32) * scale
    scaled = scaled if bias is None else scaled + bias
    return scaled.reshape(*x.shape[:-1], outputs)


def float8_product(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Σ x · rows, scaled, as float32: both float8_e4m3fn; rows filled up with zeros to multiples of 16."""
    outputs, width = scale.shape[0], x.shape[-1]
    flat = x.reshape(-1, width)
    if rows.shape[1] != width:
        flat = F.pad(flat.view(torch.uint8), (0, rows.shape[1] - width)).view(FLOAT8)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    found = torch._scaled_mm(flat, rows.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:, :outputs]
    scaled = found * scale
    scaled = scaled if bias is None else scaled + bias
    return scaled.reshape(*x.shape[:-1], outputs)
