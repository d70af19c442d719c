"""SIGKILL a search at random moments: the same command goes on, to the same winner; then it comes from the cache.

    python search_kept.py [--moments 20] [--seed 0] [--trials 10]

The digits example (trained on the spot) on the null target, whose time is scripted, so that the winner is no matter of luck;
with pruning, teaching in a fixed number of steps, and int8. One search runs without being disturbed. Others, with a cache of
their own, are killed at random moments, each time after a random share of what the whole one took, and started again. Each that
comes to its end must have the same trials and the same winner, with no choice tried twice; then the next one begins, until
there were `--moments` kills. The same command is timed once more: the answer has to come from the cache within 5 seconds. At
last a search of MNIST (PERWATT_DATA, two minutes) on real backends is run twice, for the same figure with real files. Writes
bench/results/search_kept.json, exits 1 where that was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kill
import models

RESULTS = Path(__file__).resolve().parents[1] / "results" / "search_kept.json"
AGAIN_S = 5.0
RECIPE = """
passes:
  - fold-batchnorm
  - prune-channels: {multiple: 16}
  - recover: {steps: 20}
  - one-of: [quantize-int8, {quantize-int8: {operators: all}}]
"""


def command(folder: Path, out: str, trials: int) -> list[str]:
    """The search on scripted time."""
    return [
        str(Path(sys.executable).parent / "optimize"), str(folder / "model.pt"), "--config", str(folder / "recipe.yaml"),
        "--target", "null", "--data", str(folder / "train.npz"), "--eval", str(folder / "test.npz"), "--max-drop", "100",
        "--min-gain", "1%", "--no-tune", "--trials", str(trials), "--out", str(folder / out), "--force", "--quiet",
    ]  # fmt: skip


def run(line: list[str], cache: Path, wait_s: float | None = None) -> tuple[float, bool]:
    """Seconds, and whether it was killed after `wait_s` of them."""
    start = time.perf_counter()
    process = subprocess.Popen(line, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    try:
        process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return time.perf_counter() - start, True
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}")
    return time.perf_counter() - start, False


def story(bundle: Path) -> dict[str, Any]:
    """What must be the same however often it was killed."""
    search = json.loads((bundle / "report.json").read_text())["search"]
    trials = [[t["number"], t["choice"], t["status"], t["objectives"], t["drop"]] for t in search["trials"]]
    return {"trials": trials, "shipped": search["shipped"], "twice": len(trials) - len({t[1] for t in trials})}


def killed(folder: Path, moments: int, trials: int, seed: int) -> dict[str, Any]:
    """The undisturbed search, those that are killed, and once more from the cache."""
    chance = random.Random(seed)
    whole_s, _ = run(command(folder, "whole", trials), folder / "cache-whole")
    whole = story(folder / "whole")
    line, cache = command(folder, "killed", trials), folder / "cache-killed"
    seen: list[dict[str, Any]] = []
    ended: list[dict[str, Any]] = []
    while sum(moment["killed"] for moment in seen) < moments:
        lived_s, was_killed = run(line, cache, chance.uniform(0.02, 0.5) * whole_s)
        seen.append({"lived_s": round(lived_s, 2), "killed": was_killed, "bundle": kill.state(folder / "killed")})
        print(seen[-1], flush=True)
        if not was_killed:
            ended.append(story(folder / "killed"))
            shutil.rmtree(cache)
            shutil.rmtree(folder / "killed")
    run(line, cache)
    ended.append(story(folder / "killed"))
    again_s, _ = run(line, cache)
    return {"whole_s": whole_s, "whole": whole, "moments": seen, "ended": ended, "again_s": again_s}


def real(folder: Path) -> dict[str, Any]:
    """A search on real backends, and the same command again."""
    mnist = models.DATA / "mnist"
    line = [
        str(Path(sys.executable).parent / "optimize"), str(mnist / "mnist_cntk_opset7.onnx"), "--target", "cpu",
        "--data", str(mnist / "mnist_calib_train_1000.npz"), "--eval", str(mnist / "mnist_test_10000.npz"),
        "--normalize", "none", "--max-drop", "1", "--scenario", "offline", "--time", "2m", "--out", str(folder / "mnist"),
        "--force", "--quiet",
    ]  # fmt: skip
    first_s, _ = run(line, folder / "cache-real")
    again_s, _ = run(line, folder / "cache-real")
    return {"first_s": first_s, "again_s": again_s}


def verdicts(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is wanted, and whether it holds."""
    killed_, mnist = found["killed"], found["mnist"]
    kills = sum(moment["killed"] for moment in killed_["moments"])
    same = all(one == killed_["whole"] for one in killed_["ended"])
    intact = all(moment["bundle"] in ("whole", "absent") for moment in killed_["moments"])
    words = f"{len(killed_['ended'])} searches, killed {kills} times: each time the {len(killed_['whole']['trials'])} trials and"
    return [
        (f"{words} the winner of the undisturbed one", same),
        ("no choice was tried twice", not any(one["twice"] for one in killed_["ended"])),
        ("after each kill the bundle was whole or absent", intact),
        (f"again from the cache: {killed_['again_s']:.1f} s (wanted {AGAIN_S:.0f})", killed_["again_s"] <= AGAIN_S),
        (
            f"again from the cache, MNIST: {mnist['again_s']:.1f} s after {mnist['first_s']:.0f} s",
            mnist["again_s"] <= AGAIN_S,
        ),
    ]


def main() -> int:
    """Kill, go on, look, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, str(Path(__file__).with_name("digits.py")), str(folder)], check=True)
        (folder / "recipe.yaml").write_text(RECIPE)
        found = {"killed": killed(folder, asked.moments, asked.trials, asked.seed), "mnist": real(folder)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    lines = verdicts(found)
    for words, holds in lines:
        print(f"{'ok  ' if holds else 'MISS'} {words}")
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
