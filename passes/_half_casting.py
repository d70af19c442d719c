"""A graph carried in a half type: weights stored in it, values retyped, and casts wherever a value leaves or enters float32.

Inputs and outputs of the model keep their types, and so does all that nodes which stay in float32 read and give. A value that
several of them read is cast once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from perwatt.fusion import Builder
from perwatt.passes._half_measuring import HalfType, is_float


def carry_in_half(graph: Any, half: HalfType, kept: Collection[Any], masks: Collection[str], taken: set[str]) -> int:
    """Change `graph` but for the nodes in `kept`; returns how many weights were changed. `masks`: names of values that are
    cut to the lowest half instead of infinity."""
    casting = _Casting(graph, half, kept, masks, taken)
    count = casting.weights()
    if count:
        casting.inputs()
        casting.inside()
        casting.outputs()
    return count


class _Casting:
    def __init__(
        self, graph: Any, half: HalfType, kept: Collection[Any], masks: Collection[str], taken: set[str]
    ) -> None:
        self.graph, self.half, self.masks, self.taken = graph, half, masks, taken
        # By identity: casts that are put in on the way are not among them.
        self.kept = {id(node) for node in kept}
        self.fresh: set[int] = set()
        # A constant stays what they read.
        self.kept |= {
            id(node)
            for node in graph
            if node.op_type == "Constant" and any(id(use.node) in self.kept for use in node.outputs[0].uses())
        }

    def weights(self) -> int:
        """Store every float32 weight, and every float32 tensor in an attribute, in half; returns how many."""
        import onnx_ir as ir

        count = 0
        for value in list(self.graph.initializers.values()):
            if value.is_graph_output() or value.const_value is None or not is_float(value.const_value):
                continue
            count += self._weight(value)
        for node in self.graph:
            if node.op_type not in ("Constant", "ConstantOfShape") or id(node) in self.kept:
                continue
            attribute = node.attributes.get("value")
            lowest = self._lowest(node.outputs[0])
            if attribute is not None and attribute.type.name == "TENSOR":
                if is_float(attribute.value):
                    node.attributes["value"] = ir.AttrTensor("value", self._half(attribute.value, lowest))
                    count += node.op_type == "Constant"
            elif node.op_type == "ConstantOfShape" and attribute is None:
                # Without a value it makes float32 zeros.
                zero = ir.tensor([0.0], dtype=ir.DataType.FLOAT)
                node.attributes["value"] = ir.AttrTensor("value", self._half(zero, lowest))
            for name in ("value_float", "value_floats"):
                if node.op_type == "Constant" and name in node.attributes:
                    held = ir.tensor(node.attributes.pop(name).value, dtype=ir.DataType.FLOAT)
                    node.attributes["value"] = ir.AttrTensor("value", self._half(held, lowest))
                    count += 1
        return count

    def _weight(self, value: Any) -> bool:
        """Store one weight in half for those who read it so; whether there are any."""
        import onnx_ir as ir

        uses = list(value.uses())
        ours = [use for use in uses if id(use.node) not in self.kept]
        if uses and not ours:
            return False
        held = self._half(value.const_value, self._lowest(value))
        if len(ours) == len(uses):
            value.const_value, value.type = held, ir.TensorType(self.half.ir)
            return True
        name = held.name = self._unused(f"{value.name}_{self.half.name}")
        fresh = ir.Value(name=name, const_value=held, shape=value.shape, type=ir.TensorType(self.half.ir))
        self.graph.register_initializer(fresh)
        for use in ours:
            use.node.replace_input_with(use.idx, fresh)
        return True

    def _half(self, tensor: Any, lowest: float) -> Any:
        import ml_dtypes
        import numpy as np
        import onnx_ir as ir

        array = tensor.numpy()
        # Beyond the largest half rounding gives infinity, and a mask's 0 · (−largest float32) would become NaN.
        array = np.where(np.isfinite(array), np.clip(array, lowest, self.half.largest), array)
        kind = ml_dtypes.bfloat16 if self.half.name == "bfloat16" else np.float16
        return ir.Tensor(array.astype(kind), dtype=self.half.ir, name=tensor.name)

    def _lowest(self, value: Any) -> float:
        return self.half.lowest if value.name in self.masks else -self.half.largest

    def inputs(self) -> None:
        """Cast what the model is given."""
        for value in self.graph.inputs:
            if is_float(value):
                self._cast_down(value, None)

    def inside(self) -> None:
        """Retype what is given between nodes, with casts where it goes over a border. Where an operator can't give half,
        the checker will say so."""
        import onnx_ir as ir

        for node in [node for node in self.graph if id(node) not in self.fresh]:
            floats = [value for value in node.outputs if is_float(value)]
            if id(node) in self.kept:
                for value in floats:
                    self._cast_down(value, node)
                continue
            self._retarget(node)
            for value in floats:
                if not value.is_graph_output():
                    value.type = ir.TensorType(self.half.ir)
                self._cast_up(value, node)

    def _retarget(self, node: Any) -> None:
        """Casts to float32, and other operators that name float32 in an attribute, go to half."""
        import onnx_ir as ir

        for key in ("to", "dtype"):
            attribute = node.attributes.get(key)
            if attribute is not None and attribute.value == ir.DataType.FLOAT.value:
                node.attributes[key] = ir.AttrInt64(key, self.half.ir.value)

    def _cast_down(self, value: Any, producer: Any) -> None:
        """A float32 value for those who read half."""
        readers = [use for use in value.uses() if id(use.node) not in self.kept]
        if not readers:
            return
        build = Builder(self.graph, producer or self.graph[0], self.taken)
        within = self._cut(build, value) if value.name in self.masks else value
        node = self._cast(within, self.half.ir, f"{value.name}_{self.half.name}", value.shape)
        self._put([*build.nodes, node], producer)
        for use in readers:
            use.node.replace_input_with(use.idx, node.outputs[0])

    def _cut(self, build: Builder, value: Any) -> Any:
        """`value` no lower than the lowest half."""
        import numpy as np

        lowest = build.constant(np.float32(self.half.lowest), f"{value.name}_lowest")
        cut = build.op("Max", value, lowest)
        cut.shape = value.shape
        return cut

    def _cast_up(self, value: Any, producer: Any) -> None:
        """A half value for those who read float32."""
        import onnx_ir as ir

        readers = [use for use in value.uses() if id(use.node) in self.kept]
        if not readers:
            return
        node = self._cast(value, ir.DataType.FLOAT, f"{value.name}_float32", value.shape)
        self._put([node], producer)
        for use in readers:
            use.node.replace_input_with(use.idx, node.outputs[0])

    def outputs(self) -> None:
        """Cast what the model gives; who stays in float32 gives it already."""
        import onnx_ir as ir

        for position, value in enumerate(list(self.graph.outputs)):
            producer = value.producer()
            if not is_float(value) or value.is_graph_input() or producer is None or id(producer) in self.kept:
                continue
            name, shape = value.name, value.shape
            value.name = self._unused(f"{name}_{self.half.name}")
            value.type = ir.TensorType(self.half.ir)
            node = self._cast(value, ir.DataType.FLOAT, name, shape, fresh=False)
            self.graph.append(node)
            self.graph.outputs[position] = node.outputs[0]

    def _cast(self, value: Any, dtype: Any, name: str, shape: Any, fresh: bool = True) -> Any:
        import onnx_ir as ir

        node = ir.node("Cast", [value], {"to": dtype.value})
        node.outputs[0].name = self._unused(name) if fresh else name
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), shape
        return node

    def _put(self, nodes: list[Any], producer: Any) -> None:
        self.fresh |= {id(node) for node in nodes}
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def _unused(self, name: str) -> str:
        return Builder(self.graph, self.graph[0], self.taken).unused(name)
