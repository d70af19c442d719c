"""`Artifact`: immutable, digested by content, saved and loaded without a difference."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import build, control_flow, conv_net, feed, inner_types, mlp, node, outputs, proto, transformer, weight
from onnx import helper

from perwatt import artifact as artifact_module
from perwatt.artifact import Artifact, Step, copy_with_path, model_digest, read_signature
from perwatt.errors import InputError

MAKERS = [conv_net, mlp, transformer, control_flow]


def elu(alpha=0.1, name="y", dims="batch,4", dtype="float32"):
    return build([node("Elu", "x", name, alpha=alpha)], f"x:{dtype}[{dims}]", f"{name}:{dtype}[{dims}]")


def with_function(default=1.0):
    """A model that calls a function of its own, whose attribute has a default."""
    made = proto([node("Scaled", "x", "y", domain="own")], "x:float32[b,4]", "y:float32[b,4]")
    inner = node("Elu", "a", "b")
    inner.attribute.append(onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha"))
    function = helper.make_function(
        "own", "Scaled", ["a"], ["b"], [inner], [helper.make_opsetid("", 23)],
        attribute_protos=[helper.make_attribute("alpha", default)],
    )  # fmt: skip
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    return Artifact(model=ir.from_proto(made))


# Digests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*MAKERS, with_function])
def test_the_digest_is_that_of_the_content(make, tmp_path):
    first, second = make(), make()
    assert first.digest() == second.digest() and len(first.digest()) == 64
    first.save(tmp_path / "m.onnx")
    assert Artifact(path=tmp_path / "m.onnx").digest() == first.digest()
    assert model_digest(first.edit()) == first.digest()


def test_a_float_attribute_digests_as_the_32_bits_that_the_file_holds(tmp_path):
    made = elu().after(elu().edit(), Step("x"))
    made.model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 0.1)
    assert made.digest() == elu().digest()


def test_outputs_and_inputs_left_out_at_the_end_are_none(tmp_path):
    made = [
        build([node(*names, name="n")], "x:float32[b,4]", "y:float32[b,4]", {"w": weight(4)})
        for names in (("LayerNormalization", "x w", "y"), ("LayerNormalization", "x w -", "y"))
    ]
    model = made[0].edit()
    model.graph[0].resize_outputs(3)
    for value in model.graph[0].outputs[1:]:
        value.name = ""
    assert made[0].digest() == made[1].digest() == model_digest(model)
    Artifact(model=model).save(tmp_path / "m.onnx")
    assert Artifact(path=tmp_path / "m.onnx").digest() == made[0].digest()


def change_weight(model):
    model.graph.initializers["w1"].const_value = ir.tensor(weight(6, 8, seed=5))


def change_weight_type(model):
    value = model.graph.initializers["w1"]
    value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64))


def change_weight_shape(model):
    value = model.graph.initializers["w1"]
    value.const_value = ir.tensor(value.const_value.numpy().reshape(8, 6))


def change_attribute(model):
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)


def change_name(model):
    model.graph[0].outputs[0].name = "other"


def change_operator(model):
    model.graph[1].op_type = "Tanh"


def change_input_shape(model):
    model.graph.inputs[0].shape = ir.Shape([1, 6])


def change_output_type(model):
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def change_opset(model):
    model.opset_imports[""] = 24


def drop_input(model):
    model.graph[0].replace_input_with(2, None)


@pytest.mark.parametrize(
    "change",
    [change_weight, change_weight_type, change_weight_shape, change_attribute, change_name, change_operator,
     change_input_shape, change_output_type, change_opset, drop_input],
)  # fmt: skip
def test_any_change_changes_the_digest_and_leaves_the_original(change):
    original = mlp()
    digest, types, batch = original.digest(), inner_types(original), feed(original)
    before = outputs(original, batch)
    model = original.edit()
    change(model)
    assert original.after(model, Step("change")).digest() != digest
    assert model_digest(original.model) == digest and inner_types(original) == types
    assert np.array_equal(outputs(original, batch)["y"], before["y"])


def test_what_is_inside_branches_and_functions_counts():
    model = control_flow().edit()
    branch = model.graph[2].attributes["else_branch"].value
    branch.initializers["inner"].const_value = ir.tensor(weight(4, seed=7))
    assert model_digest(model) != control_flow().digest()
    assert with_function(1.0).digest() != with_function(2.0).digest()


def test_shared_tensors_are_digested_once(monkeypatch):
    original = mlp()
    original.digest()
    hashed = []
    monkeypatch.setattr(artifact_module.hashlib, "sha256", lambda data=b"": hashed.append(data) or Hash())
    model = original.edit()
    change_attribute(model)
    original.after(model, Step("x")).digest()
    assert hashed == [b""], "only the structure is hashed anew, the tensors are known"


class Hash:
    def update(self, data):
        pass

    def hexdigest(self):
        return "0"


# Immutability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_edit_gives_a_graph_that_can_be_changed_all_over_without_touching_the_original(make):
    original = make()
    digest, types = original.digest(), inner_types(original)
    model = original.edit()
    for graph in artifact_module.graphs_of(model):
        for value in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]:
            value.name = f"{value.name}_changed"
            if value.type is not None:
                value.dtype = ir.DataType.INT8
            if value.shape is not None and len(value.shape):
                value.shape[0] = 77
        for each in graph:
            each.name = "changed"
            each.attributes["more"] = ir.AttrInt64("more", 1)
    model.opset_imports["new"] = 1
    model.metadata_props["new"] = "1"
    assert model_digest(original.model) == digest and inner_types(original) == types
    assert "new" not in original.model.opset_imports and "new" not in original.model.metadata_props


def test_weights_are_read_only_wherever_they_come_from(tmp_path):
    array = weight(6, 8)
    made = mlp()
    made.model.graph.initializers["w1"].const_value = ir.Tensor(array, name="w1")
    frozen = Artifact(model=made.model)
    frozen.save(tmp_path / "m.onnx")
    for each in (frozen, frozen.after(frozen.edit(), Step("x")), Artifact.load(tmp_path / "m.onnx")):
        for value in each.model.graph.initializers.values():
            with pytest.raises(ValueError, match="read-only"):
                value.const_value.numpy()[...] = 0


def test_weights_in_another_memory_order_are_put_in_order():
    made = mlp()
    made.model.graph.initializers["w1"].const_value = ir.Tensor(np.asfortranarray(weight(6, 8)), name="w1")
    frozen = Artifact(model=made.model)
    assert frozen.model.graph.initializers["w1"].const_value.numpy().flags.c_contiguous
    assert model_digest(frozen.model) == mlp().digest()


def test_steps_add_up_and_the_model_is_the_same_with_another_history():
    one = mlp().after(mlp().edit(), Step("one", {"a": 1}, ("changed",)))
    two = one.after(one.edit(), Step("two"))
    assert [step.name for step in two.steps] == ["one", "two"]
    assert two.with_steps(()).digest() == two.digest() and two.with_steps(()).steps == ()


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_saved_and_loaded_it_is_the_same_artifact(make, tmp_path):
    original = make().after(make().edit(), Step("pass", {"exclude": ["a"]}, ("did this",)))
    path = original.save(tmp_path / "m.onnx")
    loaded = Artifact.load(path)
    assert original.path == loaded.path == path
    assert (loaded.digest(), loaded.signature, loaded.steps) == (original.digest(), original.signature, original.steps)
    assert model_digest(loaded.model) == original.digest()
    assert read_signature(loaded.model) == original.signature
    batch = feed(original)
    assert np.array_equal(outputs(loaded, batch)["y"], outputs(original, batch)["y"])


def test_large_weights_lie_beside_the_file_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact_module, "EXTERNAL_DATA_ABOVE_BYTES", 1000)
    original = conv_net(width=16)
    path = original.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 1000 > path.stat().st_size - 3000
    loaded = Artifact(path=path)
    assert loaded.digest() == original.digest() and loaded.size_bytes() == original.size_bytes()
    # From one folder with external data into another, and changed on the way.
    (tmp_path / "there").mkdir()
    again = loaded.after(loaded.edit(), Step("x")).save(tmp_path / "there" / "n.onnx")
    for file in (path, tmp_path / "m.onnx.data"):
        file.unlink()
    assert Artifact(path=again).digest() == original.digest()


def test_a_small_model_read_from_external_data_is_saved_whole(tmp_path):
    (tmp_path / "a").mkdir()
    ir.save(conv_net().model, str(tmp_path / "a" / "m.onnx"), external_data="weights.bin", size_threshold_bytes=0)
    loaded = Artifact(path=tmp_path / "a" / "m.onnx")
    changed = loaded.after(loaded.edit(), Step("x"))
    path = changed.save(tmp_path / "m.onnx")
    (tmp_path / "a" / "weights.bin").unlink()
    assert Artifact(path=path).digest() == conv_net().digest()


def test_file_writes_once_under_the_digest(tmp_path):
    original = mlp()
    path = original.file(tmp_path)
    assert path.name.startswith(original.digest()[:24]) and original.file(tmp_path / "nowhere") == path
    moved = copy_with_path(original, tmp_path / "elsewhere.onnx")
    assert moved.path != original.path and moved.digest() == original.digest()


@pytest.mark.parametrize("content", [b"this is no model", None])
def test_a_file_that_is_no_model_is_an_error_in_one_line(content, tmp_path):
    if content:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx is no ONNX model that can be read") as error:
        _ = Artifact(path=tmp_path / "m.onnx").model
    assert "\n" not in str(error.value)


def test_neither_model_nor_path_is_an_error():
    with pytest.raises(ValueError, match="needs a model or a path"):
        Artifact()


# What it says of itself ---------------------------------------------------------------------------------------------


def test_the_size_counts_what_is_shared_once():
    nodes = [node("Mul", "x w", "a"), node("Mul", "a w", "b"), node("Mul", "b v", "y")]
    made = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4), "v": weight(4)})
    assert made.size_bytes() == 32
    model = made.edit()
    model.graph.initializers["v"].const_value = model.graph.initializers["w"].const_value
    assert Artifact(model=model).size_bytes() == 16


def test_operators_are_counted_in_branches_too_and_constants_are_none():
    nodes = [node("Constant", "", "one", value_float=1.0), node("Add", "x one", "y")]
    assert build(nodes, "x:float32[batch,4]", "y:float32[batch,4]").operator_counts() == {"Add": 1}
    assert control_flow().operator_counts() == {"ReduceSum": 1, "Greater": 1, "If": 1, "Add": 1, "Mul": 1}


def test_initializers_listed_as_inputs_are_no_inputs():
    made = build([node("Mul", "x w", "y")], "x:float32[batch,4] w:float32[4]", "y:float32[batch,4]", {"w": weight(4)})
    assert [str(spec) for spec in made.signature.inputs] == ["x:float32[batch,4]"]


def test_axes_without_a_name_get_one_the_first_is_the_batch():
    made = build([node("Relu", "x", "y")], "x:float32[?,?,4]", "y:float32[?,?,4]")
    assert [str(spec) for spec in (*made.signature.inputs, *made.signature.outputs)] == [
        "x:float32[batch,x_1,4]", "y:float32[batch,y_1,4]",
    ]  # fmt: skip
    assert made.signature.batch == "batch"


def test_an_output_of_unknown_rank_is_told_as_such():
    made = Artifact(model=ir.from_proto(proto([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32")))
    assert str(made.signature.outputs[0]) == "y:float32[…]"


def test_a_graph_that_was_saved_may_be_forgotten_and_comes_back_from_its_file(tmp_path):
    artifact = mlp().with_steps((Step("drop-blocks", {"ratio": 0.1}, ("one",)),))
    digest, signature = artifact.digest(), artifact.signature
    artifact.release()
    assert artifact._model is not None
    artifact.file(tmp_path)
    artifact.release()
    assert artifact._model is None
    assert (artifact.digest(), artifact.signature, len(artifact.steps)) == (digest, signature, 1)
    assert model_digest(artifact.edit()) == digest
