"""Values on the way that student and teacher share: which they are, and that learning them too brings them nearer."""

import numpy as np
import pytest
from models import feed
from residuals import WORDS, attention, basic, chain, mlp

torch = pytest.importorskip("torch")

from perwatt.artifact import Step  # noqa: E402
from perwatt.data import Samples  # noqa: E402
from perwatt.distillation import Plan, distil  # noqa: E402
from perwatt.distillation_stream import hints, with_outputs  # noqa: E402
from perwatt.interpreter import Interpreter  # noqa: E402
from perwatt.passes._residual_blocks import residual_blocks, without  # noqa: E402


def dropped(artifact, *names):
    blocks = [block for block in residual_blocks(artifact).found if block.name in names]
    assert len(blocks) == len(names)
    return without(artifact, blocks, Step("drop"))


@pytest.mark.parametrize(("kinds", "kind"), [((basic,) * 6, None), ((attention, mlp) * 3, WORDS)])
def test_what_is_left_of_the_stream_is_shared(kinds, kind):
    teacher = chain(*kinds, **({"kind": kind} if kind else {}))
    student = dropped(teacher, "/block2", "/block3")
    shared = hints(student, teacher, feed(teacher, items=2), 99)
    held = {out.name: out for node in student.model.graph for out in node.outputs}
    # What the last of six reads; what those in front of the two that went read is the same as it was.
    assert len(shared) == 1
    assert all("Add" in [use.node.op_type for use in held[name].uses()] for name in shared)
    both = [with_outputs(one, shared) for one in (teacher, student)]
    for model in both:
        assert [value.name for value in model.graph.outputs] == ["y", *shared]
    assert [value.name for value in student.model.graph.outputs] == ["y"]


def test_few_are_spread_evenly_with_the_last_among_them():
    teacher = chain(*(basic,) * 9)
    student, batch = dropped(teacher, "/block0"), feed(teacher, items=2)
    every, some = (hints(student, teacher, batch, most) for most in (99, 3))
    places = [every.index(name) for name in some]
    assert places[-1] == len(every) - 1 == 6 and np.ptp(np.diff([-1, *places])) <= 1
    assert hints(student, teacher, batch, 0) == []


def test_what_is_the_same_or_has_another_shape_or_name_is_not_shared():
    teacher = chain(*(basic,) * 5)
    batch = feed(teacher, items=2)
    assert hints(teacher, teacher, batch, 99) == []
    student = dropped(teacher, "/block2")
    shared = hints(student, teacher, batch, 99)
    assert len(shared) == 1
    model = student.edit()
    for node in model.graph:
        for out in node.outputs:
            out.name = "another" if out.name in shared else out.name
    assert hints(student.after(model, Step("rename")), teacher, batch, 99) == []
    narrow = chain(*(basic,) * 5, kind="float32[batch,8,4,4]")
    assert hints(dropped(narrow, "/block2"), narrow, feed(narrow, items=2), 99) == shared


def test_with_values_on_the_way_they_come_nearer_in_the_same_steps():
    teacher = chain(*(basic,) * 6)
    student = dropped(teacher, "/block1", "/block4")
    samples, select = (Samples([feed(teacher, items=count, seed=seed)]) for count, seed in ((512, 0), (128, 1)))

    batch = feed(teacher, items=64, seed=2)
    shared = hints(student, teacher, batch, 6)

    def far(artifact):
        """Of the outputs, and of the values on the way together."""
        old, new = (Interpreter(with_outputs(one, shared)).run(batch) for one in (teacher, artifact))
        found = {name: float(np.linalg.norm(new[name] - old[name]) / np.linalg.norm(old[name])) for name in old}
        return found.pop("y"), sum(found.values())

    def learnt(count):
        plan = Plan(steps=200, batch=32, learning_rate=0.05, hints=count)
        return distil(student, teacher, samples, select, plan, lambda _: None)

    plain, guided = learnt(0), learnt(6)
    told = {name: far(one) for name, one in (("guided", guided.artifact), ("plain", plain.artifact), ("none", student))}
    assert max(told["guided"][0], told["plain"][0]) < told["none"][0]
    assert told["guided"][1] < min(told["plain"][1], told["none"][1])
    assert any("values of the residual stream" in note for note in guided.notes)
    assert not any("values of the residual stream" in note for note in plain.notes)
    assert guided.artifact.signature == teacher.signature
