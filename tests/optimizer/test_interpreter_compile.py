"""`torch.compile` and `torch.export` of the interpreter on a small network of each family: one graph, no breaks, one
compilation for all batch sizes, and what ONNX Runtime computes."""

import numpy as np
import pytest
from models import control_flow, feed, node, outputs, proto, transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import onnx_ir as ir  # noqa: E402

from perwatt.artifact import Artifact  # noqa: E402
from perwatt.interpreter import Interpreter, dynamic_shapes  # noqa: E402
from perwatt.reading import read  # noqa: E402

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=32, **SMALL))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL))


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


def mobilenet():
    return transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32)
    )


@pytest.fixture(scope="module", params=[bert, vit, resnet, mobilenet, "resnet20"])
def family(request, tmp_path_factory):
    """The artifact of a network with random weights, as it is read from a folder or a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    if request.param == "resnet20":
        import nets

        torch.save(nets.resnet20().state_dict(), folder / "net.pt")
        return read(folder / "net.pt", arch=f"{nets.__file__}:resnet20", inputs=["x:float32[batch,3,32,32]"]).artifact
    network = request.param().eval()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            # Initialized for training from scratch, deep networks give zeros, which are right by chance.
            torch.nn.init.kaiming_normal_(parameter)
    network.save_pretrained(folder)
    if network.main_input_name == "pixel_values":
        side = getattr(network.config, "image_size", 32)
        transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return read(folder).artifact


class Counting:
    """A backend of torch.compile that runs the graph as it is and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, _):
        self.graphs += 1
        return module


def sizes(artifact):
    """Batches of several items and, for text, of several lengths."""
    length = next(iter(artifact.signature.other_dynamic), None)
    for items, words in ((4, 7), (2, 9), (6, 4)):
        yield feed(artifact, items, items, **({length: words} if length else {}))


def close(found, expected):
    for ours, theirs in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())


def tensors(artifact, batch):
    return tuple(torch.from_numpy(np.ascontiguousarray(batch[spec.name])) for spec in artifact.signature.inputs)


def check(artifact):
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(Interpreter(artifact.model), backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in sizes(artifact):
            close(compiled(*tensors(artifact, batch)), outputs(artifact, batch))
    assert backend.graphs == 1


def test_one_graph_serves_all_batch_sizes_and_lengths(family):
    check(family)


def test_the_exported_program_takes_every_batch_size_one_included(family):
    network = Interpreter(family.model)
    example = tensors(family, next(sizes(family)))
    with torch.no_grad():
        program = torch.export.export(network, example, dynamic_shapes=dynamic_shapes(family.signature)).module()
        for batch in (*sizes(family), feed(family, 1)):
            close(program(*tensors(family, batch)), outputs(family, batch))


def test_training_compiles_without_breaks():
    """Forward and backward through aot_autograd, which needs every operator's derivative to be traceable."""
    torch._dynamo.reset()
    network = Interpreter(transformer().model)
    weights = [network.weights[name].requires_grad_() for name in ("table", "wq", "w")]
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    ids, mask = torch.arange(22).reshape(2, 11) % 11, torch.ones(2, 11)
    found = []
    for run in (network, compiled):
        found.append(torch.autograd.grad(run(ids, mask)[0].square().sum(), weights))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def test_a_mask_cut_by_a_computed_size_compiles():
    """The bound of a Slice comes of a shape through arithmetic, casts and a Range: never through a tensor."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s one", "n"), node("CastLike", "nought n", "start"),
        node("CastLike", "unit n", "step"), node("Range", "start n step", "places"), node("Add", "n less", "bound"),
        node("Unsqueeze", "bound zero", "bounds"), node("Slice", "table zero bounds one_axis", "cut"),
        node("Cast", "places", "p", to=1), node("Mul", "x p", "scaled"), node("Slice", "scaled one_axis last one_axis", "z"),
        node("Add", "z cut", "y"),
    ]  # fmt: skip
    weights = {
        "one": np.int64(1), "nought": np.float32(0), "unit": np.float32(1), "less": np.int64(-1), "zero": np.int64([0]),
        "one_axis": np.int64([1]), "last": np.int64([2**63 - 1]), "table": np.float32(np.arange(64).reshape(1, 64)),
    }  # fmt: skip
    made = proto(nodes, "x:float32[batch,length]", "y:float32[batch,?]", weights)
    check(Artifact(model=ir.from_proto(made)))


def test_a_condition_of_data_runs_and_is_refused_as_one_graph():
    artifact = control_flow()
    network = Interpreter(artifact.model)
    for seed in (0, 1, 2):
        batch = feed(artifact, seed=seed)
        close(network(*tensors(artifact, batch)), outputs(artifact, batch))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="data-dependent"):
        torch.compile(network, backend="eager", fullgraph=True)(*tensors(artifact, batch))
