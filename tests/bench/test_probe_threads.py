"""Peaks and a second thread: measured on this machine, CPUs that share a core on scripted folders."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench import probe_threads
from perwatt.bench.probe_threads import allowed, measure, numbers, pair_of


def topology(root, **siblings):
    for cpu, spans in siblings.items():
        folder = root / f"sys/devices/system/cpu/{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(spans + "\n")


def test_siblings_are_compared_where_the_system_tells_them(tmp_path):
    topology(tmp_path, cpu0="0", cpu1="1,5", cpu5="1,5")
    assert pair_of([0, 1, 5], tmp_path) == ([1, 5], True)


def test_a_sibling_that_may_not_be_used_is_none(tmp_path):
    topology(tmp_path, cpu0="0-1", cpu2="2-3")
    assert pair_of([0, 2], tmp_path) == ([0, 2], False)


def test_where_nothing_is_told_the_first_two_are_compared(tmp_path):
    assert pair_of([3, 4, 5], tmp_path) == ([3, 4], None)


def test_one_cpu_has_no_pair(tmp_path):
    topology(tmp_path, cpu0="0-1")
    assert pair_of([0], tmp_path) == ([], False)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_numbers_are_read_from_spans(wanted):
    ordered = sorted(wanted)
    assert numbers(",".join(map(str, ordered))) == ordered
    assert numbers(f"{ordered[0]}-{ordered[0] + 3},900") == [*range(ordered[0], ordered[0] + 4), 900]


def test_this_machine_reaches_something_and_the_pair_is_told(monkeypatch):
    monkeypatch.setattr(probe_threads, "SLICE_S", 0.01)
    monkeypatch.setattr(probe_threads, "ROUNDS", 2)
    affinity = os.sched_getaffinity(0)
    said = []
    (facts,) = measure(["f32"], said.append).values()
    assert said == ["arithmetic: f32"]
    assert 0 < facts["one_tops"] <= facts["all_tops"] < 1000 and facts["cpus"] == len(allowed())
    assert os.sched_getaffinity(0) == affinity, "only the probe's own threads are bound"
    if len(allowed()) == 1:
        assert facts["pair"] is None
        return
    low, high = facts["pair"]["throughput_range"]
    assert 0 < facts["share"] <= 1.05
    assert 0 < low <= facts["pair"]["throughput"] <= high and facts["pair"]["cpu_s"] > 0


def test_a_single_cpu_is_measured_without_a_pair(monkeypatch):
    monkeypatch.setattr(probe_threads, "SLICE_S", 0.01)
    monkeypatch.setattr(probe_threads, "ROUNDS", 1)
    first = allowed()[:1]
    monkeypatch.setattr(probe_threads, "allowed", lambda: first)
    (facts,) = measure(["f32"]).values()
    assert facts["pair"] is None and facts["cpus"] == 1 and facts["all_tops"] == pytest.approx(facts["one_tops"])
