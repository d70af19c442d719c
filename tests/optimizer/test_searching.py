"""Whole searches on a tiny network: scripted time on the null target, so that what costs less is no matter of luck."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import optimize
from searches import FLAGS, TRIALS, cache, here, searched, told

__all__ = ["cache", "here"]

Reports: TypeAlias = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def reports(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Of half a search, and of the same one gone on with to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("answers") / "out"
        return searched(here, out, trials=TRIALS // 2), searched(here, out, trials=TRIALS)


@pytest.mark.slow
def test_the_best_of_the_trials_ships_confirmed_on_what_none_of_them_saw(reports: Reports) -> None:
    _, report = reports
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
def test_every_pass_of_the_answer_is_accounted_for_and_the_run_charged(reports: Reports) -> None:
    _, report = reports
    names = {share["name"] for share in report["account"]["shares"]}
    applied = {row["name"] for row in report["passes"] if row["status"] == "applied" and row["name"] != "read"}
    assert names and names <= applied | set(report["account"]["droppable"])
    assert report["run_cost"]["cpu_s"] > 0 and report["run_cost"]["seconds"] > 0
    assert report["run_cost"]["pays_back_after"] > 0


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_ended(reports: Reports) -> None:
    first, longer = reports
    assert told(longer)[: len(told(first))] == told(first)
    seconds = [[t["seconds"] for t in report["search"]["trials"][: TRIALS // 2]] for report in reports]
    assert seconds[0] == seconds[1]


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
    done = optimize("net.onnx", *FLAGS, "--trials", 3, "--size", "100", "--out", out, "--json", cwd=here)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert report["outcome"] == "budget_not_met" and "0.00 MB are allowed" in report["reason"]
    sizes = {t["number"]: t["size_bytes"] for t in report["search"]["trials"] if t["status"] == "measured"}
    assert sizes[report["search"]["shipped"]] == min(sizes.values())


@pytest.mark.slow
def test_what_was_asked_to_be_small_is_small(here: Path, tmp_path: Path, cache: Path) -> None:
    report = searched(here, tmp_path / "out", trials=5, objective="size,inferences-per-joule")
    search = report["search"]
    assert search["objectives"] == ["size", "inferences-per-joule"]
    permitted = [t for t in search["trials"] if t["status"] == "measured" and not t["missed"]]
    shipped = search["trials"][search["shipped"]]
    assert shipped["size_bytes"] == min(t["size_bytes"] for t in permitted) < permitted[0]["size_bytes"]
    assert all(len(t["objectives"]) == 2 for t in search["trials"] if t["status"] == "measured")
