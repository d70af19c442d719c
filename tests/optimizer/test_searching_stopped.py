"""Whole searches that are stopped, killed, gone on with and asked for again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perwatt.bundle import Bundle, is_bundle

sys.path.insert(0, str(Path(__file__).parent))
from runs import command, optimize
from searches import FLAGS, TRIALS, cache, here, searched, told

__all__ = ["cache", "here"]


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
    until(process, "trial 4")
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
    for number in (2, 5):
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
    made = json.loads(fresh.stdout)
    assert made["created"] > reports[0]["created"]
    # Its trials were made again, too.
    seconds = [[trial["seconds"] for trial in report["search"]["trials"]] for report in (made, reports[0])]
    assert len(seconds[0]) == len(seconds[1]) and seconds[0] != seconds[1]
