"""`remove-softmax-guards`: the forms of the guard, what nothing is known of, and what only looks like one."""

import numpy as np
import pytest
from masked import CAUSAL, GONE, INFINITE, KEYS, ROWS, UNKNOWN, Net, batch_for, left, ran, removed
from models import build, node, outputs, run_twice

from perwatt.passes.remove_softmax_guards import RemoveSoftmaxGuards


def test_causal_attention_of_torch(golden_pass):
    net = Net()
    masked = net("Add", net.scores(), net.chosen(net.hold(CAUSAL, "bool")))
    soft = net("Softmax", masked, axis=-1)
    kept = net("Where", net("IsNaN", soft), net.hold([0]), soft)
    net.nodes.append(node("MatMul", f"{kept} v", "y"))
    inputs = f"q:float32[batch,2,{ROWS},5] k:float32[batch,2,5,{KEYS}] v:float32[batch,2,{KEYS},5]"
    before = build(net.nodes, inputs, f"y:float32[batch,2,{ROWS},5]", net.weights)
    after, changes = run_twice(RemoveSoftmaxGuards(), before)
    golden_pass("remove_softmax_guards", before, after, changes)
    removed(before)


def test_without_a_mask():
    net = Net()
    removed(net.guarded(net.scores()))


def test_scores_that_come_from_outside_may_be_anything():
    net = Net()
    left(net.guarded("s", inputs=f"s:float32[batch,2,{ROWS},{KEYS}]"), UNKNOWN)


def test_a_mask_that_comes_from_outside_may_be_anything():
    net = Net()
    left(net.guarded(net("Add", net.scores(), "m"), inputs=f"m:float32[batch,1,1,{KEYS}]"), UNKNOWN)


# What nothing is known of ---------------------------------------------------------------------------------------------


def test_the_logarithm_of_a_mask():
    net = Net()
    mask = net("Log", net("Cast", "m", to=1))
    before = net.guarded(net("Add", net.scores(), mask), inputs=f"m:bool[batch,1,1,{KEYS}]")
    left(before, ["1 left: Log may give −∞ or NaN"])


@pytest.mark.parametrize(("by", "changes"), [("h", ["1 left: a division may be by zero"]), ("4", GONE)])
def test_scores_that_are_divided(by, changes):
    net = Net()
    by = net("Cast", "h", to=1) if by == "h" else net.hold(float(by))
    before = net.guarded(net("Div", net.scores(), by), inputs="h:int64[1]")
    removed(before) if changes == GONE else left(before, changes)


def test_integers_wrap_around():
    """100 and up to 127 in int8 may be negative, and has no root then."""
    net = Net()
    total = net("Add", net("Max", "h", net.hold(0, "int8")), net.hold(100, "int8"))
    mask = net("Sqrt", net("Cast", total, to=1))
    left(net.guarded(net("Add", net.scores(), mask), inputs="h:int8[1]"), ["1 left: what is added up may be NaN"])


def test_scores_divided_by_the_root_of_a_size():
    net = Net()
    size = net("Gather", net("Shape", "q"), net.hold(-1, "int64"))
    removed(net.guarded(net("Div", net.scores(), net("Sqrt", net("Cast", size, to=1)))))


def test_along_another_axis():
    net = Net()
    removed(net.guarded(net.scores(), axis=2))
    net = Net()
    mask = net.hold(np.where(CAUSAL, 0, INFINITE))
    before = net.guarded(net("Add", net.scores(), mask), axis=2)
    left(before, ["1 left: its mask may be −∞, and the softmax is not along the last axis"])
    # Here the last column hides all of itself, and the guard is needed.
    assert np.isfinite(outputs(before, batch_for(before))["y"]).all()


def test_the_last_axis_by_its_number():
    net = Net()
    removed(net.guarded(net("Add", net.scores(), net.hold(np.where(CAUSAL, 0, INFINITE))), axis=3))


def test_a_long_way_back():
    """No recursion without an end: where it gets too far, the guard stays."""
    net = Net()
    scores = net.scores()
    for _ in range(300):
        scores = net("Add", scores, net.hold(1))
    left(net.guarded(scores), ["1 left: the way back to its mask is too long"])


# Other forms of the guard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["Equal", "IsInf"])
@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("negated", [True, False])
def test_rows_that_are_masked_entirely(masked, casts, negated):
    net = Net()
    scores = net("Add", net.scores(), net.hold(np.where(CAUSAL, 0, INFINITE)))
    soft = net("Softmax", scores, axis=-1)
    hidden = net("Equal", scores, net.hold(INFINITE)) if masked == "Equal" else net("IsInf", scores, detect_positive=0)
    whole = net("ReduceMin", net("Cast", hidden, to=7) if casts else hidden, net.hold([-1], "int64"), keepdims=1)
    whole = net("Cast", whole, to=9) if casts else whole
    zeros = net("Expand", net.hold(0), net("Shape", soft))
    chosen = (net("Not", whole), soft, zeros) if negated else (whole, zeros, soft)
    net.nodes.append(node("Where", " ".join(chosen), "y"))
    counts, changes = ran(net.built())
    assert changes == GONE and "ReduceMin" not in counts


def test_rows_that_are_looked_at_the_wrong_way():
    net = Net()
    scores = net("Add", net.scores(), net.hold(np.where(CAUSAL, 0, INFINITE)))
    hidden = net("Cast", net("Equal", scores, net.hold(INFINITE)), to=7)
    whole = net("Cast", net("ReduceMin", hidden, net.hold([-2], "int64"), keepdims=1), to=9)
    net.nodes.append(node("Where", f"{whole} {net.hold(0)} {net('Softmax', scores, axis=-1)}", "y"))
    left(net.built(), ["1 left: the guard looks along another axis than the softmax"])


def test_a_cast_between_softmax_and_guard():
    net = Net()
    soft = net("Cast", net("Softmax", net("Cast", net.scores(), to=11), axis=-1), to=1)
    net.nodes.append(node("Where", f"{net('IsNaN', soft)} {net.hold(0)} {soft}", "y"))
    removed(net.built())


def test_what_is_put_in_may_have_another_shape():
    net = Net()
    soft = net("Softmax", net.scores(), axis=-1)
    net.nodes.append(node("Where", f"{net('IsNaN', soft)} z {soft}", "y"))
    before = net.built(inputs=f"z:float32[batch,1,{ROWS},{KEYS}]")
    left(before, ["1 left: what the guard puts in may have another shape"])
    shape = f"float32[batch,2,{ROWS},{KEYS}]"
    removed(net.built(inputs=f"z:{shape}", inner=f"{soft}:{shape}"))


def test_zeros_of_the_shape_of_something_else():
    net = Net()
    soft = net("Softmax", net.scores(), axis=-1)
    zeros = net("Expand", net.hold(0), net("Shape", "z"))
    net.nodes.append(node("Where", f"{net('IsNaN', soft)} {zeros} {soft}", "y"))
    left(net.built(inputs=f"z:float32[batch,2,{ROWS},1]"), ["1 left: what the guard puts in may have another shape"])


def test_zeros_of_a_part_of_the_shape():
    net = Net()
    soft = net("Softmax", net.scores(), axis=-1)
    zeros = net("Expand", net.hold(0), net("Shape", soft, start=1))
    net.nodes.append(node("Where", f"{net('IsNaN', soft)} {zeros} {soft}", "y"))
    left(net.built(), ["1 left: what the guard puts in may have another shape"])


def test_rows_that_are_looked_at_without_their_axis():
    net = Net()
    scores = net("Add", net.scores(), net.hold(np.where(CAUSAL, 0, INFINITE)))
    hidden = net("Cast", net("Equal", scores, net.hold(INFINITE)), to=7)
    whole = net("Cast", net("ReduceMin", hidden, net.hold([-1], "int64"), keepdims=0), to=9)
    net.nodes.append(node("Where", f"{whole} {net.hold(0)} {net('Softmax', scores, axis=-1)}", "y"))
    left(net.built(), [])


def test_infinities_of_both_signs_are_no_mask():
    net = Net()
    scores = net.scores()
    whole = net("ReduceMin", net("Cast", net("IsInf", scores), to=7), net.hold([-1], "int64"), keepdims=1)
    net.nodes.append(node("Where", f"{net('Cast', whole, to=9)} {net.hold(0)} {net('Softmax', scores)}", "y"))
    left(net.built(), [])


def test_a_softmax_that_others_use_too():
    net = Net()
    soft = net("Softmax", net.scores(), axis=-1)
    net.nodes.append(node("Where", f"{net('IsNaN', soft)} {net.hold(0)} {soft}", "y"))
    net.nodes.append(node("Relu", soft, "z"))
    removed(net.built(ends=f"z:float32[batch,2,{ROWS},{KEYS}]"))


def test_a_guard_that_others_use():
    net = Net()
    soft = net("Softmax", net.scores(), axis=-1)
    fires = net("IsNaN", soft)
    net.nodes.append(node("Where", f"{fires} {net.hold(0)} {soft}", "y"))
    before = net.built(ends=f"{fires}:bool[batch,2,{ROWS},{KEYS}]")
    left(before, ["1 left: a value inside it is an output"])


def test_the_guard_of_something_else():
    net = Net()
    soft, other = net("Softmax", net.scores(), axis=-1), net("Log", net.scores())
    net.nodes.append(node("Where", f"{net('IsNaN', other)} {net.hold(0)} {soft}", "y"))
    left(net.built(), [])
