"""Tiny models for tests, each built in a few lines, with weights that depend on a seed and nothing else.

    build([node("Conv", "x w", "y")], "x:float32[batch,3,8,8]", "y:float32[batch,4,6,6]", {"w": weight(4, 3, 3, 3)})

An empty word in a node's inputs is written `-`: `node("Clip", "x - high", "y")`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from perwatt.artifact import Artifact, graphs_of
from perwatt.contract import Capabilities, Context, QuantizationStyle
from perwatt.data import Samples
from perwatt.passes._half_rest import SHORT
from perwatt.recipe import Budget
from perwatt.reference import Reference

# Artifacts remember their files, so these have to outlive a test.
SCRATCH = tempfile.TemporaryDirectory(prefix="perwatt-tests-")
SYMMETRIC = QuantizationStyle("symmetric", "int8", "int8", True, True)
ASYMMETRIC = QuantizationStyle("asymmetric", "uint8", "int8", False, True)


def weight(*shape, seed=0, scale=0.3, dtype=np.float32):
    """Normal noise."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(dtype)


def node(operator, inputs, outputs, **attributes):
    """A node; names of values are separated by spaces, `-` is an input left out."""
    names = [name if name != "-" else "" for name in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), **attributes)


def value(spec):
    """`x:float32[batch,3]` to a typed value; without brackets the rank is unknown, `?` is an axis without a name."""
    name, dtype, dims = re.fullmatch(r"(\w+):(\w+)(?:\[(.*)\])?", spec).groups()
    kind = onnx.TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = None if dims is None else [int(d) if d.isdigit() else None if d == "?" else d for d in dims.split(",") if d]
    return helper.make_tensor_value_info(name, kind, shape)


def proto(nodes, inputs, outputs, weights=None, *, inner="", opset=23):
    """A model as protobuf; `inputs`, `outputs` and `inner` are specs separated by spaces."""
    graph = helper.make_graph(
        nodes, "net", [value(s) for s in inputs.split()], [value(s) for s in outputs.split()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
        value_info=[value(s) for s in inner.split()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def build(*args, **options):
    """The artifact of that model, checked."""
    made = proto(*args, **options)
    onnx.checker.check_model(made)
    return Artifact(model=ir.from_proto(made))


def normalization(name, channels, seed=0):
    """γ, β, μ and σ² of a batch normalization, as `<name>_gamma` and so on."""
    parts = {part: weight(channels, seed=seed + i) for i, part in enumerate(("gamma", "beta", "mean", "var"))}
    parts["gamma"] += 1
    parts["var"] = np.abs(parts["var"]) + 0.5
    return {f"{name}_{part}": array for part, array in parts.items()}


def norm_node(name, source, out, **attributes):
    """The batch normalization that goes with `normalization(name, …)`."""
    inputs = f"{source} {name}_gamma {name}_beta {name}_mean {name}_var"
    return node("BatchNormalization", inputs, out, name=f"/{out.split()[0]}", **attributes)


def conv_net(batch="batch", width=8, side=8, seed=0):
    """Two convolutions with batch normalizations, pooling, linear: x:float32[batch,3,8,8] to y:float32[batch,5]."""
    nodes = [
        node("Conv", "x w1", "c1", name="/layer1/conv", pads=[1] * 4),
        norm_node("bn1", "c1", "n1"),
        node("Relu", "n1", "r1", name="/layer1/relu"),
        node("Conv", "r1 w2 b2", "c2", name="/layer2/conv", pads=[1] * 4),
        norm_node("bn2", "c2", "n2"),
        node("Relu", "n2", "r2", name="/layer2/relu"),
        node("GlobalAveragePool", "r2", "p", name="/pool"),
        node("Flatten", "p", "f", name="/flatten"),
        node("Gemm", "f w3 b3", "y", name="/head"),
    ]
    weights = {
        "w1": weight(width, 3, 3, 3, seed=seed),
        "w2": weight(width, width, 3, 3, seed=seed), "b2": weight(width, seed=seed),
        "w3": weight(width, 5, seed=seed), "b3": weight(5, seed=seed),
        **normalization("bn1", width, seed), **normalization("bn2", width, seed + 9),
    }  # fmt: skip
    inner = " ".join(f"{name}:float32[{batch},{width},{side},{side}]" for name in ("c1", "n1", "r1", "c2", "n2", "r2"))
    inner += f" p:float32[{batch},{width},1,1] f:float32[{batch},{width}]"
    return build(nodes, f"x:float32[{batch},3,{side},{side}]", f"y:float32[{batch},5]", weights, inner=inner)


def mlp(batch="batch"):
    """x:float32[batch,6] through two Gemm to y:float32[batch,3]."""
    nodes = [node("Gemm", "x w1 b1", "h"), node("Relu", "h", "r"), node("Gemm", "r w2 b2", "y")]
    weights = {"w1": weight(6, 8), "b1": weight(8), "w2": weight(8, 3), "b2": weight(3)}
    inner = f"h:float32[{batch},8] r:float32[{batch},8]"
    return build(nodes, f"x:float32[{batch},6]", f"y:float32[{batch},3]", weights, inner=inner)


def transformer(words=11, width=8):
    """ids:int64[batch,words] and a float mask, looked up, attended, normalized: y:float32[batch,words,4]."""
    nodes = [
        node("Gather", "table ids", "e", name="/embed"),
        node("LayerNormalization", "e scale shift", "l", name="/norm"),
        node("MatMul", "l wq", "q", name="/q"),
        node("Transpose", "l", "k", name="/k", perm=[0, 2, 1]),
        node("MatMul", "q k", "s", name="/scores"),
        node("Unsqueeze", "mask one", "m1", name="/mask/unsqueeze"),
        node("Sub", "unit m1", "m2", name="/mask/sub"),
        node("Mul", "m2 lowest", "m3", name="/mask/mul"),
        node("Add", "s m3", "s2", name="/masked"),
        node("Softmax", "s2", "a", name="/softmax", axis=-1),
        node("MatMul", "a l", "o", name="/attended"),
        node("MatMul", "o w", "y", name="/out"),
    ]
    weights = {
        "table": weight(words, width), "wq": weight(width, width),
        "scale": 1 + weight(width), "shift": weight(width, seed=1),
        "w": weight(width, 4), "one": np.int64([1]), "unit": np.float32(1), "lowest": np.finfo(np.float32).min,
    }  # fmt: skip
    wide = " ".join(f"{name}:float32[batch,words,{width}]" for name in ("e", "l", "q", "o"))
    square = " ".join(f"{name}:float32[batch,words,words]" for name in ("s", "s2", "a"))
    inner = f"{wide} {square} k:float32[batch,{width},words] " + " ".join(
        f"m{i}:float32[batch,1,words]" for i in (1, 2, 3)
    )
    inputs = "ids:int64[batch,words] mask:float32[batch,words]"
    return build(nodes, inputs, "y:float32[batch,words,4]", weights, inner=inner)


def shared_weights():
    """One weight in two convolutions, each with a batch normalization of its own: x:float32[batch,4,6,6] to y."""
    nodes = [
        node("Conv", "x w", "c1", pads=[1] * 4), norm_node("bn1", "c1", "n1"), node("Relu", "n1", "r"),
        node("Conv", "r w", "c2", pads=[1] * 4), norm_node("bn2", "c2", "y"),
    ]  # fmt: skip
    weights = {"w": weight(4, 4, 3, 3), **normalization("bn1", 4), **normalization("bn2", 4, 9)}
    inner = " ".join(f"{name}:float32[batch,4,6,6]" for name in ("c1", "n1", "r", "c2"))
    return build(nodes, "x:float32[batch,4,6,6]", "y:float32[batch,4,6,6]", weights, inner=inner)


def two_and_two():
    """Two inputs, two outputs: sum and difference of a:float32[batch,4] and b:float32[batch,4]."""
    nodes = [node("Add", "a b", "total"), node("Sub", "a b", "gap")]
    return build(nodes, "a:float32[batch,4] b:float32[batch,4]", "total:float32[batch,4] gap:float32[batch,4]")


def no_batch():
    """x:float32[6] · w: no axis that all agree on, one call is one inference."""
    return build([node("MatMul", "x w", "y")], "x:float32[6]", "y:float32[3]", {"w": weight(6, 3)})


def control_flow():
    """y = x + 1 where the sum of x is positive, else x · w, by an If whose branches use outer values and a weight."""

    def branch(name, *nodes, weights=()):
        return helper.make_graph(list(nodes), name, [], [value("out:float32[batch,4]")], list(weights))

    yes = branch("yes", node("Add", "x unit", "out"))
    no = branch("no", node("Mul", "x inner", "out"), weights=[numpy_helper.from_array(weight(4), "inner")])
    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "positive"),
        node("If", "positive", "y", then_branch=yes, else_branch=no),
    ]  # fmt: skip
    weights = {"unit": np.float32([1]), "zero": np.float32(0)}
    return build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights)


def feed(artifact, items=3, seed=0, **sizes):
    """Random inputs for `artifact`; symbols other than the batch take their size from `sizes`, else 5."""
    random = np.random.default_rng(seed)
    batch = {}
    for spec in artifact.signature.inputs:
        shape = [
            d if isinstance(d, int) else sizes.get(d, items if axis == 0 else 5) for axis, d in enumerate(spec.shape)
        ]
        whole = np.issubdtype(np.dtype(spec.dtype), np.integer)
        batch[spec.name] = random.integers(0, 5, shape) if whole else random.standard_normal(shape).astype(spec.dtype)
    if "mask" in batch:
        batch["mask"] = np.ones_like(batch["mask"])
        batch["mask"][:, -1] = 0
    return batch


def outputs(artifact, batch):
    """{name: array} by ONNX Runtime without graph optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    made = ir.to_proto(artifact.model).SerializeToString()
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, batch), strict=True))


def executed(artifact, batches, taps=(), optimized=False, quick=False):
    """The numeric reference, in this process."""
    return Reference(artifact, Path(SCRATCH.name), taps, optimized=optimized).run(batches)


def context(samples=None, half=("bfloat16",), styles=(SYMMETRIC,), seed=0, **asked):
    """What a pass is given; `samples` is a Samples, or the batches to make one of. `asked`: the `execute`, `measure` and
    `profile` that it may use."""
    held = samples if isinstance(samples, Samples) else Samples(samples or [])

    def not_here(*_):
        raise AssertionError("this pass was not expected to run or measure anything")

    return Context(
        samples=lambda role: held,
        capabilities=Capabilities(
            floating_precisions=("f32", *(SHORT[kind] for kind in half)), half_types=half, quantization_styles=styles
        ),
        budget=Budget(), seed=seed, deadline=None, progress=lambda text: None,
        **(dict.fromkeys(("execute", "measure", "profile", "judge"), not_here) | asked),
    )  # fmt: skip


def printed(artifact):
    """The graph as text, one line a node: types and shapes, attributes, the names of weights but not their values."""
    return "\n".join(_lines(artifact.model.graph)) + "\n"


def _lines(graph, indent=""):
    def typed(value):
        tensor = value.const_value
        dtype, shape = (tensor.dtype, tensor.shape) if tensor is not None else (value.dtype, value.shape)
        kind = "?" if dtype is None else dtype.name.lower()
        return f"{value.name}:{kind}{'' if shape is None else str(shape).replace(' ', '')}"

    yield f"{indent}inputs   {', '.join(typed(v) for v in graph.inputs)}"
    for initializer in sorted(graph.initializers.values(), key=lambda v: v.name):
        yield f"{indent}weight   {typed(initializer)}"
    for each in graph:
        plain, branches = [], []
        for attribute in sorted(each.attributes.values(), key=lambda a: a.name):
            if attribute.type.name == "GRAPH":
                branches.append(attribute)
            elif attribute.type.name == "TENSOR":
                plain.append(f"{attribute.name}={attribute.value.dtype.name.lower()}{attribute.value.numpy().tolist()}")
            else:
                plain.append(f"{attribute.name}={attribute.value!r}")
        names = ", ".join(v.name if v is not None else "-" for v in each.inputs)
        outs = ", ".join(typed(v) for v in each.outputs)
        yield f"{indent}{outs} = {each.op_type}({names}){' {' + ', '.join(plain) + '}' if plain else ''}"
        for attribute in branches:
            yield f"{indent}  {attribute.name}:"
            yield from _lines(attribute.value, indent + "    ")
    yield f"{indent}outputs  {', '.join(typed(v) for v in graph.outputs)}"


def inner_types(artifact):
    """Type and shape of every value, to see that nothing inside was changed."""
    return [
        (v.name, str(v.type), str(v.shape))
        for graph in graphs_of(artifact.model)
        for v in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    ]


def ask(made_by, artifact, given=None):
    """What `requires` says."""
    return list(made_by.requires(artifact, given or context()))


def run_twice(made_by, artifact, given=None):
    """(result, changes) of a pass that kept its two general promises: what it was given is as it was, and running it on
    its own result changes nothing."""
    given = given or context()
    before = artifact.model
    digest, types = Artifact(model=before).digest(), inner_types(artifact)
    after, changes = made_by.run(artifact, given)
    assert Artifact(model=before).digest() == digest, "the pass changed the model it was given"
    assert inner_types(artifact) == types, "the pass changed types or shapes of the model it was given"
    if after.digest() == digest:
        noted = inner_types(after) != types
        assert after is artifact or noted, "an unchanged model must come back as the same artifact"
        return artifact, changes
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.steps[-1].name == made_by.name() and list(after.steps[-1].changes) == changes
    again, _ = made_by.run(after, given)
    assert again.digest() == after.digest(), (
        f"a second run changed the model again:\n{printed(after)}\n{printed(again)}"
    )
    return after, changes
