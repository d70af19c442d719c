"""sentence-transformers folders rebuilt as one torch module: encoder, pooling, dense layers, normalization.

Written against the folder's own files, so that the package itself is not needed and its module loader, which imports
whatever class `modules.json` names, never runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, UntrustedCodeError

_KNOWN = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
_POOLING = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens")
_MOST_CLASSES = 64
"""A last dense layer without activation and at most this many outputs is taken for a classifier's head."""


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """The entries of `modules.json`, each with the bare name of its type under `kind`. The first is the encoder."""
    try:
        entries = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules = [{**entry, "kind": str(entry["type"]).rsplit(".", 1)[-1]} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'modules.json'} can't be read: {error}") from None
    for module in modules:
        if not str(module["type"]).startswith("sentence_transformers."):
            raise UntrustedCodeError(
                f"{folder} asks for code of its own ({module['type']} in modules.json)",
                fix="export the model to ONNX, or give the encoder alone as a Hugging Face folder",
            )
        if module["kind"] not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise InputError(f"{folder}: sentence-transformers module {module['kind']} is not known; known are {known}")
        _inside(folder, str(module.get("path") or ""))
    if not modules or modules[0]["kind"] != "Transformer":
        raise InputError(f"{folder}: modules.json does not begin with a Transformer")
    return modules


def _inside(folder: Path, path: str) -> Path:
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: modules.json points outside the folder ({path})")
    return folder / path


def SentenceEncoder(network: Any, names: Sequence[str], folder: Path, modules: Sequence[Mapping[str, Any]]) -> Any:
    """A torch module that takes the encoder's inputs in order and gives {"sentence_embedding"} (or {"logits"})."""
    import torch

    parts = [(str(module["kind"]), _part(folder, module)) for module in modules if module["kind"] != "Dropout"]
    output = "logits" if parts and _is_head(*parts[-1]) else "sentence_embedding"

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.parts = torch.nn.ModuleList(part for _, part in parts)

        def forward(self, *tensors: Any) -> dict[str, Any]:
            given = dict(zip(names, tensors, strict=True))
            value = self.network(**given, return_dict=True).last_hidden_state
            for (kind, _), part in zip(parts, self.parts, strict=True):
                value = part(value, given["attention_mask"]) if kind == "Pooling" else part(value)
            return {output: value}

    return Encoder()


def _is_head(kind: str, part: Any) -> bool:
    import torch

    if kind != "Dense" or not isinstance(part[1], torch.nn.Identity):
        return False
    return 2 <= int(part[0].out_features) <= _MOST_CLASSES


def _part(folder: Path, module: Mapping[str, Any]) -> Any:
    import torch
    from torch.nn import functional

    kind, home = str(module["kind"]), _inside(folder, str(module.get("path") or ""))

    class Normalize(torch.nn.Module):  # type: ignore[misc]
        def forward(self, value: Any) -> Any:
            return functional.normalize(value, p=2.0, dim=-1)

    if kind == "Normalize":
        return Normalize()
    settings = _settings(home)
    if kind == "Pooling":
        return _pooling(home, settings)
    if kind == "LayerNorm":
        return _filled(torch.nn.LayerNorm(int(settings["dimension"])), home, "norm.")
    sizes = int(settings["in_features"]), int(settings["out_features"])
    linear = torch.nn.Linear(*sizes, bias=bool(settings.get("bias", True)))
    return torch.nn.Sequential(_filled(linear, home, "linear."), _activation(home, settings))


def _settings(home: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((home / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{home / 'config.json'} can't be read: {error}") from None


def _activation(home: Path, settings: Mapping[str, Any]) -> Any:
    """The activation that the configuration names: sentence-transformers would import any class by that name."""
    import torch

    name = str(settings.get("activation_function") or "torch.nn.modules.activation.Tanh")
    known = {"Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "LeakyReLU"}
    short = name.rsplit(".", 1)[-1]
    if not name.startswith("torch.nn.modules.") or short not in known:
        known_names = ", ".join(sorted(known))
        raise UntrustedCodeError(f"{home} asks for the activation {name}; known are {known_names} of torch.nn")
    return getattr(torch.nn, short)()


def _filled(layer: Any, home: Path, prefix: str) -> Any:
    import torch

    try:
        if (home / "model.safetensors").is_file():
            from safetensors.torch import load_file

            state = load_file(str(home / "model.safetensors"))
        else:
            state = torch.load(str(home / "pytorch_model.bin"), map_location="cpu", weights_only=True)
        layer.load_state_dict({key.removeprefix(prefix): value.float() for key, value in state.items()})
    except Exception as error:
        raise InputError(f"{home}: its weights can't be loaded ({str(error).splitlines()[0]})") from None
    return layer.eval()


def _pooling(home: Path, settings: Mapping[str, Any]) -> Any:
    import torch

    modes = [mode for mode in _POOLING if settings.get(f"pooling_mode_{mode}")]
    named = settings.get("pooling_mode")
    if named:
        # Newer versions write one name, or several, in place of a flag for each.
        short = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
        modes = [short.get(str(name), str(name)) for name in ([named] if isinstance(named, str) else named)]
    flags = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    unknown = [mode for mode in (*modes, *flags) if mode not in _POOLING and (mode in modes or "token" in mode)]
    unknown = [mode for mode in unknown if mode != "include_prompt"]
    if unknown or not modes:
        raise InputError(
            f"{home}: pooling {', '.join(unknown) or 'of no kind'} is not known; known are cls, max and mean"
        )

    class Pooling(torch.nn.Module):  # type: ignore[misc]
        def forward(self, value: Any, attention: Any) -> Any:
            mask = attention.unsqueeze(-1).to(value.dtype)
            total = (value * mask).sum(1)
            count = mask.sum(1).clamp(min=1e-9)
            results = {
                "cls_token": lambda: value[:, 0],
                "max_tokens": lambda: torch.where(mask > 0, value, torch.full_like(value, -1e9)).max(1).values,
                "mean_tokens": lambda: total / count,
                "mean_sqrt_len_tokens": lambda: total / count.sqrt(),
            }
            return torch.cat([results[mode]() for mode in modes], dim=1) if len(modes) > 1 else results[modes[0]]()

    return Pooling()
