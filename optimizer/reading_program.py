"""Serialized `torch.export` programs: judged as data before torch may look at them.

Loading a `.pt2` runs code in more ways than one: sample inputs and constants are pickles; size expressions go through
`sympy.sympify`, which evaluates; guards and names of nodes end up in Python source that is compiled and run; the tree
specification imports modules that it names; operators are looked up by dotted name. Each of them is held to an
allow-list here, and what is not needed (stack traces and other metadata of nodes, extra files) is left out.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, UntrustedCodeError
from perwatt.reading_safety import Archive, loads_as_plain_tensors

_SYMPY_FUNCTIONS = frozenset({
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt",
    "IsNonOverlappingAndDenseIndicator", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "Max", "Min", "floor",
    "ceiling", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise", "sqrt",
    # torch writes expressions the way sympy's srepr does.
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Equality", "Unequality", "LessThan",
    "StrictLessThan", "GreaterThan", "StrictGreaterThan", "ExprCondPair", "Tuple",
})  # fmt: skip
_SYMPY_KEYWORDS = frozenset({
    "evaluate", "positive", "negative", "nonnegative", "nonpositive", "integer", "real", "zero", "nonzero", "finite",
    "precision",
})  # fmt: skip
_GUARD_METHODS = frozenset({"size", "stride", "dim", "storage_offset", "numel"})
_EXPRESSION_NODES = (
    ast.Expression, ast.keyword,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not, ast.Invert,
    ast.And, ast.Or, ast.BitAnd, ast.BitOr, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_GUARD_NODES = (*_EXPRESSION_NODES, ast.Subscript, ast.Attribute)
_LONGEST_EXPRESSION = 4000
_LARGEST_EXPONENT = 64

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim|quantized|quantized_decomposed|torchvision|higher_order)"
    r"\.(?!(from_file|save|call_torchbind|with_effects|hints_wrapper|triton_kernel_wrapper\w*)\b)"
    r"(_?[a-zA-Z][a-zA-Z0-9_]*|__i?(and|or|xor|lshift|rshift)__)(\.[a-zA-Z][a-zA-Z0-9_]*)?"
    r"|torch\._?sym_[a-z_]+"
    r"|math\.(ceil|floor|sqrt|trunc|pow)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|invert|lshift|rshift"
    r"|getitem|index)"
)
# Sympy evaluates texts that it is given as arguments, so these are held to words and numbers.
_WORD_OR_NUMBER = re.compile(r"\w+|[-+]?\d+(\.\d*)?(e[-+]?\d+)?")
_PLAIN = re.compile(r"[\w.+/-]*")
_TREE_TYPES = frozenset({
    None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.namedtuple",
    "torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict",
})  # fmt: skip
_FREE_TEXT = frozenset({"as_string", "as_strings"})

_FIX = (
    "save it again from the model with torch.export.save, or as TorchScript or ONNX; or give --trust if you know "
    "where it comes from"
)


def check_expression(text: str) -> str | None:
    """Why a size expression is not plain arithmetic on symbols, None if it is."""
    return _outside_allow_list(text, _EXPRESSION_NODES)


def check_guard(text: str) -> str | None:
    """Why a guard is not a plain comparison of input sizes, None if it is."""
    return _outside_allow_list(text, _GUARD_NODES)


def _outside_allow_list(text: str, allowed: tuple[type, ...]) -> str | None:
    if len(text) > _LONGEST_EXPRESSION or "\n" in text:
        return "is too long"
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "does not parse"
    guard = allowed is _GUARD_NODES
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            return f"holds {type(node).__name__}"
        reason = _node_reason(node, guard)
        if reason:
            return reason
    return None


def _node_reason(node: ast.AST, guard: bool) -> str | None:
    if isinstance(node, ast.Name) and "__" in node.id:
        return f"names {node.id}"
    if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | str):
        return f"holds the constant {node.value!r}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _WORD_OR_NUMBER.fullmatch(node.value):
        return f"holds the text {_short(node.value)}"
    if isinstance(node, ast.Attribute) and node.attr not in _GUARD_METHODS:
        return f"reads {node.attr}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _exponent_reason(node.right)
    return _call_reason(node, guard) if isinstance(node, ast.Call) else None


def _call_reason(node: ast.Call, guard: bool) -> str | None:
    function = node.func
    for keyword in node.keywords:
        if keyword.arg not in _SYMPY_KEYWORDS or not isinstance(keyword.value, ast.Constant):
            return f"calls {ast.unparse(function)} with {keyword.arg}"
    if isinstance(function, ast.Name) and function.id in _SYMPY_FUNCTIONS:
        return _exponent_reason(node.args[1]) if function.id == "Pow" and len(node.args) == 2 else None
    if guard and isinstance(function, ast.Attribute):
        return None
    return f"calls {ast.unparse(function)}"


def _exponent_reason(node: ast.AST) -> str | None:
    # A tower of powers would keep the machine busy for ever.
    if isinstance(node, ast.Call) and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value <= _LARGEST_EXPONENT:
        return None
    return "holds a power that is no small number"


def program_reasons(program: Any) -> Iterator[str]:
    """Why a serialized program (parsed JSON) is not plain data; silence means it is."""
    for guard in program.get("guards_code") or []:
        reason = check_guard(str(guard))
        if reason:
            yield f"a guard {reason}: {_short(guard)}"
    ranges = program.get("range_constraints") or {}
    for expression in ranges:
        reason = check_expression(str(expression))
        if reason:
            yield f"a size expression {reason}: {_short(expression)}"
    yield from _reasons([value for key, value in program.items() if key not in ("guards_code", "range_constraints")])
    yield from _reasons(list(ranges.values()))


def _reasons(node: Any, key: str = "") -> Iterator[str]:
    if isinstance(node, list):
        for entry in node:
            yield from _reasons(entry, key)
    elif isinstance(node, str):
        yield from _string_reasons(node, key)
    elif isinstance(node, dict):
        if node.get("as_custom_obj") is not None or node.get("custom_obj_values"):
            yield "it holds a custom object"
        for name, value in node.items():
            yield from _string_reasons(name, "")
            yield from _reasons(value, name)


def _string_reasons(text: str, key: str) -> Iterator[str]:
    if key in _FREE_TEXT:
        return
    if key == "expr_str":
        reason = check_expression(text)
        if reason:
            yield f"a size expression {reason}: {_short(text)}"
    elif key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(text):
            yield f"it calls {_short(text)}, which is no known operator"
    elif key in ("in_spec", "out_spec"):
        yield from _tree_reasons(text)
    elif not _PLAIN.fullmatch(text):
        # Names reach Python source that torch generates and runs.
        yield f"a name is no plain word: {_short(text)}"


def _tree_reasons(text: str) -> Iterator[str]:
    if not text:
        return
    try:
        tree = json.loads(text)
    except ValueError:
        yield f"a tree specification does not parse: {_short(text)}"
        return
    yield from _tree_node_reasons(tree)


def _tree_node_reasons(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for entry in node:
            yield from _tree_node_reasons(entry)
    elif isinstance(node, str):
        if not _PLAIN.fullmatch(node):
            yield f"a tree specification holds {_short(node)}"
    elif isinstance(node, dict):
        if "__enum__" in node or ("type" in node and node["type"] not in _TREE_TYPES):
            yield f"a tree specification names {_short(node.get('type') or node.get('fqn'))}"
        for name, value in node.items():
            if name == "context" and isinstance(value, str):
                yield from _tree_reasons(value)
            else:
                yield from _tree_node_reasons(name)
                yield from _tree_node_reasons(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…'"


def _without_metadata(program: Any) -> Any:
    """The program without what nodes carry along for humans (their stack traces reach generated source as comments)."""
    if isinstance(program, list):
        return [_without_metadata(entry) for entry in program]
    if isinstance(program, dict):
        return {k: {} if k == "metadata" and isinstance(v, dict) else _without_metadata(v) for k, v in program.items()}
    return program


def load_program(path: Path, trust: bool) -> Any:
    """The `torch.export.ExportedProgram` in `path`. Raises UntrustedCodeError where loading it would run its code."""
    import torch

    try:
        return torch.export.load(str(path) if trust else _checked(Archive(path)))
    except InputError:
        raise
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} is a torch.export program that torch {torch.__version__} can't load: {why[0]}",
            fix="save it again with torch.export.save under this version",
        ) from None


def _checked(archive: Archive) -> io.BytesIO:
    replaced: dict[str, bytes] = {}
    keep = []
    for name in archive.names:
        if name.startswith(("extra/", "extra_files/")):
            continue
        keep.append(name)
        if name.startswith("models/") or name == "serialized_exported_program.json":
            replaced[name] = _checked_program(archive, name)
        elif name.endswith("_config.json"):
            _check_payloads(archive, name)
        elif name.startswith("data/sample_inputs/") or re.fullmatch(
            r"(data/(weights|constants)/)?[^/]+\.(pt|json)", name
        ):
            data = archive.read(name)
            if data and not loads_as_plain_tensors(data):
                _refuse(archive, f"{name} is a pickle that holds more than tensors")
        elif not _is_raw(name):
            _refuse(archive, f"it carries {name}")
    if archive.root:
        return archive.rebuilt(replaced, keep)
    return _flat(archive, replaced, keep)


def _flat(archive: Archive, replaced: dict[str, bytes], keep: list[str]) -> io.BytesIO:
    # The layout of torch up to 2.7 has no root folder, and its reader asks for bare names.
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
        for name in keep:
            out.writestr(name, replaced.get(name) or archive.read(name))
    buffer.seek(0)
    return buffer


def _is_raw(name: str) -> bool:
    known = (".data/serialization_id", ".data/version", "archive_format", "archive_version", "byteorder", "version")
    return name in known or bool(re.fullmatch(r"data/(weights|constants)/(weight|tensor)_\d+", name))


def _checked_program(archive: Archive, name: str) -> bytes:
    try:
        program = _without_metadata(json.loads(archive.read(name)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{archive.path}: {name} is not a program: {error}") from None
    for reason in program_reasons(program):
        _refuse(archive, reason)
    return json.dumps(program).encode()


def _check_payloads(archive: Archive, name: str) -> None:
    try:
        payloads = json.loads(archive.read(name))["config"]
        described = [(key, payload["path_name"], payload.get("use_pickle")) for key, payload in payloads.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{archive.path}: {name} is damaged ({error})") from None
    for key, member, pickled in described:
        if not _PLAIN.fullmatch(key) or not re.fullmatch(r"(weight|tensor)_\d+", member):
            _refuse(archive, f"it carries the object {_short(member)}")
        if pickled and not loads_as_plain_tensors(archive.read(f"{name.rsplit('/', 1)[0]}/{member}")):
            _refuse(archive, f"{member} is a pickle that holds more than tensors")


def _refuse(archive: Archive, reason: str) -> None:
    raise UntrustedCodeError(f"{archive.path} could run code when loaded: {reason}", fix=_FIX)
