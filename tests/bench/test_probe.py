"""The compute probe on this machine, and its rule on scripted figures."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench import probe as probe_module
from perwatt.bench.fingerprint import isa
from perwatt.bench.probe import (
    CACHE_LINE_BYTES,
    FACTOR,
    RULE,
    Probe,
    aligned,
    disturbance,
    figure,
    fractions,
    keep,
    matmul_kernels,
    peaks,
    rewarded,
)


@pytest.fixture(scope="module")
def probe():
    return Probe()


# On this machine ------------------------------------------------------------------------------------------------------


def test_this_machine_reaches_something_in_each_type_it_has_units_for(probe):
    reached = probe.measure()
    assert tuple(reached) == probe.types and "f32" in reached
    assert all(0 < rate < 1000 for rate in reached.values())
    assert set(probe.types) <= set(rewarded(isa()))


@pytest.mark.skipif(not {"amx_int8", "amx_bf16"} <= set(isa()), reason="no matrix units here")
def test_matrix_units_run_integer_and_bf16_kernels_of_their_own(probe):
    described = probe.describe()
    assert all("amx" in name for kind in ("int8", "bf16") for name in described[kind]["kernels"])
    assert all("amx" not in name for name in described["f32"]["kernels"])


def test_what_is_run_is_described(probe):
    for kind, facts in probe.describe().items():
        assert kind in probe.types and facts["kernels"] and facts["operations"] > 1e7 and facts["repeats"] >= 2


def test_only_the_types_that_were_asked_for_are_probed():
    assert tuple(Probe(["f32"]).measure()) == ("f32",)


def test_a_float_kernel_that_unpacks_integer_weights_is_not_taken_for_an_integer_kernel():
    import openvino as ov
    import openvino.opset13 as op

    x = op.parameter([64, 64], np.uint8)
    codes = op.constant(np.ones((64, 64), np.int8))
    weight, left = (op.multiply(op.convert(v, "f32"), np.float32(0.01)) for v in (codes, x))
    model = ov.Model([op.matmul(left, weight, False, True)], [x])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (kernel,) = matmul_kernels(compiled)
    assert kernel.endswith("f32")


@pytest.mark.parametrize(("flags", "types"), [
    ([], ("f32",)),
    (["avx2", "avx512f"], ("f32",)),
    (["avx_vnni"], ("int8", "f32")),
    (["avx512_vnni"], ("int8", "f32")),
    (["avx512_bf16", "avx512_vnni"], ("int8", "bf16", "f32")),
    (["amx_tile", "amx_int8", "amx_bf16"], ("int8", "bf16", "f32")),
])  # fmt: skip
def test_types_that_an_instruction_set_rewards(flags, types):
    assert rewarded(flags) == types


@pytest.mark.parametrize(("flags", "does"), [(["avx2"], False), (["avx2", "avx512_vnni"], True), (["amx_bf16"], True)])
def test_it_pays_where_a_scripted_processor_has_units_for_small_types(monkeypatch, flags, does):
    monkeypatch.setattr(probe_module, "isa", lambda: flags)
    assert probe_module.pays() is does


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([np.float32, np.uint16, np.int8]))
def test_aligned_copies_are_equal_and_begin_at_a_cache_line(rows, columns, dtype):
    array = np.arange(rows * columns).reshape(rows, columns).astype(dtype)
    copy = aligned(array)
    assert copy.ctypes.data % CACHE_LINE_BYTES == 0
    assert copy.dtype == array.dtype and np.array_equal(copy, array) and not np.shares_memory(copy, array)


# Figures of a job -----------------------------------------------------------------------------------------------------


def even(*rates):
    return [{"int8": rate, "f32": rate / 10} for rate in rates]


def test_the_peak_is_the_95th_percentile_and_not_a_single_slip():
    series = even(*[1.0] * 99, 50.0)
    assert peaks(series) == {"int8": pytest.approx(1.0), "f32": pytest.approx(0.1)}
    assert fractions(series)[-1]["int8"] == pytest.approx(50.0)


def test_fractions_are_of_each_types_own_peak():
    series = [{"int8": 4.0, "f32": 0.2}] * 9 + [{"int8": 1.0, "f32": 0.2}]
    assert fractions(series)[-1] == {"int8": pytest.approx(0.25), "f32": pytest.approx(1.0)}


def test_without_probes_there_is_nothing_to_tell():
    assert peaks([]) == {} and fractions([]) == [] and keep([]) == [] and disturbance([]) == []
    assert keep([[], []]) == [True, True] and keep([[{}, {}]]) == [True]


def test_one_figure_weighs_each_types_change_alike():
    assert figure({"int8": 4.0, "f32": 0.25}) == pytest.approx(1.0)
    assert figure({"int8": 8.0, "f32": 0.25}) == pytest.approx(figure({"int8": 4.0, "f32": 0.5}))


def test_a_block_in_which_the_machine_changed_is_discarded():
    assert keep([even(2.0, 2.0), even(2.0, 0.5), even(0.5, 0.5)]) == [True, False, True]


def test_when_most_blocks_would_go_all_are_kept_and_it_is_said():
    blocks = [even(2.0, 0.5)] * 3 + [even(2.0, 2.0)]
    assert keep(blocks) == [True] * 4
    assert disturbance(blocks) == [
        "the machine's speed changed by more than a factor of 2.5 within 3 of 4 blocks; none was discarded"
    ]


def test_half_of_the_blocks_may_go():
    blocks = [even(2.0, 0.5)] * 2 + [even(2.0, 2.0)] * 2
    assert keep(blocks) == [False, False, True, True] and disturbance(blocks) == []


def test_one_block_is_never_left_alone():
    pair = [even(2.0, 0.5), even(2.0, 2.0)]
    assert keep(pair) == [True, True] and "within 1 of 2 blocks" in disturbance(pair)[0]
    assert keep([even(2.0, 0.5), even(2.0, 2.0), even(2.0, 2.0)]) == [False, True, True]


def test_a_type_that_is_slow_too_often_disturbs_the_run_and_is_named():
    quick, slow = {"int8": 2.0, "f32": 0.2}, {"int8": 0.8, "f32": 0.2}
    assert disturbance([[quick] * 10] * 9 + [[slow] * 10]) == [
        "int8 arithmetic was below half of its peak in 10 % of the probes"
    ]
    assert disturbance([[quick] * 97 + [slow] * 3]) == []


def test_a_few_probes_cannot_tell_that_a_type_is_slow():
    assert disturbance([even(2.0, 2.0, 2.0, 2.0, 0.9)]) == []


def test_the_rule_in_words_names_the_factor():
    assert f"{FACTOR:g}" in RULE


rates = st.floats(0.01, 100.0)
probes = st.fixed_dictionaries({"int8": rates, "f32": rates})


@given(st.lists(st.lists(probes, min_size=2, max_size=5), max_size=12), st.floats(1.0, 10.0))
def test_never_more_than_half_of_the_blocks_go_and_all_that_go_changed(blocks, factor):
    kept = keep(blocks, factor)
    assert len(kept) == len(blocks) and 2 * sum(kept) >= len(kept)
    for block, stays in zip(blocks, kept, strict=True):
        figures = [figure(p) for p in block]
        assert stays or max(figures) > factor * min(figures)


@given(st.lists(st.lists(probes, min_size=2, max_size=5), max_size=12), st.integers(-6, 6))
def test_a_faster_machine_is_judged_like_a_slower_one(blocks, power):
    ratios = [max(map(figure, block)) / min(map(figure, block)) for block in blocks]
    if all(not math.isclose(ratio, FACTOR, rel_tol=1e-9) for ratio in ratios):
        scaled = [[{kind: rate * 2.0**power for kind, rate in p.items()} for p in block] for block in blocks]
        assert keep(scaled) == keep(blocks)
