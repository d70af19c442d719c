"""From windows to a verdict: ratios within blocks, the noise floor from two processes of one model, and what decides."""

from __future__ import annotations

import math

import numpy as np
import pytest

from perwatt.comparison import Blocks, compare, exact_figure, judge, noise_floor, subject_figure, verdict_of
from perwatt.gate_report import ComparedAccuracy
from perwatt.limits import GateFile
from perwatt.measurement import Window

BLOCKS = 40


def window(cost_ms: float, energy_j: float | None = None, calls: int = 20) -> Window:
    return Window(calls, calls * cost_ms / 2e3, calls * cost_ms / 1e3, [cost_ms / 2] * calls, energy_j)


def subject(cost_ms: float, seed: int, *, noise=0.02, weather=None, processes=(1.0, 1.0), watts=None, idle_w=None):
    """A subject in two processes. `weather`: what the machine does to every window of a block; `processes`: how fast
    each of the two is by itself; `watts`: power under load."""
    random = np.random.default_rng(seed)
    weather = np.ones(BLOCKS) if weather is None else weather
    blocks = []
    for block in range(BLOCKS):
        costs = [cost_ms * weather[block] * own * math.exp(random.normal(0, noise)) for own in processes]
        energies = [None if watts is None else watts * 20 * cost / 2e3 for cost in costs]
        blocks.append([window(cost, joules) for cost, joules in zip(costs, energies, strict=True)])
    return Blocks(blocks, blocks, idle_w)


def compared(base, head, method="modelled"):
    return compare(base, head, method, "package", two_processes=True)


def limits(**asked):
    return GateFile.model_validate({"limits": asked}).limits


def checks(found, scored=None, /, **asked):
    return judge(limits(**asked), found, scored, "no labels")


def test_what_the_machine_does_to_both_sides_cancels():
    weather = np.exp(np.random.default_rng(0).normal(0, 0.5, BLOCKS))
    found = compared(subject(1.0, 1, weather=weather), subject(1.1, 2, weather=weather))["cpu_s_per_inference"]
    assert found.ratio.low < 1.1 < found.ratio.high
    assert found.ratio.high / found.ratio.low < 1.04
    assert found.head / found.base == pytest.approx(found.ratio.value)
    assert found.n == BLOCKS


def test_throughput_goes_the_other_way_and_energy_follows_its_windows():
    found = compared(subject(1.0, 1, watts=10.0), subject(1.25, 2, watts=10.0), "counter")
    assert found["throughput_per_s"].ratio.value == pytest.approx(0.8, rel=0.02)
    assert found["energy_j_per_inference"].ratio.value == pytest.approx(1.25, rel=0.02)
    assert found["throughput_per_watt"].ratio.value == pytest.approx(0.8, rel=0.02)
    assert found["energy_j_per_inference"].base == pytest.approx(10.0 * 1.0 / 2e3, rel=0.02)
    assert found["power_w"].ratio.value == pytest.approx(1.0, rel=1e-6)
    assert found["power_w"].method == "counter"
    assert found["cpu_s_per_inference"].method is None


def test_energy_above_idle_takes_off_what_the_machine_draws_anyway():
    blocks = subject(1.0, 1, watts=10.0, idle_w=6.0)
    gross, above = (
        subject_figure(name, blocks)[0] for name in ("energy_j_per_inference", "energy_above_idle_j_per_inference")
    )
    assert above / gross == pytest.approx(0.4)
    assert subject_figure("energy_above_idle_j_per_inference", subject(1.0, 1, watts=10.0))[0] is None


def test_missing_energy_is_none_and_never_zero():
    found = compared(subject(1.0, 1), subject(1.1, 2))
    for name in ("energy_j_per_inference", "throughput_per_watt", "power_w", "energy_above_idle_j_per_inference"):
        assert (found[name].base, found[name].head, found[name].ratio.value, found[name].floor) == (None,) * 4


def test_two_processes_of_one_model_give_the_noise_floor():
    quiet, unlike = subject(1.0, 1), subject(1.0, 1, processes=(1.0, 1.08))
    assert noise_floor("cpu_s_per_inference", quiet) < 0.02
    # The two differ by 8 %; a mean of two has √2 less of that.
    assert 0.077 / math.sqrt(2) < noise_floor("cpu_s_per_inference", unlike) < 0.1 / math.sqrt(2)
    alone = Blocks([block[:1] for block in quiet.short], quiet.energy)
    assert noise_floor("cpu_s_per_inference", alone) is None


def test_without_a_noise_floor_or_an_interval_nothing_fails():
    by_cpu = {"cpu_s_per_inference": {"max_increase": "5%"}}
    base, head = subject(1.0, 1), subject(1.5, 2)
    one_process = compare(base, head, "modelled", "package", two_processes=False)
    check = checks(one_process, **by_cpu)[0]
    assert check.verdict == "inconclusive" and "noise is not known" in check.reason
    assert (
        checks(compare(base, subject(1.0, 2), "modelled", "package", two_processes=False), **by_cpu)[0].verdict
        == "pass"
    )
    one_block = compared(Blocks(base.short[:1], base.energy[:1]), Blocks(head.short[:1], head.energy[:1]))
    check = checks(one_block, **by_cpu)[0]
    assert check.verdict == "inconclusive" and "too few blocks" in check.reason
    assert checks(one_block, throughput_per_s={"min": 1e9})[0].verdict == "inconclusive"


def test_latency_percentiles_are_over_all_calls():
    slow = subject(1.0, 1, noise=0.0)
    for block in slow.short[:10]:
        block[0].latencies_ms[:] = [5.0] * 20
    assert subject_figure("latency_p99_ms", slow)[0] == 5.0
    assert subject_figure("latency_p50_ms", slow)[0] == 0.5


def test_a_slower_head_fails_an_equal_one_passes_a_noisy_one_is_inconclusive():
    by_cpu = {"cpu_s_per_inference": {"max_increase": "5%"}}
    slower = checks(compared(subject(1.0, 1), subject(1.1, 2)), **by_cpu)
    equal = checks(compared(subject(1.0, 1), subject(1.0, 2)), **by_cpu)
    noisy = checks(compared(subject(1.0, 1, noise=0.5), subject(1.05, 2, noise=0.5)), **by_cpu)
    assert [c[0].verdict for c in (slower, equal, noisy)] == ["fail", "pass", "inconclusive"]
    assert "×" in slower[0].reason and slower[0].limit == "at most 5 % more"


def test_a_difference_that_two_processes_of_one_model_show_too_does_not_fail():
    unlike = {"processes": (1.0, 1.2)}
    found = compared(subject(1.0, 1, **unlike), subject(1.1, 2, **unlike))
    check = checks(found, cpu_s_per_inference={"max_increase": "5%"})[0]
    assert check.verdict == "inconclusive"
    assert "two processes of the same model differ" in check.reason


def test_modelled_joules_never_decide_cpu_seconds_do():
    # By joules the head is worse, by CPU seconds it is not.
    found = compared(subject(1.0, 1, watts=10.0), subject(1.0, 2, watts=14.0))
    check = checks(found, throughput_per_watt={"max_decrease": "5%"})[0]
    assert (check.verdict, check.decided_by) == ("pass", "cpu_s_per_inference")
    assert (
        checks(
            compared(subject(1.0, 1, watts=10), subject(1.2, 2, watts=10)),
            energy_j_per_inference={"max_increase": "5%"},
        )[0].verdict
        == "fail"
    )
    for kind in ({"max": 1.0}, {"min": 0.1}):
        assert checks(found, energy_j_per_inference=kind)[0].verdict == "inconclusive"
    assert checks(found, power_w={"max_increase": "5%"})[0].verdict == "inconclusive"


def test_counted_joules_do_decide():
    found = compared(subject(1.0, 1, watts=10.0), subject(1.0, 2, watts=14.0), "counter")
    check = checks(found, throughput_per_watt={"max_decrease": "5%"})[0]
    assert (check.verdict, check.decided_by) == ("fail", None)


def test_absolute_limits_are_judged_on_the_heads_interval():
    found = compared(subject(1.0, 1), subject(1.0, 2))
    assert checks(found, latency_p50_ms={"max": 0.7})[0].verdict == "pass"
    assert checks(found, latency_p50_ms={"max": "0.3ms"})[0].verdict == "fail"
    assert checks(found, throughput_per_s={"min": 1990})[0].verdict == "inconclusive"


def test_sizes_are_exact():
    found = {"size_bytes": exact_figure("size_bytes", 1000.0, 1060.0)}
    assert checks(found, size_bytes={"max_increase": "5%"})[0].verdict == "fail"
    assert checks(found, size_bytes={"max_increase": "6%"})[0].verdict == "pass"
    assert checks(found, size_bytes={"max": "1KB"})[0].verdict == "fail"
    assert (
        checks({"size_bytes": exact_figure("size_bytes", None, None)}, size_bytes={"max": 5})[0].verdict
        == "inconclusive"
    )


def test_the_same_files_hold_every_limit_against_the_base_whatever_the_noise():
    found = compared(subject(1.0, 1), subject(1.2, 2))
    asked = limits(cpu_s_per_inference={"max_increase": "5%", "max": 1e-6})
    apart = judge(asked, found, None, "")
    assert [check.verdict for check in apart] == ["fail", "fail"]
    relative, absolute = judge(asked, found, None, "", identical=True)
    assert (relative.verdict, relative.reason) == ("pass", "both sides are the same files, run in the same way")
    assert absolute.verdict == "fail"


def accuracy(drop, lost=9, gained=1, p=0.02):
    return ComparedAccuracy(metric="top1", unit="fraction", n=1000, base=0.9, head=0.9 - drop / 100, drop=drop, low=-1.0,
                            high=2.0, flips_lost=lost, flips_gained=gained, p_value=p)  # fmt: skip


def test_accuracy_is_judged_on_budget_and_flips():
    asked = {"accuracy": {"max_drop": 0.5}}
    assert checks({}, accuracy(0.4), **asked)[0].verdict == "pass"
    assert checks({}, accuracy(0.8), **asked)[0].verdict == "fail"
    assert checks({}, accuracy(0.8, 20, 12, 0.2), **asked)[0].verdict == "inconclusive"
    broken = judge(limits(**asked), {}, None, "not finite", "fail")[0]
    assert (broken.verdict, broken.reason) == ("fail", "not finite")
    none = checks({}, None, **asked)[0]
    assert (none.verdict, none.reason) == ("inconclusive", "no labels")
    assert checks({}, accuracy(0.4), accuracy={"min": "89%"})[0].verdict == "pass"
    assert checks({}, accuracy(0.4), accuracy={"min": 0.9})[0].verdict == "fail"


def test_the_worst_verdict_is_the_gates():
    found = {"size_bytes": exact_figure("size_bytes", 1000.0, 1060.0)}
    failed = checks(found, size_bytes={"max_increase": "5%"})
    passed = checks(found, size_bytes={"max": "1MB"})
    unknown = checks(found, accuracy={"max_drop": 1})
    assert verdict_of([*passed, *unknown, *failed]) == "fail"
    assert verdict_of([*passed, *unknown]) == "inconclusive"
    assert verdict_of(passed) == "pass"
