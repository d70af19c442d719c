"""Whether `--target cpu` picks the best backend: against every backend that the alias stands for, each at its own best.

    python alias.py [--models mnist,…] [--scenarios single-stream,offline] [--backends …] [--time 20] [--most 150] [--reuse]

For each model (those in PERWATT_DATA, and the six of architectures.py) `perwatt.optimize` runs with the alias and with each
backend named, every time with all passes and its own search for an operating point; then all bundles are measured side by
side, interleaved (`perwatt.benchmark`). Wanted: the alias's bundle takes at most 1.03 × the CPU seconds per inference of
the best one, and no more than the budget's accuracy is lost by either, which `optimize` itself sees to. The verdict is by
the point estimate; with several backends the best of them is partly luck, so the interval is told beside it. Where the
alias's bundle and another hold the same program byte for byte at the same operating point, their ratio is the noise between
two processes: it is told, marked `same program`, and decides nothing.

Where weights are random, accuracy says nothing and its budget is left open. A backend that is missing or fails is named
with its reason. Writes bench/results/alias.json after each model (what a run leaves out stays as it was), prints a table
in Markdown, exits 1 where the alias missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import models

import perwatt
from perwatt import registry
from perwatt.bench.fingerprint import fingerprint

RESULTS = models.ROOT / "bench" / "results" / "alias.json"
WITHIN = 1.03
ALIAS = "cpu"
SCENARIOS = ("single-stream", "offline")
FIGURE = "cpu_s_per_inference"


def cases(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name → (model, options of `perwatt.optimize`)."""
    mnist, resnet8 = models.DATA / "mnist", models.DATA / "mlperf_tiny_resnet8" / "resnet8.onnx"
    cifar = models.cifar()
    found: dict[str, tuple[Path, dict[str, Any]]] = {
        "mnist": (
            mnist / "mnist_cntk_opset7.onnx",
            {
                "data": str(mnist / "mnist_calib_train_1000.npz"),
                "eval": str(mnist / "mnist_test_10000.npz"),
                "normalize": "none",
            },
        ),
        "resnet8": (resnet8, {**cifar, "normalize": "none"}),
        "resnet20": (models.resnet(20, "onnx", folder)[0], {**cifar, "normalize": "imagenet"}),
        "resnet56": (models.resnet(56, "onnx", folder)[0], {**cifar, "normalize": "imagenet"}),
        "face": (models.DATA / "face_rfb320" / "version-RFB-320.onnx", {}),
        "minilm": (folder / "minilm-sst2", {}),
    }
    for name, what in architectures.ALL.items():
        if not what.real:
            files = architectures.Files.of(name)
            found[name] = (files.fp32, {"data": str(files.samples), "max_drop": 100})
    return found


def made_ready(name: str, folder: Path, case: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The case with its files there: what takes long to make is made only when its turn has come."""
    if name == "minilm":
        return models.minilm(folder), models.sst2(folder)
    if name in architectures.ALL and not architectures.ALL[name].real:
        architectures.built(name)
    return case


def run_case(
    name: str, model: Path, options: dict[str, Any], scenario: str, asked: argparse.Namespace
) -> dict[str, Any]:
    """Bundles of the alias and of every backend, and all of them side by side."""
    bundles: dict[str, perwatt.Bundle] = {}
    told: dict[str, Any] = {"failed": {}}
    for target in (ALIAS, *asked.backends):
        out = architectures.FOLDER / "bundles" / f"{name}-{scenario}-alias-{target.replace(':', '-')}"
        try:
            # The plain pipeline, whatever the time: a search is another question (search.py).
            limits = {"trials": 0, **({"time": f"{asked.most:g}s"} if asked.most else {})}
            bundles[target] = _optimized(model, target, out, scenario, {**options, **limits}, asked.reuse)
        except perwatt.PerwattError as error:
            told["failed"][target] = str(error)
            print(f"{name}, {scenario}, {target}: {error}", file=sys.stderr, flush=True)
    told["bundles"] = {target: _chosen(bundle) for target, bundle in bundles.items()}
    if ALIAS in bundles and len(bundles) > 1:
        told |= side_by_side(bundles, asked.time)
    return told


def program_of(bundle: perwatt.Bundle) -> str:
    """A digest of what the bundle runs and how: its program's files, and its operating point."""
    folder = bundle.program["target"].partition(":")[0]
    files = {name: digest for name, digest in bundle.lock["outputs"].items() if name.startswith(f"{folder}/")}
    assert files, f"{bundle.path} lists no files of its program"
    plain = json.dumps([bundle.program["target"], files, bundle.program["operating_point"]], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _optimized(
    model: Path, target: str, out: Path, scenario: str, options: dict[str, Any], reuse: bool
) -> perwatt.Bundle:
    if reuse and (out / "program.json").exists():
        return perwatt.Bundle(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"optimizing for {out.name}", file=sys.stderr, flush=True)
    return perwatt.optimize(model, target=target, out=out, force=True, scenario=scenario, **options)


def _chosen(bundle: perwatt.Bundle) -> dict[str, Any]:
    report, program = bundle.report, bundle.program
    shipped = [candidate["name"] for candidate in report["candidates"] if candidate["verdict"] == "shipped"]
    return {
        "outcome": report["outcome"], "seconds": report["seconds"], "shipped": shipped, "target": program["target"],
        "operating_point": program["operating_point"], "accuracy_drop": (report["accuracy"] or {}).get("drop"),
    }  # fmt: skip


def side_by_side(bundles: dict[str, perwatt.Bundle], time_s: float | None) -> dict[str, Any]:
    """CPU seconds per inference of each bundle, and the alias's ÷ the best one's."""
    order = [ALIAS, *(target for target in bundles if target != ALIAS)]
    report = perwatt.benchmark(*(bundles[target].path for target in order), time_s=time_s)
    measured = dict(zip(order, report.subjects, strict=True))
    figures = {target: subject.figures[FIGURE].value for target, subject in measured.items()}
    ratios = {
        target: turned(ratio)
        for target, subject in measured.items()
        if target != ALIAS and (ratio := subject.ratio_to_first[FIGURE]).value
    }
    floor = report.noise_floor.get(FIGURE)
    programs = {target: program_of(bundle) for target, bundle in bundles.items()}
    same = [target for target in ratios if programs[target] == programs[ALIAS]]
    return {"figures": figures, "noise_floor": floor, "disturbed": report.disturbed, **judged(ratios, same)}


def turned(ratio: Any) -> dict[str, float | None]:
    """The alias's bundle ÷ another, from the report's other ÷ the alias's, which is measured first."""
    return {"value": 1 / ratio.value, "low": ratio.high and 1 / ratio.high, "high": ratio.low and 1 / ratio.low}


def judged(ratios: dict[str, dict[str, float | None]], same: Sequence[str] = ()) -> dict[str, Any]:
    """The best backend by the highest ratio of the alias's bundle to it, and whether the alias is near enough; `same` are
    those whose bundle holds the alias's own program."""
    if not ratios:
        return {"alias_to": {}, "verdict": "not measured"}
    best = max(ratios, key=lambda target: ratios[target]["value"] or 0.0)
    highest = ratios[best]["value"] or 0.0
    deciding = max((ratio["value"] or 0.0 for target, ratio in ratios.items() if target not in same), default=0.0)
    return {
        "alias_to": ratios, "alias_to_best": ratios[best], "best": best if highest > 1 else ALIAS,
        "same_program": list(same),
        "verdict": "holds" if deciding <= WITHIN else "missed",
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Everything as a table in Markdown."""
    backends = sorted(
        {b for scenarios in results.values() for its in scenarios.values() for b in its.get("alias_to", {})}
    )
    lines = [
        "| model | scenario | the alias chose | " + " | ".join(f"{b}, CPU ms" for b in ["alias", *backends])
        + " | alias ÷ best | within 3 % |",
        "| --- | --- | --- |" + " --- |" * (len(backends) + 3),
    ]  # fmt: skip
    for name, scenarios in results.items():
        for scenario, its in scenarios.items():
            chose = its["bundles"].get(ALIAS)
            cells = [name, scenario, f"{chose['target']}, {', '.join(chose['shipped'])}" if chose else "failed"]
            for target in (ALIAS, *backends):
                value = its.get("figures", {}).get(target)
                cells.append(f"{1e3 * value:.4f}" if value else "failed" if target in its["failed"] else "–")
            ratio = its.get("alias_to_best")
            cells.append(f"{ratio['value']:.3f}{_interval(ratio)}" if ratio else "–")
            same = ratio is not None and [t for t in its.get("same_program", ()) if its["alias_to"][t] == ratio]
            cells.append(its.get("verdict", "not measured") + (" (same program)" if same else ""))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(ratio: dict[str, float | None]) -> str:
    return f" [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio["low"] and ratio["high"] else ""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(cases(Path()))
    parser.add_argument("--models", default=",".join(known), help=f"among {', '.join(known)}")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--backends", default=",".join(registry.serving(ALIAS)), help="to compare the alias with")
    parser.add_argument("--time", type=float, help="seconds to measure the bundles of one model side by side")
    parser.add_argument("--most", type=float, help="seconds that each optimization may take (its `--time`)")
    parser.add_argument("--reuse", action="store_true", help="take bundles of earlier runs where they are there")
    options = parser.parse_args()
    for words, names in (("models", known), ("scenarios", SCENARIOS)):
        given = getattr(options, words).split(",")
        if unknown := [name for name in given if name not in names]:
            parser.error(f"unknown {words}: {', '.join(unknown)}; known are {', '.join(names)}")
        setattr(options, words, given)
    options.backends = options.backends.split(",")
    return options


def main() -> None:
    """Run the cases, write after each, tell."""
    asked = parsed()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    ran: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in asked.models:
            model, options = made_ready(name, folder, cases(folder)[name])
            for scenario in asked.scenarios:
                result = run_case(name, model, options, scenario, asked)
                ran.setdefault(name, {})[scenario] = result
                kept["models"].setdefault(name, {})[scenario] = result
                kept["machine"] = fingerprint()
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
                print(f"{name}, {scenario}: {result.get('verdict', 'not measured')}", file=sys.stderr, flush=True)
    print(table(kept["models"]))
    missed = [f"{n}, {s}" for n, by in ran.items() for s, its in by.items() if its.get("verdict") != "holds"]
    print(
        f"\nwithin {WITHIN - 1:.0%} of the best everywhere"
        if not missed
        else f"\nmissed or not measured: {'; '.join(missed)}"
    )
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
