"""SIGKILL the real command at ten random moments: the output folder must be whole or absent each time.

    python kill.py [--moments 10] [--seed 0]

Runs on the digits example (trained on the spot). A first run says how long the command takes; then it is killed at moments
spread over that time and a little beyond, half of them over an older bundle, and half of all within the last second, where
the bundle is written. After each, the folder is checked against the digests in its own lock, no worker may be left, and at
the end one more run must leave no remains of the killed ones beside it. Writes bench/results/kill.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from perwatt.bundle import digest_of

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path) -> list[str]:
    """The command that is killed."""
    return [
        str(Path(sys.executable).parent / "optimize"), str(folder / "model.pt"), "--data", str(folder / "train.npz"),
        "--eval", str(folder / "test.npz"), "--out", str(folder / "bundle"), "--quiet", "--min-gain", "0",
    ]  # fmt: skip


def state(bundle: Path) -> str:
    """absent, whole, or what is wrong with it."""
    if not bundle.exists():
        return "absent"
    try:
        outputs = json.loads((bundle / "perwatt.lock.json").read_text())["outputs"]
    except (OSError, ValueError) as error:
        return f"broken: {error}"
    wrong = [
        name for name, digest in outputs.items() if not (bundle / name).is_file() or digest_of(bundle / name) != digest
    ]
    return f"broken: {wrong}" if wrong else "whole"


def workers_left(before: set[int]) -> int:
    """Worker processes that were not there before, after a moment to notice that their parent is gone."""
    time.sleep(1.5)
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if "perwatt.worker" in (p.info["cmdline"] or []) and p.pid not in before
    ]
    return len(left)


def main() -> None:
    """Kill, look, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, str(ROOT / "bench" / "suites" / "digits.py"), str(folder)], check=True)
        start = time.perf_counter()
        subprocess.run(command(folder), check=True)
        whole_run = time.perf_counter() - start
        shutil.copytree(folder / "bundle", folder / "older")
        found = []
        for number in range(options.moments):
            shutil.rmtree(folder / "bundle", ignore_errors=True)
            replacing = number % 2 == 1
            if replacing:
                shutil.copytree(folder / "older", folder / "bundle")
            late = number % 4 >= 2
            moment = chance.uniform(whole_run - 1.0, whole_run + 0.5) if late else chance.uniform(0, whole_run)
            before = {p.pid for p in psutil.process_iter(["cmdline"]) if "perwatt.worker" in (p.info["cmdline"] or [])}
            process = subprocess.Popen(command(folder))
            try:
                process.wait(timeout=moment)
                killed = False
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed = True
            entry = {"moment_s": round(moment, 2), "killed": killed, "replacing": replacing, "state": state(folder / "bundle"),
                     "workers_left": workers_left(before)}  # fmt: skip
            print(entry, flush=True)
            found.append(entry)
        subprocess.run(command(folder), check=True)
        remains = [p.name for p in folder.iterdir() if p.name.startswith(".bundle")]
    good = all(e["state"] == "whole" or (e["state"] == "absent" and not e["replacing"]) for e in found)
    clean = not remains and not any(e["workers_left"] for e in found)
    result = {
        "whole_run_s": round(whole_run, 1),
        "moments": found,
        "always_whole_or_absent": good,
        "remains": remains,
        "clean": clean,
    }
    where = ROOT / "bench" / "results" / "kill.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(result, indent=1) + "\n")
    print(f"whole or absent each time: {good}; no workers and no remains left: {clean}")
    raise SystemExit(0 if good and clean else 1)


if __name__ == "__main__":
    main()
