"""From a torch module to the IR: `torch.export`, then ONNX, then readable names and nothing that is left of torch.

The batch axis stays dynamic where the model lets it; where its code depends on the number of items, the export is
repeated with a fixed batch and a note says so.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perwatt.errors import InputError
from perwatt.reading_shapes import BATCH, examples
from perwatt.signature import TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
"""The oldest opset that passes and targets expect; torch exports to it."""


@dataclass
class Exported:
    """A network as torch sees it (`program`) and in the IR (`model`), with sentences for the report."""

    program: Any
    model: ir.Model
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch and its exporter warn and log: none of it is the user's to act on."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export_module(
    module: Any, specs: Sequence[TensorSpec], inferred: bool = False, sizes: Mapping[str, int] | None = None
) -> Exported:
    """Export `module` (in eval mode) for inputs of `specs`, given in the order of its forward parameters.

    `inferred` says that the dynamic batch is our guess and not the user's word, so that it is proved by a run with
    another number of items. `sizes` are sizes of dynamic axes that the model is known to take."""
    sizes = dict(sizes or {})
    notes = []
    with quiet():
        program, failure = None, None
        for attempt in _attempts(specs, sizes):
            try:
                values = examples(attempt, sizes)
                program = _export(module, attempt, values)
                if inferred and BATCH in _symbols(attempt) and not _follows_batch(program, attempt, values):
                    program = None
                    continue
            except Exception as error:
                failure = failure or error
                program = None
                continue
            lost = _symbols(specs) - _symbols(attempt)
            if lost:
                notes.append(f"{' and '.join(sorted(lost))} fixed: the model's code depends on the size of that axis")
            specs = attempt
            break
        if program is None:
            raise InputError(f"torch.export can't follow the model's code: {first_line(failure)}") from failure
        model = to_ir(program, [spec.name for spec in specs], specs)
    if BATCH in _symbols(specs):
        notes.insert(0, "batch axis is dynamic")
    return Exported(program, model, notes)


def first_line(error: BaseException | None) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _symbols(specs: Sequence[TensorSpec]) -> set[str]:
    return {d for spec in specs for d in spec.shape or () if isinstance(d, str)}


def _attempts(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> Iterator[Sequence[TensorSpec]]:
    """All dynamic axes, then only the batch, then none."""
    yield specs
    symbols = _symbols(specs)
    if BATCH in symbols and len(symbols) > 1:
        yield [_fixed(spec, symbols - {BATCH}, sizes) for spec in specs]
    if symbols:
        yield [_fixed(spec, symbols, sizes) for spec in specs]


def _fixed(spec: TensorSpec, symbols: set[str], sizes: Mapping[str, int]) -> TensorSpec:
    usual = 64 if len(spec.shape or ()) >= 4 else 8
    shape = tuple(
        sizes.get(d, 1 if d == BATCH else usual) if isinstance(d, str) and d in symbols else d for d in spec.shape or ()
    )
    return TensorSpec(spec.name, spec.dtype, shape)


def _export(module: Any, specs: Sequence[TensorSpec], values: Sequence[Any]) -> Any:
    import torch

    dims = {symbol: torch.export.Dim(symbol) for symbol in sorted(_symbols(specs))}
    for _ in range(3):
        try:
            return _export_with(module, specs, values, dims)
        except Exception as error:
            # A limit that the model's code implies (a table of 512 positions) must be said; the error says it.
            limits = _suggested_limits(str(error), dims)
            if not limits:
                raise
            dims.update(limits)
    return _export_with(module, specs, values, dims)


def _suggested_limits(text: str, dims: dict[str, Any]) -> dict[str, Any]:
    import torch

    found = {}
    for name, inside in re.findall(r"^\s*(\w+) = Dim\('\w+', ([^)]*)\)", text, flags=re.MULTILINE):
        limits = {key: int(value) for key, value in re.findall(r"(min|max)=(\d+)", inside)}
        # A size of one is run by what was exported for more, so that torch's wish for at least two is no limit.
        limits = {key: value for key, value in limits.items() if not (key == "min" and value <= 2)}
        if name in dims and limits:
            found[name] = torch.export.Dim(name, **limits)
    return found


def _export_with(module: Any, specs: Sequence[TensorSpec], values: Sequence[Any], dims: dict[str, Any]) -> Any:
    import torch

    shapes = tuple({a: dims[d] for a, d in enumerate(spec.shape or ()) if isinstance(d, str)} for spec in specs)
    names = [spec.name for spec in specs]
    with torch.no_grad():
        keywords = _keywords(module, names)
        if keywords:
            return torch.export.export(
                module, (), dict(zip(names, values, strict=True)), dynamic_shapes=dict(zip(names, shapes, strict=True))
            )
        # A module that takes *args counts as having one parameter that is a tuple.
        nested = (shapes,) if _takes_any_number(module) else shapes
        return torch.export.export(module, tuple(values), dynamic_shapes=nested)


def _keywords(module: Any, names: Sequence[str]) -> bool:
    """Whether inputs must go by keyword, because a parameter between them is left at its default."""
    import inspect

    import torch

    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return False
    positional = list(inspect.signature(module.forward).parameters)[: len(names)]
    return not _takes_any_number(module) and positional != list(names)


def _takes_any_number(module: Any) -> bool:
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


def _follows_batch(program: Any, specs: Sequence[TensorSpec], values: Sequence[Any]) -> bool:
    """Whether three items give three results: a traced model may carry the number that it was traced with."""
    import torch
    from torch.utils._pytree import tree_leaves

    three = []
    for spec, value in zip(specs, values, strict=True):
        batched = spec.shape and spec.shape[0] == BATCH
        three.append(torch.cat([value, value, value])[:3] if batched else value)
    with torch.no_grad():
        module = program.module()
        outputs = (
            module(**dict(zip([s.name for s in specs], three, strict=True))) if _by_name(program) else module(*three)
        )
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return all(t.dim() == 0 or t.shape[0] == 3 for t in tensors)


def _by_name(program: Any) -> bool:
    spec = program.call_spec.in_spec
    return bool(spec is not None and spec.num_children == 2 and spec.child(1).num_children)


def to_ir(program: Any, names: Sequence[str], specs: Sequence[TensorSpec] | None) -> ir.Model:
    """The IR of an exported program: input and output names readable, symbols named, torch's traces removed."""
    import torch

    model: ir.Model
    with quiet(), torch.no_grad():
        try:
            model = torch.onnx.export(
                program, (), dynamo=True, optimize=False, verbose=False, opset_version=OPSET, external_data=False
            ).model
        except Exception as error:
            raise InputError(f"the model has no ONNX form: {_onnx_reason(error)}") from error
    if len(model.graph.inputs) != len(names):
        names = [str(value.name) for value in model.graph.inputs]
        specs = None
    _share_weights(model)
    _forget_torch(model)
    _name_inputs_and_outputs(model, names, output_names(program, len(model.graph.outputs)))
    _name_symbols(model, specs)
    return model


def _onnx_reason(error: BaseException) -> str:
    # The exporter wraps the reason in pages of advice; the innermost cause is what counts.
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _share_weights(model: ir.Model) -> None:
    """One initializer for each piece of memory, as tied weights had in torch."""
    seen: dict[Any, Any] = {}
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if raw is None or not hasattr(raw, "untyped_storage") or value.is_graph_output():
            continue
        key = (raw.untyped_storage().data_ptr(), raw.storage_offset(), tuple(raw.shape), raw.stride(), raw.dtype)
        first = seen.setdefault(key, value)
        if first is not value and raw.numel():
            value.replace_all_uses_with(first)
            del graph.initializers[name]


def _forget_torch(model: ir.Model) -> None:
    """Drop metadata (stack traces with paths of the machine that exported) and hold weights in plain arrays."""
    import onnx_ir as ir

    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "perwatt", None
    for graph in (model.graph, *model.graph.subgraphs(), *(f.graph for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.meta.clear()
        for node in graph:
            node.metadata_props.clear()
            node.meta.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()
                output.meta.clear()
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)


def output_names(program: Any, count: int) -> list[str]:
    """`output` for a single tensor, the keys of a dict, else `output_0`, `output_1`, …"""
    from torch.utils import _pytree as pytree

    names: list[str] = []
    with contextlib.suppress(Exception):
        spec = program.call_spec.out_spec
        tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        for path, _ in pytree.tree_flatten_with_path(tree)[0]:
            keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            if not keys:
                names.append("output")
            else:
                names.append("_".join(keys) if not keys[0].isdigit() else "output_" + "_".join(keys))
    if len(names) != count or len(set(names)) != count:
        names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    return ["output"] if names == ["output_0"] else [re.sub(r"[^\w.]", "_", name) for name in names]


def _name_inputs_and_outputs(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    import onnx_ir as ir

    graph = model.graph
    renamed: set[int] = set()
    for index, value in enumerate(graph.outputs):
        # An input, a weight or an output that was already named can't take a second name.
        if value.is_graph_input() or value.is_initializer() or id(value) in renamed:
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[index] = identity.outputs[0]
        renamed.add(id(graph.outputs[index]))
    wanted = {*inputs, *outputs}
    taken = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for value in (*(v for n in graph.all_nodes() for v in n.outputs), *list(graph.initializers.values())):
        if value.name in wanted and id(value) not in taken:
            value.name = f"{value.name}_inner"
    for value, name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        value.name = name


def _name_symbols(model: ir.Model, specs: Sequence[TensorSpec] | None) -> None:
    """Rename torch's symbols (`s77`) everywhere: to the names asked for, else to what their place suggests."""
    names: dict[str, str] = {}
    for index, value in enumerate(model.graph.inputs):
        asked = specs[index].shape if specs else None
        for axis, dim in enumerate(value.shape or ()):
            symbol = getattr(dim, "value", None)
            if isinstance(dim, int) or symbol is None or symbol in names:
                continue
            named = asked[axis] if asked else None
            if isinstance(named, str):
                names[symbol] = named
                continue
            wish = _suggested(value, axis)
            names[symbol] = wish if wish not in names.values() else f"{value.name}_{axis}"
    graphs = (model.graph, *model.graph.subgraphs())
    for value in (v for g in graphs for v in (*g.inputs, *g.outputs, *(o for n in g for o in n.outputs))):
        _rename_dims(value, names)


def _suggested(value: Any, axis: int) -> str:
    if axis == 0:
        return BATCH
    rank = len(value.shape)
    if axis == 1 and rank == 2:
        return "sequence"
    return {2: "height", 3: "width"}.get(axis, f"{value.name}_{axis}") if rank == 4 else f"{value.name}_{axis}"


def _rename_dims(value: Any, names: dict[str, str]) -> None:
    import onnx_ir as ir

    if value.shape is None or value.shape.is_static():
        return
    dims: list[Any] = []
    for dim in value.shape:
        text = getattr(dim, "value", None)
        if isinstance(dim, int) or text is None:
            dims.append(dim)
        else:
            dims.append(ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(text))))
    value.shape = ir.Shape(dims)
