"""The type checker behind `tensorrt_contract.py`: follows names through our source, and asks the libraries.

What a method takes and returns it reads out of the docstrings that pybind11 writes.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache

ROLES = {
    "builder",
    "network",
    "config",
    "parser",
    "engine",
    "context",
    "runtime",
    "inspector",
    "profile",
    "cache",
    "logger",
}
"""Variables of these names have to be followed wherever something is taken from them."""


@dataclass(frozen=True)
class Thing:
    """A module, class or function of a library."""

    what: object


@dataclass(frozen=True)
class Instance:
    """A value of a library's class."""

    cls: type


@dataclass(frozen=True)
class Method:
    cls: type
    name: str


@dataclass(frozen=True)
class Own:
    """A value of a class in our files."""

    name: str


@dataclass(frozen=True)
class OwnCallable:
    returns: object


@dataclass(frozen=True)
class Many:
    """Something that is iterated over; `each` for all, or one kind for each place."""

    each: object = None
    places: tuple = ()


OTHER = "known, and none of ours"


@cache
def parsed(text):
    return ast.parse(text)


def split(text):
    """`a: X[b, c] = <d: 1>, e: Y` at its outer commas."""
    parts, depth, last = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append(text[last:place].strip())
            last = place + 1
    return [*parts, text[last:].strip()] if text.strip() else []


def signatures(callable_, name):
    """[(argument names, their types, how many are needed, what is returned)] out of a pybind11 docstring."""
    found = []
    for line in (callable_.__doc__ or "").split("\n"):
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", line.strip())
        if match and "*args" not in line:
            arguments = split(match[1])
            names = [a.split(":")[0].split("=")[0].strip() for a in arguments]
            types = [a.partition(":")[2].split(" = ")[0].strip() for a in arguments]
            found.append((names, types, sum(" = " not in a for a in arguments), match[2].strip()))
    return found


class Checker:
    """All our files against the libraries in `aliases` (name in our source → module)."""

    def __init__(self, sources, aliases, main):
        self.aliases, self.main = aliases, main
        self.problems, self.uses, self.members = [], [], {}
        self.trees = {name: parsed(text) for name, text in sources.items()}
        self.classes, self.functions = {}, {}
        for tree in self.trees.values():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name] = node
                elif isinstance(node, ast.FunctionDef):
                    self.functions[node.name] = node
        kinds = [c for c in vars(main).values() if isinstance(c, type)] if main else []
        self.vocabulary = {n for c in kinds for n in vars(c) if "_" in n.strip("_") and not n.startswith("_")}

    def run(self):
        for file, tree in self.trees.items():
            self.file = file
            self.block(tree.body, {})
        return sorted(set(self.problems))

    def problem(self, node, words):
        self.problems.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {words}")

    def library(self, text):
        """The class that a docstring names, `tensorrt_bindings.tensorrt.IBuilder` or `nvinfer1::v_1_0::ITensor`."""
        name = re.split(r"\.|::", text)[-1]
        named = {"IParserError": "ParserError"}.get(name, name)
        found = getattr(self.main, named, None) if self.main else None
        if isinstance(found, type):
            return Instance(found)
        inner = re.fullmatch(r"list\[(.+)\]", text)
        return Many(self.library(inner[1])) if inner else OTHER

    # Names -----------------------------------------------------------------------------------------------------------

    def annotation(self, node, scope):
        if node is None:
            return None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.parse(node.value, mode="eval").body, scope)
        if isinstance(node, ast.BinOp):
            sides = [self.annotation(side, scope) for side in (node.left, node.right)]
            return next((s for s in sides if s not in (None, OTHER)), OTHER)
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            kinds = [self.annotation(part, scope) for part in parts]
            if isinstance(node.value, ast.Name) and node.value.id == "tuple":
                return Many(places=tuple(kinds))
            return Many(kinds[-1])
        if isinstance(node, ast.Name) and node.id in self.classes:
            return Own(node.id)
        if isinstance(node, ast.Attribute):
            found = self.infer(node, scope)
            return Instance(found.what) if isinstance(found, Thing) and isinstance(found.what, type) else OTHER
        return OTHER if getattr(node, "id", "") != "Any" else None

    def member(self, name, attribute, seen=()):
        """What an attribute of one of our classes is; None where that can't be told."""
        node = self.classes.get(name)
        if node is None or name in seen:
            return None
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and getattr(part.target, "id", None) == attribute:
                return self.annotation(part.annotation, {})
            if isinstance(part, ast.FunctionDef) and part.name == attribute:
                kind = self.annotation(part.returns, {})
                is_property = any(getattr(d, "id", "") in ("property", "cached_property") for d in part.decorator_list)
                return kind if is_property else OwnCallable(kind)
        for method in (p for p in node.body if isinstance(p, ast.FunctionDef)):
            scope = self.arguments(method, {"self": Own(name)})
            for part in ast.walk(method):
                for target, kind in (
                    self.assigned(part, scope) if method.name == "__init__" else self.annotated(part, scope)
                ):
                    if isinstance(target, ast.Attribute) and target.attr == attribute and self.is_self(target.value):
                        return kind
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return next((k for base in bases if (k := self.member(base, attribute, (*seen, name))) is not None), None)

    @staticmethod
    def is_self(node):
        return isinstance(node, ast.Name) and node.id == "self"

    def annotated(self, node, scope):
        if isinstance(node, ast.AnnAssign):
            yield node.target, self.annotation(node.annotation, scope)

    def assigned(self, node, scope):
        """(target, kind) of an assignment or a loop."""
        yield from self.annotated(node, scope)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from self.unpacked(target, node.value, self.infer(node.value, scope, quiet=True), scope)
        elif isinstance(node, ast.For | ast.comprehension):
            kind = self.infer(node.iter, scope, quiet=True)
            yield from self.unpacked(node.target, None, kind.each if isinstance(kind, Many) else None, scope)
        elif isinstance(node, ast.NamedExpr):
            yield node.target, self.infer(node.value, scope, quiet=True)

    def unpacked(self, target, value, kind, scope):
        if not isinstance(target, ast.Tuple):
            yield target, kind
        elif isinstance(value, ast.Tuple):
            for one, part in zip(target.elts, value.elts, strict=False):
                yield one, self.infer(part, scope, quiet=True)
        elif isinstance(kind, Many) and kind.places:
            yield from zip(target.elts, kind.places, strict=False)
        else:
            yield from ((one, None) for one in target.elts)

    def arguments(self, function, scope):
        inner = dict(scope)
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
            if argument.arg != "self" or "self" not in inner:
                inner[argument.arg] = self.annotation(argument.annotation, scope)
        return inner

    # Statements ------------------------------------------------------------------------------------------------------

    def block(self, body, scope):
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                self.overrides(statement, scope)
                self.block(statement.body, {**scope, "self": Own(statement.name)})
            elif isinstance(statement, ast.FunctionDef):
                self.block(statement.body, self.arguments(statement, scope))
                self.annotation(statement.returns, scope)
            else:
                self.statement(statement, scope)

    def statement(self, statement, scope):
        nested = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
        nested += [handler.body for handler in getattr(statement, "handlers", [])]
        nested += (
            [[inner] for inner in ast.walk(statement) if isinstance(inner, ast.FunctionDef)] if not any(nested) else []
        )
        heads = [
            child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt | ast.ExceptHandler)
        ]
        for node in (
            node for head in heads for node in ast.walk(head) if isinstance(node, ast.comprehension | ast.NamedExpr)
        ):
            self.remember(node, scope)
        for head in heads:
            for node in ast.walk(head):
                if isinstance(node, ast.Attribute | ast.Call):
                    self.infer(node, scope)
        self.remember(statement, scope)
        for body in nested:
            self.block(body, scope)

    def remember(self, node, scope):
        for target, kind in self.assigned(node, scope):
            if isinstance(target, ast.Name) and target.id not in self.aliases:
                # What was annotated once stays so.
                if kind is not None or target.id not in scope or isinstance(node, ast.Assign):
                    scope[target.id] = kind
            elif isinstance(target, ast.Attribute) and not isinstance(node, ast.For | ast.comprehension):
                self.settable(target, scope)

    def settable(self, target, scope):
        kind = self.infer(target.value, scope, quiet=True)
        if isinstance(kind, Instance):
            found = getattr(kind.cls, target.attr, None)
            if isinstance(found, property) and found.fset is None:
                self.problem(target, f"{kind.cls.__name__}.{target.attr} can't be set")

    def overrides(self, node, scope):
        for base in node.bases:
            kind = self.infer(base, scope, quiet=True)
            if not isinstance(kind, Thing) or not isinstance(kind.what, type):
                continue
            for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and hasattr(kind.what, m.name)):
                known = [s[0] for s in signatures(getattr(kind.what, method.name), method.name)]
                names = [argument.arg for argument in method.args.args]
                if method.name != "__init__" and names not in known:
                    self.problem(method, f"{kind.what.__name__}.{method.name} takes {known}, ours {names}")

    # Expressions -----------------------------------------------------------------------------------------------------

    def quietly(self, question, *arguments):
        """An answer that leaves no trace: the same is asked where it stands, or it stands in another file."""
        kept = self.problems, self.uses
        self.problems, self.uses = [], []
        try:
            return question(*arguments)
        finally:
            self.problems, self.uses = kept

    def infer(self, node, scope, quiet=False):
        if quiet:
            return self.quietly(self.infer, node, scope)
        if isinstance(node, ast.Name):
            if node.id in self.aliases:
                return Thing(self.aliases[node.id])
            if node.id in scope:
                return scope[node.id]
            if node.id in self.functions:
                return OwnCallable(self.quietly(self.annotation, self.functions[node.id].returns, {}))
            return Thing(Own(node.id)) if node.id in self.classes else None
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope)
        if isinstance(node, ast.Call):
            return self.call(node, scope)
        if isinstance(node, ast.Subscript):
            kind = self.infer(node.value, scope)
            return kind.each if isinstance(kind, Many) else None
        if isinstance(node, ast.IfExp):
            return self.infer(node.body, scope) or self.infer(node.orelse, scope)
        if isinstance(node, ast.ListComp):
            return Many(self.infer(node.elt, scope))
        return OTHER if isinstance(node, ast.Constant | ast.List | ast.Dict | ast.JoinedStr) else None

    def attribute(self, node, scope):
        kind, name = self.infer(node.value, scope), node.attr
        if isinstance(kind, Own):
            if (kind.name, name) not in self.members:
                self.members[kind.name, name] = self.quietly(self.member, kind.name, name)
            return self.members[kind.name, name]
        if isinstance(kind, Thing) and not isinstance(kind.what, Own):
            self.uses.append((self.file, node.end_lineno, node.end_col_offset, name))
            if not hasattr(kind.what, name):
                self.problem(node, f"{getattr(kind.what, '__name__', kind.what)} has no {name}")
                return OTHER
            found = getattr(kind.what, name)
            return Thing(found) if not isinstance(kind.what, type) or callable(found) else Instance(type(found))
        if isinstance(kind, Instance):
            self.uses.append((self.file, node.end_lineno, node.end_col_offset, name))
            if not hasattr(kind.cls, name):
                self.problem(node, f"{kind.cls.__name__} has no {name}")
                return OTHER
            found = getattr(kind.cls, name)
            if isinstance(found, property):
                text = (found.fget.__doc__ or "").strip().split(" -> ")[-1]
                return self.library(text.strip())
            return Method(kind.cls, name) if callable(found) else Instance(type(found))
        role = getattr(node.value, "id", getattr(node.value, "attr", None))
        if kind is None and self.main and (name in self.vocabulary or role in ROLES):
            self.problem(node, f"{ast.unparse(node)}: annotate {ast.unparse(node.value)}, so that it can be checked")
        return None

    def call(self, node, scope):
        kind = self.infer(node.func, scope)
        if isinstance(kind, OwnCallable):
            return kind.returns
        if isinstance(kind, Method):
            return self.fits(node, signatures(getattr(kind.cls, kind.name), kind.name), kind.name, scope, bound=True)
        if not isinstance(kind, Thing):
            return None
        if isinstance(kind.what, Own):
            return kind.what
        if isinstance(kind.what, type) and self.main and kind.what.__module__.startswith(self.main.__name__):
            known = signatures(kind.what.__init__, "__init__")
            if known:
                self.fits(node, known, kind.what.__name__, scope, bound=True)
            return Instance(kind.what)
        name = getattr(kind.what, "__name__", "")
        known = signatures(kind.what, name) if self.main else []
        if known and not inspect.isfunction(kind.what):
            # A method taken from its class, as `trt.ILogger.__init__(self)`: `self` stands among the arguments.
            return self.fits(node, known, name, scope, bound=False)
        try:
            inspect.signature(kind.what).bind(*node.args, **{k.arg: k.value for k in node.keywords})
        except TypeError as error:
            self.problem(node, f"{ast.unparse(node.func)}: {error}")
        except ValueError:
            pass
        return None

    def fits(self, node, known, name, scope, bound):
        """What the first signature returns that takes these arguments."""
        reasons = []
        for names, types, needed, returns in known:
            skip = int(bound)
            reason = self.misfit(node, names[skip:], types[skip:], needed - skip, scope)
            if reason is None:
                return self.library(returns)
            reasons.append(reason)
        if known:
            self.problem(node, f"{name}: {' / '.join(reasons)}")
        return OTHER

    def misfit(self, node, names, types, needed, scope):
        given = {**dict(zip(names, node.args, strict=False)), **{k.arg: k.value for k in node.keywords}}
        unknown = [k.arg for k in node.keywords if k.arg not in names]
        if unknown:
            return f"no argument {unknown[0]}, there are {names}"
        if len(node.args) > len(names) or len(given) < needed:
            return f"{len(node.args) + len(node.keywords)} arguments given, it takes {needed} to {len(names)}"
        for argument, value in given.items():
            wanted, got = self.library(types[names.index(argument)]), self.infer(value, scope, quiet=True)
            if isinstance(wanted, Instance) and isinstance(got, Instance) and not issubclass(got.cls, wanted.cls):
                return f"{argument} is {wanted.cls.__name__}, given {got.cls.__name__}"
        return None
