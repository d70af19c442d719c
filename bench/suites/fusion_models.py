"""The architectures that fusion is judged on, as torch modules and as every file that somebody makes of them, built once.

    python fusion_models.py [NAME…] [--small] [--again]

BERT-base, MiniLM, ViT-B, a Llama-style decoder (SmolLM-135M's shape), GPT-2, ResNet-50, MobileNetV2, EfficientNet-B0,
ConvNeXt-tiny, Swin-tiny and Whisper's encoder (base) from transformers' configurations, with random weights of a fixed seed
that are nowhere left at zero or one (initializations leave scales at one and shifts at zero, which anything could fold).
The decoders have 4096 words: a head over 50 thousand would be most of their work. The batch is dynamic where the model's
code lets it, all else fixed: 128 tokens, 224 × 224 pixels, 30 s of sound.

`--small` cuts widths to a quarter, vocabularies to 1000 words and Whisper's sound to 6 s: layers, heads, windows and so all
nodes are those of the architecture, at a sixteenth of the weights.

Of each: `dynamo` (perwatt's own reading, opset 23), `script` (TorchScript, opset 17), `torch` (what torch.onnx.export makes
by default), `ir` (OpenVINO's own conversion of the module), samples, and what torch makes of them. Everything lies in
PERWATT_MODELS (default: ~/.cache/perwatt/suites), in `fusion`. Each file is built in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import numpy as np

FOLDER = architectures.FOLDER / "fusion"
SEED = 0
BATCH = 8
"""Items in a call where the batch can't be dynamic."""
SMALL_BATCH = 2
ITEMS = 16
WORDS, FEW_WORDS = 4096, 1000
KINDS = ("dynamo", "script", "torch", "ir")
SCRIPT_OPSET = 17


@dataclass(frozen=True)
class Architecture:
    """`make(width)` gives the module for one width (1, or 0.25 where `small`); `inputs` what it is fed; `heads` of its
    attention and its `hidden` size, which ONNX Runtime's optimizer asks for, and the `rival` types that it may take it
    for. `has`: operators (several of one kind, separated by `|`, are added up) that the graph has where every
    operator of the standard is allowed: one for each place of the architecture."""

    name: str
    title: str
    make: Callable[[float], Any]
    inputs: str
    has: dict[str, int] = field(default_factory=dict)
    rival: tuple[str, ...] = ("bert",)
    heads: int = 0
    hidden: int = 0

    @property
    def attentions(self) -> tuple[str, ...]:
        """Implementations of attention that transformers has for it."""
        return ("sdpa", "eager") if self.heads else ("sdpa",)


# Networks -------------------------------------------------------------------------------------------------------------


def _bert(width: float) -> Any:
    import transformers as hf

    sizes = {
        "hidden_size": int(768 * width),
        "intermediate_size": int(3072 * width),
        "vocab_size": _words(width, 30522),
    }
    return hf.BertForSequenceClassification(hf.BertConfig(num_labels=2, **sizes))


def _minilm(width: float) -> Any:
    import transformers as hf

    sizes = {
        "hidden_size": int(384 * width),
        "intermediate_size": int(1536 * width),
        "vocab_size": _words(width, 30522),
    }
    return hf.BertModel(hf.BertConfig(num_hidden_layers=6, **sizes), add_pooling_layer=False)


def _vit(width: float) -> Any:
    import transformers as hf

    sizes = {"hidden_size": int(768 * width), "intermediate_size": int(3072 * width)}
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000, **sizes))


def _llama(width: float) -> Any:
    import transformers as hf

    sizes = {
        "hidden_size": int(576 * width),
        "intermediate_size": int(1536 * width),
        "vocab_size": _words(width, WORDS),
    }
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, max_position_embeddings=2048, **sizes, **heads))


def _gpt2(width: float) -> Any:
    import transformers as hf

    return hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False, n_embd=int(768 * width), vocab_size=_words(width, WORDS)))


def _whisper(width: float) -> Any:
    import transformers as hf

    sizes = {
        "d_model": int(512 * width),
        "encoder_ffn_dim": int(2048 * width),
        "max_source_positions": _frames(width) // 2,
    }
    heads = {"encoder_layers": 6, "encoder_attention_heads": 8, "decoder_layers": 1, "decoder_attention_heads": 8}
    return hf.WhisperModel(hf.WhisperConfig(**sizes, **heads)).encoder


def _resnet50(width: float) -> Any:
    import transformers as hf

    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))


def _mobilenetv2(width: float) -> Any:
    import transformers as hf

    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=1000))


def _efficientnet(width: float) -> Any:
    import transformers as hf

    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    return hf.EfficientNetForImageClassification(hf.EfficientNetConfig(num_labels=1000, **sizes))


def _convnext(width: float) -> Any:
    import transformers as hf

    sizes = [int(size * width) for size in (96, 192, 384, 768)]
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(num_labels=1000, hidden_sizes=sizes))


def _swin(width: float) -> Any:
    import transformers as hf

    return hf.SwinForImageClassification(hf.SwinConfig(num_labels=1000, embed_dim=int(96 * width)))


def _words(width: float, full: int) -> int:
    return full if width == 1 else FEW_WORDS


def _frames(width: float) -> int:
    return 3000 if width == 1 else 600


ALL = {
    found.name: found
    for found in (
        Architecture(
            "bert-base", "BERT-base", _bert, "sentences", rival=("bert",), heads=12, hidden=768,
            has={"LayerNormalization": 25, "Gelu": 12, "Attention": 12, "MatMul|Gemm": 74, "Softmax|Erf|ReduceMean": 0},
        ),
        Architecture(
            "minilm", "MiniLM-L6", _minilm, "sentences", rival=("bert",), heads=12, hidden=384,
            has={"LayerNormalization": 13, "Gelu": 6, "Attention": 6, "MatMul|Gemm": 36, "Softmax|Erf|ReduceMean": 0},
        ),
        Architecture(
            "vit-b", "ViT-B/16", _vit, "pictures", rival=("vit", "bert", "clip"), heads=12, hidden=768,
            has={"LayerNormalization": 25, "Gelu": 12, "Attention": 12, "MatMul|Gemm": 73, "Softmax|Erf|ReduceMean": 0},
        ),
        Architecture(
            "llama", "Llama-style decoder", _llama, "tokens", rival=("qwen3", "gpt2", "phi"), heads=9, hidden=576,
            has={"RMSNormalization": 61, "Swish": 30, "Attention": 30, "RotaryEmbedding": 60, "MatMul|Gemm": 211,
                 "Softmax|ReduceMean|Sigmoid": 0},
        ),
        Architecture(
            "gpt2", "GPT-2", _gpt2, "tokens", rival=("gpt2",), heads=12, hidden=768,
            has={"LayerNormalization": 25, "Gelu": 12, "Attention": 12, "MatMul|Gemm": 49, "Softmax|Tanh|ReduceMean": 0},
        ),
        Architecture(
            "whisper", "Whisper encoder (base)", _whisper, "sound", rival=("bart", "bert"), heads=8, hidden=512,
            has={"LayerNormalization": 13, "Gelu": 8, "Attention": 6, "MatMul|Gemm": 36, "Conv": 2, "Softmax|Erf|ReduceMean": 0},
        ),
        Architecture(
            "resnet50", "ResNet-50", _resnet50, "pictures",
            has={"Conv": 53, "Relu": 49, "BatchNormalization": 0, "MatMul|Gemm": 1},
        ),
        Architecture(
            "mobilenetv2", "MobileNetV2", _mobilenetv2, "pictures",
            has={"Conv": 52, "Clip": 35, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
        ),
        Architecture(
            "efficientnet-b0", "EfficientNet-B0", _efficientnet, "pictures",
            has={"Conv": 81, "Swish": 49, "Sigmoid": 16, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
        ),
        Architecture(
            "convnext-tiny", "ConvNeXt-tiny", _convnext, "pictures", rival=("bert", "unet"),
            has={"Conv": 22, "LayerNormalization": 23, "Gelu": 18, "MatMul|Gemm": 37, "Erf": 0},
        ),
        Architecture(
            "swin-tiny", "Swin-tiny", _swin, "pictures", rival=("swin", "bert"),
            has={"Conv": 1, "LayerNormalization": 29, "Gelu": 12, "Attention": 12, "MatMul|Gemm": 76, "Softmax|Erf": 0},
        ),
    )
}  # fmt: skip


def network(name: str, attention: str = "sdpa", small: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """(module in eval mode that returns one tensor, samples by input name)."""
    import torch

    what = ALL[name]
    width = 0.25 if small else 1.0
    torch.manual_seed(SEED)
    net = what.make(width)
    if attention == "eager":
        net.set_attn_implementation("eager")
    with torch.no_grad():
        roughen(net)
    if what.inputs == "pictures":
        architectures.settle_statistics(net)
    return one_output(net.eval(), what.inputs), samples(what.inputs, net, SMALL_BATCH if small else ITEMS)


def roughen(net: Any) -> None:
    """Move parameters that are all alike, as scales, shifts and layers' scales are when nothing was learnt, off their
    value."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for parameter in net.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def samples(kind: str, net: Any, count: int) -> dict[str, np.ndarray]:
    """Made-up inputs: texts of several lengths, filled up; pictures; spectrograms."""
    random = np.random.default_rng(SEED)
    if kind == "pictures":
        return {"pixel_values": architectures.pictures(count)}
    if kind == "sound":
        frames = 2 * net.config.max_source_positions
        return {"input_features": random.standard_normal((count, net.config.num_mel_bins, frames), dtype=np.float32)}
    words = architectures.sentences(count, net.config.vocab_size)
    lengths = random.integers(architectures.SEQUENCE // 4, architectures.SEQUENCE + 1, count)
    words["attention_mask"] = (np.arange(architectures.SEQUENCE) < lengths[:, None]).astype(np.int64)
    return words if kind == "sentences" else {name: words[name] for name in ("input_ids", "attention_mask")}


def one_output(net: Any, kind: str) -> Any:
    """`net` with named tensors in and one tensor out: logits, or the last hidden state."""
    import torch

    class Pictures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def given(self, **inputs: Any) -> Any:
            found = self.net(**inputs)
            return found.logits if "logits" in found else found.last_hidden_state

        def forward(self, pixel_values: Any) -> Any:
            return self.given(pixel_values=pixel_values)

    class Sound(Pictures):
        def forward(self, input_features: Any) -> Any:
            return self.given(input_features=input_features)

    class Tokens(Pictures):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.given(input_ids=input_ids, attention_mask=attention_mask)

    class Sentences(Pictures):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.given(**given)

    return {"pictures": Pictures, "sound": Sound, "tokens": Tokens, "sentences": Sentences}[kind]().eval()


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Where the files of one architecture with one implementation of attention lie."""

    name: str
    attention: str = "sdpa"
    small: bool = False

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.name}-{self.attention}{'-small' if self.small else ''}"

    def path(self, kind: str) -> Path:
        return self.folder / ("ir.xml" if kind == "ir" else f"{kind}.onnx")

    @property
    def samples(self) -> Path:
        return self.folder / "samples.npz"

    @property
    def outputs(self) -> Path:
        """What torch makes of the samples, as `output`."""
        return self.folder / "outputs.npz"


def built(files: Files, kind: str, again: bool = False) -> Path:
    """The file of that kind, built where it is not there. Raises RuntimeError with the last words where that fails."""
    path = files.path(kind)
    if again or not path.exists():
        words = [sys.executable, __file__, files.name, "--build", kind, "--attention", files.attention]
        print(f"building {path}", file=sys.stderr, flush=True)
        done = subprocess.run([*words, *(["--small"] if files.small else [])], capture_output=True, text=True)
        if done.returncode or not path.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(lines[-1][:300] if lines else f"exit code {done.returncode}")
    return path


def build(files: Files, kind: str) -> None:
    """One file, in this process, and the samples and torch's outputs where they are not there. Written aside first, so
    that a run that was stopped leaves nothing half."""
    import torch

    net, given = network(files.name, files.attention, files.small)
    files.folder.mkdir(parents=True, exist_ok=True)
    tensors = tuple(map(torch.from_numpy, given.values()))
    if not files.outputs.exists():
        with torch.no_grad():
            np.savez(files.outputs, output=net(*tensors).numpy())
        np.savez(files.samples, **given)
    aside = files.folder / f"aside-{os.getpid()}{files.path(kind).suffix}"
    makers = {"dynamo": by_perwatt, "script": by_script, "torch": by_torch, "ir": by_openvino}
    makers[kind](net, given, aside, SMALL_BATCH if files.small else BATCH)
    for ending in (".bin", ".onnx.json"):
        if (beside := aside.with_name(aside.name.removesuffix(aside.suffix) + ending)).exists():
            beside.replace(files.folder / f"{kind}{ending}")
    aside.replace(files.path(kind))


def by_perwatt(net: Any, given: dict[str, np.ndarray], path: Path, batch: int) -> None:
    """As perwatt reads every torch model: dynamo's export, not optimized. The batch is `batch` where it can't be dynamic."""
    from perwatt.artifact import Artifact, Step
    from perwatt.reading_export import export_module
    from perwatt.signature import TensorSpec

    specs = [TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:])) for name, array in given.items()]
    exported = export_module(net, specs, inferred=True, sizes={"batch": batch})
    Artifact(model=exported.model, steps=(Step("read", {}, tuple(exported.notes)),)).save(path)


def by_script(net: Any, given: dict[str, np.ndarray], path: Path, batch: int) -> None:
    """By torch's older exporter, which traces TorchScript."""
    import torch

    from perwatt.reading_export import quiet

    example = tuple(torch.from_numpy(array[:batch]) for array in given.values())
    with quiet(), torch.no_grad():
        torch.onnx.export(
            net, example, str(path), dynamo=False, opset_version=SCRIPT_OPSET, input_names=list(given),
            output_names=["output"], dynamic_axes={name: {0: "batch"} for name in (*given, "output")},
        )  # fmt: skip


def by_torch(net: Any, given: dict[str, np.ndarray], path: Path, batch: int) -> None:
    """By torch.onnx.export as it is by default; with a fixed batch where torch can't make it dynamic."""
    import torch

    from perwatt.reading_export import quiet

    example = tuple(torch.from_numpy(array[:batch]) for array in given.values())
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in example)
    with quiet(), torch.no_grad():
        for shapes in (dynamic, None):
            try:
                program = torch.onnx.export(
                    net, example, dynamo=True, dynamic_shapes=shapes, input_names=list(given), output_names=["output"],
                    verbose=False,
                )  # fmt: skip
                break
            except Exception:
                if shapes is None:
                    raise
    assert program is not None
    program.save(str(path))


def by_openvino(net: Any, given: dict[str, np.ndarray], path: Path, batch: int) -> None:
    """By OpenVINO's own conversion of the module; all axes but the batch have the sizes of the samples."""
    import openvino
    import torch

    from perwatt.reading_export import quiet

    with quiet(), torch.no_grad():
        model = openvino.convert_model(net, example_input={n: torch.from_numpy(a[:batch]) for n, a in given.items()})
    model.reshape({name: openvino.PartialShape([-1, *array.shape[1:]]) for name, array in given.items()})
    # As they are in the module: halved weights would be another model.
    openvino.save_model(model, path, compress_to_fp16=False)


def main() -> None:
    """Build what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"among {', '.join(ALL)}; all without")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--again", action="store_true", help="build anew what is there")
    parser.add_argument("--build", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--attention", default="sdpa", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ALL]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(ALL)}")
    if options.build:
        build(Files(options.names[0], options.attention, options.small), options.build)
        return
    failed = False
    for name in options.names or ALL:
        for attention in ALL[name].attentions:
            for kind in KINDS if attention == "sdpa" else ("dynamo", "script"):
                try:
                    path = built(Files(name, attention, options.small), kind, options.again)
                    print(f"{name}, {attention}, {kind}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
                except RuntimeError as error:
                    failed = True
                    print(f"{name}, {attention}, {kind}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
