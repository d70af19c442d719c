"""Networks in plain torch for a machine where nothing can be fetched, and their quantized forms.

ResNet-50, BERT-base (sequence 128) and ViT-B/16 (224 × 224) with random weights of a fixed seed; `tiny`, which is there to
try every line; the trained CIFAR-10 ResNet-20 where PERWATT_DATA holds it. Quantization is explicit and plain: symmetric,
one scale a tensor from the largest value seen, one a channel for weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEED, SEQUENCE, SIDE, VOCABULARY = 0, 128, 224, 30522
Arrays = dict[str, np.ndarray]


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut."""

    def __init__(self, wide_in: int, narrow: int, stride: int) -> None:
        super().__init__()
        wide = 4 * narrow
        self.body = nn.Sequential(
            _conv(wide_in, narrow, 1), nn.ReLU(), _conv(narrow, narrow, 3, stride), nn.ReLU(), _conv(narrow, wide, 1)
        )
        self.shortcut = nn.Identity() if (wide_in, stride) == (wide, 1) else _conv(wide_in, wide, 1, stride)

    def forward(self, x: Any) -> Any:
        return functional.relu(self.body(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


def resnet50() -> nn.Module:
    """He et al. 2016, with the stride in the 3×3 convolution."""
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    wide = 64
    for narrow, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            layers.append(Bottleneck(wide, narrow, stride if number == 0 else 1))
            wide = 4 * narrow
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 1000))


class Block(nn.Module):
    """Attention and two linear layers, normalized before (ViT) or after (BERT)."""

    def __init__(self, width: int, heads: int, before: bool) -> None:
        super().__init__()
        self.heads, self.before = heads, before
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Any, mask: Any = None) -> Any:
        if self.before:
            x = x + self._attention(self.first(x), mask)
            return x + self._feed_forward(self.second(x))
        x = self.first(x + self._attention(x, mask))
        return self.second(x + self._feed_forward(x))

    def _attention(self, x: Any, mask: Any) -> Any:
        query, key, value = (self._split(part(x)) for part in (self.query, self.key, self.value))
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(found.transpose(1, 2).flatten(2))

    def _split(self, x: Any) -> Any:
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)

    def _feed_forward(self, x: Any) -> Any:
        return self.down(functional.gelu(self.up(x)))


class Bert(nn.Module):
    """Devlin et al. 2019, base, with a classifier."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, before=False) for _ in range(depth))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.places(places))
        # A row for each query, as transformers makes it: ONNX Runtime's Attention refuses a mask to be broadcast along them.
        mask = attention_mask.bool()[:, None, None, :].expand(-1, -1, input_ids.shape[1], -1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class Vit(nn.Module):
    """Dosovitskiy et al. 2021, B/16."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (SIDE // 16) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, before=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, pixel_values: Any) -> Any:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def tiny() -> nn.Module:
    """A few layers of each kind."""
    return nn.Sequential(
        _conv(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip


def resnet20() -> nn.Module:
    """The trained one."""
    return models.network(20)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50, "bert-base": Bert, "vit-b16": Vit, "resnet20": resnet20, "tiny": tiny,
}  # fmt: skip
SIDES = {"resnet50": SIDE, "vit-b16": SIDE, "resnet20": 32, "tiny": 32}


def inputs(name: str, count: int, seed: int = SEED) -> tuple[Arrays, np.ndarray | None]:
    """(`count` inputs by name, their labels or None): the test pictures for the trained network, else made up."""
    random = np.random.default_rng(seed)
    if name == "resnet20":
        with np.load(models.DATA / "cifar10" / "cifar10_test_lossless_1017.npz") as archive:
            raw, labels = archive["images"][:count].astype(np.float32) / 255, archive["labels"][:count]
        scaled = (raw - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        return {"pixel_values": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}, labels.astype(np.int64)
    if name == "bert-base":
        ids = random.integers(1, VOCABULARY, (count, SEQUENCE))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, None
    side = SIDES[name]
    coarse = random.standard_normal((count, 3, side // 16, side // 16), dtype=np.float32)
    fine = random.standard_normal((count, 3, side, side), dtype=np.float32)
    return {"pixel_values": 0.9 * np.kron(coarse, np.ones((1, 1, 16, 16), np.float32)) + 0.44 * fine}, None


def network(name: str) -> nn.Module:
    """The network in eval mode, on the CPU, in float32."""
    torch.manual_seed(SEED)
    net = NETWORKS[name]()
    if name != "resnet20":
        for part in net.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        _settle_statistics(net, name)
    return net.eval()


def _settle_statistics(net: nn.Module, name: str) -> None:
    """Statistics of made-up pictures for batch normalization, without which activations grow from layer to layer."""
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for number in range(2 if norms else 0):
            net.train()(torch.from_numpy(inputs(name, 16, seed=1000 + number)[0]["pixel_values"]))


def as_onnx(net: nn.Module, name: str, folder: Path) -> Path:
    """The network as perwatt reads it from a `.pt2` file, constants folded."""
    import onnx
    import onnxscript.optimizer

    import perwatt

    example, _ = inputs(name, 2)
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in example)
    program = torch.export.export(net, tuple(map(torch.from_numpy, example.values())), dynamic_shapes=dynamic)
    torch.export.save(program, folder / f"{name}.pt2")
    read = perwatt.read(folder / f"{name}.pt2").artifact.save(folder / f"{name}-read.onnx")
    # Left unfolded, a linear layer's weight is a Transpose of a constant, which nothing could quantize.
    onnx.save(onnxscript.optimizer.optimize(onnx.load(read)), folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


# Quantization ---------------------------------------------------------------------------------------------------------

LARGEST = {"int8": 127.0, "fp8": 448.0}


def products(model: Any, operators: tuple[str, ...]) -> list[Any]:
    """The nodes that are quantized: products by a constant weight."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    return [node for node in model.graph.node if node.op_type in operators and node.input[1] in weights]


def quantized(path: Path, largest: dict[str, float], kind: str, operators: tuple[str, ...], out: Path) -> Path:
    """The ONNX file with Q/DQ pairs around `operators`. `kind` is "int8" or "fp8"; `largest`: absolute value by tensor."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen, made, new = products(model, operators), {}, []

    def constant(name: str, array: Any) -> str:
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    for node in chosen:
        source = node.input[0]
        if source not in made:
            scale = constant(f"{source}_scale", np.float32(max(largest[source], 1e-6) / LARGEST[kind]))
            zero = constant(f"{source}_zero", _cast(np.zeros(()), kind))
            made[source] = f"{source}_dq"
            new.append(helper.make_node("QuantizeLinear", [source, scale, zero], [f"{source}_q"]))
            new.append(helper.make_node("DequantizeLinear", [f"{source}_q", scale, zero], [made[source]]))
        node.input[0] = made[source]
        weight, axis = numpy_helper.to_array(held[node.input[1]]), _output_axis(node)
        other = tuple(a for a in range(weight.ndim) if a != axis)
        scales = np.maximum(np.abs(weight).max(other), 1e-12).astype(np.float32) / np.float32(LARGEST[kind])
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        label = f"{node.name or node.output[0]}_weight"
        stored = constant(f"{label}_q", _cast(weight / scales.reshape(shape), kind))
        zeros = constant(f"{label}_zero", _cast(np.zeros(len(scales)), kind))
        parts = [stored, constant(f"{label}_scale", scales), zeros]
        new.append(helper.make_node("DequantizeLinear", parts, [f"{label}_dq"], axis=axis))
        node.input[1] = f"{label}_dq"
    _put_in_order(model, new)
    onnx.save(model, out)
    return out


def _cast(array: Any, kind: str) -> Any:
    if kind == "int8":
        return np.clip(np.rint(array), -127, 127).astype(np.int8)
    import ml_dtypes

    return np.asarray(array, np.float32).astype(ml_dtypes.float8_e4m3fn)


def _output_axis(node: Any) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 1


def _put_in_order(model: Any, new: list[Any]) -> None:
    """Nodes sorted so that each comes after what it reads; weights that nothing reads any more are dropped."""
    ready = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer} | {""}
    left, order = [*new, *model.graph.node], []
    while left:
        now = [node for node in left if all(name in ready for name in node.input)]
        if not now:
            raise ValueError(f"nodes wait for each other: {[node.op_type for node in left][:5]}")
        for node in now:
            ready.update(node.output)
        order += now
        taken = set(map(id, now))
        left = [node for node in left if id(node) not in taken]
    read = {name for node in order for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(order)
    model.graph.initializer.extend(kept)
