"""Shapes of a model's inputs: from `--input`, from the data, or a completed command that says how to give them."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, nearest
from perwatt.recipe import RawInput
from perwatt.signature import TensorSpec

BATCH = "batch"
_FORM = 'write name:type[dimension,…], as "x:float32[batch,3,224,224]"'
_TYPES = (
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


def parse_input(text: str) -> TensorSpec:
    """`x:float32[batch,3,32,32]` as a TensorSpec; a word among the dimensions is a dynamic one."""
    match = re.fullmatch(r"\s*([\w.\-/]+)\s*:\s*(\w+)\s*\[([^\]]*)\]\s*", text)
    if not match:
        raise InputError(f"--input {text!r} can't be understood", fix=_FORM)
    name, dtype, inside = match.groups()
    if dtype not in _TYPES:
        raise InputError(f"--input {text!r}: {nearest(dtype, _TYPES, 'type')}")
    dims: list[int | str] = []
    for part in (p.strip() for p in inside.split(",") if p.strip()):
        if part.isdigit() and int(part) > 0:
            dims.append(int(part))
        elif part.isidentifier():
            dims.append(part)
        else:
            raise InputError(f"--input {text!r}: {part!r} is no dimension", fix=_FORM)
    return TensorSpec(name, dtype, tuple(dims))


def without_raw(spec: TensorSpec, raw: RawInput | None) -> TensorSpec:
    """The model's own input behind data of `spec`, where `raw` preprocessing will be put in front of it."""
    if raw is None or spec.shape is None:
        return spec
    shape = spec.shape
    if raw.layout == "NHWC" and len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    return TensorSpec(spec.name, "float32" if spec.dtype == raw.dtype else spec.dtype, shape)


def resolve(
    path: Path,
    names: Sequence[str],
    optional: Sequence[str],
    given: Sequence[TensorSpec],
    example: Sequence[TensorSpec],
    raw_inputs: Mapping[str, RawInput],
    guess: str | None,
) -> list[TensorSpec]:
    """Specs of the inputs to export with, in the order of the forward signature.

    `names` are the required parameters of the forward method, `optional` those with a default. Raises InputError that
    holds the completed command where shapes are unknown."""
    if given:
        return _ordered(path, names, optional, given, guess)
    if len(names) == 1 and len(example) == 1:
        raw = raw_inputs.get(names[0]) or (next(iter(raw_inputs.values())) if len(raw_inputs) == 1 else None)
        return [TensorSpec(names[0], *_rest(without_raw(example[0], raw)))]
    by_name = {spec.name: spec for spec in example}
    if names and set(names) <= set(by_name):
        wanted = [*names, *(n for n in optional if n in by_name)]
        return [without_raw(by_name[n], raw_inputs.get(n)) for n in wanted]
    known = f"; the data holds {', '.join(map(str, example))}" if example else ""
    raise InputError(f"{path}: the shape of its input is not known{known}", fix=_complete(path, names, guess))


def _rest(spec: TensorSpec) -> tuple[str, tuple[int | str, ...] | None]:
    return spec.dtype, spec.shape


def _ordered(
    path: Path, names: Sequence[str], optional: Sequence[str], given: Sequence[TensorSpec], guess: str | None
) -> list[TensorSpec]:
    by_name = {spec.name: spec for spec in given}
    known = [*names, *optional]
    if len(given) == 1 and len(names) == 1 and given[0].name not in known:
        raise InputError(f"--input {given[0]}: {nearest(given[0].name, known, 'input')}")
    for name in by_name:
        if known and name not in known:
            raise InputError(f"--input {by_name[name]}: {nearest(name, known, 'input')}")
    missing = [name for name in names if name not in by_name]
    if missing:
        fix = _complete(path, missing, guess if len(missing) == 1 else None, given)
        raise InputError(f"{path}: the shape of {' and '.join(missing)} is not known", fix=fix)
    return [by_name[name] for name in known if name in by_name] if known else list(given)


def _complete(path: Path, names: Sequence[str], guess: str | None, given: Sequence[TensorSpec] = ()) -> str:
    flags = [f'--input "{spec}"' for spec in given]
    flags += [f'--input "{name}:{guess or "float32[batch,3,224,224]"}"' for name in names or ("x",)]
    return f"give it, as in: optimize {shlex.quote(str(path))} --target cpu {' '.join(flags)}"


def forward_names(module: Any) -> tuple[list[str], list[str]]:
    """Required and optional tensor parameters of a module's forward method, by name."""
    required: list[str] = []
    optional: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        (required if parameter.default is parameter.empty else optional).append(parameter.name)
    return required, optional


def script_names(module: Any) -> tuple[list[str], list[str]]:
    """The same of a ScriptModule, which knows its parameters from its schema."""
    required: list[str] = []
    optional: list[str] = []
    for argument in module.forward.schema.arguments[1:]:
        (optional if argument.has_default_value() else required).append(argument.name)
    return required, optional


def guess_input(module: Any) -> str | None:
    """Type and shape that the first layer's weight suggests, for the command in an error message."""
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 4:
            return f"float32[batch,{shape[1]},224,224]"
        if len(shape) == 3:
            return f"float32[batch,{shape[1]},1000]"
        if len(shape) == 2:
            return "int64[batch,128]" if "emb" in name else f"float32[batch,{shape[1]}]"
    return None


def examples(specs: Sequence[TensorSpec], known: Mapping[str, int] | None = None) -> list[Any]:
    """Tensors that fit `specs`: 2 items on the batch axis, 8 on other dynamic ones (64 for images); seeded.

    `known` gives other sizes by symbol; none is below 2, as torch takes a size of one for a constant."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec in specs:
        if spec.shape is None:
            raise InputError(f"the rank of input {spec.name} is not known", fix=f"give --input; {_FORM}")
        other = 64 if len(spec.shape) >= 4 else 8
        sizes = [
            d if isinstance(d, int) else max(2, (known or {}).get(d, 2 if d == BATCH else other)) for d in spec.shape
        ]
        dtype = getattr(torch, spec.dtype, None)
        if dtype is None:
            raise InputError(f"input {spec} has a type that torch does not know")
        floating = dtype.is_floating_point
        # Ones are valid indices and valid masks; zeros would mask everything out.
        tensors.append(
            torch.randn(sizes, generator=generator).to(dtype) if floating else torch.ones(sizes, dtype=dtype)
        )
    return tensors


def with_batch(specs: Sequence[TensorSpec]) -> tuple[list[TensorSpec], dict[str, int]]:
    """`specs` with axis 0 as a dynamic batch where all of them agree on its size; and that size."""
    firsts = {spec.shape[0] if spec.shape and len(spec.shape) > 1 else None for spec in specs}
    first = firsts.pop() if len(firsts) == 1 else None
    if not isinstance(first, int):
        return list(specs), {}
    return [TensorSpec(s.name, s.dtype, (BATCH, *(s.shape or ())[1:])) for s in specs], {BATCH: first}
