"""The IR as a torch module: ONNX operators in torch, differentiable, without graph breaks under `torch.compile`.

An ONNX graph becomes a flat `torch.fx` graph with one call for each node, so a stack trace, a profile or a compiled graph
names the operators. Values that are shapes are no tensors here but plain ints, SymInts and tuples of them
(`interpreter_values`): a tensor that holds a size would end every compiled graph at the next Reshape.

Operators stand in `interpreter_*.py`, one function each, registered under their ONNX name and the opset version from
which on the function is right. One that is not there is refused when the module is made, with all that is missing.

**Calling it.** `Interpreter(model)` is an `nn.Module`: tensors in by position, in the order of `inputs` (the graph's
inputs that are no initializers), a tuple of tensors out, in the order of `outputs`. `forward` takes `*inputs`, so
`torch.export` wants the dynamic dimensions in one tuple more:

    network = Interpreter(artifact.model)
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=128)}
    with torch.no_grad():  # else the program learns
        program = torch.export.export(network, (ids, mask), dynamic_shapes=((dims, dims),))
    torch.compile(network, fullgraph=True, dynamic=True)(ids, mask)

`dynamic_shapes(artifact.signature)` writes that tuple, with ranges left to torch. An example of size 1 would be taken for
a constant: give at least 2 along each dynamic dimension (the program then takes 1, too). A compiled module has one graph
for all sizes but 1, for which torch compiles another. The module moves with `.to(device)`; what operators make from
shapes alone (Range, ConstantOfShape, random numbers) they make where the first input is.

**The graph.** `program` is a `torch.fx.GraphModule`, one `call_function` for each ONNX node, whose target is the
operator's function (identity holds: `node.target is interpreter_linear.matmul`) and whose arguments are the ONNX inputs
by position (None for one that is left out; no trailing None) and the ONNX attributes that the node has as keywords:

| ONNX | target in `perwatt.` | positional arguments | keywords |
| --- | --- | --- | --- |
| QuantizeLinear | `interpreter_quantize.quantize_linear` | x, scale, zero point | axis, block_size, saturate, output_dtype |
| DequantizeLinear | `interpreter_quantize.dequantize_linear` | x, scale, zero point | axis, block_size, output_dtype |
| Q then DQ, with `straight_through` | `interpreter_quantize.fake_quantize` | x, scale, zero point | those of Q |
| MatMul | `interpreter_linear.matmul` | a, b | |
| Gemm | `interpreter_linear.gemm` | a, b, c | alpha, beta, transA, transB |
| Conv | `interpreter_convolution.conv` | x, w, b | auto_pad, dilations, group, kernel_shape, pads, strides |

Operators whose number of outputs varies return a tuple and are followed by `interpreter_graph.item(call, position)`.
Operators that make tensors of shapes alone have `device=` besides, the result of `interpreter_values.device_of` on the
first input; `interpreter_values.as_tensor` stands where what may be a shape meets an operator of tensors. A constant of floats
is a `get_attr` of a parameter; one of integers or bools is a buffer of its own type, or a plain number where the operator
takes it as a shape: a quantized weight stays the int8 tensor that DequantizeLinear gets. Nothing is folded but arithmetic
of shapes that is constant (at most 64 whole numbers). The
attribute is named `v_` + the ONNX name with what no identifier may hold replaced by `_`, so `state_dict` has
`program.v_conv1_weight`; `weights` has the ONNX names. To change the graph, change `program.graph` and call
`program.recompile()`.

Limits: values are dense tensors (no sequences, maps, optionals or strings); a float in the graph is computed in its own
type on the device that the weights are on. A loop, condition or size that is read from data ends a compiled graph, and so
does a seeded random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perwatt import interpreter_values as values
from perwatt.errors import TargetError
from perwatt.interpreter_graph import Builder, opsets_of
from perwatt.interpreter_operators import find
from perwatt.interpreter_weights import is_constant, with_weights

if TYPE_CHECKING:
    import onnx_ir as ir

    from perwatt.artifact import Artifact, Step
    from perwatt.signature import Batch, Signature


class Unsupported(TargetError):
    """The interpreter can't run this model. `operators`: what is missing, as "domain::Name (opset n)"."""

    def __init__(self, operators: Sequence[str]) -> None:
        self.operators = tuple(operators)
        super().__init__(f"the interpreter has no {', '.join(self.operators)}")


class Interpreter(nn.Module):  # type: ignore[misc]
    """An ONNX graph that runs in torch. Positional tensors in, in the order of `inputs`; a tuple out, in the order of
    `outputs`.

    With `straight_through`, a DequantizeLinear of a QuantizeLinear passes gradients through the rounding: what learning
    wants. Numbers that were folded into the graph (shapes, exponents, limits of Clip) are no weights. Raises Unsupported
    where an operator is missing."""

    def __init__(self, model: ir.Model, *, straight_through: bool = False) -> None:
        super().__init__()
        missing = missing_operators(model)
        if missing:
            raise Unsupported(missing)
        _refuse_types(model)
        self.inputs = [_name(value) for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.outputs = [_name(value) for value in model.graph.outputs]
        self._types = [values.DTYPES.get(int(v.dtype)) if v.dtype is not None else None for v in model.graph.outputs]
        builder = Builder(model, straight_through)
        self.program = builder.graph_module(model.graph)
        self._attributes = builder.attributes

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The float parameters by their ONNX names (frozen: `requires_grad_` those that are to be learnt). Where two
        subgraphs have one of the same name, the second is `name#2`."""
        held = {name: weight for module in self.program.modules() for name, weight in module._parameters.items()}
        return {name: held[attribute] for name, attribute in self._attributes.items() if attribute in held}

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """One pass."""
        like = next((one for one in inputs if isinstance(one, torch.Tensor)), None)
        found: tuple[Any, ...] = self.program(*inputs)
        return tuple(_declared(value, kind, like) for value, kind in zip(found, self._types, strict=True))

    def run(self, batch: Batch) -> Batch:
        """NumPy in and out, by name, without gradients."""
        device = next((weight.device for weight in self.parameters()), torch.device("cpu"))
        feeds = [values.from_numpy(batch[name], device) for name in self.inputs]
        with torch.no_grad():
            found = self(*feeds)
        return {name: values.to_numpy(value) for name, value in zip(self.outputs, found, strict=True)}

    def write_back(self, artifact: Artifact, step: Step) -> Artifact:
        """The artifact that `step` made of `artifact`, from which this module was made, by learning: the weights that
        changed in their own types, all others shared. Raises InputError where `artifact` has no such weights."""
        return with_weights(artifact, {name: weight.detach() for name, weight in self.weights.items()}, step)


def dynamic_shapes(signature: Signature) -> tuple[tuple[dict[int, Any], ...]]:
    """What `torch.export.export` takes as `dynamic_shapes` for the interpreter of a model with this signature: every
    dimension that is a symbol is dynamic, in the range that the model allows."""
    dynamic = torch.export.Dim.DYNAMIC
    return (
        tuple(
            {axis: dynamic for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}
            for spec in signature.inputs
        ),
    )


def missing_operators(model: ir.Model) -> list[str]:
    """Operators of `model` that the interpreter doesn't have, sorted, as "domain::Name (opset n)"."""
    opsets = opsets_of(model)
    found = set()
    for node in model.graph.all_nodes():
        if is_constant(node):
            continue
        version = opsets.get(node.domain, 1)
        if find(node.domain, node.op_type, version) is None:
            found.add(f"{node.domain + '::' if node.domain else ''}{node.op_type} (opset {version})")
    return sorted(found)


def _refuse_types(model: ir.Model) -> None:
    """Inputs and outputs of types that torch has no tensors for."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        kind = None if value.dtype is None else int(value.dtype)
        if kind is not None and kind not in values.DTYPES and kind not in values.FEW_BITS:
            raise TargetError(f"the interpreter has no tensors of type {value.dtype}, which {value.name} has")


def _name(value: Any) -> str:
    return str(value.name)


def _declared(value: Any, kind: torch.dtype | None, like: torch.Tensor | None) -> Any:
    """An output as a tensor; what was a number has the type that the graph declares."""
    if isinstance(value, torch.Tensor) or value is None:
        return value
    made = values.as_tensor(value, like)
    return made if kind is None else made.to(kind)


__all__ = ["Interpreter", "Unsupported", "dynamic_shapes", "missing_operators"]
