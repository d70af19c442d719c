"""The fingerprint: what decides speed is in it, what changes by itself is not."""

import json
import stat

import pytest

from perwatt.bench.fingerprint import difference, digest, fingerprint, gpu_names, isa, memory_gib, same
from perwatt.bench.modelled import Processor

SAPPHIRE_RAPIDS = Processor("GenuineIntel", 6, 143, "Some Xeon")
BLOCKS = "sys/devices/system/memory"
SERVER = {
    "proc/cpuinfo": "stepping\t: 8\nflags\t\t: fpu avx2 fma avx512f amx_tile amx_int8 constant_tsc\ncpu MHz\t: 2100.0\n",
    "proc/meminfo": "MemTotal:       3900000 kB\n",
    "proc/sys/kernel/osrelease": "6.1.0\n",
    "proc/self/status": "Cpus_allowed_list:\t0-3\n",
    "proc/loadavg": "0.1 0.1 0.1 1/2 3\n",
    "sys/devices/system/cpu/online": "0-3\n",
    "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0,2\n",
    f"{BLOCKS}/block_size_bytes": "80000000\n",
    f"{BLOCKS}/memory0/online": "1\n",
    f"{BLOCKS}/memory1/online": "1\n",
    f"{BLOCKS}/memory2/online": "0\n",
}


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def no_driver(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def taken(tmp_path, name="server", **changes):
    files = {**SERVER, **{key.replace("__", "/"): value for key, value in changes.items()}}
    return fingerprint(tree(tmp_path / name, files), SAPPHIRE_RAPIDS)


def test_a_synthetic_server_has_what_decides_speed(tmp_path):
    found = taken(tmp_path)
    assert found == {
        "vendor": "GenuineIntel", "family": 6, "model": 143, "stepping": 8, "name": "Some Xeon",
        "cpus": 4, "cpus_allowed": 4, "threads_per_core": 2, "memory_gib": 4,
        "isa": ["avx2", "fma", "avx512f", "amx_tile", "amx_int8"], "gpus": [], "cpu_limit": None,
    }  # fmt: skip
    json.dumps(found)


def test_another_kernel_frequency_load_and_rest_of_memory_is_the_same_machine(tmp_path):
    again = tree(tmp_path / "again", SERVER)
    tree(again, {
        "proc/cpuinfo": "stepping\t: 8\nflags\t\t: avx2 amx_tile new_flag fma fpu avx512f amx_int8\ncpu MHz\t: 3400.0\n",
        "proc/meminfo": "MemTotal:       3200000 kB\n",
        "proc/sys/kernel/osrelease": "7.2.0\n",
        "proc/loadavg": "9 9 9 1/2 3\n",
    })  # fmt: skip
    first, second = taken(tmp_path), fingerprint(again, SAPPHIRE_RAPIDS)
    assert same(first, second) and digest(first) == digest(second)


def test_a_digest_is_twelve_hexadecimal_digits_whatever_the_order_of_keys(tmp_path):
    found = taken(tmp_path)
    assert len(digest(found)) == 12 and int(digest(found), 16) >= 0
    assert digest(dict(reversed(found.items()))) == digest(found)
    assert digest(json.loads(json.dumps(found))) == digest(found)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("cpus", 8, "CPUs online: 4 became 8"),
    ("cpu_limit", 1.5, "CPU limit of the container: none became 1.5"),
    ("gpus", ["NVIDIA A10"], "graphics processors: none became NVIDIA A10"),
    ("isa", ["avx2", "fma", "avx512f", "f16c"], "instruction sets: without amx_tile, amx_int8 and with f16c"),
    ("stepping", None, "processor stepping: 8 became unknown"),
])  # fmt: skip
def test_a_difference_is_told_in_words_and_changes_the_digest(tmp_path, key, value, words):
    first = taken(tmp_path)
    second = {**first, key: value}
    assert difference(first, second) == [words]
    assert not same(first, second) and digest(first) != digest(second)


def test_equal_machines_have_no_difference(tmp_path):
    assert difference(taken(tmp_path, "a"), taken(tmp_path, "b")) == []


def test_a_fact_that_only_one_side_has_is_a_difference(tmp_path):
    found = taken(tmp_path)
    older = {key: value for key, value in found.items() if key != "threads_per_core"}
    assert difference(older, found) == ["threads per core: unknown became 2"]


def test_memory_without_blocks_is_rounded_from_what_the_kernel_has_in_a_synthetic_tree(tmp_path):
    assert memory_gib(tree(tmp_path, {"proc/meminfo": "MemTotal:       24731272 kB\n"})) == 24
    assert memory_gib(tmp_path / "nothing") is None


def test_instruction_sets_of_a_synthetic_arm_processor(tmp_path):
    root = tree(tmp_path, {"proc/cpuinfo": "BogoMIPS\t: 50\nFeatures\t: fp asimd i8mm sve crc32\n"})
    assert isa(root) == ["asimd", "i8mm", "sve"]


def driver(tmp_path, monkeypatch, script):
    gpu_names.cache_clear()
    folder = tmp_path / "driver"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + script)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_graphics_processors_as_a_scripted_driver_tool_lists_them(tmp_path, monkeypatch):
    driver(tmp_path, monkeypatch, '[ "$1" = --query-gpu=name ] && echo "NVIDIA B" && echo "NVIDIA A"\n')
    assert gpu_names() == ["NVIDIA A", "NVIDIA B"]


def test_a_scripted_driver_tool_that_fails_means_no_graphics_processor(tmp_path, monkeypatch):
    driver(tmp_path, monkeypatch, "echo NVIDIA-SMI has failed; exit 9\n")
    assert gpu_names() == []


def test_this_machine_has_the_same_digest_twice():
    assert digest(fingerprint()) == digest(fingerprint())
