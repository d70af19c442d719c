"""What a file would run if it were loaded, found out without loading it.

Pickles, TorchScript source and serialized programs are looked at as data. Whatever is judged here is loaded from the
very bytes that were judged: an archive is rebuilt in memory from its checked members, so that a second reading of the
file by another zip library can't find something else (duplicate or case-folded names, a file swapped in between).
"""

from __future__ import annotations

import ast
import io
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, UntrustedCodeError

PLAIN_WAYS = "save it as TorchScript (torch.jit.save), with torch.export.save, as a state dict with --arch, or as ONNX"
"""Formats that are loaded without running code of the file's own."""

SAFE_WAYS = f"{PLAIN_WAYS}; or give --trust if you know where it comes from"

_FILE_OPERATORS = frozenset({"from_file", "save", "load_tensor", "load_library", "import_module"})
_OPERATOR_NAMESPACES = frozenset({
    "aten", "prim", "prims", "quantized", "_quantized", "quantized_decomposed", "torchvision", "torch", "higher_order",
})  # fmt: skip
_PRIM_REFUSED = re.compile(r"rpc_|PythonOp")
_TORCHBIND_ALLOWED = ("quantized.", "rnn.", "sparse.")


class Archive:
    """A zip archive whose members share one root folder, read once and judged once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            names = [name for name in self._zip.namelist() if not name.endswith("/")]
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise InputError(
                f"{path} is a damaged or truncated archive ({error})", fix="save or copy it again"
            ) from None
        folded = [name.lower() for name in names]
        if len(set(folded)) != len(folded):
            raise UntrustedCodeError(f"{path} holds several members of the same name, so its content is ambiguous")
        roots = {name.split("/", 1)[0] for name in names if "/" in name}
        rooted = len(roots) == 1 and all("/" in name for name in names)
        self.root = f"{roots.pop()}/" if rooted else ""
        self.names = [name[len(self.root) :] for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises InputError for a damaged one."""
        try:
            return self._zip.read(self.root + name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path} is damaged at {name} ({error})", fix="save or copy it again") from None
        except Exception as error:  # zlib.error and its like derive from Exception alone
            raise InputError(f"{self.path} is damaged at {name} ({error})", fix="save or copy it again") from None

    def rebuilt(self, replaced: Mapping[str, bytes] | None = None, keep: Iterable[str] | None = None) -> io.BytesIO:
        """A new archive in memory of the members in `keep` (default: all), some of them `replaced`."""
        replaced = replaced or {}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
            for name in self.names if keep is None else keep:
                out.writestr(f"{self.root or 'archive/'}{name}", replaced.get(name) or self.read(name))
        buffer.seek(0)
        return buffer


def pickled_globals(data: bytes) -> set[str]:
    """Dotted names that a pickle would import, found by reading its opcodes. Raises ValueError if it is no pickle."""
    found: set[str] = set()
    stream = io.BytesIO(data)
    # Old torch files are several pickles one after the other, followed by raw storages.
    for _ in range(5):
        start = stream.tell()
        try:
            found |= set(_globals_of_one(stream))
        except Exception as error:
            if start == 0:
                raise ValueError(f"not a pickle: {error}") from None
            break
    return found


def _globals_of_one(stream: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif "UNICODE" in name:
            strings.append(str(argument))
        elif name == "MEMOIZE" and strings:
            memo[len(memo)] = strings[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
            strings.append(memo[argument])


def first_pickled_number(data: bytes) -> int | None:
    """The number that the first pickle in `data` consists of, None if it is something else."""
    try:
        arguments = [argument for _, argument, _ in pickletools.genops(data[:64]) if argument is not None]
    except Exception:
        return None
    numbers = [a for a in arguments if isinstance(a, int) and a > 5]
    return numbers[0] if len(numbers) == 1 else None


def loads_as_plain_tensors(data: bytes) -> bool:
    """Whether a file of `torch.save` holds nothing but tensors and plain containers."""
    import torch

    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def check_torchscript(archive: Archive) -> None:
    """Raise UntrustedCodeError if the TorchScript source in `archive` calls operators that touch files or the network.

    Its source runs at loading already (`__setstate__`), so that it is judged as text and not as a loaded graph."""
    for name in archive.names:
        if name.startswith("code/") and name.endswith(".py"):
            for reason in _torchscript_reasons(archive.read(name)):
                raise UntrustedCodeError(
                    f"{archive.path} is a TorchScript that {reason} (in {name})",
                    fix="save the model without that, or give --trust if you know where it comes from",
                )


def _torchscript_reasons(source: bytes) -> Iterator[str]:
    text = source.decode("utf-8", errors="replace")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # Not Python's grammar: then no mention at all of these names is let through.
        for word in re.findall(r"\w+", text):
            if word in _FILE_OPERATORS:
                yield f"mentions {word}"
        return
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    self_is_stored = any(name.id == "self" and isinstance(name.ctx, ast.Store) for name in names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            words = {a.value for a in node.args if isinstance(a, ast.Constant)}
            if words & _FILE_OPERATORS:
                yield f"calls {sorted(map(str, words & _FILE_OPERATORS))[0]}, which touches files"
        if isinstance(node, ast.Attribute):
            yield from _attribute_reasons(node, id(node) in called, self_is_stored)


def _attribute_reasons(node: ast.Attribute, called: bool, self_is_stored: bool) -> Iterator[str]:
    owner = node.value
    # A module may well have an attribute that is named `save`; only reading it from `self` is known to be that.
    own = isinstance(owner, ast.Name) and owner.id == "self" and not called and not self_is_stored
    if node.attr in _FILE_OPERATORS and not own and isinstance(node.ctx, ast.Load):
        yield f"calls {node.attr}, which touches files"
    if isinstance(owner, ast.Name) and owner.id == "ops" and node.attr not in _OPERATOR_NAMESPACES:
        yield f"calls operators of {node.attr!r}, which are not known to be harmless"
    if _PRIM_REFUSED.search(node.attr):
        yield f"calls {node.attr}, which leaves this process"
    dotted = ast.unparse(node)
    if dotted.startswith("__torch__.torch.classes."):
        rest = dotted.removeprefix("__torch__.torch.classes.") + "."
        if not rest.startswith(_TORCHBIND_ALLOWED):
            yield f"uses the native class {rest.rstrip('.')}"


def check_loaded_torchscript(path: Path, module: Any) -> None:
    """The same judgement on the graphs of a loaded TorchScript: every method of every submodule, inlined blocks too."""
    for owner in module.modules():
        for method in owner._c._method_names():
            for kind in _node_kinds(owner._c._get_method(method).inlined_graph):
                namespace, _, operator = kind.partition("::")
                if operator in _FILE_OPERATORS or (namespace == "prim" and _PRIM_REFUSED.search(operator)):
                    raise UntrustedCodeError(
                        f"{path} is a TorchScript that calls {kind}, which touches files",
                        fix="save the model without that, or give --trust if you know where it comes from",
                    )


def _node_kinds(block: Any) -> Iterator[str]:
    for node in block.nodes():
        yield str(node.kind())
        for inner in node.blocks():
            yield from _node_kinds(inner)
