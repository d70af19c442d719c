"""The doctor: what is here, what is missing and what mends it; scripted targets and machines, and the real ones here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from perwatt import doctor, doctor_words, registry
from perwatt.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from runs import assert_one_line_error, optimize, package

SCRIPTED = """
from perwatt.contract import Capabilities, Target


class Scripted(Target):
    \"\"\"A scripted target with devices.\"\"\"

    variants = ("", "gpu", "npu", "broken")
    serves = {"cpu": "", "gpu": "gpu"}

    def missing(self):
        if self.variant == "broken":
            import os
            os._exit(7)
        return ["no driver: install it"] if self.variant else []

    def capabilities(self):
        return Capabilities(floating_precisions=("f32", "bf16"), channel_multiples={"int8": 64})

    def knobs(self, point):
        return {"threads": (1, None)} if point.scenario == "single-stream" else {"batch": (1, 32)}

    def lower(self, artifact, point):
        raise NotImplementedError

    def versions(self):
        return {"scripted": "1.0"}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with no earlier probe, and the scripted target to be found there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package(tmp_path, "targets", "scripted", SCRIPTED)


def test_every_target_is_told_with_its_variants_and_what_is_missing(elsewhere: Path) -> None:
    done = optimize("targets", "--json", cwd=elsewhere, path=elsewhere)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    entries = {entry["name"]: entry for entry in found["targets"]}
    assert {"null", "openvino", "scripted"} <= set(entries)
    assert entries["null"]["variants"][0]["missing"] == [] and entries["null"]["package"] == "perwatt"
    ours = {variant["name"]: variant for variant in entries["scripted"]["variants"]}
    assert list(ours) == ["scripted", "scripted:gpu", "scripted:npu", "scripted:broken"]
    assert ours["scripted"]["missing"] == [] and ours["scripted"]["versions"] == {"scripted": "1.0"}
    assert ours["scripted:gpu"]["missing"] == ["no driver: install it"] and ours["scripted:gpu"]["capabilities"] is None
    assert "exit code 7" in ours["scripted:broken"]["missing"][0]
    assert "scripted" in found["aliases"]["cpu"]["usable"] and "scripted:gpu" in found["aliases"]["gpu"]["missing"]
    assert (
        found["probe"] is None and found["machine"]["cpus"] >= 1 and set(found["meters"]) == {"cpu", "gpu", "missing"}
    )


def test_the_page_folds_what_misses_the_same_and_says_what_mends_it(elsewhere: Path) -> None:
    text = optimize("targets", cwd=elsewhere, path=elsewhere).stdout
    assert "✓ scripted by scripted (scripted 1.0, serves cpu)" in text
    words = " ".join(text.split())
    assert "not here: scripted:gpu, scripted:npu (install it); scripted:broken (" in words
    assert "optimize targets --probe" in text
    for title in ("Targets", "Machine", "Energy", "What the hardware rewards"):
        assert f"\n{title}\n" in f"\n{text}"


def test_one_targets_page_has_its_knobs_and_styles_and_ends_with_4_where_it_is_missing(elsewhere: Path) -> None:
    page = optimize("targets", "scripted", cwd=elsewhere, path=elsewhere)
    assert page.returncode == 0 and "single-stream: threads 1, None" in page.stdout
    assert "offline: batch 1, 32" in page.stdout and "scripted:npu" in page.stdout
    missing = optimize("targets", "scripted:gpu", cwd=elsewhere, path=elsewhere)
    assert missing.returncode == 4 and "no driver: install it" in missing.stdout and missing.stderr == ""
    crashed = optimize("targets", "scripted:broken", "--json", cwd=elsewhere, path=elsewhere)
    assert crashed.returncode == 4 and "exit code 7" in json.loads(crashed.stdout)["missing"][0]
    assert_one_line_error(optimize("targets", "scriptd", cwd=elsewhere, path=elsewhere), 2, "scripted")
    assert_one_line_error(optimize("targets", "scripted:tpu", cwd=elsewhere, path=elsewhere), 2, "scripted:npu")
    both = optimize("targets", "scripted", "--probe", cwd=elsewhere, path=elsewhere)
    assert_one_line_error(both, 2, "leave the name out")


def test_a_broken_package_is_an_entry_with_the_reason(tmp_path: Path) -> None:
    package(tmp_path, "targets", "broken", "import nothing_of_that_name\nclass Broken(object): pass\n")
    done = optimize("targets", "--json", cwd=tmp_path, path=tmp_path)
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)["targets"]}
    assert done.returncode == 0 and "nothing_of_that_name" in entries["broken"]["variants"][0]["missing"][0]


def test_an_alias_gives_the_page_of_each_that_serves_it() -> None:
    pages = doctor.one("cpu")
    assert [page["name"] for page in pages] == registry.serving("cpu")
    openvino = next(page for page in pages if page["name"] == "openvino")
    assert openvino["serves"] == ["cpu"] and openvino["formats"] == [".xml"] and openvino["missing"] == []
    assert "symmetric int8 activations, int8 weights per channel" in doctor_words.target_page(openvino)
    with pytest.raises(InputError, match="openvino"):
        doctor.one("openvin")


def test_meters_say_which_would_measure_and_why_others_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERWATT_METER", raising=False)
    found = doctor.meters()
    assert set(found["missing"]) == {"rapl", "rapl:psys", "nvml", "modelled"}
    if found["cpu"]["name"] is not None:
        assert found["missing"][found["cpu"]["name"]] == []
    assert (found["gpu"]["name"] is None) == bool(found["missing"]["nvml"])
    monkeypatch.setenv("PERWATT_METER", "walll:x")
    assert "walll:x" in doctor.meters()["cpu"]["notes"][0]


# Words on scripted findings -------------------------------------------------------------------------------------------


PAIR = {"cpus": [0, 1], "siblings": None, "throughput": 1.05, "throughput_range": [0.9, 1.2], "cpu_s": 1.9}
PROBED = {
    "date": "2026-01-02 03:04:05+0000",
    "versions": {"openvino": "1.0"},
    "arithmetic": {
        "int8": {"one_tops": 2.0, "all_tops": 2.1, "cpus": 2, "kernels": ["amx_i8"], "share": 0.6, "pair": PAIR}
    },
    "channels": {"matmul": {"int8": {"multiple": 64}, "f32": {"multiple": None}}},
    "gpu": {"name": "Scripted GPU", "tops": {"float16": 700.4}, "refused": {"float8": "not here"}},
}
MACHINE = {
    "name": "Scripted CPU", "virtualised": True, "isa": [], "cpus": 8, "cpus_allowed": 4, "cpu_limit": 2.5,
    "threads_per_core": 2, "memory_gib": None,
    "gpus": [{"name": "Scripted GPU", "compute_capability": None, "memory_bytes": 80 * 2**30, "driver": None}],
}  # fmt: skip


def test_a_probe_is_told_with_its_date_and_unknown_multiples_as_none() -> None:
    text = " ".join(" ".join(doctor_words.probed(PROBED)).split())
    for words in (
        "measured 2026-01-02 03:04:05+0000 with openvino 1.0",
        "2.00 tera-operations a CPU second on one thread, 2.10 on 2 CPUs (amx_i8)",
        "CPUs 0 and 1 together: 1.05 × one (0.90 to 1.20), 1.90 × the CPU time for an operation",
        "disturbed by other processes: the threads ran 60 % of the time",
        "matmul: 64 in int8, none in f32",
        "float16 700",
        "float8: refused: not here",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("throughput", "words"), [(1.1, "brings little"), (1.5, "brings something"), (1.95, "units of its own")]
)
def test_a_second_thread_is_judged_by_what_it_brings(throughput: float, words: str) -> None:
    assert words in doctor_words.second_thread({**PAIR, "throughput": throughput})


def test_a_scripted_machine_is_told_as_far_as_it_says() -> None:
    text = " ".join(" ".join(doctor_words._machine(MACHINE)).split())
    for words in (
        "Scripted CPU (virtual machine)",
        "8 online, 4 may be used, limited to 2.5 by the container, 2 threads a core as the hypervisor tells it",
        "memory unknown",
        "Scripted GPU, compute capability unknown, 80 GiB, driver unknown",
    ):
        assert words in text


def test_an_alias_without_anything_usable_says_what_would_serve_it() -> None:
    assert doctor_words._alias({"usable": [], "missing": []}) == "nothing"
    assert "tensorrt" in doctor_words._alias({"usable": [], "missing": ["tensorrt"]})
    assert "measuring decides" in doctor_words._alias({"usable": ["a", "b"], "missing": []})
