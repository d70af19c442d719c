"""Codes, scales and zero points equal a plain definition and ONNX's own operators; every version equals its reference."""

import itertools
import math
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from perwatt.kernels import group_quantize
from perwatt.kernels.group_quantize import Scheme

MODULE = "perwatt.kernels.group_quantize"
LIMITS = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}
SCHEMES = [
    Scheme(kind, symmetric, positive, search)
    for kind, (symmetric, positive), search in itertools.product(
        LIMITS, [(True, False), (True, True), (False, False)], [False, True]
    )
]
LARGEST = float(np.finfo(np.float32).max)
values = st.one_of(
    st.floats(-2, 2, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 7.0, -8.0, 0.5, 3.5, 1e-45, -1e-45, 2.0**-126, 2.0**-122, LARGEST, -LARGEST]
    ),
)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9)


@st.composite
def problems(draw):
    """Weights, in C order or not, a group size, and an axis."""
    weights = draw(hnp.arrays(np.float32, draw(shapes), elements=values))
    axis = draw(st.integers(-weights.ndim, weights.ndim - 1))
    form = draw(st.sampled_from(["plain", "transposed", "strided", "reversed"]))
    weights = {"plain": weights, "transposed": weights.T, "strided": weights[::2], "reversed": weights[..., ::-1]}[form]
    return weights, draw(st.integers(1, 11)), axis


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)


def half_even(x):
    """Python's own rounding, of a float32 that may be large."""
    return float(round(float(x)))


def plain(group, scheme):
    """One group, value by value: its codes, scale and zero point."""
    low, high = LIMITS[scheme.kind]
    half, f = (high - low + 1) // 2, np.float32
    h, least = max(group), min(group)
    if not scheme.symmetric:
        least, h = min(least, f(0)), max(h, f(0))
        scale = f((float(h) - float(least)) / (high - low))
    elif scheme.positive:
        scale = max(h / f(half - 1), least / f(-half))
    else:
        scale = (h if h > -least else least) / f(-half)
    if abs(scale) < 2.0**-125:
        scale = f(1)
    zero = low + half if scheme.symmetric else int(min(max(half_even(-least / scale) + low, low), high))

    def code(step):
        return min(max(half_even(step) + zero, low), high)

    if scheme.search:
        factors = [half / (half - 1)] if scheme.symmetric and not scheme.positive else []
        errors = []
        for factor in map(f, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, *factors]):
            steps = [w / scale / factor for w in group]
            errors.append((sum(float(step - f(code(step) - zero)) ** 2 for step in steps) * float(factor) ** 2, factor))
        scale = scale * min(errors, key=lambda pair: pair[0])[1]
    return [code(w / scale) for w in group], scale, zero


@given(problems(), st.sampled_from(SCHEMES))
@example((np.zeros((2, 0, 3), np.float32), 4, 1), Scheme())
@example((np.full((3, 5), LARGEST, np.float32), 2, 0), Scheme(search=True))
@example((np.array([-LARGEST, LARGEST, 1], np.float32), 3, 0), Scheme("uint8", symmetric=False))
def test_the_kernels_equal_their_references_bit_for_bit(problem, scheme):
    weights, group_size, axis = problem
    wanted = group_quantize.reference_quantize(weights, group_size, axis, scheme)
    same(group_quantize.compute_quantize(weights, group_size, axis, scheme), wanted)
    if scheme.kind.endswith("t4"):
        packed = group_quantize.reference_quantize_packed(weights, group_size, axis, scheme)
        same(packed[1:], wanted[1:])
        same(group_quantize.compute_quantize_packed(weights, group_size, axis, scheme), packed)
        same([group_quantize.reference_unpack(packed[0], weights.shape, scheme.kind)], wanted[:1])
    read = group_quantize.reference_dequantize(*wanted, group_size, axis)
    assert read.shape == weights.shape and read.dtype == np.float32
    same([group_quantize.compute_dequantize(*wanted, group_size, axis)], [read])


@given(st.lists(values, min_size=1, max_size=12), st.integers(1, 12), st.sampled_from(SCHEMES))
@example([1.0, -1.0, -3.0, 3.0], 2, Scheme())
def test_the_reference_equals_the_plain_definition(row, group_size, scheme):
    weights = np.array(row, np.float32)
    codes, scales, zeros = group_quantize.reference_quantize(weights, group_size, 0, scheme)
    zeros = np.zeros(scales.shape, np.int8) if zeros is None else zeros
    parts = [weights[at : at + group_size] for at in range(0, len(row), group_size)]
    with np.errstate(all="ignore"):
        wanted = [plain(list(part), scheme) for part in parts]
    assert codes.tolist() == [code for part in wanted for code in part[0]]
    assert scales.tolist() == [part[1] for part in wanted]
    assert zeros.tolist() == [part[2] for part in wanted]


@pytest.mark.parametrize("shape", [(15, 34), (16, 64), (17, 66), (33, 129), (530, 514), (3, 40, 70), (2, 3, 1)])
@pytest.mark.parametrize("group_size", [1, 4, 16, 33, 512])
def test_they_are_equal_around_whole_tiles(shape, group_size):
    weights = np.random.default_rng(group_size).standard_normal(shape).astype(np.float32)
    weights *= np.random.default_rng(0).choice([1e-30, 1, 1e30], shape[-1]).astype(np.float32)
    asymmetric, searched = Scheme("uint4", symmetric=False), Scheme("uint4", symmetric=False, search=True)
    schemes = [Scheme(), asymmetric, searched, Scheme(search=True), Scheme("uint8", positive=True, search=True)]
    for axis, scheme in itertools.product(range(len(shape)), schemes):
        if len(shape) * math.prod(shape) * scheme.search > 10_000:
            continue
        wanted = group_quantize.reference_quantize(weights, group_size, axis, scheme)
        same(group_quantize.compute_quantize(weights, group_size, axis, scheme), wanted)
        same([group_quantize.compute_dequantize(*wanted, group_size, axis)],
             [group_quantize.reference_dequantize(*wanted, group_size, axis)])  # fmt: skip
        if scheme.kind.endswith("t4"):
            packed = group_quantize.compute_quantize_packed(weights, group_size, axis, scheme)
            same(packed, (group_quantize.reference_pack(wanted[0]), *wanted[1:]))


def models(scheme, shape, groups, group_size, axis):
    """QuantizeLinear and DequantizeLinear of ONNX, blocked, codes and zero points as 4-bit or 8-bit tensors."""
    dtype = getattr(TensorProto, scheme.kind.upper())
    zero = [] if scheme.symmetric and scheme.kind.startswith("int") else ["z"]
    inputs = {
        "w": (TensorProto.FLOAT, shape),
        "q": (dtype, shape),
        "s": (TensorProto.FLOAT, groups),
        "z": (dtype, groups),
    }
    for operator, first, last, more in [
        ("QuantizeLinear", "w", dtype, {} if zero else {"output_dtype": dtype}),
        ("DequantizeLinear", "q", TensorProto.FLOAT, {}),
    ]:
        names = [first, "s", *zero]
        node = helper.make_node(operator, names, ["y"], axis=axis, block_size=group_size, **more)
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(n, *inputs[n]) for n in names],
            [helper.make_tensor_value_info("y", last, shape)],
        )  # fmt: skip
        yield helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("shape", "group_size", "axis"), [((37, 6), 16, 0), ((6, 37), 16, 1), ((3, 9, 5), 4, 1)])
def test_onnx_operators_make_the_same_codes_and_weights(scheme, shape, group_size, axis):
    # Half-integer steps among the weights: what is rounded half to even, and before the zero point is added.
    weights = (np.random.default_rng(1).integers(-20, 21, shape) / np.float32(2)).astype(np.float32)
    weights[..., :2] = np.random.default_rng(2).standard_normal((*shape[:-1], 2))
    codes, scales, zeros = group_quantize.compute_quantize(weights, group_size, axis, scheme)
    read = group_quantize.compute_dequantize(codes, scales, zeros, group_size, axis)
    theirs = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, scheme.kind.upper()))
    feeds = {"w": weights, "q": codes.astype(theirs), "s": scales}
    feeds |= {} if zeros is None else {"z": zeros.astype(theirs)}
    for model, wanted in zip(models(scheme, shape, scales.shape, group_size, axis), [codes, read], strict=True):
        chosen = {i.name: feeds[i.name] for i in model.graph.input}
        (found,) = ReferenceEvaluator(model).run(None, chosen)
        np.testing.assert_array_equal(found.astype(wanted.dtype), wanted)
    # ONNX Runtime, from the bytes that a file has.
    initializers = [numpy_helper.from_array(scales, "s")]
    for name, array in [("q", codes), ("z", zeros)]:
        if array is not None:
            raw = group_quantize.compute_pack(array) if scheme.kind.endswith("t4") else array
            kind = getattr(TensorProto, scheme.kind.upper())
            initializers.append(helper.make_tensor(name, kind, array.shape, raw.tobytes(), raw=True))
    del model.graph.input[:]
    model.graph.initializer.extend(initializers)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (found,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {})
    np.testing.assert_array_equal(found, read)


@given(hnp.arrays(np.float32, (12, 3), elements=st.floats(-1e6, 1e6, width=32)), st.sampled_from(SCHEMES))
def test_weights_are_read_again_within_a_step(weights, scheme):
    codes, scales, zeros = group_quantize.compute_quantize(weights, 5, 0, scheme)
    missed = np.abs(group_quantize.compute_dequantize(codes, scales, zeros, 5).astype(float) - weights)
    shrunk = Scheme(scheme.kind, scheme.symmetric, scheme.positive)
    steps = np.abs(np.repeat(group_quantize.reference_quantize(weights, 5, 0, shrunk)[1], 5, 0)[:12].astype(float))
    if not scheme.search:
        # Half a step, and as much again where the scale is signed or the zero point rounded.
        most = 0.5 if scheme.symmetric and scheme.positive else 1.0
        assert (missed <= steps * most * (1 + 1e-4)).all()
    assert (missed[weights == 0] == 0).all()
    # A search leaves no more than there was without one.
    without = group_quantize.compute_dequantize(*group_quantize.compute_quantize(weights, 5, 0, shrunk), 5)
    for part in (slice(0, 5), slice(5, 10), slice(10, 12)):
        before = ((without[part].astype(float) - weights[part]) ** 2).sum(axis=0)
        assert ((missed[part] ** 2).sum(axis=0) <= before * (1 + 1e-3) + 1e-6 * (steps[part] ** 2).max(axis=0)).all()


def test_signed_scales_and_searching_leave_as_much_less_as_the_module_says():
    weights = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)

    def error(**named):
        made = group_quantize.compute_quantize(weights, 64, 1, Scheme(**named))
        return ((group_quantize.compute_dequantize(*made, 64, 1) - weights) ** 2).mean()

    signed = error()
    codes = np.clip(np.rint(weights / (np.abs(weights).max(axis=1, keepdims=True) / 7)), -8, 7)
    naive = ((codes * np.abs(weights).max(axis=1, keepdims=True) / 7 - weights) ** 2).mean()
    assert 0.77 <= signed / naive <= 0.79
    assert 1.13 <= error(positive=True) / signed <= 1.17
    assert 0.87 <= error(search=True) / signed <= 0.93
    assert error(kind="uint4", symmetric=False, search=True) < error(kind="uint4", symmetric=False) < signed


def test_groups_of_zeros_or_of_nearly_nothing_get_a_scale_of_one():
    for value in (0.0, -0.0, 1e-45, -1e-45, 1e-38):
        for scheme in SCHEMES:
            codes, scales, zeros = group_quantize.compute_quantize(np.full(3, value, np.float32), 4, 0, scheme)
            assert scales.tolist() == [1.0] or (scheme.search and value != 0 and 0.6 < scales[0] < 1.2)
            assert (codes == (0 if zeros is None else zeros[0])).all()


codes_and_shapes = hnp.arrays(st.sampled_from([np.int8, np.uint8]), shapes)


@given(codes_and_shapes)
@example(np.arange(1027, dtype=np.uint8))
def test_two_codes_a_byte_are_what_onnx_stores(codes):
    packed = group_quantize.reference_pack(codes)
    flat = [int(code) & 15 for code in codes.ravel()]
    assert packed.tolist() == [a | b << 4 for a, b in zip(flat[::2], [*flat[1::2], 0], strict=False)]
    same([group_quantize.compute_pack(codes)], [packed])
    same([group_quantize.compute_pack(codes.T)], [group_quantize.reference_pack(codes.T)])
    for kind in ("int4", "uint4"):
        tensor = onnx.TensorProto(
            data_type=getattr(TensorProto, kind.upper()), dims=codes.shape, raw_data=packed.tobytes()
        )
        wanted = numpy_helper.to_array(tensor).astype(Scheme(kind).dtype)
        same([group_quantize.reference_unpack(packed, codes.shape, kind)], [wanted])
        same([group_quantize.compute_unpack(packed, codes.shape, kind)], [wanted])


def test_a_gpu_makes_the_same(simulated):
    chance, calls, wanted = np.random.default_rng(3), [], []

    def call(name, *arguments):
        calls.append((MODULE, f"compute_cuda_{name}", arguments, {}))
        wanted.append(getattr(group_quantize, f"reference_{name}")(*arguments))
        return wanted[-1]

    problems = [((35, 2), 34, 0), ((2, 35), 34, 1), ((9, 33), 6, 0), ((17, 4), 2, 1), ((2, 5, 3), 3, 1), ((3, 0), 2, 0)]
    for number, (shape, group_size, axis) in enumerate(problems):
        weights = (chance.standard_normal(shape) * chance.choice([1e-30, 1, 1e30], shape[-1])).astype(np.float32)
        for scheme in SCHEMES[number::6]:
            made = call("quantize", weights, group_size, axis, scheme)
        call("dequantize", *made, group_size, axis)
    call("quantize_packed", weights[:5, :5], 2, 1, Scheme("uint4", symmetric=False))
    for kind in ("int4", "uint4"):
        codes = np.arange(15).astype(Scheme(kind).dtype)
        call("unpack", call("pack", codes), (5, 3), kind)
    call("dequantize", np.arange(1030, dtype=np.uint8).reshape(1, 1030), np.ones((1, 1), np.float32), None, 1030, 1)
    for found, its in zip(simulated(calls), wanted, strict=True):
        same(found if isinstance(its, tuple) else [found], its if isinstance(its, tuple) else [its])


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_no_code_stands_for_is_an_error(value, axis):
    for at in [(0, 0), (18, 2), (4, 0), (19, 6)]:
        weights = np.ones((20, 7), np.float32)
        weights[at] = value
        for name in ("reference_quantize", "compute_quantize", "compute_quantize_packed"):
            with pytest.raises(ValueError, match="NaN or infinity"):
                getattr(group_quantize, name)(weights, 3, axis)


def test_a_gpu_notices_that_too(simulated):
    weights = np.ones((4, 3), np.float32)
    weights[2, 1] = math.nan
    with pytest.raises(AssertionError, match="NaN or infinity"):
        simulated([(MODULE, "compute_cuda_quantize", (weights, 2, 0), {})])


def test_what_can_not_be_grouped_or_packed_is_an_error():
    ones, codes, scales = np.ones((4, 3), np.float32), np.ones((4, 3), np.int8), np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="kind 'int5'; there are int4"):
        Scheme("int5")
    for version in ("reference", "compute", "compute_cuda"):
        quantize, dequantize, pack, unpack, quantize_packed = (
            getattr(group_quantize, f"{version}_{name}")
            for name in ("quantize", "dequantize", "pack", "unpack", "quantize_packed")
        )
        for weights, size, axis, words in [
            (np.float32(1), 1, 0, "scalar"), (ones, 1, 2, "axis 2"), (ones, 1, -3, "axis -3"), (ones, 0, 0, "size of 0"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=words):
                quantize(weights, size, axis)
        with pytest.raises(ValueError, match="'int8' is not packed"):
            quantize_packed(ones, 2, 0, Scheme("int8"))
        for bad, words in [
            ((codes.astype(np.int32), scales, None), "int32"), ((codes, scales[:1], None), r"make \(2, 3\)"),
            ((codes, scales, np.zeros((2, 3), np.uint8)), "zero points are uint8"),
            ((codes, scales, np.zeros((3, 2), np.int8)), r"must be int8\(2, 3\)"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=words):
                dequantize(*bad, 2)
        with pytest.raises(ValueError, match="float32"):
            pack(ones)
        for packed, kind, words in [(np.zeros(5, np.uint8), "int4", r"\(6,\)"), (codes[0], "int4", "int8"),
                                    (np.zeros(6, np.uint8), "uint8", "not packed")]:  # fmt: skip
            with pytest.raises(ValueError, match=words):
                unpack(packed, (4, 3), kind)
    for out in (np.empty((3, 4), np.float32), np.empty((4, 3)), np.empty((3, 4), np.float32).T):
        with pytest.raises(ValueError, match="out is"):
            group_quantize.compute_dequantize(codes, scales, None, 2, out=out)


def test_arrays_are_left_as_they_are_and_may_be_read_only_unaligned_or_of_other_types():
    weights = np.random.default_rng(4).standard_normal((12, 6)).astype(np.float32)
    wanted = group_quantize.reference_quantize(weights, 5)
    before = weights.copy()
    weights.flags.writeable = False
    unaligned = np.frombuffer(b"x" + weights.tobytes(), np.uint8)[1:].view(np.float32).reshape(12, 6)
    for given_ in (weights, unaligned, weights.astype(np.float64), weights.astype(">f4"), weights.tolist()):
        same(group_quantize.compute_quantize(given_, 5), wanted)
    np.testing.assert_array_equal(weights, before)
    for array in wanted[:2]:
        array.flags.writeable = False
    out = np.empty((12, 6), np.float32)
    assert group_quantize.compute_dequantize(*wanted, 5, out=out) is out
    same([out], [group_quantize.reference_dequantize(*wanted, 5)])
    same([group_quantize.compute_pack(wanted[0][0, 1:])], [group_quantize.reference_pack(wanted[0][0, 1:])])


def test_numba_is_imported_by_the_kernel_alone():
    script = """
import sys
import numpy as np
from perwatt.kernels import group_quantize
group_quantize.reference_quantize_packed(np.ones((4, 4)), 2)
before = "numba" in sys.modules
group_quantize.compute_quantize(np.ones((4, 4)), 2)
print(before, "numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_it_works_where_nothing_can_be_cached(monkeypatch):
    from numba.core import caching

    from perwatt.kernels._group_quantize_cpu import compiled

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled.cache_clear()
    try:
        assert group_quantize.compute_pack(np.arange(5, dtype=np.uint8)).tolist() == [0x10, 0x32, 0x04]
        assert type(compiled("pack")._cache).__name__ == "NullCache"
    finally:
        compiled.cache_clear()
