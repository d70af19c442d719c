"""Local Hugging Face and sentence-transformers folders: never the network, never code in the folder unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, UntrustedCodeError, install_words, nearest
from perwatt.reading_export import export_module, first_line, quiet
from perwatt.reading_sentence import SentenceEncoder, read_modules
from perwatt.reading_shapes import BATCH, resolve
from perwatt.reading_torch import Wishes
from perwatt.signature import TensorSpec

SEQUENCE = "sequence"

_ASSETS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "preprocessor_config.json", "processor_config.json", "feature_extractor_config.json", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
_TOKENIZER_FILES = frozenset({
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
})  # fmt: skip
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")


def read_huggingface(folder: Path, kind: str, wishes: Wishes) -> tuple[str, Any, dict[str, Any]]:
    """The IR of the network in `folder`, with its format and the remaining fields of a `Reading`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    if not wishes.trust:
        _refuse_code(folder)
    modules = read_modules(folder) if kind == "sentence-transformers" else []
    home = folder / str(modules[0].get("path") or "") if modules else folder
    with quiet():
        network, config = _load(home, wishes.trust)
        names = _input_names(home, network)
    shapes = _shapes(home, config, names)
    if modules:
        wrapped: Any = SentenceEncoder(network, names, folder, modules[1:])
    else:
        wrapped = _wrap(network, names)
    specs = _specs(folder, names, shapes, wishes)
    exported = export_module(wrapped.eval(), specs)
    assets = tuple(folder / name for name in _ASSETS if (folder / name).is_file())
    if home != folder:
        assets += tuple(home / name for name in _ASSETS if (home / name).is_file() and not (folder / name).is_file())
    tokenizer = home if any((home / name).is_file() for name in _TOKENIZER_FILES) else None
    found = {
        "assets": assets,
        "tokenizer": tokenizer,
        "label2id": _labels(config),
        "exported": exported.program,
        "notes": tuple(exported.notes),
    }
    return kind, exported.model, found


def _refuse_code(folder: Path) -> None:
    """Refuse a folder that says its code is to be loaded from it, wherever it says so."""
    for file in sorted(folder.rglob("*.json")):
        if file.stat().st_size > 5_000_000 or file.name.endswith(".index.json"):
            continue
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError):
            continue
        key = _code_key(plain) if isinstance(plain, dict) else None
        if key:
            raise UntrustedCodeError(
                f"{folder} carries code of its own ({key} in {file.relative_to(folder)})",
                fix="use a model that transformers knows by itself, export it to ONNX, or give --trust if you know it",
            )
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds an adapter", fix="merge it first (merge_and_unload) and save the whole model")


def _code_key(plain: Mapping[str, Any]) -> str | None:
    for key, value in plain.items():
        if key in _CODE_KEYS and value:
            return key
        if isinstance(value, dict):
            inner = _code_key(value)
            if inner:
                return inner
    return None


def _load(folder: Path, trust: bool) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        raise InputError(f"{folder} needs transformers to be read", fix=install_words("huggingface")) from None
    # Its bars are drawn on the terminal whatever the level of logging.
    transformers.utils.logging.disable_progress_bar()
    plain = _config(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = sorted(p.name for p in (*folder.glob("*.h5"), *folder.glob("*.msgpack"), *folder.glob("*.bin")))
        found = f"found {', '.join(pickled)}" if pickled else "found none"
        raise InputError(f"{folder} has no weights that torch reads ({found})", fix="it needs a model.safetensors")
    loader = _class(folder, plain, transformers, trust)
    arguments = {"local_files_only": True, "trust_remote_code": trust, "output_loading_info": True, "dtype": "float32"}
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        arguments["use_safetensors"] = True
    failure: Exception | None = None
    # Attention written out by hand is what is left where a model has no fused one.
    for attention in ("sdpa", "eager"):
        try:
            network, info = loader.from_pretrained(str(folder), attn_implementation=attention, **arguments)
        except Exception as error:
            failure = failure or error
            continue
        _check_complete(folder, info)
        return network.eval().requires_grad_(False), network.config
    raise InputError(f"{folder} can't be loaded by transformers: {first_line(failure)}") from failure


def _config(folder: Path) -> dict[str, Any]:
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} can't be read: {error}") from None
    if not isinstance(plain, dict):
        raise InputError(f"{folder / 'config.json'} is no configuration")
    return plain


def _class(folder: Path, plain: Mapping[str, Any], transformers: Any, trust: bool) -> Any:
    names = plain.get("architectures") or []
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if trust:
        # The folder's own class; auto_map says which of the Auto classes leads to it.
        owners = [key for key, place in (plain.get("auto_map") or {}).items() if str(place).endswith(f".{names[0]}")]
        return getattr(transformers, next((key for key in owners if key.startswith("AutoModel")), "AutoModel"))
    known = [name for name in dir(transformers) if name.startswith(str(names[0])[:4]) and "For" in name]
    reason = nearest(str(names[0]), known, "architecture") if known else f"unknown architecture {names[0]!r}"
    raise InputError(f"{folder}: {reason} (transformers {transformers.__version__})")


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """Weights that the file lacks would be drawn at random; only a pooler may be missing, as its output is not used."""
    missing = sorted(k for k in info.get("missing_keys", ()) if "pooler" not in k)
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} weights of its architecture (first {missing[0]})",
            fix="was the model saved with its head, and is `architectures` in config.json right?",
        )


def _input_names(folder: Path, network: Any) -> list[str]:
    """What the network is fed: what its tokenizer gives and its forward method takes, else its main input."""
    import inspect

    known = set(inspect.signature(network.forward).parameters)
    main = str(getattr(network, "main_input_name", "input_ids"))
    if main != "input_ids":
        return [main]
    names = ["input_ids", "attention_mask"]
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            names = list(AutoTokenizer.from_pretrained(str(folder), local_files_only=True).model_input_names)
        except Exception as error:
            raise InputError(f"{folder}: its tokenizer can't be loaded: {first_line(error)}") from error
    return [name for name in names if name in known]


def _shapes(folder: Path, config: Any, names: Sequence[str]) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    if names[0] == "pixel_values":
        height, width = _image_size(folder, config)
        return {"pixel_values": ("float32", (BATCH, int(getattr(config, "num_channels", 3) or 3), height, width))}
    if names[0] == "input_values":
        return {"input_values": ("float32", (BATCH, "samples"))}
    return {name: ("int64", (BATCH, SEQUENCE)) for name in names}


def _image_size(folder: Path, config: Any) -> tuple[int, int]:
    """Height and width that the image preprocessor makes, else what the configuration says."""
    sizes: list[Any] = []
    file = folder / "preprocessor_config.json"
    if file.is_file():
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} can't be read: {error}") from None
        sizes = [plain.get("crop_size") if plain.get("do_center_crop", True) else None, plain.get("size")]
    for size in (*sizes, getattr(config, "image_size", None)):
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return 224, 224


def _specs(folder: Path, names: Sequence[str], shapes: Mapping[str, Any], wishes: Wishes) -> list[TensorSpec]:
    if wishes.inputs:
        return resolve(folder, names, (), wishes.inputs, (), wishes.raw_inputs, None)
    return [TensorSpec(name, *shapes[name]) for name in names]


def _wrap(network: Any, names: Sequence[str]) -> Any:
    """A module that takes tensors in order and gives what counts: logits, else the last hidden state, else all."""
    import torch

    if hasattr(network.config, "use_cache"):
        network.config.use_cache = False

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: Any) -> dict[str, Any]:
            result = self.network(**dict(zip(names, tensors, strict=True)), return_dict=True)
            for key in ("logits", "last_hidden_state"):
                if isinstance(result.get(key), torch.Tensor):
                    return {key: result[key]}
            return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}

    return Network()


def _labels(config: Any) -> dict[str, int] | None:
    labels = getattr(config, "label2id", None)
    if not labels or not isinstance(labels, dict):
        return None
    # transformers makes up two labels where the file says nothing.
    classifies = any("Classification" in name for name in getattr(config, "architectures", None) or ())
    return {str(k): int(v) for k, v in labels.items()} if classifies else None
