"""Six architectures for suites about speed: ONNX in float32, and NNCF's int8 of it as ONNX and as OpenVINO IR, built once.

    python architectures.py [NAME…] [--again]

ResNet-20 and MiniLM (sequence 128, with its SST-2 head) are trained; ResNet-50, MobileNetV2 1.0, BERT-base (sequence 128)
and ViT-B/16 are transformers' configurations at 224 × 224 with random weights of a fixed seed, whose batch statistics come
from a few batches in train mode, so that nothing saturates: good for speed, and their accuracy says nothing. The batch is
dynamic, all else fixed.

int8 is what a user of NNCF gets: `nncf.quantize` with its defaults (`ModelType.TRANSFORMER` for the three transformers), on
the ONNX file and on the model as OpenVINO reads it, which are not the same (on MobileNetV2 the IR takes 1.3 × the CPU
seconds of bf16, the ONNX file 0.85 to 1 ×). Samples are real where the weights are, else 32 made-up ones, since scales found
on noise are as fast as others; they lie beside each model as `.npz`. Everything lies in PERWATT_MODELS (default:
~/.cache/perwatt/suites). Each model is built in a process of its own, which returns its memory: 3 GiB suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np

FOLDER = Path(os.environ.get("PERWATT_MODELS", "~/.cache/perwatt/suites")).expanduser()
SEED = 0
SEQUENCE = 128
SIDE = 224
STATISTICS_BATCHES, STATISTICS_BATCH = 8, 8
"""Batches in train mode that batch normalization's statistics are averaged over, and pictures in each."""
MADE_UP = 32
REAL = 300
"""Calibration samples: made-up ones for random weights, real ones (NNCF's own default) for trained weights."""


@dataclass(frozen=True)
class Architecture:
    """`real`: trained weights. `transformer`: quantized by NNCF's scheme for transformers."""

    name: str
    title: str
    real: bool
    transformer: bool


ALL = {
    found.name: found
    for found in (
        Architecture("resnet20", "ResNet-20", real=True, transformer=False),
        Architecture("resnet50", "ResNet-50", real=False, transformer=False),
        Architecture("mobilenetv2", "MobileNetV2", real=False, transformer=False),
        Architecture("bert-base", "BERT-base", real=False, transformer=True),
        Architecture("vit-b16", "ViT-B/16", real=False, transformer=True),
        Architecture("minilm", "MiniLM", real=True, transformer=True),
    )
}


@dataclass(frozen=True)
class Files:
    """What is there of one architecture: two ONNX files and calibration samples, by input name."""

    fp32: Path
    int8: Path
    samples: Path

    @classmethod
    def of(cls, name: str) -> Files:
        return cls(*(FOLDER / f"{name}{ending}" for ending in (".onnx", "-int8.onnx", "-calibrate.npz")))

    @property
    def ir(self) -> Path:
        """NNCF's int8 of the model as OpenVINO reads it: an IR. NNCF places other scales there than in ONNX."""
        return self.fp32.with_name(f"{self.fp32.stem}-int8-ir.xml")

    def missing(self) -> list[Path]:
        return [path for path in (self.fp32, self.int8, self.samples, self.ir) if not path.exists()]


def built(name: str, again: bool = False) -> Files:
    """The files of that architecture, built where they are not there (minutes). Ends the program where that fails."""
    files = Files.of(name)
    if again or files.missing():
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"building {name} in {FOLDER}", flush=True)
        words = [sys.executable, str(Path(__file__).resolve()), "--build-one", name, *(["--again"] if again else [])]
        done = subprocess.run(words, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode or files.missing():
            sys.exit(f"architectures.py: {name} could not be built:\n{done.stderr[-2000:]}")
    return files


# Samples --------------------------------------------------------------------------------------------------------------


def pictures(count: int, seed: int = SEED, side: int = SIDE) -> np.ndarray:
    """Made-up pictures, float32 [count, 3, side, side], about unit normal: coarse patches under fine noise, because plain
    noise looks the same to every convolution and gives every picture the same output."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, side // 16, side // 16), dtype=np.float32)
    fine = random.standard_normal((count, 3, side, side), dtype=np.float32)
    return np.ascontiguousarray(0.9 * np.kron(coarse, np.ones((1, 1, 16, 16), np.float32)) + 0.44 * fine)


def sentences(count: int, vocabulary: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Made-up token indices, all of them words: int64 [count, SEQUENCE]."""
    ids = np.random.default_rng(seed).integers(1, vocabulary, (count, SEQUENCE))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def sst2_sentences(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Real SST-2 sentences from the training set, filled up to SEQUENCE: int64 [count, SEQUENCE]."""
    from tokenizers import Tokenizer

    rows = Path(models.sst2(folder, calibration=count)["data"]).read_text().splitlines()
    column = rows[0].split("\t").index("sentence")
    tokenizer = Tokenizer.from_file(str(models.minilm(folder) / "tokenizer.json"))
    tokenizer.enable_truncation(SEQUENCE)
    tokenizer.enable_padding(length=SEQUENCE)
    found = tokenizer.encode_batch([row.split("\t")[column] for row in rows[1:]])
    named = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.int64([getattr(one, key) for one in found]) for name, key in named.items()}


def cifar_pictures(count: int) -> np.ndarray:
    """Real CIFAR-10 training pictures as the ResNets take them: float32 [count, 3, 32, 32]."""
    with np.load(models.cifar()["data"]) as archive:
        raw = archive["images"][:count].astype(np.float32) / 255
    scaled = (raw - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


# Networks -------------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """(torch module in eval mode that returns logits, calibration samples by input name) of one with random weights."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    sized = {"image_size": SIDE, "num_labels": 1000}
    makers: dict[str, Any] = {
        "resnet50": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)),
        "mobilenetv2": lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**sized)),
        "vit-b16": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**sized)),
        "bert-base": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2)),
    }
    net = makers[name]()
    if name == "bert-base":
        samples = sentences(MADE_UP, net.config.vocab_size)
    else:
        samples = {"pixel_values": pictures(MADE_UP)}
        settle_statistics(net)
    return _logits_only(net.eval()), samples


def settle_statistics(net: Any) -> None:
    """Give batch normalization statistics of made-up pictures: with those of initialization activations would grow or die
    from layer to layer. Networks without it stay as they are."""
    import torch

    norms = [part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    net.train()
    with torch.no_grad():
        for number in range(STATISTICS_BATCHES):
            net(torch.from_numpy(pictures(STATISTICS_BATCH, seed=1000 + number)))


def _logits_only(net: Any) -> Any:
    import torch

    class Pictures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixel_values: Any) -> Any:
            return self.net(pixel_values=pixel_values).logits

    class Sentences(Pictures):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.net(**given).logits

    return (Sentences() if "vocab_size" in net.config.to_dict() else Pictures()).eval()


def trained_minilm(folder: Path) -> Any:
    """The trained MiniLM with its SST-2 head: mean over the tokens, normalized, then the logistic unit."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    home = models.minilm(folder)
    head = load_file(home / "3_Dense" / "model.safetensors")

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = AutoModel.from_pretrained(home)
            self.head = torch.nn.Linear(*reversed(head["linear.weight"].shape))
            self.head.load_state_dict({name.removeprefix("linear."): value for name, value in head.items()})

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            hidden = self.net(input_ids, attention_mask, token_type_ids).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return self.head(torch.nn.functional.normalize(mean, dim=-1))

    return Classifier().eval()


# Files ----------------------------------------------------------------------------------------------------------------


def export(net: Any, samples: dict[str, np.ndarray], path: Path) -> None:
    """`net` as ONNX with a dynamic batch, the way torch exports by default."""
    import torch

    example = tuple(torch.from_numpy(array[:2]) for array in samples.values())
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        net.eval(), example, dynamo=True, dynamic_shapes=tuple({0: batch} for _ in example),
        input_names=list(samples), output_names=["logits"], verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(path))


def quantize(files: Files, transformer: bool) -> None:
    """NNCF's int8 of the float32 file, as ONNX, with its defaults."""
    import onnx

    onnx.save(_nncf(onnx.load(files.fp32), files.samples, transformer), files.int8)


def quantize_ir(files: Files, out: Path, transformer: bool) -> None:
    """NNCF's int8 of the float32 file as OpenVINO reads it, with its defaults."""
    import openvino

    model = _nncf(openvino.Core().read_model(files.fp32), files.samples, transformer)
    openvino.save_model(model, out, compress_to_fp16=False)


def _nncf(model: Any, samples: Path, transformer: bool) -> Any:
    import nncf

    with np.load(samples) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = len(next(iter(arrays.values())))
    calls = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    return nncf.quantize(model, nncf.Dataset(calls), model_type=kind, subset_size=min(300, count))


def build(name: str, again: bool) -> None:
    """Everything of one architecture, in this process. Each file is written aside first: a run that was stopped leaves
    nothing half."""
    files, what = Files.of(name), ALL[name]
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        aside = Files(*(Path(scratch) / path.name for path in (files.fp32, files.int8, files.samples)))
        if again or not (files.fp32.exists() and files.samples.exists()):
            _float(name, Path(scratch), aside)
            check(aside)
            aside.samples.replace(files.samples)
            aside.fp32.replace(files.fp32)
        if again or not files.int8.exists():
            quantize(Files(files.fp32, aside.int8, files.samples), what.transformer)
            aside.int8.replace(files.int8)
        if again or not files.ir.exists():
            quantize_ir(files, aside.ir, what.transformer)
            aside.ir.with_suffix(".bin").replace(files.ir.with_suffix(".bin"))
            aside.ir.replace(files.ir)


def _float(name: str, folder: Path, files: Files) -> None:
    if name == "resnet20":
        shutil.copy(models.resnet(20, "onnx", folder)[0], files.fp32)
        samples = {input_names(files.fp32)[0]: cifar_pictures(REAL)}
    elif name == "minilm":
        samples = sst2_sentences(folder, REAL)
        export(trained_minilm(folder), samples, files.fp32)
    else:
        net, samples = network(name)
        export(net, samples, files.fp32)
    np.savez(files.samples, **samples)


def input_names(path: Path) -> list[str]:
    """Names of the inputs of an ONNX file, in order."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def check(files: Files) -> None:
    """Outputs must be finite and differ from sample to sample. Ends the program where they don't."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(files.fp32), providers=["CPUExecutionProvider"])
    with np.load(files.samples) as archive:
        out = session.run(None, {name: archive[name][:4] for name in archive.files})[0]
    if not np.isfinite(out).all() or np.ptp(out, axis=0).max() < 1e-4 * np.abs(out).max():
        sys.exit(f"architectures.py: {files.fp32.name} is saturated or not finite: {out[:, :4]}")


def main() -> None:
    """Build what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"among {', '.join(ALL)}; all without")
    parser.add_argument("--again", action="store_true", help="build anew what is there")
    parser.add_argument("--build-one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build_one:
        build(options.build_one, options.again)
        return
    unknown = [name for name in options.names if name not in ALL]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(ALL)}")
    failed = []
    for name in options.names or ALL:
        try:
            files = built(name, options.again)
        except SystemExit as error:
            failed.append(name)
            print(error, file=sys.stderr, flush=True)
            continue
        sizes = {path.name: f"{path.stat().st_size / 1e6:.1f} MB" for path in (files.fp32, files.int8, files.samples)}
        print(f"{name}: {json.dumps(sizes)}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
