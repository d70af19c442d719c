"""Masks that leave something in every row, those that may not, and random ones against the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import CAUSAL, GONE, INFINITE, KEYS, LOWEST, MAY_FIRE, ROWS, Net, batch_for, left, onnx_bool, removed
from models import outputs, run_twice

from perwatt.passes.remove_softmax_guards import RemoveSoftmaxGuards

# Stored masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_a_stored_mask_that_is_added(axes):
    net = Net()
    mask = np.where(CAUSAL, 0, INFINITE).reshape([1] * (axes - 2) + [ROWS, KEYS])
    removed(net.guarded(net("Add", net.scores(), net.hold(mask))))


@pytest.mark.parametrize("axes", [2, 4])
def test_a_stored_mask_with_an_empty_row(axes):
    net = Net()
    allowed = CAUSAL.copy()
    allowed[1] = False
    mask = np.where(allowed, 0, INFINITE).reshape([1] * (axes - 2) + [ROWS, KEYS])
    left(net.guarded(net("Add", net.scores(), net.hold(mask))), MAY_FIRE)


def test_a_stored_mask_of_one_column_hides_whole_rows():
    net = Net()
    left(net.guarded(net("Add", net.scores(), net.hold([[0], [INFINITE], [0]]))), MAY_FIRE)


@pytest.mark.parametrize("form", ["added", "chosen", "chosen the other way"])
def test_a_stored_mask_of_truth_values(form):
    def made(allowed):
        net = Net()
        if form == "chosen the other way":
            hidden = net.hold(~allowed, "bool")
            return net.guarded(net("Where", hidden, net.hold(INFINITE), net.scores()))
        mask = net.hold(allowed, "bool")
        if form == "chosen":
            return net.guarded(net("Where", mask, net.scores(), net.hold(INFINITE)))
        return net.guarded(net("Add", net.scores(), net.chosen(mask)))

    removed(made(CAUSAL))
    left(made(np.tril(CAUSAL, -1)), MAY_FIRE)


# Large negative numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "fires"), [(-1e4, False), (LOWEST, False), (INFINITE, True)])
def test_a_mask_chosen_by_what_comes_from_outside(low, fires):
    net = Net()
    before = net.guarded(net("Add", net.scores(), net.chosen("m", low)), inputs=f"m:bool[batch,1,1,{KEYS}]")
    left(before, MAY_FIRE) if fires else removed(before)


@pytest.mark.parametrize(("low", "fires"), [(-1e30, False), (LOWEST, True)])
def test_two_masks_add_up(low, fires):
    net = Net()
    masks = net("Add", net.chosen("m", low), net.chosen("n", low))
    before = net.guarded(net("Add", net.scores(), masks), inputs=f"m:bool[batch,1,1,{KEYS}] n:bool[1,1,{ROWS},1]")
    left(before, MAY_FIRE) if fires else removed(before)


def test_a_sum_that_is_scaled_later():
    """It was −∞ before."""
    net = Net()
    masks = net("Mul", net("Add", net.chosen("m", LOWEST), net.chosen("n", LOWEST)), net.hold(0.1))
    inputs = f"m:bool[batch,1,1,{KEYS}] n:bool[1,1,{ROWS},1]"
    left(net.guarded(net("Add", net.scores(), masks), inputs=inputs), MAY_FIRE)


@pytest.mark.parametrize(("low", "fires"), [(0.0, False), (LOWEST, True)])
def test_what_is_taken_off_the_best_of_a_row(low, fires):
    net = Net()
    kept = net("Where", net.causal(), net.hold(low), net.hold(INFINITE))
    masks = net("Sub", kept, net("Where", "m", net.hold(1e38), net.hold(0)))
    before = net.guarded(net("Add", net.scores(), masks), inputs=f"m:bool[batch,1,1,{KEYS}]")
    left(before, MAY_FIRE) if fires else removed(before)


@pytest.mark.parametrize(("low", "fires"), [(-1e4, False), (LOWEST, True)])
def test_a_mask_that_is_negated(low, fires):
    net = Net()
    masks = net("Add", net("Neg", net.chosen("m", -LOWEST)), net.chosen("n", low))
    inputs = f"m:bool[batch,1,1,{KEYS}] n:bool[1,1,{ROWS},1]"
    before = net.guarded(net("Add", net.scores(), masks), inputs=inputs)
    left(before, MAY_FIRE) if fires else removed(before)


@pytest.mark.parametrize("by", ["Max", "Clip", "Relu"])
def test_two_masks_that_are_kept_from_adding_up(by):
    net = Net()
    both = net("Add", net.chosen("m", LOWEST), net.chosen("n", LOWEST))
    masks = net(by, both, *([] if by == "Relu" else [net.hold(LOWEST)]))
    inputs = f"m:bool[batch,1,1,{KEYS}] n:bool[1,1,{ROWS},1]"
    removed(net.guarded(net("Add", net.scores(), masks), inputs=inputs))


@pytest.mark.parametrize(("low", "fires"), [(-1e4, False), (-65504.0, True)])
def test_in_float16_the_lowest_number_and_a_score_are_infinite(low, fires):
    net = Net("float16")
    before = net.guarded(net("Add", net.scores(), net.chosen("m", low)), inputs=f"m:bool[batch,1,1,{KEYS}]")
    left(before, MAY_FIRE) if fires else removed(before)


@pytest.mark.parametrize(("kind", "low", "changes"), [
    ("bool", LOWEST, GONE), ("bool", INFINITE, ["1 left: what is added up may be NaN"]),
    ("int64", -10000.0, GONE), ("int64", LOWEST, ["1 left: what is added up may reach +∞"]),
])  # fmt: skip
def test_one_minus_the_mask_times_a_large_number(kind, low, changes):
    """Of integers nobody says that they are 0 and 1."""
    net = Net()
    inverse = net("Sub", net.hold(1), net("Cast", "m", to=1))
    before = net.guarded(
        net("Add", net.scores(), net("Mul", inverse, net.hold(low))), inputs=f"m:{kind}[batch,1,1,{KEYS}]"
    )
    removed(before) if changes == GONE else left(before, changes)


# Causal masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "first", "hides", "fires"), [
    ("LessOrEqual", "keys", False, False), ("GreaterOrEqual", "rows", False, False), ("Greater", "keys", True, False),
    ("Less", "rows", True, False), ("Less", "keys", False, True), ("Greater", "rows", False, True),
    ("GreaterOrEqual", "keys", True, True), ("LessOrEqual", "rows", True, True),
])  # fmt: skip
def test_positions_compared(kind, first, hides, fires):
    """Strictly before leaves nothing in the first row; `hides`: what holds is masked."""
    net = Net()
    mask = net.causal(kind, first)
    before = net.guarded(net("Add", net.scores(), net.chosen(net("Not", mask) if hides else mask)))
    left(before, MAY_FIRE) if fires else removed(before)
    net = Net()
    low, high = (0.0, INFINITE) if hides else (INFINITE, 0.0)
    before = net.guarded(net("Add", net.scores(), net.chosen(net.causal(kind, first), low, high)))
    left(before, MAY_FIRE) if fires else removed(before)


def test_all_that_torch_puts_around_a_causal_mask():
    net = Net()
    everything = net("ConstantOfShape", net.hold([], "int64"), value=onnx_bool(True))
    mask = net("And", everything, net("Cast", net.causal(), to=9))
    mask = net("Expand", mask, net.hold([2, 1, ROWS, KEYS], "int64"))
    removed(net.guarded(net("Add", net.scores(), net.chosen(mask))))


@pytest.mark.parametrize("negated", [True, False])
def test_a_mask_that_hides_everything_or_nothing(negated):
    net = Net()
    filled = net("ConstantOfShape", net.hold([ROWS, KEYS], "int64"), value=onnx_bool(True))
    mask = net.chosen(net("Not", filled) if negated else filled, 0.0, INFINITE)
    before = net.guarded(net("Add", net.scores(), mask))
    removed(before) if negated else left(before, MAY_FIRE)
    net = Net()
    filled = net("ConstantOfShape", net.hold([ROWS, KEYS], "int64"), value=onnx_bool(True))
    mask = net.chosen(net("Not", filled) if negated else filled)
    before = net.guarded(net("Add", net.scores(), mask))
    left(before, MAY_FIRE) if negated else removed(before)


@pytest.mark.parametrize("form", ["ones", "triangle"])
def test_numbers_that_hide_where_they_are_not_zero(form):
    net = Net()
    ones = net.hold(np.ones((ROWS, KEYS)))
    mask = net("Cast", ones if form == "ones" else net("Trilu", ones, upper=0), to=9)
    left(net.guarded(net("Add", net.scores(), net.chosen(mask, 0.0, INFINITE))), MAY_FIRE)


@pytest.mark.parametrize(("wide", "fires"), [((1, ROWS, KEYS), False), ((KEYS, ROWS), True)])
def test_a_mask_that_is_reshaped(wide, fires):
    """Twelve numbers, of which the second four are −∞: rows of three have something in each, rows of four don't."""
    mask = np.where(CAUSAL, 0, INFINITE)
    if fires:
        mask = np.zeros(ROWS * KEYS)
        mask[4:8] = INFINITE
    mask = mask.reshape(wide)
    assert (mask.max(axis=-1) == 0).all()
    net = Net()
    turned = net("Reshape", net.hold(mask), net.hold([ROWS, KEYS], "int64"))
    before = net.guarded(net("Add", net.scores(), turned))
    left(before, MAY_FIRE) if fires else removed(before)


def test_a_mask_that_is_cut():
    """What was left of its first row is cut off."""
    net = Net()
    wide = net.hold(np.where(np.tril(np.ones((ROWS, KEYS + 1))), 0, INFINITE))
    cut = net("Slice", wide, net.hold([1], "int64"), net.hold([KEYS + 1], "int64"), net.hold([1], "int64"))
    left(net.guarded(net("Add", net.scores(), cut)), MAY_FIRE)


def test_padding_may_hide_what_is_causal():
    """The first position sees only itself, and that may be padding."""
    net = Net()
    before = net.guarded(
        net("Add", net.scores(), net.chosen(net("And", net.causal(), "m"))), inputs=f"m:bool[batch,1,1,{KEYS}]"
    )
    left(before, MAY_FIRE)
    net = Net()
    masks = net("Add", net.chosen(net.causal()), net.chosen("m", -1e9))
    removed(net.guarded(net("Add", net.scores(), masks), inputs=f"m:bool[batch,1,1,{KEYS}]"))


def test_what_either_mask_lets_through():
    net = Net()
    mask = net("Or", net.causal(), "m")
    removed(net.guarded(net("Add", net.scores(), net.chosen(mask)), inputs=f"m:bool[batch,1,1,{KEYS}]"))


@pytest.mark.parametrize(
    ("upper", "offset", "fires"), [(0, None, False), (0, 1, False), (0, -1, True), (1, 0, True), (1, 1, True)]
)
@pytest.mark.parametrize("form", ["equal", "cast", "truth"])
def test_a_triangle_of_ones(upper, offset, fires, form):
    net = Net()
    one = net.hold(np.ones((ROWS, KEYS)), "bool" if form == "truth" else None)
    triangle = net("Trilu", one, *([net.hold(offset, "int64")] if offset is not None else []), upper=upper)
    if form == "equal":
        mask = net.chosen(net("Equal", triangle, net.hold(0)), 0.0, INFINITE)
    else:
        mask = net.chosen(net("Cast", triangle, to=9) if form == "cast" else triangle)
    before = net.guarded(net("Add", net.scores(), mask))
    left(before, MAY_FIRE) if fires else removed(before)


@pytest.mark.parametrize(("offset", "fires"), [(1, False), (2, False), (0, True)])
def test_a_triangle_of_infinities_above_the_diagonal(offset, fires):
    net = Net()
    filled = net("Expand", net.hold(INFINITE), net.hold([ROWS, KEYS], "int64"))
    mask = net("Trilu", filled, net.hold(offset, "int64"), upper=1)
    before = net.guarded(net("Add", net.scores(), mask))
    left(before, MAY_FIRE) if fires else removed(before)


def test_rows_that_were_columns():
    """Every row of what is stored has something in it, but the second column has nothing."""
    stored = np.zeros((KEYS, ROWS))
    stored[:, 1] = INFINITE
    net = Net()
    turned = net("Transpose", net.hold(stored), perm=[1, 0])
    left(net.guarded(net("Add", net.scores(), turned)), MAY_FIRE)
    net = Net()
    stayed = net("Transpose", net.hold(np.where(CAUSAL, 0, INFINITE)[None, :, None]), perm=[0, 2, 1, 3])
    removed(net.guarded(net("Add", net.scores(), stayed)))


def test_positions_of_rows_are_the_same_all_along_a_row():
    """Only the first row may see anything."""
    net = Net()
    mask = net("LessOrEqual", net.positions(ROWS, 2), net.hold(0, "int64"))
    left(net.guarded(net("Add", net.scores(), net.chosen(mask))), MAY_FIRE)
    net = Net()
    mask = net("LessOrEqual", net.positions(ROWS, 2), net.hold(0, "int64"))
    left(net.guarded(net("Add", net.scores(), net.chosen(mask, 0.0, INFINITE))), MAY_FIRE)


@pytest.mark.parametrize(("last", "fires"), [(0, False), (1, True)])
def test_positions_that_are_stored(last, fires):
    net = Net()
    keys = net.hold([[0, 1, 2, 3], [3, 2, 1, 0], [4, 3, 2, last]], "int64")
    mask = net("LessOrEqual", keys, net.positions(ROWS, 2))
    before = net.guarded(net("Add", net.scores(), net.chosen(mask)))
    left(before, MAY_FIRE) if fires else removed(before)


# Random masks against the truth ---------------------------------------------------------------------------------------

LOWS = st.sampled_from([INFINITE, LOWEST, LOWEST / 2, -1e4])
STORED = st.lists(st.lists(st.booleans(), min_size=KEYS, max_size=KEYS), min_size=ROWS, max_size=ROWS)
TRUTHS = st.recursive(
    st.one_of(
        st.sampled_from([("input", "m"), ("input", "n")]), st.tuples(st.just("stored"), STORED),
        st.tuples(st.just("causal"), st.sampled_from(["LessOrEqual", "Less", "GreaterOrEqual", "Greater"])),
        st.tuples(st.just("triangle"), st.integers(0, 1), st.integers(-1, 1)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("Not"), inner), st.tuples(st.sampled_from(["And", "Or"]), inner, inner),
    ),
    max_leaves=4,
)  # fmt: skip
MASKS = st.recursive(
    st.one_of(
        st.tuples(st.just("chosen"), TRUTHS, LOWS, st.booleans()), st.tuples(st.just("held"), STORED, LOWS),
        st.tuples(st.just("infinite triangle"), st.integers(0, 1), st.integers(-1, 2)),
    ),
    lambda inner: st.tuples(st.sampled_from(["Add", "Sub", "Max", "Min", "Neg", "Where"]), inner, inner),
    max_leaves=4,
)  # fmt: skip


def truth_in(net, tree):
    kind, *rest = tree
    if kind == "input":
        return rest[0]
    if kind == "stored":
        return net.hold(rest[0], "bool")
    if kind == "causal":
        return net.causal(rest[0])
    if kind == "triangle":
        return net("Trilu", net.hold(np.ones((ROWS, KEYS)), "bool"), net.hold(rest[1], "int64"), upper=rest[0])
    return net(kind, *(truth_in(net, inner) for inner in rest))


def mask_in(net, tree):
    kind, *rest = tree
    if kind == "chosen":
        ends = (rest[1], 0.0) if rest[2] else (0.0, rest[1])
        return net.chosen(truth_in(net, rest[0]), *ends)
    if kind == "held":
        return net.hold(np.where(rest[0], 0, rest[1]))
    if kind == "infinite triangle":
        return net("Trilu", net.hold(np.full((ROWS, KEYS), INFINITE)), net.hold(rest[1], "int64"), upper=rest[0])
    a, b = (mask_in(net, inner) for inner in rest)
    if kind == "Neg":
        return net("Add", net("Neg", net("Neg", a)), b)
    return net("Where", "m", a, b) if kind == "Where" else net(kind, a, b)


@settings(max_examples=150)
@given(tree=MASKS, seed=st.integers(0, 9))
def test_a_guard_that_is_removed_never_fires(tree, seed):
    net = Net()
    inputs = f"m:bool[batch,1,1,{KEYS}] n:bool[1,1,{ROWS},{KEYS}]"
    before = net.guarded(net("Add", net.scores(), mask_in(net, tree)), inputs=inputs)
    after, changes = run_twice(RemoveSoftmaxGuards(), before)
    if after is before:
        assert len(changes) == 1 and changes[0].startswith("1 left: ")
        return
    for truth in (None, True, False):
        batch = batch_for(before, seed, truth)
        np.testing.assert_array_equal(outputs(after, batch)["y"], outputs(before, batch)["y"])
