"""`--arch`: the callable that builds a network, and the weights of a checkpoint put into it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, nearest

_NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "ema_state_dict", "params", "weights")
_RIGHT_ARCH = "is it the right --arch, with the right --arch-args?"
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")


def build(arch: str, arguments: Mapping[str, Any]) -> Any:
    """Call `package.module:callable` or `net.py:callable` and return the torch module that it builds."""
    import torch

    function = load_callable(arch, "--arch")
    shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        fix = "give its arguments, as in --arch-args num_classes=10"
        raise InputError(f"--arch {arch}({shown}): {error}", fix=fix) from None
    except ValueError:
        pass
    try:
        module = function(**arguments)
    except Exception as error:
        raise InputError(f"--arch {arch}({shown}) raised {type(error).__name__}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"--arch {arch} gave a {type(module).__name__}, no torch.nn.Module")
    return module.eval()


def load_callable(text: str, flag: str) -> Any:
    """The callable that `package.module:name` or `file.py:name` names; the working directory is importable."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"{flag} {text!r} names no callable", fix="write package.module:callable or net.py:callable")
    namespace = _from_file(Path(place), text, flag) if place.endswith(".py") else _from_package(place, text, flag)
    target = namespace
    for part in name.split("."):
        if not hasattr(target, part):
            known = [n for n, v in vars(target).items() if callable(v) and not n.startswith("_")]
            reason = nearest(part, known, "callable") if known else f"{place} has no callable"
            raise InputError(f"{flag} {text}: {reason}")
        target = getattr(target, part)
    if not callable(target):
        raise InputError(f"{flag} {text} is a {type(target).__name__}, which can't be called")
    return target


def _from_file(file: Path, text: str, flag: str) -> Any:
    if not file.is_file():
        raise InputError(f"{flag} {text}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its neighbours are importable, as they are when it runs as a script; and it must be found by name for pickles.
    with _importable(file.parent), _importable(Path.cwd()):
        before = sys.modules.get(file.stem)
        sys.modules[file.stem] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            if before is None:
                del sys.modules[file.stem]
            raise InputError(f"{flag} {text}: {file} raised {type(error).__name__}: {error}") from error
        finally:
            if before is not None:
                sys.modules[file.stem] = before
    return module


def _from_package(place: str, text: str, flag: str) -> Any:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            missing = error.name or place
            hint = f"is there a file {place.split('.')[0]}.py here?" if missing == place.split(".")[0] else None
            raise InputError(f"{flag} {text}: there is no module {missing}", fix=hint) from None
        except Exception as error:
            raise InputError(f"{flag} {text}: importing {place} raised {type(error).__name__}: {error}") from error


class _importable:
    """Puts a folder at the front of the import path, for a while."""

    def __init__(self, folder: Path) -> None:
        self.entry = str(folder.resolve())

    def __enter__(self) -> None:
        sys.path.insert(0, self.entry)

    def __exit__(self, *_: object) -> None:
        if self.entry in sys.path:
            sys.path.remove(self.entry)


def find_state(content: Any) -> dict[str, Any] | None:
    """The state dict in what a checkpoint held: itself, or nested under a usual name. None where there is none."""
    if not isinstance(content, Mapping):
        return None
    if _is_state(content):
        return dict(content)
    for name in _NESTS:
        if isinstance(content.get(name), Mapping):
            inner = find_state(content[name])
            if inner:
                return inner
    return None


def _is_state(content: Mapping[Any, Any]) -> bool:
    import torch

    tensors = [k for k, v in content.items() if isinstance(v, torch.Tensor)]
    return bool(tensors) and len(tensors) * 2 > len(content) and all(isinstance(k, str) for k in tensors)


def fill(module: Any, state: Mapping[str, Any], arch: str, arguments: Mapping[str, Any], path: Path) -> None:
    """Load `state` into `module`, strictly, with the usual prefixes removed that fit best. InputError on a mismatch."""
    import torch

    own = module.state_dict()
    # Keys that are no tensors (version markers) are none of the network's.
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    best = max(_stripped(state), key=lambda s: len(set(s) & set(own)))
    wrong = [k for k in own if k in best and own[k].shape != best[k].shape]
    if wrong:
        fix = _likely_argument(arch, arguments, wrong, own, best)
        raise InputError(_shape_message(path, arch, wrong, own, best), fix=fix)
    # A counter of training steps may be missing in old checkpoints; it has no part in inference.
    missing = [k for k in own if k not in best and not k.endswith("num_batches_tracked")]
    extra = [k for k in best if k not in own and not k.endswith("num_batches_tracked")]
    if missing or extra:
        raise InputError(_key_message(path, arch, missing, extra, len(own)), fix=_RIGHT_ARCH)
    module.load_state_dict(best, strict=False)


def _stripped(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The state as it is, and with each usual prefix removed, one after the other, as often as all keys bear it."""
    current = dict(state)
    yield current
    for _ in range(6):
        prefix = next((p for p in _PREFIXES if sum(k.startswith(p) for k in current) * 2 > len(current)), None)
        if prefix is None:
            return
        current = {k.removeprefix(prefix): v for k, v in current.items() if k.startswith(prefix)}
        yield current


def _shape_message(path: Path, arch: str, wrong: list[str], own: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    key = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    there, here = list(state[key].shape), list(own[key].shape)
    return f"{path} does not fit {arch}: {key} is {there} in the file and {here} in the network{more}"


def _likely_argument(
    arch: str, arguments: Mapping[str, Any], wrong: list[str], own: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    key = wrong[0]
    here, there = tuple(own[key].shape), tuple(state[key].shape)
    differing = [axis for axis, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
    if not differing or len(here) != len(there):
        return _RIGHT_ARCH
    size, was = there[differing[0]], here[differing[0]]
    try:
        parameters = inspect.signature(load_callable(arch, "--arch")).parameters.values()
    except (InputError, ValueError, TypeError):
        parameters = ()  # type: ignore[assignment]
    same = [p.name for p in parameters if arguments.get(p.name, p.default) == was and type(was) is int]
    classes = [p.name for p in parameters if re.search(r"class|label|out", p.name)]
    last = [k for k in own if k.endswith(("weight", "bias"))][-2:]
    name = same[0] if same else classes[0] if classes and key in last else "num_classes" if key in last else None
    return f"perhaps --arch-args {name}={size}" if name else _RIGHT_ARCH


def _key_message(path: Path, arch: str, missing: list[str], extra: list[str], count: int) -> str:
    said = []
    if missing:
        said.append(f"{len(missing)} of the network's {count} tensors are not in the file (first {missing[0]})")
    if extra:
        said.append(f"{len(extra)} in the file are not in the network (first {extra[0]})")
    return f"{path} does not fit {arch}: {'; '.join(said)}"
