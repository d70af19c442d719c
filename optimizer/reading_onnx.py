"""ONNX files into the IR: old opsets brought up, inputs tidied, external data held inside the folder. No torch."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, PerwattError

OLDEST_OPSET, NEWEST_OPSET = 23, 26
IR_VERSION = 10
_LOWEST_KEPT_OPSET = 13
_LARGEST_CONVERTED_BYTES = 1_500_000_000
_NEEDS_NEWER_IR = ("FLOAT4E2M1", "FLOAT8E8M0", "INT2", "UINT2")

Convert = Callable[[Path, int, Path], Path]


def read_onnx(path: Path, convert: Convert | None) -> tuple[Any, list[str]]:
    """The IR of an `.onnx` file and what was changed about it. Raises InputError for what is no usable model."""
    import onnx_ir as ir

    try:
        model = ir.load(str(path))
        graph = model.graph
        count = len(graph)
    except PerwattError:
        raise
    except Exception as error:
        reason = f"{path} is not a model in any known format (read as ONNX: {_innermost(error)})"
        raise InputError(reason, fix=KNOWN) from None
    if not count and not graph.outputs:
        raise InputError(f"{path} holds no network (read as ONNX: no nodes and no outputs)", fix=KNOWN)
    _check_external_data(model, path)
    _tidy(model)
    changes = [*_drop_initializer_inputs(model), *_name_bad_dims(model)]
    model, converted = _at_opset(model, path, convert or convert_in_process)
    changes += converted
    changes += _settle_ir_version(model)
    changes += _complete_types(model)
    if not model.graph.inputs and not model.graph.outputs:
        raise InputError(f"{path} has neither inputs nor outputs")
    for value in (*model.graph.inputs, *model.graph.outputs):
        kind = type(value.type).__name__
        if kind not in ("TensorType", "NoneType"):
            raise InputError(f"{path}: {value.name} is a {kind.removesuffix('Type').lower()}, only tensors can be fed")
    return model, changes


KNOWN = "known are TorchScript, torch.export, a state dict or .safetensors with --arch, a Hugging Face folder, and ONNX"


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _tidy(model: Any) -> None:
    """Put nodes into an order in which each comes after what it uses, and import every domain that is used."""
    from perwatt.artifact import graphs_of

    for graph in graphs_of(model):
        for node in graph:
            if node.domain not in ("", "ai.onnx"):
                model.opset_imports.setdefault(node.domain, 1)
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError as error:
        raise InputError(f"the graph holds a cycle ({_innermost(error)})") from None


def _tensors(model: Any) -> Iterator[Any]:
    from perwatt.artifact import graphs_of

    for graph in graphs_of(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                kind = attribute.type.name
                if kind == "TENSOR" and attribute.value is not None:
                    yield attribute.value
                elif kind == "TENSORS":
                    yield from attribute.value


def _check_external_data(model: Any, path: Path) -> None:
    """Hold external weights to files inside the model's own folder, and to their real size."""
    import onnx_ir as ir

    # A cache of downloads may link model and weights into one other folder: that folder counts as the model's own.
    homes = (path.parent.resolve(), path.resolve().parent)
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise InputError(f"{path}: weight {tensor.name} points outside the model's folder ({tensor.location})")
        file = path.parent / location
        if not file.is_file():
            fix = "copy that file beside it"
            raise InputError(f"{path}: its weights are in {tensor.location}, which is missing", fix=fix)
        if not any(file.resolve().is_relative_to(home) for home in homes):
            link = f"a link at {tensor.location}"
            raise InputError(f"{path}: weight {tensor.name} points outside the model's folder ({link})")
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > file.stat().st_size:
            raise InputError(f"{path}: {tensor.location} is truncated (weight {tensor.name} ends at byte {end})")


def _drop_initializer_inputs(model: Any) -> list[str]:
    graph = model.graph
    kept = [value for value in graph.inputs if value.name not in graph.initializers]
    dropped = len(graph.inputs) - len(kept)
    if not dropped:
        return []
    graph.inputs.clear()
    graph.inputs.extend(kept)
    return [f"{dropped} weights that were listed as inputs are inputs no more"]


def _name_bad_dims(model: Any) -> list[str]:
    """Old exporters wrote 0 or -1 for an unknown size."""
    import onnx_ir as ir

    changes = []
    for value in model.graph.inputs:
        if value.shape is None or not any(isinstance(d, int) and d < 1 for d in value.shape):
            continue
        named = [
            ir.SymbolicDim("batch" if axis == 0 else f"{value.name}_{axis}") if isinstance(d, int) and d < 1 else d
            for axis, d in enumerate(value.shape)
        ]
        value.shape = ir.Shape(named)
        changes.append(f"sizes of input {value.name} that were 0 or negative are dynamic")
    return changes


def _opset(model: Any) -> int:
    imports = model.opset_imports
    if "ai.onnx" in imports:
        imports.setdefault("", imports.pop("ai.onnx"))
    # Absent means that no standard operator is used: any version is right.
    return int(imports.setdefault("", OLDEST_OPSET))


def _at_opset(model: Any, path: Path, convert: Convert) -> tuple[Any, list[str]]:
    """`model` with an opset from 23 to 26, or as it is where that can't be had and it is not too old."""
    import onnx_ir.passes.common as common

    opset = _opset(model)
    if OLDEST_OPSET <= opset <= NEWEST_OPSET:
        return model, []
    goal = OLDEST_OPSET if opset < OLDEST_OPSET else NEWEST_OPSET
    if model.functions:
        # The converter knows no model-local functions.
        model = common.InlinePass()(model).model
    # Before version 4 of the IR weights had to be listed as inputs, and the converter insists on it.
    model.ir_version = max(model.ir_version, 8)
    try:
        converted = _converted(model, goal, convert)
    except Exception as error:
        reason = _innermost(error)
        if _LOWEST_KEPT_OPSET <= opset <= NEWEST_OPSET:
            return model, [f"opset {opset} kept: it can't be brought to {goal} ({reason})"]
        raise InputError(
            f"{path} is written in ONNX opset {opset}, which can't be brought to {goal} ({reason})",
            fix=f"export it again with opset {_LOWEST_KEPT_OPSET} to {NEWEST_OPSET}",
        ) from None
    return converted, [f"opset {opset} brought to {goal}"]


def _converted(model: Any, goal: int, convert: Convert) -> Any:
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        inner = any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())
        if inner and node.domain not in ("", "ai.onnx"):
            # It leaves these graphs at the old opset, under the new number.
            raise PerwattError(f"the converter does not look inside {node.domain}.{node.op_type}")
    if sum(tensor.nbytes for tensor in _tensors(model)) > _LARGEST_CONVERTED_BYTES:
        raise PerwattError("its weights are too large for the converter")
    with tempfile.TemporaryDirectory(prefix="perwatt-") as folder:
        source, result = Path(folder) / "source.onnx", Path(folder) / "converted.onnx"
        # The source lies elsewhere than its external weights, so they go inside.
        ir.save(ir.external_data.load_to_model(model.clone()), str(source))
        converted = ir.load(str(convert(source, goal, result)))
    _same_interface(model, converted)
    return converted


def _same_interface(before: Any, after: Any) -> None:
    """The converter drops what it does not understand without a word: compare what must not change."""
    for what in ("inputs", "outputs"):
        names = [v.name for v in getattr(before.graph, what)]
        if names != [v.name for v in getattr(after.graph, what)]:
            raise PerwattError(f"the converter changed the {what}")
    if _customs(before) != _customs(after):
        raise PerwattError("the converter changed operators of other domains")
    if len(list(before.graph.subgraphs())) != len(list(after.graph.subgraphs())):
        raise PerwattError("the converter changed subgraphs")


def _customs(model: Any) -> Counter[tuple[str, str]]:
    return Counter((n.domain, n.op_type) for n in model.graph.all_nodes() if n.domain not in ("", "ai.onnx"))


def convert_in_process(source: Path, opset: int, result: Path) -> Path:
    """Bring `source` to `opset` with onnx's own converter. It is C++ and may crash on a bad file: prefer a worker."""
    import onnx
    import onnx.version_converter

    onnx.save(onnx.version_converter.convert_version(onnx.load(str(source)), opset), str(result))
    return result


def _settle_ir_version(model: Any) -> list[str]:
    version = model.ir_version
    if version > IR_VERSION and any(t.dtype.name in _NEEDS_NEWER_IR for t in _tensors(model)):
        return [f"IR version {version} kept: its number types need it"]
    model.ir_version = IR_VERSION
    return [f"IR version {version} lowered to {IR_VERSION}"] if version > IR_VERSION else []


def _complete_types(model: Any) -> list[str]:
    """Fill in types and ranks of outputs that the file leaves out."""
    import onnx_ir.passes.common as common

    def unknown(values: Any) -> list[str]:
        return [v.name for v in values if v.dtype is None or v.shape is None]

    if not unknown(model.graph.outputs):
        return []
    missing = unknown(model.graph.outputs)
    try:
        common.ShapeInferencePass()(model)
    except Exception:
        return []
    found = sorted(set(missing) - set(unknown(model.graph.outputs)))
    return [f"shape of output {name} inferred" for name in found]
