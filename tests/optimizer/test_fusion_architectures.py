"""Fusion on whole networks: tiny configurations of eleven architectures, as torch's two exporters write them.

What is asserted: one operator for each place that the architecture has, nothing left of the pieces, every pass within its
tolerance on padded inputs, and the same answers at any batch. `bench/suites/fusion.py` does the same at full size.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import context, outputs

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Stage
from perwatt.drift import drift
from perwatt.recipe import PassStep

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEQUENCE, SIDE, FRAMES, WORDS = 16, 64, 100, 100
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
OPERATORS = ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish")
"""Those of the standard that are newer than opset 22: every backend's form may have them here."""


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(max_position_embeddings=64, **TEXT))


def minilm():
    sizes = {**TEXT, "hidden_size": 48, "num_hidden_layers": 3}
    config = transformers.BertConfig(max_position_embeddings=64, **sizes)
    return transformers.BertModel(config, add_pooling_layer=False)


def vit():
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=SIDE, patch_size=16, num_labels=10, **sizes)
    )


def llama():
    config = transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, use_cache=False, **TEXT)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False, **sizes))


def whisper():
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "max_source_positions": FRAMES // 2}
    heads = {"encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 1, "decoder_attention_heads": 4}
    return transformers.WhisperModel(transformers.WhisperConfig(**sizes, **heads)).encoder


def resnet50():
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10, **sizes))


def mobilenetv2():
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=SIDE, num_labels=10)
    return transformers.MobileNetV2ForImageClassification(config)


def efficientnet():
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": SIDE}
    return transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig(num_labels=10, **sizes))


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=10)
    return transformers.ConvNextForImageClassification(config)


def swin():
    sizes = {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(image_size=SIDE, num_labels=10, **sizes))


ARCHITECTURES = {
    bert: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 14, "Softmax|Erf|ReduceMean": 0},
    minilm: {"LayerNormalization": 7, "Gelu": 3, "Attention": 3, "MatMul|Gemm": 18, "Softmax|Erf|ReduceMean": 0},
    vit: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 13, "Softmax|Erf|ReduceMean": 0},
    llama: {"RMSNormalization": 5, "Swish": 2, "Attention": 2, "RotaryEmbedding": 4, "MatMul|Gemm": 15, "Softmax|Sigmoid": 0},
    gpt2: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 9, "Softmax|Tanh|ReduceMean": 0},
    whisper: {"LayerNormalization": 5, "Gelu": 4, "Attention": 2, "MatMul|Gemm": 12, "Conv": 2, "Softmax|Erf|ReduceMean": 0},
    resnet50: {"Conv": 15, "Relu": 13, "BatchNormalization": 0, "MatMul|Gemm": 1},
    mobilenetv2: {"Conv": 52, "Clip": 35, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
    efficientnet: {"Conv": 51, "Swish": 31, "Sigmoid": 10, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
    convnext: {"LayerNormalization": 7, "Gelu": 4, "Conv": 6, "MatMul|Gemm": 9, "Erf": 0},
    swin: {"LayerNormalization": 11, "Gelu": 4, "Attention": 4, "Conv": 1, "MatMul|Gemm": 26, "Softmax|Erf": 0},
}  # fmt: skip
"""Network → its operators (those with `|` between them added up) once everything is fused, from the architecture."""
WRITTEN_OUT = (bert, minilm, vit, llama, gpt2, whisper)
"""Those that transformers has without a fused attention too."""
MERGED = {bert: 10, llama: 9, whisper: 8, swin: 18}
"""Products that are left where projections are merged: one for the three of an attention, one for gate and up."""

CASES = [
    *((make, "sdpa", "dynamo") for make in ARCHITECTURES),
    *(pytest.param(make, "sdpa", "script", marks=pytest.mark.slow) for make in ARCHITECTURES),
    *(
        pytest.param(make, "eager", kind, marks=pytest.mark.slow)
        for make in WRITTEN_OUT
        for kind in ("dynamo", "script")
    ),
]


# Networks -------------------------------------------------------------------------------------------------------------


def network(make, attention):
    """In eval mode, with no parameter left at zero or one."""
    torch.manual_seed(0)
    net = make()
    if attention == "eager":
        net.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in net.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return net.eval()


def inputs(make, items, seed=0):
    random = np.random.default_rng(seed)
    if make in (bert, minilm, llama, gpt2):
        lengths = random.integers(4, SEQUENCE + 1, items)
        mask = (np.arange(SEQUENCE) < lengths[:, None]).astype(np.int64)
        return {"input_ids": random.integers(1, WORDS, (items, SEQUENCE)), "attention_mask": mask}
    if make is whisper:
        return {"input_features": random.standard_normal((items, 80, FRAMES), dtype=np.float32)}
    return {"pixel_values": random.standard_normal((items, 3, SIDE, SIDE), dtype=np.float32)}


def one_output(net, names):
    """`net` with these inputs in order and one tensor out."""

    def picked(**given):
        found = net(**given)
        return found.logits if "logits" in found else found.last_hidden_state

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input_ids, attention_mask):
            return picked(input_ids=input_ids, attention_mask=attention_mask)

    class Sound(Text):
        def forward(self, input_features):
            return picked(input_features=input_features)

    class Pictures(Text):
        def forward(self, pixel_values):
            return picked(pixel_values=pixel_values)

    return {"input_ids": Text, "input_features": Sound, "pixel_values": Pictures}[names[0]]().eval()


@cache
def exported(make, attention, kind, folder):
    """The network as perwatt reads it."""
    from perwatt.reading import read
    from perwatt.reading_export import export_module, quiet
    from perwatt.signature import TensorSpec

    given = inputs(make, 2)
    net = one_output(network(make, attention), list(given))
    if kind == "dynamo":
        specs = [TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:])) for name, array in given.items()]
        return Artifact(model=export_module(net, specs, inferred=True, sizes={"batch": 2}).model)
    path = folder / f"{make.__name__}-{attention}.onnx"
    with quiet(), torch.no_grad():
        torch.onnx.export(
            net, tuple(map(torch.from_numpy, given.values())), str(path), dynamo=False, opset_version=17,
            input_names=list(given), output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in (*given, "output")},
        )  # fmt: skip
    return read(path).artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


# Fusion ---------------------------------------------------------------------------------------------------------------


def passes(edits):
    steps = registry.edit_steps(registry.default_steps(), edits) if edits else registry.default_steps()
    made = [registry.bind(step) for step in steps if isinstance(step, PassStep)]
    return [one for one in made if one.stage in (Stage.CLEAN, Stage.FUSE)]


def allowing(*names):
    given = context()
    return type(given)(**{**vars(given), "capabilities": Capabilities(operators=names)})


def fused(artifact, given, batch, edits=""):
    """After all default passes (with these `edits`), each of them held against its own tolerance."""
    before = outputs(artifact, batch)
    for made in passes(edits):
        if list(made.requires(artifact, given)):
            continue
        after, _ = made.run(artifact, given)
        if after is not artifact:
            found = outputs(after, batch)
            assert not drift([before], [found], made.tolerance).reasons, made.name()
            artifact, before = after, found
    onnx.checker.check_model(ir.to_proto(artifact.model), full_check=True)
    return artifact


def count(artifact, named):
    found = artifact.operator_counts()
    return sum(found.get(kind, 0) for kind in named.split("|"))


@pytest.mark.parametrize(("make", "attention", "kind"), CASES)
def test_every_place_of_the_architecture_is_one_operator(make, attention, kind, folder):
    source = exported(make, attention, kind, folder)
    made = fused(source, allowing(*OPERATORS), inputs(make, 2))
    wanted = ARCHITECTURES[make]
    assert {named: count(made, named) for named in wanted} == wanted
    fixed = isinstance(source.signature.batch, int)
    for items in () if fixed else (1, 5):
        batch = inputs(make, items, seed=items)
        expected, found = outputs(source, batch), outputs(made, batch)
        for name, array in expected.items():
            assert np.abs(found[name] - array).max() < 1e-3 * max(1.0, np.abs(array).max())


@pytest.mark.parametrize(("make", "products"), MERGED.items())
def test_projections_are_merged_where_that_is_asked_for(make, products, folder):
    source = exported(make, "sdpa", "dynamo", folder)
    made = fused(source, allowing(*OPERATORS), inputs(make, 2), "+merge-projections")
    assert count(made, "MatMul|Gemm") == products


def test_a_shortcut_and_its_main_path_are_not_merged_across_their_activations(folder):
    source = exported(resnet50, "sdpa", "dynamo", folder)
    made = fused(source, allowing(), inputs(resnet50, 2), "+merge-convolutions")
    assert count(made, "Conv") == ARCHITECTURES[resnet50]["Conv"]


@pytest.mark.parametrize("make", [llama, efficientnet])
def test_operators_that_a_target_does_not_name_are_not_put_in(make, folder):
    source = exported(make, "sdpa", "dynamo", folder)
    there = set(source.operator_counts())
    made = fused(source, allowing(), inputs(make, 2))
    assert not (set(made.operator_counts()) - there) & set(OPERATORS)
