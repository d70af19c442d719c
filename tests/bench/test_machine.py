"""Facts and counters of the machine: read from a tree that the test writes where the real one depends on the machine."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench import machine
from perwatt.bench.machine import TICK_S, Ticks, disturbance, facts, ticks
from perwatt.measurement import Window


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPU = "sys/devices/system/cpu"
SERVER = {
    "proc/stat": "cpu  1000 200 300 5000 400 10 20 70 999 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu hypervisor avx2\ncpu MHz\t\t: 2100.000\n\n"
    "processor\t: 1\nmodel name\t: Some CPU\nflags\t\t: fpu hypervisor avx2\ncpu MHz\t\t: 2600.500\n",
    "proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\n",
    "proc/loadavg": "0.50 0.25 0.10 1/100 1234\n",
    "proc/sys/kernel/osrelease": "6.1.0-test\n",
    "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-1,6\n",
    "proc/self/cgroup": "0::/outer/inner\n",
    "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
    "sys/fs/cgroup/outer/inner/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 4\nthrottled_usec 7\n",
    f"{CPU}/online": "0-3,6\n",
    f"{CPU}/intel_pstate/no_turbo": "0\n",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave\n",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "performance\n",
    f"{CPU}/cpu0/cpufreq/scaling_driver": "intel_pstate\n",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
    f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "3200000\n",
    f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "3900000\n",
    f"{CPU}/cpu0/cpufreq/scaling_max_freq": "3500000\n",
    f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "3\n",
    f"{CPU}/cpu1/thermal_throttle/package_throttle_count": "2\n",
    "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone0/temp": "61000\n",
    "sys/class/hwmon/hwmon1/name": "coretemp\n",
    "sys/class/hwmon/hwmon1/temp2_input": "58500\n",
    "sys/class/hwmon/hwmon1/temp2_label": "Core 0\n",
    "sys/class/hwmon/hwmon1/temp3_input": "not a number\n",
}


def test_counters_of_a_synthetic_stat_sum_all_kinds_of_work_and_leave_guest_time_out(tmp_path):
    found = ticks(tree(tmp_path, SERVER))
    # Guest time (999) is part of user time already.
    assert found == Ticks(pytest.approx(1530 * TICK_S), pytest.approx(70 * TICK_S), pytest.approx(5400 * TICK_S))


def test_what_was_counted_since():
    assert Ticks(9.0, 2.0, 30.0).since(Ticks(4.0, 2.0, 10.0)) == Ticks(5.0, 0.0, 20.0)


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n"])
def test_no_counters_in_a_synthetic_tree_are_none(tmp_path, text):
    assert ticks(tree(tmp_path, {} if text is None else {"proc/stat": text})) is None


@pytest.mark.skipif(ticks() is None, reason="no /proc/stat here")
def test_work_of_this_process_shows_in_this_machines_counters():
    before = ticks()
    # As long as it takes: counters move in steps.
    while ticks().since(before).busy_s <= 0.0:
        math.factorial(2000)
    passed = ticks().since(before)
    assert passed.busy_s > 0 and passed.steal_s >= 0 and passed.idle_s >= 0


def test_facts_of_a_synthetic_server(tmp_path):
    found = facts(tree(tmp_path, SERVER))
    assert found == {
        "processor": "Some CPU",
        "cpus_online": 5,
        "cpus_allowed": 3,
        "memory_bytes": 16_000_000 * 1024,
        "virtualised": True,
        "kernel": "6.1.0-test",
        "load_average": [0.5, 0.25, 0.1],
        "governor": "performance, powersave",
        "scaling_driver": "intel_pstate",
        "frequency_mhz": {"lowest": 1800.0, "highest": 3200.0, "max": 3900.0, "allowed_max": 3500.0, "from": "cpufreq"},
        "turbo": True,
        "temperatures_c": {"coretemp Core 0": 58.5, "x86_pkg_temp": 61.0},
        "throttle_count": 5,
        "cpu_limit": 1.5,
        "cgroup_throttled": 4,
    }
    json.dumps(found)


def test_a_synthetic_virtual_machine_without_cpufreq_says_where_its_frequencies_are_from(tmp_path):
    files = {name: text for name, text in SERVER.items() if "cpufreq" not in name}
    found = facts(tree(tmp_path, files))["frequency_mhz"]
    assert (found["lowest"], found["highest"], found["max"], found["from"]) == (2100.0, 2600.5, None, "/proc/cpuinfo")


def test_an_empty_tree_has_no_facts_and_no_error(tmp_path):
    assert set(facts(tmp_path).values()) == {None}


@pytest.mark.parametrize(("name", "said", "turbo"), [
    ("intel_pstate/no_turbo", "1", False), ("cpufreq/boost", "1", True), ("cpufreq/boost", "0", False),
])  # fmt: skip
def test_turbo_in_a_synthetic_tree(tmp_path, name, said, turbo):
    assert facts(tree(tmp_path, {f"{CPU}/{name}": said}))["turbo"] is turbo


def test_a_container_whose_own_path_is_hidden_reads_the_limit_at_the_top_of_a_synthetic_tree(tmp_path):
    files = {"proc/self/cgroup": "0::/not/mounted/here\n", "sys/fs/cgroup/cpu.max": "50000 100000"}
    assert machine.cpu_limit(tree(tmp_path, files)) == 0.5


def test_the_tightest_limit_counts_in_a_synthetic_tree(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
    }  # fmt: skip
    assert machine.cpu_limit(tree(tmp_path, files)) == 1.0


def test_a_processor_without_flags_does_not_say_whether_it_is_virtual(tmp_path):
    assert machine.virtualised(tree(tmp_path, {"proc/cpuinfo": "Features\t: asimd\n"})) is None
    assert machine.virtualised(tree(tmp_path, {"proc/cpuinfo": "flags\t: fpu avx2\n"})) is False


def test_this_machine_is_read_without_an_error():
    found = facts()
    assert found["cpus_online"] is None or found["cpus_online"] >= 1
    json.dumps(found)


# Disturbance ----------------------------------------------------------------------------------------------------------


def windows(n=100, steal=0.0, other=0.0):
    """Half a second of two busy CPUs each; shares of that time."""
    return [Window(100, 0.5, 1.0, steal_s=steal, other_cpu_s=other) for _ in range(n)]


def test_a_quiet_run_is_not_disturbed():
    assert disturbance(windows(steal=0.01, other=0.05), 2, {"throttle_count": 4}, {"throttle_count": 4}) == []


def test_steal_disturbs_and_is_told_in_percent():
    (reason,) = disturbance(windows(steal=0.05), 2)
    assert "steal" in reason and "5 %" in reason


def test_other_processes_disturb_and_are_told_in_percent():
    (reason,) = disturbance(windows(other=0.25), 2)
    assert "other processes" in reason and "25 %" in reason


@pytest.mark.parametrize(("key", "word"), [("throttle_count", "temperature"), ("cgroup_throttled", "CPU limit")])
def test_throttling_during_the_run_disturbs(key, word):
    (reason,) = disturbance([], 2, {key: 4}, {key: 5})
    assert word in reason


def test_throttling_that_is_not_told_on_both_ends_is_not_claimed():
    assert disturbance([], 2, {"throttle_count": None}, {"throttle_count": 5}) == []
    assert disturbance([], 2, None, {"throttle_count": 5}) == []


def test_a_system_that_says_nothing_is_not_called_disturbed():
    assert disturbance([Window(1, 0.5, 1.0)], 2) == []


def test_one_tick_in_one_short_window_is_no_disturbance_but_many_such_windows_are():
    short = Window(10, 0.05, 0.1, steal_s=TICK_S, other_cpu_s=2 * TICK_S)
    assert disturbance([short], 2) == []
    assert len(disturbance([short] * 400, 2)) == 2


def test_negative_differences_of_short_windows_cancel():
    noisy = [Window(10, 0.05, 0.1, other_cpu_s=x) for x in (0.05, -0.05)] * 200
    assert disturbance(noisy, 2) == []


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(-0.1, 0.5)), max_size=30), st.floats(0.0, 0.5))
def test_more_steal_never_makes_a_run_quieter(pairs, more):
    some = [Window(1, 0.5, 1.0, steal_s=s, other_cpu_s=o) for s, o in pairs]
    worse = [Window(1, 0.5, 1.0, steal_s=s + more, other_cpu_s=o) for s, o in pairs]
    assert len(disturbance(worse, 2)) >= len(disturbance(some, 2))
