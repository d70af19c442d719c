"""The IR as a torch module: ONNX operators in torch, differentiable, without graph breaks under `torch.compile`.

An ONNX graph becomes a flat `torch.fx` graph with one call for each node, so a stack trace, a profile or a compiled graph
names the operators. Values that are shapes are no tensors here but plain ints, SymInts and tuples of them
(`interpreter_values`): a tensor that holds a size would end every compiled graph at the next Reshape.

Operators stand in `interpreter_*.py`, one function each, registered under their ONNX name and the opset version from
which on the function is right. One that is not there is refused when the module is made, with all that is missing.

Limits: values are dense tensors (no sequences, maps, optionals or strings); a float in the graph is computed in its own
type on the device that the weights are on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from perwatt import interpreter_values as values
from perwatt.errors import TargetError
from perwatt.interpreter_operators import Operator, find

if TYPE_CHECKING:
    import onnx_ir as ir

    from perwatt.signature import Batch


IMPLIED = {"QuantizeLinear": (2, "output_dtype"), "CastLike": (1, "implied_type")}
"""Which input's type says what no tensor of torch can say, and the setting that tells it."""


class Unsupported(TargetError):
    """The interpreter can't run this model. `operators`: what is missing, as "domain::Name (opset n)"."""

    def __init__(self, operators: Sequence[str]) -> None:
        self.operators = tuple(operators)
        super().__init__(f"the interpreter has no {', '.join(self.operators)}")


class Interpreter(nn.Module):  # type: ignore[misc]
    """An ONNX graph that runs in torch. Positional tensors in, in the order of `inputs`; a tuple out, in the order of
    `outputs`.

    `weights` maps ONNX names to the float parameters (frozen: `requires_grad_` those that are to be learnt). With
    `straight_through`, a DequantizeLinear of a QuantizeLinear passes gradients through the rounding: what learning wants.
    Raises Unsupported where an operator is missing."""

    def __init__(self, model: ir.Model, *, straight_through: bool = False) -> None:
        super().__init__()
        missing = missing_operators(model)
        if missing:
            raise Unsupported(missing)
        _refuse_types(model)
        self.inputs = [_name(value) for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.outputs = [_name(value) for value in model.graph.outputs]
        self._types = [values.DTYPES.get(int(v.dtype)) if v.dtype is not None else None for v in model.graph.outputs]
        self.weights: dict[str, nn.Parameter] = {}
        builder = _Builder(self, _opsets(model), straight_through)
        self.program = builder.graph_module(model.graph)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """One pass."""
        like = next((one for one in inputs if isinstance(one, torch.Tensor)), None)
        found: tuple[Any, ...] = self.program(*inputs)
        return tuple(_declared(value, kind, like) for value, kind in zip(found, self._types, strict=True))

    def run(self, batch: Batch) -> Batch:
        """NumPy in and out, by name, without gradients."""
        device = next((weight.device for weight in self.weights.values()), torch.device("cpu"))
        feeds = [values.from_numpy(batch[name], device) for name in self.inputs]
        with torch.no_grad():
            found = self(*feeds)
        return {name: values.to_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


def missing_operators(model: ir.Model) -> list[str]:
    """Operators of `model` that the interpreter doesn't have, sorted, as "domain::Name (opset n)"."""
    opsets = _opsets(model)
    found = set()
    for node in model.graph.all_nodes():
        if _is_constant(node):
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


def _opsets(model: ir.Model) -> dict[str, int]:
    return {("" if domain == "ai.onnx" else domain): version for domain, version in model.opset_imports.items()}


def _name(value: Any) -> str:
    return str(value.name)


class _Builder:
    """Makes the `torch.fx` graph. Weights belong to `owner`, once each, also where subgraphs use them."""

    def __init__(self, owner: Interpreter, opsets: Mapping[str, int], straight_through: bool) -> None:
        self.owner = owner
        self.opsets = opsets
        self.straight_through = straight_through
        self.may_be_host: set[fx.Node] = set()

    def graph_module(
        self, graph: Any, outer: Sequence[Any] = (), constants: Mapping[int, _Constant] | None = None
    ) -> fx.GraphModule:
        """`graph` as a module: first the values of `outer` that it uses, then its own inputs, in; all outputs out.
        `constants` of enclosing graphs stay constants."""
        constants = constants or {}
        made, root = fx.Graph(), nn.Module()
        scope: dict[int, Any] = {}
        own = [value for value in graph.inputs if value.name not in graph.initializers]
        for value in [*outer, *own]:
            place = made.placeholder(_identifier(str(value.name)))
            scope[id(value)] = place
            # What a subgraph is given may be a number: a trip count, a shape.
            self.may_be_host.add(place)
        for value, constant in constants.items():
            scope[value] = self._constant_of(constant.array, constant.name, made, root)
        for value in graph.initializers.values():
            scope[id(value)] = self._constant(value.const_value, str(value.name), made, root)
        for node in graph:
            self._node(node, scope, made, root)
        made.output(tuple(self._use(value, scope, True, made) for value in graph.outputs))
        return fx.GraphModule(root, made)

    def _node(self, node: Any, scope: dict[int, Any], made: fx.Graph, root: nn.Module) -> None:
        if _is_constant(node):
            scope[id(node.outputs[0])] = self._constant(_constant_value(node), str(node.outputs[0].name), made, root)
            return
        version = self.opsets.get(node.domain, 1)
        operator = find(node.domain, node.op_type, version)
        assert operator is not None
        if self.straight_through and operator.name == "DequantizeLinear" and self._fake_quantized(node, scope, made):
            return
        arguments = [
            None
            if value is None
            else self._use(value, scope, operator.takes_host(position), made, operator.host_inputs is not True)
            for position, value in enumerate(node.inputs)
        ]
        while arguments and arguments[-1] is None:
            arguments.pop()
        settings = {**_implied(node), **self._settings(node, operator, scope, made, root)}
        if operator.counts_outputs:
            settings["outputs"] = len(node.outputs)
        with_name = _identifier(node.name or f"{node.op_type}_{node.outputs[0].name}")
        call = made.create_node("call_function", operator.function, tuple(arguments), settings, name=with_name)
        if operator.may_give_host:
            self.may_be_host.add(call)
        if len(node.outputs) == 1 and not operator.counts_outputs:
            scope[id(node.outputs[0])] = call
            return
        for position, value in enumerate(node.outputs):
            if value.name:
                item = made.call_function(_item, (call, position))
                scope[id(value)] = item
                if operator.may_give_host:
                    self.may_be_host.add(item)

    def _fake_quantized(self, node: Any, scope: dict[int, Any], made: fx.Graph) -> bool:
        """Q and DQ of one scale as one operator that gradients pass."""
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear" or not _same_scale(before, node):
            return False
        fake = find("perwatt", "FakeQuantize", 1)
        assert fake is not None
        settings = _implied(before) | {name: attribute.value for name, attribute in before.attributes.items()}
        arguments = [None if v is None else self._use(v, scope, False, made) for v in before.inputs]
        scope[id(node.outputs[0])] = made.call_function(fake.function, tuple(arguments), settings)
        return True

    def _use(self, value: Any, scope: dict[int, Any], host: bool, made: fx.Graph, narrow: bool = False) -> Any:
        """A value as an operator takes it: a constant of few integers as plain numbers where it wants those (of `narrow`
        types too, where it will only read them), and what may be a number as a tensor where it doesn't."""
        found = scope[id(value)]
        if isinstance(found, _Constant):
            plain = found.numbers if narrow else found.host
            return plain if host and plain is not None else found.node()
        if not host and found in self.may_be_host:
            return made.call_function(values.as_tensor, (found,))
        return found

    def _constant(self, tensor: Any, name: str, made: fx.Graph, root: nn.Module) -> _Constant:
        if tensor is None:
            raise TargetError(f"the interpreter knows no value for {name}")
        return self._constant_of(values.from_numpy(values.array_of(tensor), torch.device("cpu")), name, made, root)

    def _constant_of(self, array: torch.Tensor, name: str, made: fx.Graph, root: nn.Module) -> _Constant:
        return _Constant(array, name, lambda: self._stored(array, name, made, root))

    def _stored(self, array: torch.Tensor, name: str, made: fx.Graph, root: nn.Module) -> fx.Node:
        attribute = _identifier(name)
        if not hasattr(root, attribute):
            if array.is_floating_point():
                weight = self.owner.weights.setdefault(name, nn.Parameter(array, requires_grad=False))
                root.register_parameter(attribute, weight)
            else:
                root.register_buffer(attribute, array)
        return made.get_attr(attribute)

    def _settings(
        self, node: Any, operator: Operator, scope: dict[int, Any], made: fx.Graph, root: nn.Module
    ) -> dict[str, Any]:
        """The node's attributes as keyword arguments. A subgraph becomes a module, and the outer values that it uses a
        tuple beside it: `body` and `body_outer`."""
        settings: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if name not in operator.settings:
                raise TargetError(f"the interpreter's {operator.name} knows no attribute {name}")
            kind = str(attribute.type.name)
            if kind == "GRAPH":
                used = _outer_values(attribute.value)
                known = {id(v): scope[id(v)] for v in used if isinstance(scope[id(v)], _Constant)}
                outer = [value for value in used if id(value) not in known]
                module_name = _identifier(f"{node.name or node.op_type}_{name}_{len(root._modules)}")
                root.add_module(module_name, self.graph_module(attribute.value, outer, known))
                settings[name] = made.get_attr(module_name)
                settings[f"{name}_outer"] = tuple(self._use(value, scope, True, made) for value in outer)
            elif kind == "TENSOR":
                held = self._constant(attribute.value, f"{node.outputs[0].name}_{name}", made, root)
                settings[name] = held.host if held.host is not None else held.node()
            else:
                settings[name] = values.plain(attribute.value)
        return settings


class _Constant:
    """An initializer or Constant: `node` makes its node, where a tensor is wanted."""

    def __init__(self, array: torch.Tensor, name: str, node: Callable[[], fx.Node]) -> None:
        self.host = values.host_of(array)
        self.numbers = values.numbers_of(array)
        self.array, self.name, self.node = array, name, node


def _declared(value: Any, kind: torch.dtype | None, like: torch.Tensor | None) -> Any:
    """An output as a tensor; what was a number has the type that the graph declares."""
    if isinstance(value, torch.Tensor) or value is None:
        return value
    made = values.as_tensor(value, like)
    return made if kind is None else made.to(kind)


def _item(found: Sequence[Any], position: int) -> Any:
    """One output of several; None where an optional one was not made."""
    return found[position] if position < len(found) else None


def _implied(node: Any) -> dict[str, Any]:
    """Settings that the graph gives by a type alone: torch has no four-bit types, so a zero point's can't be read off."""
    position, setting = IMPLIED.get(node.op_type, (0, ""))
    told = node.inputs[position] if setting and len(node.inputs) > position else None
    return {} if told is None or told.dtype is None else {setting: int(told.dtype)}


def _same_scale(quantize: Any, dequantize: Any) -> bool:
    theirs, ours = list(quantize.inputs[1:]), list(dequantize.inputs[1:])
    return [id(v) for v in theirs if v is not None] == [id(v) for v in ours if v is not None]


def _outer_values(graph: Any) -> list[Any]:
    """The values of enclosing graphs that `graph` and its own subgraphs use, each once, in order of use."""
    inner: set[int] = set()
    found: dict[int, Any] = {}

    def walk(one: Any) -> None:
        inner.update(id(value) for value in [*one.inputs, *one.initializers.values()])
        for node in one:
            for value in node.inputs:
                if value is not None and id(value) not in inner:
                    found.setdefault(id(value), value)
            for attribute in node.attributes.values():
                if str(attribute.type.name) == "GRAPH":
                    walk(attribute.value)
            inner.update(id(value) for value in node.outputs)
        for value in one.outputs:
            if id(value) not in inner:
                found.setdefault(id(value), value)

    walk(graph)
    return list(found.values())


def _is_constant(node: Any) -> bool:
    return bool(node.op_type == "Constant" and node.domain in ("", "ai.onnx"))


def _constant_value(node: Any) -> Any:
    """What a Constant node holds, whichever attribute says it."""
    (attribute,) = node.attributes.values()
    return attribute.value if attribute.name in ("value", "sparse_value") else attribute


def _identifier(name: str) -> str:
    """A Python identifier that begins like `name` and is not one of Python's own words."""
    return "v_" + re.sub(r"\W", "_", name)


__all__ = ["Interpreter", "Unsupported", "missing_operators"]
