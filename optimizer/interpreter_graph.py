"""From an ONNX graph to a `torch.fx` graph: see `interpreter` for what comes out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from perwatt import interpreter_values as values
from perwatt.errors import TargetError
from perwatt.interpreter_operators import Operator, find
from perwatt.interpreter_weights import constant_value, is_constant, weight_names

if TYPE_CHECKING:
    import onnx_ir as ir

IMPLIED = {"QuantizeLinear": (2, "output_dtype"), "CastLike": (1, "implied_type")}
"""Which input's type says what no tensor of torch can say, and the setting that tells it."""


def opsets_of(model: ir.Model) -> dict[str, int]:
    """Versions by domain; the standard one is \"\"."""
    return {("" if domain == "ai.onnx" else domain): version for domain, version in model.opset_imports.items()}


class Builder:
    """Makes the `torch.fx` graph. A weight is one parameter, also where subgraphs use it. `attributes`: what weights are
    called in the modules, by their ONNX names."""

    def __init__(self, model: ir.Model, straight_through: bool) -> None:
        self.opsets = opsets_of(model)
        self.straight_through = straight_through
        self.may_be_host: set[fx.Node] = set()
        self.attributes: dict[str, str] = {}
        self._names = weight_names(model)
        self._parameters: dict[str, nn.Parameter] = {}
        self._taken: set[str] = set()

    def graph_module(
        self, graph: Any, outer: Sequence[Any] = (), constants: Mapping[int, _Constant] | None = None
    ) -> fx.GraphModule:
        """`graph` as a module. The main graph: its inputs in, all outputs out. A subgraph: first the device, then the
        values of `outer` that it uses, then its own inputs; `constants` of enclosing graphs stay constants there."""
        scope = _Scope(fx.Graph(), nn.Module())
        nested = constants is not None
        if nested:
            scope.device = scope.made.placeholder("device")
        own = [value for value in graph.inputs if value.name not in graph.initializers]
        for value in [*outer, *own]:
            scope.values[id(value)] = scope.made.placeholder(identifier(str(value.name)))
            if nested:
                # What a subgraph is given may be a number: a trip count, a shape.
                self.may_be_host.add(scope.values[id(value)])
        if own and not nested:
            scope.device = scope.made.call_function(values.device_of, (scope.values[id(own[0])],))
        for at, constant in (constants or {}).items():
            scope.values[at] = replace(constant, scope=scope)
        for value in graph.initializers.values():
            scope.values[id(value)] = self._constant(value.const_value, self._names[id(value)], scope)
        for node in _ordered(graph):
            self._node(node, scope)
        scope.made.output(tuple(self._use(value, scope, True) for value in graph.outputs))
        # The device where nobody asks for it, a QuantizeLinear that became part of a FakeQuantize.
        scope.made.eliminate_dead_code()
        return fx.GraphModule(scope.root, scope.made)

    def _node(self, node: Any, scope: _Scope) -> None:
        if is_constant(node):
            value = node.outputs[0]
            scope.values[id(value)] = self._constant(constant_value(node), self._names[id(value)], scope)
            return
        operator = find(node.domain, node.op_type, self.opsets.get(node.domain, 1))
        assert operator is not None
        if self.straight_through and operator.name == "DequantizeLinear" and self._fake_quantized(node, scope):
            return
        settings = {**_implied(node), **self._settings(node, operator, scope)}
        if self._folded(node, operator, settings, scope):
            return
        arguments = [
            None
            if value is None
            else self._use(value, scope, operator.takes_host(position), operator.reads_numbers(position))
            for position, value in enumerate(node.inputs)
        ]
        while arguments and arguments[-1] is None:
            arguments.pop()
        settings = {name: _resolved(one) for name, one in settings.items()}
        if operator.counts_outputs:
            settings["outputs"] = len(node.outputs)
        if operator.wants_device:
            settings["device"] = scope.device
        with_name = identifier(node.name or f"{node.op_type}_{node.outputs[0].name}")
        call = scope.made.create_node("call_function", operator.function, tuple(arguments), settings, name=with_name)
        first = arguments[0] if arguments else None
        plain = not isinstance(first, fx.Node) or first in self.may_be_host
        self._outputs(node, call, operator, operator.makes_host or (operator.may_give_host and plain), scope)

    def _outputs(self, node: Any, call: fx.Node, operator: Operator, may_be_host: bool, scope: _Scope) -> None:
        found = {0: call}
        if len(node.outputs) > 1 or operator.counts_outputs:
            named = [position for position, value in enumerate(node.outputs) if value.name]
            found = {position: scope.made.call_function(item, (call, position)) for position in named}
        for position, one in found.items():
            scope.values[id(node.outputs[position])] = one
        if may_be_host:
            self.may_be_host.update(found.values())

    def _folded(self, node: Any, operator: Operator, settings: Mapping[str, Any], scope: _Scope) -> bool:
        """Arithmetic of shapes whose inputs are all constants, done now: a tensor of sizes, such as the pairs of pads that
        torch's exporter turns round, would be read back from the device at run time."""
        known = [None if value is None else scope.values[id(value)] for value in node.inputs]
        if operator.host_inputs is not True or operator.counts_outputs or not known:
            return False
        if not all(one is None or (isinstance(one, _Constant) and one.is_short) for one in known):
            return False
        plain = {name: one.value if isinstance(one, _Constant) else one for name, one in settings.items()}
        with torch.no_grad():
            found = values.as_tensor(operator.function(*(None if one is None else one.value for one in known), **plain))
        if found.is_floating_point() or found.is_complex() or found.numel() > values.HOST_AT_MOST:
            return False
        value = node.outputs[0]
        scope.values[id(value)] = self._held(found, str(value.name), False, scope)
        return True

    def _fake_quantized(self, node: Any, scope: _Scope) -> bool:
        """Q and DQ of one scale as one operator that gradients pass."""
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear" or not _same_scale(before, node):
            return False
        fake = find("perwatt", "FakeQuantize", 1)
        assert fake is not None
        settings = _implied(before) | {name: attribute.value for name, attribute in before.attributes.items()}
        arguments = [None if v is None else self._use(v, scope, False) for v in before.inputs]
        scope.values[id(node.outputs[0])] = scope.made.call_function(fake.function, tuple(arguments), settings)
        return True

    def _use(self, value: Any, scope: _Scope, host: bool, numbers: bool = False) -> Any:
        """A value as an operator takes it: a constant of few integers as plain numbers where it wants those (of any type
        where it only reads `numbers`), and what may be a number as a tensor where it doesn't."""
        found = scope.values[id(value)]
        if isinstance(found, _Constant):
            plain = found.numbers if numbers else found.host
            return plain if (host or numbers) and plain is not None else found.node()
        if not host and found in self.may_be_host:
            return scope.made.call_function(values.as_tensor, (found,), {"device": scope.device})
        return found

    def _constant(self, tensor: Any, name: str, scope: _Scope, weight: bool = True) -> _Constant:
        if tensor is None:
            raise TargetError(f"the interpreter knows no value for {name}")
        return self._held(values.from_numpy(values.array_of(tensor), torch.device("cpu")), name, weight, scope)

    def _held(self, array: torch.Tensor, name: str, weight: bool, scope: _Scope) -> _Constant:
        """Nothing is stored of a constant that no graph uses as a tensor."""
        attribute = ""

        def store(place: _Scope) -> fx.Node:
            nonlocal attribute
            attribute = attribute or self._free(name)
            if not hasattr(place.root, attribute):
                if weight and array.is_floating_point():
                    self.attributes[name] = attribute
                    parameter = self._parameters.setdefault(name, nn.Parameter(array, requires_grad=False))
                    place.root.register_parameter(attribute, parameter)
                else:
                    place.root.register_buffer(attribute, array)
            return place.made.get_attr(attribute)

        return _Constant(array, store, scope)

    def _free(self, name: str) -> str:
        """An attribute that no other constant has: `a.b` and `a_b` are one identifier."""
        wanted = found = identifier(name)
        number = 1
        while found in self._taken:
            number += 1
            found = f"{wanted}_{number}"
        self._taken.add(found)
        return found

    def _settings(self, node: Any, operator: Operator, scope: _Scope) -> dict[str, Any]:
        """The node's attributes as keyword arguments. A subgraph becomes a module, and what it is given besides its own
        inputs a tuple beside it: `body` and `body_outer`. A tensor is still a `_Constant`."""
        settings: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if name not in operator.settings:
                raise TargetError(f"the interpreter's {operator.name} knows no attribute {name}")
            kind = str(attribute.type.name)
            if kind == "GRAPH":
                used = _outer_values(attribute.value)
                known = {id(v): scope.values[id(v)] for v in used if isinstance(scope.values[id(v)], _Constant)}
                outer = [value for value in used if id(value) not in known]
                module_name = identifier(f"{node.name or node.op_type}_{name}_{len(scope.root._modules)}")
                scope.root.add_module(module_name, self.graph_module(attribute.value, outer, known))
                settings[name] = scope.made.get_attr(module_name)
                settings[f"{name}_outer"] = (scope.device, *(self._use(value, scope, True) for value in outer))
            elif kind == "TENSOR":
                settings[name] = self._constant(attribute.value, f"{node.outputs[0].name}_{name}", scope, weight=False)
            else:
                settings[name] = values.plain(attribute.value)
        return settings


@dataclass
class _Scope:
    """One graph in the making. `values` by `id` of the ONNX value; `device` is a node that gives the device."""

    made: fx.Graph
    root: nn.Module
    values: dict[int, Any] = field(default_factory=dict)
    device: fx.Node | None = None


@dataclass(frozen=True)
class _Constant:
    """An initializer or Constant in one graph: `node` makes its node, where a tensor is wanted."""

    array: torch.Tensor
    store: Callable[[_Scope], fx.Node]
    scope: _Scope

    def node(self) -> fx.Node:
        return self.store(self.scope)

    @property
    def host(self) -> Any:
        """As a host value, None where it is none."""
        return values.host_of(self.array)

    @property
    def numbers(self) -> Any:
        """As plain numbers of any type, None where it is long."""
        return values.numbers_of(self.array)

    @property
    def is_short(self) -> bool:
        """Whether it may be sizes."""
        return bool(self.array.numel() <= values.HOST_AT_MOST)

    @property
    def value(self) -> Any:
        """Itself, for computing with it now."""
        return self.array if self.host is None else self.host


def _resolved(setting: Any) -> Any:
    """A tensor among a node's settings as it comes to the operator."""
    if not isinstance(setting, _Constant):
        return setting
    return setting.node() if setting.host is None else setting.host


def item(found: Sequence[Any], position: int) -> Any:
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


def _ordered(graph: Any) -> list[Any]:
    """The nodes, each after those whose outputs it uses: files need not have them so, and ONNX Runtime doesn't mind."""
    nodes = list(graph)
    makers = {id(value): at for at, node in enumerate(nodes) for value in node.outputs}
    needs: dict[int, set[int]] = {}
    for at, node in enumerate(nodes):
        graphs = [one.value for one in node.attributes.values() if str(one.type.name) == "GRAPH"]
        used = [*node.inputs, *(value for inner in graphs for value in _outer_values(inner))]
        needs[at] = {makers[id(value)] for value in used if id(value) in makers}
    if all(max(before, default=-1) < at for at, before in needs.items()):
        return nodes
    return [nodes[at] for at in TopologicalSorter(needs).static_order()]


def _outer_values(graph: Any) -> list[Any]:
    """The values of enclosing graphs that `graph` and its own subgraphs use, each once, in order of use."""
    inner: set[int] = set()
    found: dict[int, Any] = {}

    def walk(one: Any) -> None:
        made = (value for node in one for value in node.outputs)
        inner.update(id(value) for value in [*one.inputs, *one.initializers.values(), *made])
        for node in one:
            for value in node.inputs:
                if value is not None and id(value) not in inner:
                    found.setdefault(id(value), value)
            for attribute in node.attributes.values():
                if str(attribute.type.name) == "GRAPH":
                    walk(attribute.value)
        for value in one.outputs:
            if id(value) not in inner:
                found.setdefault(id(value), value)

    walk(graph)
    return list(found.values())


def identifier(name: str) -> str:
    """A Python identifier that begins like `name` and is not one of Python's own words."""
    return "v_" + re.sub(r"\W", "_", name)


__all__ = ["Builder", "item", "opsets_of"]
