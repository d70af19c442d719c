"""How often the gate is wrong: false alarms on a noisy machine, and power against a head that really is slower.

    python bench/suites/gate.py [--only false-alarms power threads truth] [--gates N] [--fresh]

Resumable: every gate is a line in `bench/results/gate.jsonl`, and a second call goes on where the first one ended.
Writes `bench/results/gate.json` and the table in `docs/gate.md`; ends with 1 where a bar is missed.

- **false alarms**: 200 gates of a model against itself, while a busy loop on the other core comes and goes; at most 2
  may fail, 8 s each.
- **power**: 100 gates against the same network with one more residual block and a 1×1 convolution (about 10 % slower: the
  truth is measured for itself); at least 95 failed or inconclusive, at least 80 failed, 20 s each.
- **threads**: the same bundle with two threads instead of one, judged by throughput: where two virtual CPUs are threads of
  one core, the second costs more than it brings.

The rules that others use are judged on the same samples: one ratio of means against the threshold, as
github-action-benchmark does; and Mann-Whitney's test with a factor, as asv compares (p < 0.002).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from models import ROOT, enter

import perwatt
from perwatt.limits import GateFile

RESULTS = ROOT / "bench" / "results"
LINES, SUMMARY, PAGE = RESULTS / "gate.jsonl", RESULTS / "gate.json", ROOT / "docs" / "gate.md"
LIMIT = 0.05
BY_CPU = {"limits": {"cpu_s_per_inference": {"max_increase": LIMIT}}}
BY_THROUGHPUT = {"limits": {"throughput_per_s": {"max_decrease": LIMIT}}}

BUSY = """
import os, random, sys, time
random.seed(int(sys.argv[1]))
parent = os.getppid()
while os.getppid() == parent:
    until = time.perf_counter() + random.uniform(0.1, 1.5)
    while time.perf_counter() < until:
        pass
    time.sleep(random.uniform(0.1, 1.5))
"""


@contextmanager
def busy_loop(seed: int) -> Iterator[None]:
    """Another process that comes and goes, as a neighbour on a shared runner does."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(seed)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def bundles(folder: Path) -> dict[str, Path]:
    """The base, a copy of it, the slower head and the one with one thread, made where they aren't there."""
    import torch

    enter(folder)
    import nets

    torch.manual_seed(0)
    base = nets.resnet20().eval()
    slower = copy.deepcopy(base)
    slower.layer3.extend([copy.deepcopy(base.layer3[-1]), _convolution(64)])
    made = {}
    for name, net in (("base", base), ("slower", slower.eval())):
        path, out = folder / f"{name}.pt", folder / f"{name}-cpu"
        if not out.exists():
            torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 32, 32)), path)
            options = {"input": ["x:float32[batch,3,32,32]"], "passes": "fold-batchnorm"}
            perwatt.optimize(path, target="openvino", out=out, **options)
        made[name] = out
    made["same"] = _copy(made["base"], folder / "same-cpu", {})
    # Limits against the base hold by themselves where both sides are the same files: these differ by a comment.
    graph = made["same"] / "openvino" / "model.xml"
    graph.write_text(graph.read_text().rstrip() + "\n<!-- the same network in another file -->\n")
    made["one-thread"] = _copy(made["base"], folder / "one-thread-cpu", {"threads": 1})
    return made


def _convolution(channels: int) -> Any:
    from torch import nn

    return nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def _copy(bundle: Path, out: Path, point: dict[str, Any]) -> Path:
    shutil.copytree(bundle, out, dirs_exist_ok=True)
    program = json.loads((out / "program.json").read_text())
    program["operating_point"].update(point)
    (out / "program.json").write_text(json.dumps(program))
    return out


def one_gate(base: Path, head: Path, limits: dict[str, Any], time_s: float, seed: int) -> dict[str, Any]:
    """One gate, and what the others' rules say of its samples."""
    start = time.perf_counter()
    report = perwatt.gate(str(base), str(head), limits=GateFile.model_validate(limits), time_s=time_s, seed=seed)
    (name,) = limits["limits"]
    figure = report.figures[name]
    samples = report.samples
    worse = 1 if name == "cpu_s_per_inference" else -1
    theirs, ours = (samples[side][name] for side in ("base", "head"))
    return {
        "verdict": report.verdict,
        "seconds": round(time.perf_counter() - start, 2),
        "ratio": figure.ratio.value,
        "interval": [figure.ratio.low, figure.ratio.high],
        "floor": figure.floor,
        "blocks": figure.n,
        "disturbed": bool(report.disturbed),
        "discarded": report.measuring["discarded"],
        "single_ratio": single_ratio(theirs, ours, worse),
        "mann_whitney": mann_whitney(theirs, ours, worse),
    }


def single_ratio(base: list[float], head: list[float], worse: int) -> bool:
    """Whether a threshold on one ratio of means fails the head."""
    ratio = (statistics.fmean(head) / statistics.fmean(base)) ** worse
    return ratio > 1 + LIMIT


def mann_whitney(base: list[float], head: list[float], worse: int) -> bool:
    """Whether asv's rule fails the head: medians apart by the factor, and the samples different (p < 0.002)."""
    from scipy.stats import mannwhitneyu

    ratio = (statistics.median(head) / statistics.median(base)) ** worse
    return ratio > 1 + LIMIT and float(mannwhitneyu(base, head, alternative="two-sided").pvalue) < 0.002


KINDS: dict[str, dict[str, Any]] = {
    "false-alarms": {"head": "same", "limits": BY_CPU, "time_s": 2.8, "gates": 200, "noisy": True, "seconds": 8.0},
    "power": {"head": "slower", "limits": BY_CPU, "time_s": 6.0, "gates": 100, "noisy": False, "seconds": 20.0},
    "threads": {"base": "one-thread", "head": "same", "limits": BY_THROUGHPUT, "time_s": 4.0, "gates": 20, "noisy": False,
                "seconds": 20.0},
    "truth": {"head": "slower", "limits": BY_CPU, "time_s": 90.0, "gates": 1, "noisy": False, "seconds": 120.0},
}  # fmt: skip


def lines() -> list[dict[str, Any]]:
    """What was done so far."""
    return [json.loads(line) for line in LINES.read_text().split("\n") if line] if LINES.exists() else []


def run(kind: str, gates: int, made: dict[str, Path]) -> None:
    """Do what is left of one kind."""
    facts = KINDS[kind]
    done = sum(1 for line in lines() if line["kind"] == kind)
    for number in range(done, gates):
        seed = random.Random(f"{kind}-{number}").randrange(1 << 30)
        arguments = (made[facts.get("base", "base")], made[facts["head"]], facts["limits"], facts["time_s"], seed)
        if facts["noisy"]:
            with busy_loop(seed):
                found = one_gate(*arguments)
        else:
            found = one_gate(*arguments)
        with LINES.open("a") as file:
            file.write(json.dumps({"kind": kind, "number": number, **found}) + "\n")
        low, high = found["interval"]
        print(f"{kind} {number + 1}/{gates}: {found['verdict']} {found['ratio']:.3f} [{low:.3f}, {high:.3f}] "
              f"floor {found['floor']:.3f} in {found['seconds']:.1f} s", flush=True)  # fmt: skip


def summary(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and spreads of one kind."""
    ratios = [line["ratio"] for line in found]
    widths = [line["interval"][1] / line["interval"][0] - 1 for line in found]
    return {
        "gates": len(found),
        "failed": sum(line["verdict"] == "fail" for line in found),
        "inconclusive": sum(line["verdict"] == "inconclusive" for line in found),
        "passed": sum(line["verdict"] == "pass" for line in found),
        "seconds_median": statistics.median(line["seconds"] for line in found),
        "seconds_most": max(line["seconds"] for line in found),
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "interval_width_median": statistics.median(widths),
        "floor_median": statistics.median(line["floor"] for line in found),
        "marked_disturbed": sum(line["disturbed"] for line in found),
        "single_ratio_failed": sum(line["single_ratio"] for line in found),
        "mann_whitney_failed": sum(line["mann_whitney"] for line in found),
        "interval_holds_1": sum(line["interval"][0] <= 1 <= line["interval"][1] for line in found),
    }


def problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """Which bars are missed."""
    missed = []
    alarms, power = found.get("false-alarms"), found.get("power")
    if alarms and alarms["failed"] > 0.01 * alarms["gates"]:
        missed.append(f"{alarms['failed']} of {alarms['gates']} gates of a model against itself fail")
    if power and power["failed"] + power["inconclusive"] < 0.95 * power["gates"]:
        missed.append(f"{power['passed']} of {power['gates']} slower heads pass")
    if power and power["failed"] < 0.8 * power["gates"]:
        missed.append(f"only {power['failed']} of {power['gates']} slower heads fail")
    for kind, facts in KINDS.items():
        if kind in found and found[kind]["seconds_most"] > facts["seconds"]:
            missed.append(f"{kind}: a gate took {found[kind]['seconds_most']:.1f} s, {facts['seconds']:g} s allowed")
    return missed


def write(found: dict[str, dict[str, Any]]) -> None:
    """The summary and the page's table."""
    SUMMARY.write_text(json.dumps({"limit": LIMIT, "kinds": found, "missed": problems(found)}, indent=2) + "\n")
    words = {
        "false-alarms": ("a model against itself, a busy loop on the other core coming and going", "pass"),
        "power": ("one more residual block and a 1×1 convolution", "fail"),
        "threads": ("two threads instead of one (throughput)", "fail where they share a core"),
        "truth": ("the head with one more block, measured for 90 s", "fail"),
    }
    rows = [
        "| what | right answer | gates | failed | inconclusive | passed | ratio: median (least to most) | interval's width | "
        "s each (most) | one ratio of means fails | Mann-Whitney fails |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, one in found.items():
        rows.append(
            f"| {' | '.join(words[kind])} | {one['gates']} | {one['failed']} | {one['inconclusive']} | {one['passed']} "
            f"| {one['ratio_median']:.3f} ({one['ratio_least']:.3f} to {one['ratio_most']:.3f}) "
            f"| {100 * one['interval_width_median']:.1f} % | {one['seconds_median']:.1f} ({one['seconds_most']:.1f}) "
            f"| {one['single_ratio_failed']} | {one['mann_whitney_failed']} |"
        )
    text = PAGE.read_text()
    begin, end = "<!-- gate:begin -->", "<!-- gate:end -->"
    head, rest = text.split(begin)[0], text.split(end)[1]
    PAGE.write_text(f"{head}{begin}\n" + "\n".join(rows) + f"\n{end}{rest}")


def main() -> None:
    """Run what is left, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--gates", type=int, help="instead of each kind's own number")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "perwatt-gate-suite")
    arguments = parser.parse_args()
    if arguments.fresh:
        LINES.unlink(missing_ok=True)
        shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    made = bundles(arguments.folder)
    for kind in arguments.only:
        run(kind, arguments.gates or KINDS[kind]["gates"], made)
    done = lines()
    found = {kind: summary(kind, of) for kind in KINDS if (of := [line for line in done if line["kind"] == kind])}
    write(found)
    print(json.dumps(found, indent=2))
    missed = problems(found)
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
