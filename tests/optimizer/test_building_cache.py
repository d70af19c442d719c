"""The cache of bundles: what makes a key, what is kept, and that a damaged entry is none."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt import building_cache
from perwatt.building_cache import (
    Cache,
    default_folder,
    entry_name,
    external_weights,
    files_of,
    from_environment,
    intact,
    named_files,
    names_code,
    path_of,
    source_digest,
)
from perwatt.bundle import digest_of, write_json
from perwatt.errors import InputError
from perwatt.options import build_recipe

sys.path.insert(0, str(Path(__file__).parent))
from runs import conv_net

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a model, samples and code that reads them."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    np.savez(tmp_path / "samples.npz", x=np.zeros((4, 1, 8, 8), np.float32))
    (tmp_path / "data.py").write_text("def batches(): ...\n")
    return tmp_path


def name(here: Path, code: str = "tree", **options: object) -> str:
    recipe = build_recipe(None, **{"model": "net.onnx", "target": "null", "data": "samples.npz", **options})
    return entry_name(recipe, here, lambda: code)


def test_a_name_tells_model_and_target_and_ends_in_a_key(here: Path) -> None:
    assert re.fullmatch(r"net-null-[0-9a-f]{32}", name(here))
    assert name(here) == name(here)


def test_the_same_content_by_another_path_has_another_key(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "deep"
    shutil.copytree(here, other / "models")
    # The bundle keeps the path as written, and a gate looks for the data there: so the path counts, too.
    assert name(other, model="models/net.onnx", data="models/samples.npz") != name(here)
    same = tmp_path_factory.mktemp("same") / "deep"
    shutil.copytree(here, same)
    assert name(same) == name(here)


def test_every_input_and_every_setting_counts(here: Path) -> None:
    found = {name(here)}
    for options in ({"seed": 1}, {"max_drop": 0.5}, {"passes": "fold-batchnorm"}, {"target": "openvino"}, {"batch": 4}):
        found.add(name(here, **options))
    np.savez(here / "samples.npz", x=np.ones((4, 1, 8, 8), np.float32))
    found.add(name(here))
    (here / "net.onnx").write_bytes(conv_net(seed=1).SerializeToString())
    found.add(name(here))
    assert len(found) == 8


def test_the_default_pipeline_is_the_one_that_it_spells_out(here: Path) -> None:
    from perwatt.compilation import resolve_steps

    recipe = build_recipe(None, model="net.onnx", target="null")
    spelled = recipe.model_copy(update={"passes": resolve_steps(recipe)})
    assert entry_name(recipe, here, str) == entry_name(spelled, here, str)


def test_all_of_the_commit_counts_only_where_code_of_the_recipe_runs(here: Path) -> None:
    assert name(here, code="one") == name(here, code="two")
    for options in ({"data": "data.py:batches"}, {"metric": "data.py:score"}, {"arch": "data.py:build"}):
        assert name(here, code="one", **options) != name(here, code="two", **options), options


def test_the_code_file_itself_counts_also_where_git_does_not_keep_it(here: Path) -> None:
    before = name(here, data="data.py:batches")
    (here / "data.py").write_text("def batches(): return []\n")
    assert name(here, data="data.py:batches") != before


def test_another_machine_and_another_perwatt_have_other_keys(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name(here)}
    with monkeypatch.context() as patch:
        patch.setattr("perwatt.bench.fingerprint.fingerprint", lambda: {"name": "another processor"})
        found.add(name(here))
    with monkeypatch.context() as patch:
        patch.setattr(building_cache, "_own_source", lambda: "edited")
        found.add(name(here))
    with monkeypatch.context() as patch:
        patch.setattr(building_cache, "version", lambda package: "9.9")
        found.add(name(here))
    assert len(found) == 4
    assert name(here) in found


def test_the_source_digest_covers_every_package_of_perwatt() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(building_cache.PACKAGES) == set(packages)


def test_the_source_digest_follows_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edited_package").mkdir()
    (tmp_path / "edited_package" / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest(["edited_package"])
    (tmp_path / "edited_package" / "__init__.py").write_text("a = 2\n")
    assert source_digest(["edited_package"]) != before


def test_weights_beside_a_model_count(here: Path) -> None:
    onnx.save(conv_net(), str(here / "wide.onnx"), save_as_external_data=True, location="wide.bin", size_threshold=0)
    assert external_weights(here / "wide.onnx") == ["wide.bin"]
    assert files_of("wide.onnx", here) == [here / "wide.onnx", here / "wide.bin"]
    before = name(here, model="wide.onnx")
    content = bytearray((here / "wide.bin").read_bytes())
    content[0] ^= 1
    (here / "wide.bin").write_bytes(content)
    assert name(here, model="wide.onnx") != before


def test_what_is_no_onnx_model_has_no_weights_beside_it(here: Path) -> None:
    (here / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (here / "broken.onnx").write_bytes((here / "net.onnx").read_bytes()[:200])
    for other in ("samples.npz", "data.py", "pointer.onnx", "broken.onnx", "nowhere.onnx", "."):
        assert external_weights(here / other) == [], other


def test_what_is_missing_still_has_a_key(here: Path) -> None:
    assert name(here, model="nowhere.onnx") != name(here)


def test_files_that_a_recipe_names_are_those_and_no_others() -> None:
    recipe = build_recipe(
        None, model="a/net.pt", arch="net.py:build", data="~/calib", eval="data.py:test", train="t.csv", metric="top1"
    )
    assert named_files(recipe) == {
        ("model", "path"): "a/net.pt", ("model", "arch"): "net.py:build", ("data", "calibrate"): "~/calib",
        ("data", "eval"): "data.py:test", ("data", "train"): "t.csv",
    }  # fmt: skip
    assert names_code(recipe)
    assert path_of("data.py:test") == Path("data.py") and path_of("~/calib") == Path.home() / "calib"
    plain = build_recipe(None, model="net.onnx", metric="mse")
    assert list(named_files(plain).values()) == ["net.onnx"] and not names_code(plain)
    assert names_code(build_recipe(None, model="net.th", arch="package.nets:build"))


def test_a_network_of_an_installed_package_comes_from_the_environment(here: Path) -> None:
    import onnx_ir

    recipe = build_recipe(None, model="net.th", arch="onnx_ir.nets:build")
    assert from_environment(recipe, here) == Path(onnx_ir.__file__).parent
    (here / "onnx_ir").mkdir()
    assert from_environment(recipe, here) is None
    for other in ("net.py:build", "no_such_package:build"):
        assert from_environment(build_recipe(None, model="net.th", arch=other), here) is None


def test_the_folder_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PERWATT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "perwatt" / "bundles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert default_folder() == tmp_path / ".cache" / "perwatt" / "bundles"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "perwatt" / "bundles"
    monkeypatch.setenv("PERWATT_CACHE", "~/mine")
    assert default_folder() == tmp_path / "mine"


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="PERWATT_CACHE"):
        Cache(tmp_path / "file" / "cache")


def entry(cache: Cache, number: int, age_s: float = 0, size: int = 10) -> Path:
    """A bundle as far as the cache looks: a lock, a program, and what the lock lists."""
    path = cache.folder / f"net-null-{number:032x}"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"\0" * size)
    (path / "program.json").write_text("{}")
    write_json(path / "perwatt.lock.json", {"outputs": {"model.onnx": digest_of(path / "model.onnx")}})
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_what_was_not_used_for_long_is_removed_the_rest_stays(tmp_path: Path) -> None:
    cache, day = Cache(tmp_path / "cache"), 86400.0
    paths = [entry(cache, number, age_s=day * (number + 1)) for number in range(25)]
    assert cache.use(paths[24].name) == paths[24]
    cache.prune()
    assert {path for path in paths if path.exists()} == {*paths[:19], paths[24]}


def test_what_was_used_within_the_hour_stays_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building_cache, "KEEP_BYTES", 1000)
    cache = Cache(tmp_path / "cache")
    fresh = [entry(cache, number, size=900) for number in range(3)]
    old = entry(cache, 3, age_s=7200, size=10)
    cache.prune()
    assert all(path.exists() for path in fresh) and not old.exists()


@given(
    ages=st.lists(st.integers(min_value=0, max_value=40), min_size=0, max_size=30, unique=True),
    sizes=st.lists(st.integers(min_value=0, max_value=300), min_size=30, max_size=30),
)
def test_after_pruning_the_limits_hold_and_the_newest_are_those_kept(
    tmp_path_factory: pytest.TempPathFactory, ages: list[int], sizes: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building_cache, "KEEP_BYTES", 2000)
        cache = Cache(tmp_path_factory.mktemp("cache"))
        paths = {entry(cache, age, age_s=age * 1800 + 60, size=sizes[i]): age for i, age in enumerate(ages)}
        cache.prune()
    kept = [age for path, age in paths.items() if path.exists()]
    assert {age for age in ages if age < 2} <= set(kept)
    old = [path for path, age in paths.items() if path.exists() and age >= 2]
    if old:
        assert len(kept) <= building_cache.KEEP_ENTRIES
        assert sum(f.stat().st_size for path in paths if path.exists() for f in path.iterdir()) <= 2000
        assert set(kept) == {age for age in ages if age <= max(kept)}


def test_pruning_touches_nothing_but_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own folder of bundles may be named as the cache."""
    monkeypatch.setattr(building_cache, "KEEP_ENTRIES", 0)
    cache = Cache(tmp_path / "cache")
    own = entry(cache, 1, age_s=1e6).rename(cache.folder / "my-bundle")
    os.utime(own, (0, 0))
    linked = cache.folder / f"net-null-{2:032x}"
    linked.symlink_to(own)
    gone = entry(cache, 3, age_s=1e6)
    cache.prune()
    assert (own / "model.onnx").exists() and linked.is_symlink() and not gone.exists()


def test_pruning_sweeps_what_killed_builds_left(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    left = cache.folder / f".net-null-{1:032x}.partial-0a1b2c3d"
    left.mkdir()
    (left / "model.onnx").write_text("half")
    cache.prune()
    assert not left.exists()


def test_a_damaged_entry_is_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    changed, lacking, unreadable, whole = (entry(cache, number) for number in range(4))
    (changed / "model.onnx").write_bytes(b"\1" * 10)
    (lacking / "model.onnx").unlink()
    (unreadable / "perwatt.lock.json").write_text("{")
    assert [intact(path) for path in (changed, lacking, unreadable, whole)] == [False, False, False, True]
    assert cache.use(changed.name) is None and cache.use(whole.name) == whole
    assert cache.use(f"net-null-{9:032x}") is None


def test_two_builders_of_one_entry_take_turns(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    waiting, order = threading.Event(), []

    def second() -> None:
        with cache.building("net-null-0", waiting.set):
            order.append("second")

    with cache.building("net-null-0", lambda: order.append("never")):
        other = threading.Thread(target=second)
        other.start()
        assert waiting.wait(20)
        order.append("first")
    other.join(20)
    assert order == ["first", "second"]
