"""Small fusions and graphs to try them on, for the tests of what all fusions have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from models import build, feed, node, outputs, printed, run_twice, value, weight
from onnx import helper

from perwatt.drift import drift
from perwatt.fusion import Fusion
from perwatt.patterns import Match, Number, Op, Var

X, Y = Var("x"), Var("y")


@dataclass(frozen=True)
class One(Fusion):
    """A fusion of which a test gives the parts; `also` are outputs that a rewrite gives anew besides the root's."""

    what: ClassVar[str] = "patterns replaced"

    pattern: Any = None
    rewritten: Any = None
    reasons: Any = None
    also: Any = None
    roots: tuple[str, ...] = ()
    opset: int = 0
    operator: str | None = None

    def settings(self):
        return {}

    def patterns(self):
        return (self.pattern,)

    def find(self, node):
        for match in super().find(node):
            extra = tuple(self.also(match)) if self.also else ()
            yield Match(match.root, match.nodes, (*match.outputs, *extra), match.values, match.named, match.shared)

    def check(self, match):
        yield from self.reasons(match) if self.reasons else ()

    def rewrite(self, match, build):
        return self.rewritten(match, build)


def fusion(pattern, rewritten, **options):
    return One(pattern, rewritten, roots=tuple(pattern.kinds), **options)


TWICE_NEGATED = fusion(Op("Neg", Op("Neg", X)), lambda match, build: match["x"])
GAP = fusion(Op("Add", X, Op("Neg", Y)), lambda match, build: build.op("Sub", match["x"], match["y"]))
LOGISTIC = fusion(
    Op("Div", Number(1), Op("Add", Op("Exp", Op("Neg", X)), Number(1))),
    lambda match, build: build.op("Sigmoid", match["x"]),
)


def done(made_by, artifact, tolerance=Fusion.tolerance, **sizes):
    """The result of a fusion that kept all general promises, and its words."""
    after, changes = run_twice(made_by, artifact)
    batch = feed(artifact, **sizes)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], tolerance).reasons, printed(after)
    assert after.signature == artifact.signature
    return after, changes


def net(*nodes, outputs="y:float32[n,4]", inputs="a:float32[n,4] b:float32[n,4]", **options):
    return build(list(nodes), inputs, outputs, **options)


def by_name(artifact):
    graph = artifact.model.graph
    return {v.name: v for v in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs))}


def chosen(*inner, outer=(), weights=None, **inside):
    """y = `inner` where c, else a; `inner` computes `out` from outer values, `inside` are its own weights."""
    then = helper.make_graph(
        list(inner), "yes", [], [value("out:float32[n,4]")],
        [onnx.numpy_helper.from_array(array, name) for name, array in inside.items()],
    )  # fmt: skip
    no = helper.make_graph([node("Identity", "a", "other")], "no", [], [value("other:float32[n,4]")])
    choice = node("If", "c", "y", then_branch=then, else_branch=no)
    return net(*outer, choice, inputs="a:float32[n,4] b:float32[n,4] c:bool[]", weights=weights)


def both_ways(before, after):
    for truth in (True, False):
        batch = {"a": weight(2, 4), "b": weight(2, 4, seed=1), "c": np.array(truth)}
        batch = {spec.name: batch[spec.name] for spec in before.signature.inputs}
        assert not drift([outputs(before, batch)], [outputs(after, batch)], Fusion.tolerance).reasons
