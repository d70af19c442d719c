"""Answers of whole runs: what makes a key, and that a bundle comes back whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from perwatt import cache_keys, run_cache
from perwatt.bundle import LOCK, digest_of, write_json
from perwatt.compilation import resolve_steps
from perwatt.errors import InputError
from perwatt.options import build_recipe
from perwatt.run_cache import RunCache, open_run_cache, run_key

sys.path.insert(0, str(Path(__file__).parent))
from runs import conv_net

KEY, OTHER = "ab" * 32, "cd" * 32
MACHINE = {"name": "a processor", "cpus": 2}


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, samples, and code that makes networks and batches."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    np.savez(tmp_path / "samples.npz", x=np.zeros((4, 1, 8, 8), np.float32))
    (tmp_path / "data.py").write_text("def batches(): ...\n")
    return tmp_path


def key(machine: dict[str, Any] | None = MACHINE, facts: dict[str, Any] | None = None, **options: Any) -> str | None:
    recipe = build_recipe(None, **{"model": "net.onnx", "target": "null", "data": "samples.npz", **options})
    return run_key(recipe, resolve_steps(recipe), machine, **(facts or {}))


def test_the_same_run_has_the_same_key(here: Path) -> None:
    first = key()
    assert first == key() == key(model="./net.onnx", data=".//samples.npz")
    assert first is not None and len(first) == 64


def test_a_copy_elsewhere_is_the_same_run_where_the_recipe_finds_it_in_the_same_way(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key()
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(here, other / "deep")
    monkeypatch.chdir(other)
    # The bundle keeps the path as written, and a gate looks for the data there.
    assert key(model="deep/net.onnx", data="deep/samples.npz") != first
    monkeypatch.chdir(other / "deep")
    assert key() == first


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1}, {"max_drop": 0.5}, {"passes": "fold-batchnorm"}, {"target": "openvino"}, {"batch": 4},
        {"time": "5m"}, {"metric": "top5"}, {"max_samples": 2}, {"input": ["x:float32[n,1,8,8]"]}, {"trials": 3},
        {"facts": {"meter": "rapl"}}, {"machine": {"name": "another"}}, {"machine": None},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_the_machine_and_what_else_is_told_count(here: Path, options: dict[str, Any]) -> None:
    assert key(**options) != key()


def test_the_content_of_model_and_data_counts(here: Path) -> None:
    found = [key()]
    np.savez(here / "samples.npz", x=np.ones((4, 1, 8, 8), np.float32))
    found.append(key())
    (here / "net.onnx").write_bytes(conv_net(seed=1).SerializeToString())
    found.append(key())
    assert len(set(found)) == 3


@pytest.mark.parametrize("role", ["data", "calibrate", "eval", "train", "confirm"])
def test_every_set_of_samples_counts(here: Path, role: str) -> None:
    np.savez(here / "other.npz", x=np.zeros((4, 1, 8, 8), np.float32))
    options: dict[str, Any] = {role: "other.npz"}
    if role != "data":
        options = {"data": None, "eval": "samples.npz", **options}
    first = key(**options)
    np.savez(here / "other.npz", x=np.ones((4, 1, 8, 8), np.float32))
    assert key(**options) != first


def test_a_folder_counts_by_names_and_contents(here: Path) -> None:
    (here / "pictures" / "cat").mkdir(parents=True)
    (here / "pictures" / "cat" / "1.png").write_bytes(b"1")
    found = [key(data="pictures")]
    (here / "pictures" / "cat" / "1.png").write_bytes(b"2")
    found.append(key(data="pictures"))
    (here / "pictures" / "cat").rename(here / "pictures" / "dog")
    found.append(key(data="pictures"))
    (here / "pictures" / "labels.csv").write_text("1.png,dog\n")
    found.append(key(data="pictures"))
    assert len(set(found)) == 4


@pytest.mark.parametrize("name", ["net.onnx.data", "n" * 127, "n" * 128, "n" * 200, "deep/weights.bin"])
def test_weights_beside_a_model_count_whatever_their_file_is_called(here: Path, name: str) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    onnx.save(
        conv_net(), str(here / "net.onnx"), save_as_external_data=True, location=name, size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    assert (here / name).stat().st_size > 0
    first = key()
    content = bytearray((here / name).read_bytes())
    content[3] ^= 1
    (here / name).write_bytes(content)
    assert key() != first


def test_bytes_that_look_like_the_name_of_a_file_harm_nobody(here: Path) -> None:
    model = (here / "net.onnx").read_bytes()
    for rest in (b"", b"\x05", b"\x05a\0bcd", b"\xff", b"\xff\xff" + b"x" * 300, b"\x03\xff\xfe\xfd"):
        (here / "net.onnx").write_bytes(model + run_cache.EXTERNAL + rest)
        assert key() is not None
    (here / "net.onnx").write_bytes(b"")
    assert key() is not None


def test_what_is_missing_is_for_the_run_to_say(here: Path) -> None:
    assert key(data="nowhere.npz") is not None
    assert key(data="nowhere.npz") != key()


def test_what_can_not_be_read_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_cache, "digest_files", refuse)
    with pytest.raises(InputError, match=r"can't read net\.onnx: Permission denied"):
        key()


def test_steps_count_as_they_are_spelled_out(here: Path) -> None:
    recipe = build_recipe(None, model="net.onnx", target="null")
    steps = resolve_steps(recipe)
    assert run_key(recipe, steps, MACHINE) != run_key(recipe, steps[:-1], MACHINE)
    named = recipe.model_copy(update={"passes": steps})
    assert run_key(named, steps, MACHINE) == run_key(recipe, steps, MACHINE)


def test_variables_counters_and_the_fingerprint_of_this_machine_count(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = [key(machine=None)]
    monkeypatch.setattr(run_cache, "fingerprint", lambda: {"name": "another"})
    found.append(key(machine=None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found.append(key(machine=None))
    powercap = tmp_path_factory.mktemp("powercap")
    zone = powercap / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "1"), ("max_energy_range_uj", "2")):
        (zone / name).write_text(text)
    monkeypatch.setattr(run_cache, "POWERCAP", powercap)
    found.append(key(machine=None))
    # A counter that is there and may not be read counts nothing.
    monkeypatch.setattr(run_cache.os, "access", lambda *_: False)
    assert key(machine=None) == found[2]
    assert len(set(found)) == 4


def test_packages_and_perwatts_own_source_count(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key()
    monkeypatch.setattr(run_cache, "environment", lambda: {**cache_keys.environment(), "source": "another"})
    assert key() != first


# Code that the recipe names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"data": "data.py:batches"}, {"metric": "data.py:batches"}, {"arch": "data.py:batches"}, {"arch": "data:batches"},
     {"trust": True}],
    ids=str,
)  # fmt: skip
def test_where_code_is_named_the_python_files_that_it_may_import_count(here: Path, options: dict[str, Any]) -> None:
    (here / "layers").mkdir()
    (here / "layers" / "attention.py").write_text("HEADS = 4\n")
    found = [key(**options)]
    (here / "layers" / "attention.py").write_text("HEADS = 8\n")
    found.append(key(**options))
    (here / "data.py").write_text("def batches(): return []\n")
    found.append(key(**options))
    (here / "layers" / "attention.py").rename(here / "layers" / "other.py")
    found.append(key(**options))
    assert len(set(found)) == 4
    first = key()
    (here / "data.py").write_text("def batches(): return {}\n")
    assert key() == first, "nobody named it"


def test_what_is_not_imported_from_counts_for_nothing(here: Path) -> None:
    first = key(trust=True)
    for folder in (".git", "__pycache__", "venv", "node_modules"):
        (here / folder).mkdir()
        (here / folder / "module.py").write_text("A = 1\n")
    (here / "venv" / "pyvenv.cfg").write_text("")
    (here / "notes.txt").write_text("note")
    assert key(trust=True) == first


def test_a_package_that_is_installed_elsewhere_counts(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "zoo").mkdir()
    (site / "zoo" / "__init__.py").write_text("")
    (site / "single.py").write_text("def net(): ...\n")
    monkeypatch.syspath_prepend(str(site))
    for arch, file in (("zoo.nets:resnet", site / "zoo" / "nets.py"), ("single:net", site / "single.py")):
        first = key(arch=arch)
        file.write_text("def resnet(): ...\n")
        assert key(arch=arch) != first
    assert key(arch="no_such_package:net") is not None


def test_where_there_is_too_much_code_to_look_through_there_is_no_key(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_cache, "MOST_CODE", 3)
    for number in range(4):
        (here / f"module_{number}.py").write_text("")
    assert key(trust=True) is None
    assert key() is not None


# Bundles --------------------------------------------------------------------------------------------------------------


def bundle(path: Path, text: str = "first", size: int = 1000) -> Path:
    (path / "openvino" / "deep").mkdir(parents=True)
    (path / "empty").mkdir()
    (path / "openvino" / "deep" / "model.bin").write_bytes(random.Random(text).randbytes(size))
    (path / "build.sh").write_text("#!/bin/sh\n")
    (path / "build.sh").chmod(0o755)
    write_json(path / "program.json", {"target": text})
    write_json(path / "report.json", {"outcome": "optimized"})
    write_json(path / LOCK, {"model": {"name": "net"}})
    return path


@pytest.fixture
def cache(tmp_path: Path) -> RunCache:
    return RunCache(tmp_path / "runs")


def only_in(folder: Path, *names: str) -> bool:
    """Whether nothing else is there: no half entry, nothing aside."""
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_bundle_comes_back_as_it_was(cache: RunCache, tmp_path: Path) -> None:
    made = bundle(tmp_path / "made")
    assert cache.restore(KEY, tmp_path / "out") is None and cache.kept(KEY) is None
    assert cache.keep(KEY, made)
    again = RunCache(cache.folder).restore(KEY, tmp_path / "out")
    assert again is not None and again.path == tmp_path / "out" and again.outcome == "optimized"
    assert digest_of(again.path) == digest_of(made)
    assert os.access(again.path / "build.sh", os.X_OK) and (again.path / "empty").is_dir()
    kept = cache.kept(KEY)
    assert kept is not None and digest_of(kept) == digest_of(made)
    assert only_in(cache.folder, KEY)


def test_what_was_there_before_is_replaced_and_what_is_done_to_it_harms_no_entry(
    cache: RunCache, tmp_path: Path
) -> None:
    cache.keep(KEY, bundle(tmp_path / "made"))
    out = bundle(tmp_path / "out", "older")
    (out / "left-over").write_text("")
    for _ in range(2):
        again = cache.restore(KEY, out)
        assert again is not None and again.program == {"target": "first"}
        assert not (out / "left-over").exists()
        (out / "program.json").write_text("mine now")
    assert only_in(tmp_path, "made", "out", "runs")


def test_a_bundle_that_is_kept_again_takes_the_place_of_the_first(cache: RunCache, tmp_path: Path) -> None:
    for text in ("first", "second"):
        cache.keep(KEY, bundle(tmp_path / text, text))
    again = cache.restore(KEY, tmp_path / "out")
    assert again is not None and again.program == {"target": "second"}


@pytest.mark.parametrize(
    "harm",
    [
        lambda kept: (kept / "openvino" / "deep" / "model.bin").write_bytes(b"x" * 1000),
        lambda kept: (kept / "openvino" / "deep" / "model.bin").unlink(),
        lambda kept: (kept / "more").write_text(""),
        lambda kept: (kept / LOCK).unlink(),
        lambda kept: (kept.parent / "entry.json").unlink(),
        lambda kept: (kept.parent / "entry.json").write_text(""),
        lambda kept: (kept.parent / "entry.json").write_text("[]"),
        lambda kept: (kept.parent / "entry.json").write_text('{"sha256": null}'),
    ],
)
def test_a_damaged_entry_is_none_leaves_what_was_there_and_can_be_kept_anew(
    cache: RunCache, tmp_path: Path, harm
) -> None:
    made, out = bundle(tmp_path / "made"), bundle(tmp_path / "out", "older")
    cache.keep(KEY, made)
    before = digest_of(out)
    harm(cache.kept(KEY))
    assert cache.restore(KEY, out) is None
    assert digest_of(out) == before
    assert cache.kept(KEY) is None
    assert cache.keep(KEY, made) and cache.restore(KEY, out) is not None
    assert only_in(tmp_path, "made", "out", "runs")


def test_a_full_disk_costs_the_head_start_only(
    cache: RunCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle(tmp_path / "made")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_cache.shutil, "copy", full)
        assert not cache.keep(KEY, made)
    assert cache.kept(KEY) is None and only_in(cache.folder)
    (tmp_path / "file").write_text("")
    assert not RunCache(tmp_path / "file" / "runs").keep(KEY, made)
    cache.keep(KEY, made)
    # Where the answer itself has no room, that is the user's to mend, and the entry stays.
    with monkeypatch.context() as patched, pytest.raises(InputError, match="no room on the disk"):
        patched.setattr(run_cache.shutil, "copy", full)
        cache.restore(KEY, tmp_path / "out")
    assert cache.restore(KEY, tmp_path / "out") is not None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = RunCache(tmp_path / "runs", limit_bytes=35_000)
    for number in range(5):
        cache.keep(f"{number}", bundle(tmp_path / f"{number}", f"{number}", size=10_000))
        if number == 3:
            assert cache.restore("1", tmp_path / "out") is not None
        for entry in cache.folder.iterdir():
            told = entry.stat()
            os.utime(entry, (told.st_atime - 60, told.st_mtime - 60))
    assert only_in(cache.folder, "1", "3", "4")


def test_a_bundle_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = RunCache(tmp_path / "runs", limit_bytes=5_000)
    assert not cache.keep(KEY, bundle(tmp_path / "made", size=6_000))
    assert cache.keep(KEY, bundle(tmp_path / "small", size=1_000))


def test_what_is_no_entry_is_left_alone(tmp_path: Path) -> None:
    cache = RunCache(tmp_path / "runs", limit_bytes=25_000)
    cache.folder.mkdir()
    (cache.folder / "README").write_text("mine" * 10_000)
    (cache.folder / ".hidden").mkdir()
    for number in range(4):
        cache.keep(f"{number}", bundle(tmp_path / f"{number}", size=10_000))
    assert (cache.folder / "README").exists() and (cache.folder / ".hidden").exists()


def test_the_cache_of_the_user_lies_in_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = open_run_cache()
    assert cache is not None and cache.folder == tmp_path / "perwatt" / "runs"
    monkeypatch.setattr(run_cache, "cache_folder", lambda name: None)
    assert open_run_cache() is None


def test_a_large_bundle_is_there_in_well_under_five_seconds(cache: RunCache, tmp_path: Path) -> None:
    made = bundle(tmp_path / "made", size=100_000_000)
    cache.keep(KEY, made)
    start = time.perf_counter()
    assert cache.restore(KEY, tmp_path / "out") is not None
    assert time.perf_counter() - start < 4


def test_nothing_heavy_is_imported(here: Path) -> None:
    code = (
        "import sys\n"
        "from perwatt.options import build_recipe\n"
        "from perwatt.run_cache import open_run_cache, run_key\n"
        "recipe = build_recipe(None, model='net.onnx', data='samples.npz')\n"
        "assert open_run_cache().restore(run_key(recipe, []), 'out') is None\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True, cwd=here,
        env={**os.environ, "XDG_CACHE_HOME": str(here / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not {"torch", "onnx", "onnx_ir", "openvino", "onnxruntime", "nncf"} & set(json.loads(done.stdout))


# Several processes ----------------------------------------------------------------------------------------------------

KEEPER = """
import sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from perwatt.run_cache import RunCache

cache, made, out = RunCache(Path(sys.argv[1]), limit_bytes=3_000_000), Path(sys.argv[2]), Path(sys.argv[3])
print("begun", flush=True)
for turn in range(int(out.name.split("-")[1])):
    for name in ("first", "second"):
        cache.keep(name, made / name)
        again = cache.restore(name, out)
        assert again is None or again.program == {"target": name}, again.program
print("done", flush=True)
"""


def keeper(folder: Path, turns: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", KEEPER, folder / "runs", folder / "made", folder / f"out-{turns}"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


@pytest.fixture
def two(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    for name in ("first", "second"):
        bundle(tmp_path / "made" / name, name, size=1_000_000)
    return tmp_path


@pytest.mark.slow
def test_killed_at_any_moment_entries_and_answers_are_whole(two: Path) -> None:
    cache, chance = RunCache(two / "runs"), random.Random(0)
    for _ in range(6):
        process = keeper(two, 100_000)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        out = two / "out-100000"
        assert not out.exists() or digest_of(out) in [digest_of(two / "made" / n) for n in ("first", "second")]
        for name in ("first", "second"):
            again = cache.restore(name, two / "again")
            assert again is None or digest_of(again.path) == digest_of(two / "made" / name)
    assert cache.keep("first", two / "made" / "first")
    assert set(path.name for path in cache.folder.iterdir()) <= {"first", "second"}


@pytest.mark.slow
def test_several_processes_may_use_one_folder(two: Path) -> None:
    processes = [keeper(two, turns) for turns in (10, 11, 12)]
    for process in processes:
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and told == "done\n", errors
    cache = RunCache(two / "runs")
    assert cache.keep("first", two / "made" / "first") and cache.restore("first", two / "again") is not None
