"""Torch's own files: TorchScript, torch.export, checkpoints, safetensors, and, with trust, pickled modules."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, UntrustedCodeError
from perwatt.reading_arch import build, fill, find_state
from perwatt.reading_export import Exported, export_module, first_line, quiet, to_ir
from perwatt.reading_program import load_program
from perwatt.reading_safety import (
    SAFE_WAYS,
    Archive,
    check_loaded_torchscript,
    check_torchscript,
    pickled_globals,
)
from perwatt.reading_shapes import examples, forward_names, guess_input, resolve, script_names, with_batch
from perwatt.recipe import RawInput
from perwatt.signature import TensorSpec


@dataclass(frozen=True)
class Wishes:
    """What the caller said beside the path, handed through to whoever reads."""

    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[TensorSpec] = ()
    example: Sequence[TensorSpec] = ()
    trust: bool = False
    raw_inputs: Mapping[str, RawInput] = field(default_factory=dict)


def read_torchscript(path: Path, wishes: Wishes) -> Exported:
    """A TorchScript archive, traced or scripted. Its traced inputs, where it kept them, give the shapes."""
    import torch

    archive = Archive(path)
    with quiet():
        try:
            if not wishes.trust:
                check_torchscript(archive)
            module = torch.jit.load(archive.rebuilt(), map_location="cpu").eval()
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{path} is a TorchScript archive that can't be loaded: {first_line(error)}") from None
        if not wishes.trust:
            check_loaded_torchscript(path, module)
    required, optional = script_names(module)
    traced = traced_inputs(archive, [*required, *optional])
    if traced and not wishes.inputs:
        specs, sizes = with_batch(traced)
        return _export_script(module, specs, True, sizes)
    specs = resolve(path, required, optional, wishes.inputs, wishes.example, wishes.raw_inputs, guess_input(module))
    return _export_script(module, specs, False, {})


class _TracedInputs(pickle.Unpickler):
    """Reads the record that torch.jit.trace leaves of its inputs: types and shapes, as the values are not kept."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("torch._utils", "_rebuild_tensor_v2"): lambda dtype, offset, size, *_: (dtype, size),
            ("collections", "OrderedDict"): dict,
        }
        if module == "torch" and name.endswith("Storage"):
            return name
        return known[module, name]

    def persistent_load(self, reference: Any) -> Any:
        return reference[1]


_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


def traced_inputs(archive: Archive, names: Sequence[str]) -> list[TensorSpec]:
    """Types and shapes of the inputs that `forward` was traced with; empty where the archive does not say."""
    if "traced_inputs.pkl" not in archive:
        return []
    try:
        values = _TracedInputs(io.BytesIO(archive.read("traced_inputs.pkl"))).load()["forward"]
        return [
            TensorSpec(name, _STORAGES[dtype], tuple(int(d) for d in size))
            for name, (dtype, size) in zip(names[: len(values)], values, strict=True)
        ]
    except Exception:
        # Whatever else was traced (tuples, dicts of tensors) must be described by --input.
        return []


def _export_script(module: Any, specs: Sequence[TensorSpec], inferred: bool, sizes: Mapping[str, int]) -> Exported:
    from torch._export.converter import TS2EPConverter

    with quiet():
        try:
            eager = TS2EPConverter(module, tuple(examples(specs, sizes))).convert().module()
        except Exception as error:
            raise InputError(f"torch can't turn this TorchScript into a graph: {first_line(error)}") from error
    return export_module(eager, specs, inferred, sizes)


def read_program(path: Path, wishes: Wishes) -> Exported:
    """A `torch.export` program: its shapes, dynamic or not, are its own."""
    with quiet():
        program = load_program(path, wishes.trust)
    return Exported(program, to_ir(program, _program_inputs(program), None))


def _program_inputs(program: Any) -> list[str]:
    """Names of the inputs as the forward method had them, else as the graph has them."""
    user = [str(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    for entry in program.module_call_graph[:1]:
        names = getattr(entry.signature, "forward_arg_names", None) or []
        if len(names) == len(user):
            return [str(name) for name in names]
    return user


def read_saved(path: Path, data: Any, wishes: Wishes) -> tuple[str, Exported]:
    """A file of `torch.save`: a checkpoint of plain tensors (needs --arch), or a pickled module (needs trust).

    `data` is the pickle inside, for the message that names what it would import. Returns the format with the export."""
    import torch

    failure: Exception | None = None
    with quiet():
        try:
            content = torch.load(str(path), map_location="cpu", weights_only=True)
        except Exception as error:
            failure = error
    if failure is None:
        return "checkpoint", _from_state(path, content, wishes)
    foreign = _foreign(data)
    if not foreign:
        reason = f"{path} is a damaged or truncated torch file ({first_line(failure)})"
        raise InputError(reason, fix="save or copy it again")
    if not wishes.trust:
        held = ", ".join(foreign[:3])
        raise UntrustedCodeError(f"{path} is a pickle that holds {held}: loading it runs its code", fix=SAFE_WAYS)
    content = load_trusted(path)
    module = content if isinstance(content, torch.nn.Module) else _module_inside(content)
    if module is None:
        return "checkpoint", _from_state(path, content, wishes)
    return "pickled-module", _export_eager(path, module.float() if _is_half(module) else module, wishes)


def load_trusted(path: Path) -> Any:
    """Load a pickle that the user trusts; its classes may lie in the working directory."""
    import sys

    import torch

    sys.path.insert(0, str(Path.cwd()))
    try:
        with quiet():
            return torch.load(str(path), map_location="cpu", weights_only=False)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(
            f"{path} needs code that is not here: {first_line(error)}",
            fix="run this in the folder of the model's source",
        ) from None
    except Exception as error:
        raise InputError(f"{path} can't be loaded: {first_line(error)}") from None
    finally:
        sys.path.remove(str(Path.cwd()))


def _foreign(data: bytes) -> list[str]:
    """What a pickle would import beyond tensors and plain containers."""
    plain = ("torch._utils._rebuild", "collections.OrderedDict", "torch._tensor", "torch.serialization._get_layout")
    try:
        names = pickled_globals(data)
    except ValueError:
        return []
    return sorted(n for n in names if not n.startswith(plain) and not (n.startswith("torch.") and n.count(".") == 1))


def _is_half(module: Any) -> bool:
    import torch

    return any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())


def _module_inside(content: Any) -> Any:
    """The network in a checkpoint that carries a whole module under a usual name, as YOLO's do."""
    import torch

    if isinstance(content, Mapping):
        for name in ("ema", "model", "net", "network"):
            if isinstance(content.get(name), torch.nn.Module):
                return content[name]
    return None


def _export_eager(path: Path, module: Any, wishes: Wishes) -> Exported:
    import torch

    if isinstance(module, torch.nn.DataParallel):
        module = module.module
    module = module.eval()
    required, optional = forward_names(module)
    specs = resolve(path, required, optional, wishes.inputs, wishes.example, wishes.raw_inputs, guess_input(module))
    return export_module(module, specs)


def _from_state(path: Path, content: Any, wishes: Wishes) -> Exported:
    state = find_state(content)
    if state is None:
        kind = type(content).__name__
        raise InputError(f"{path} holds a {kind} without a state dict", fix="save model.state_dict()")
    if wishes.arch is None:
        raise InputError(
            f"{path} holds {len(state)} weights and no network",
            fix=f"say what builds it, as in: optimize {path} --arch net.py:YourNet",
        )
    module = build(wishes.arch, wishes.arch_args)
    fill(module, state, wishes.arch, wishes.arch_args, path)
    return _export_eager(path, module, wishes)


def read_safetensors(paths: Sequence[Path], wishes: Wishes) -> Exported:
    """Weights in `.safetensors` files (several: the shards of one), put into what --arch builds."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for path in paths:
        try:
            state.update(load_file(str(path)))
        except Exception as error:
            raise InputError(f"{path} is a damaged or truncated safetensors file ({first_line(error)})") from None
    return _from_state(paths[0], state, wishes)


def read_folder_with_arch(folder: Path, wishes: Wishes) -> Exported:
    """The weights found in a folder, put into what --arch builds."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return read_safetensors(shards, wishes)
    import torch

    found = sorted(p for ending in ("*.bin", "*.pt", "*.pth", "*.th") for p in folder.glob(ending))
    if not found:
        raise InputError(f"{folder} holds no weights (looked for *.safetensors, *.bin, *.pt, *.pth, *.th)")
    state: dict[str, Any] = {}
    for path in found:
        try:
            state.update(find_state(torch.load(str(path), map_location="cpu", weights_only=True)) or {})
        except Exception:
            raise UntrustedCodeError(f"{path} is a pickle that holds more than tensors", fix=SAFE_WAYS) from None
    return _from_state(found[0], state, wishes)
