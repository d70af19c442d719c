"""Tiny configurations of eleven architectures, as torch's two exporters write them, for tests of whole networks.

Each is exported once in a test run, however many processes it has: what one has written the others read.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path

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
def exported(make, attention, kind):
    """The network as perwatt reads it. `attention`: sdpa or eager; `kind`: dynamo or script, for torch's exporters."""
    path = _folder() / f"{make.__name__}-{attention}-{kind}.onnx"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _written(make, attention, kind, path)
    return Artifact.load(path)


@cache
def _folder():
    """Of this test run, for all of its processes."""
    folder = Path(os.environ["PERWATT_TEST_RUN"]) / "architectures"
    folder.mkdir(exist_ok=True)
    return folder


def _written(make, attention, kind, path):
    from perwatt.reading import read
    from perwatt.reading_export import export_module, quiet
    from perwatt.signature import TensorSpec

    given = inputs(make, 2)
    net = one_output(network(make, attention), list(given))
    if kind == "dynamo":
        specs = [TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:])) for name, array in given.items()]
        artifact = Artifact(model=export_module(net, specs, inferred=True, sizes={"batch": 2}).model)
    else:
        scripted = path.with_suffix(".script.onnx")
        with quiet(), torch.no_grad():
            torch.onnx.export(
                net, tuple(map(torch.from_numpy, given.values())), str(scripted), dynamo=False, opset_version=17,
                input_names=list(given), output_names=["output"],
                dynamic_axes={name: {0: "batch"} for name in (*given, "output")},
            )  # fmt: skip
        artifact = read(scripted).artifact
    artifact.save(path)


# Fused --------------------------------------------------------------------------------------------------------------


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
