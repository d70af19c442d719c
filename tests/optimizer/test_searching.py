"""Whole searches on a tiny network: scripted time on the null target, so that what costs less is no matter of luck."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import perwatt
from perwatt.bundle import Bundle, is_bundle
from perwatt.report import schema

sys.path.insert(0, str(Path(__file__).parent))
from runs import command, optimize, put_net

TRIALS = 8
OPTIONS = {"target": "null", "min_gain": "1%", "max_drop": 100, "tune": False}
FLAGS = ("--target", "null", "--min-gain", "1%", "--max-drop", "100", "--no-tune", "--data", "samples.npz")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.onnx` and `samples.npz`."""
    folder = tmp_path_factory.mktemp("searches")
    put_net(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own: every search begins anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def searched(here: Path, out: Path, trials: int = TRIALS, **options: Any) -> dict[str, Any]:
    bundle = perwatt.optimize(
        here / "net.onnx", data=here / "samples.npz", out=out, trials=trials, force=True, **{**OPTIONS, **options}
    )
    report = bundle.report
    jsonschema.validate(report, schema())
    return report


def told(report: dict[str, Any]) -> list[tuple[int, str, tuple[float, ...], float | None]]:
    """What must be the same however often a search was interrupted."""
    return [(t["number"], t["choice"], tuple(t["objectives"]), t["drop"]) for t in report["search"]["trials"]]


@pytest.mark.slow
def test_the_best_of_the_trials_ships_confirmed_on_what_none_of_them_saw(
    here: Path, tmp_path: Path, cache: Path
) -> None:
    report = searched(here, tmp_path / "out")
    search = report["search"]
    assert report["outcome"] == "optimized" and len(search["trials"]) == TRIALS
    assert search["ended"] == f"{TRIALS} trials were made"
    permitted = [t for t in search["trials"] if t["status"] == "measured" and not t["missed"]]
    best = min(permitted, key=lambda t: t["objectives"][0])
    shipped = search["trials"][search["shipped"]]
    assert shipped["objectives"] == best["objectives"]
    assert report["ratio"]["cpu_s_per_inference"]["value"] == pytest.approx(best["objectives"][0], rel=0.02)
    assert report["accuracy"]["n"] == report["accuracy"]["n_unseen"] > 0
    assert report["data"]["samples"]["select"] >= max(t["n"] for t in permitted)


@pytest.mark.slow
def test_every_pass_of_the_answer_is_accounted_for_and_the_run_charged(here: Path, tmp_path: Path, cache: Path) -> None:
    report = searched(here, tmp_path / "out")
    names = {share["name"] for share in report["account"]["shares"]}
    applied = {row["name"] for row in report["passes"] if row["status"] == "applied" and row["name"] != "read"}
    assert names and names <= applied | set(report["account"]["droppable"])
    assert report["run_cost"]["cpu_s"] > 0 and report["run_cost"]["seconds"] > 0
    assert report["run_cost"]["pays_back_after"] > 0


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_ended(here: Path, tmp_path: Path, cache: Path) -> None:
    first = searched(here, tmp_path / "out", trials=4)
    longer = searched(here, tmp_path / "out", trials=TRIALS)
    assert told(longer)[: len(told(first))] == told(first)
    assert [t["seconds"] for t in longer["search"]["trials"][:4]] == [t["seconds"] for t in first["search"]["trials"]]


@pytest.mark.slow
def test_without_trials_there_is_no_search(here: Path, tmp_path: Path, cache: Path) -> None:
    report = searched(here, tmp_path / "out", trials=0, time="10m")
    assert report["search"] is None and report["account"] is None
    assert not (cache / "perwatt" / "search").exists()


@pytest.mark.slow
def test_samples_to_confirm_with_are_the_only_ones_that_judge(here: Path, tmp_path: Path, cache: Path) -> None:
    report = searched(here, tmp_path / "out", trials=2, confirm=str(here / "samples.npz"))
    assert report["accuracy"]["n"] == 200


@pytest.mark.slow
def test_where_nothing_is_small_enough_the_smallest_ships_and_says_so(here: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    done = optimize("net.onnx", *FLAGS, "--trials", TRIALS, "--size", "100", "--out", out, "--json", cwd=here)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert report["outcome"] == "budget_not_met" and "0.00 MB are allowed" in report["reason"]
    sizes = {t["number"]: t["size_bytes"] for t in report["search"]["trials"] if t["status"] == "measured"}
    assert sizes[report["search"]["shipped"]] == min(sizes.values())


@pytest.mark.slow
def test_what_was_asked_to_be_small_is_small(here: Path, tmp_path: Path, cache: Path) -> None:
    report = searched(here, tmp_path / "out", objective="size,inferences-per-joule")
    search = report["search"]
    assert search["objectives"] == ["size", "inferences-per-joule"]
    assert all(len(t["objectives"]) == 2 for t in search["trials"] if t["status"] == "measured")


def started(here: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    line = command("net.onnx", *FLAGS, "--trials", TRIALS, "--out", out, "-v")
    return subprocess.Popen(
        line, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"it ended without a word of {word!r}")


@pytest.mark.slow
def test_ctrl_c_ends_the_search_with_the_best_so_far(here: Path, tmp_path: Path, cache: Path) -> None:
    process = started(here, tmp_path / "out", cache)
    until(process, "trial 5")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    report = Bundle(tmp_path / "out").report
    assert report["search"]["ended"] == "stopped by Ctrl-C" and 1 <= len(report["search"]["trials"]) < TRIALS
    assert report["outcome"] == "optimized"


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_answer(here: Path, tmp_path: Path, cache: Path) -> None:
    whole = searched(here, tmp_path / "whole")
    out, elsewhere, draw = tmp_path / "killed", tmp_path / "cache-killed", random.Random(1)
    for number in (2, 4, 7):
        process = started(here, out, elsewhere)
        until(process, f"trial {number}")
        time.sleep(draw.uniform(0.0, 1.0))
        process.kill()
        process.communicate()
        assert not out.exists() or is_bundle(out), "a whole bundle or none"
    done = started(here, out, elsewhere)
    said, _ = done.communicate(timeout=600)
    assert done.returncode == 0, said
    report = Bundle(out).report
    assert told(report) == told(whole)
    assert report["search"]["shipped"] == whole["search"]["shipped"]


@pytest.mark.slow
def test_the_same_search_again_comes_from_the_cache(here: Path, tmp_path: Path, cache: Path) -> None:
    arguments = ("net.onnx", *FLAGS, "--trials", 3, "--out")
    first = optimize(*arguments, tmp_path / "first", cwd=here)
    assert first.returncode == 0 and "from the cache" not in first.stdout, first.stderr
    again = optimize(*arguments, tmp_path / "again", cwd=here)
    assert again.returncode == 0 and "from the cache: this is the answer of" in again.stdout, again.stderr
    reports = [Bundle(tmp_path / name).report for name in ("first", "again")]
    assert reports[0] == reports[1]
    fresh = optimize(*arguments, tmp_path / "again", "--fresh", "--json", cwd=here)
    assert json.loads(fresh.stdout)["created"] > reports[0]["created"]
