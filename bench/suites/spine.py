"""What the spine must show, on real models: `python spine.py [CASE…]` runs the cases and writes bench/results/spine.json.

Each case is one run of the command line in a fresh process, its wall time measured around the whole command. A case that
was measured with this very code is kept (resumable); `--again` measures anew. The table at the end says what holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import models
import numpy as np

import perwatt

RESULTS = models.ROOT / "bench" / "results" / "spine.json"


def cases(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name → (model, options)."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for depth in (20, 56):
        for form in models.FORMATS:
            path, options = models.resnet(depth, form, folder)
            found[f"resnet{depth}/{form}"] = (
                path,
                {**options, **models.cifar(), "normalize": "imagenet", "max_drop": 0.5},
            )
    found["resnet8"] = (models.DATA / "mlperf_tiny_resnet8" / "resnet8.onnx", {**models.cifar(), "normalize": "none"})
    mnist = models.DATA / "mnist"
    found["mnist"] = (
        mnist / "mnist_cntk_opset7.onnx",
        {
            "data": str(mnist / "mnist_calib_train_1000.npz"),
            "eval": str(mnist / "mnist_test_10000.npz"),
            "normalize": "none",
        },
    )
    found["face"] = (models.DATA / "face_rfb320" / "version-RFB-320.onnx", {})
    found["minilm"] = (models.minilm(folder), models.sst2(folder))
    found["minilm-offline"] = (models.minilm(folder), {**models.sst2(folder), "scenario": "offline", "batch": 8})
    return found


def flags(options: dict[str, Any]) -> list[str]:
    """Options of `perwatt.optimize` as the command line spells them."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return words


def run_case(name: str, model: Path, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run of the command; the figures that the issue asks for."""
    out = folder / "bundle"
    command = [
        str(Path(sys.executable).parent / "optimize"),
        str(model),
        "--target",
        "cpu",
        "--out",
        str(out),
        "--force",
        "--json",
    ]
    start = time.perf_counter()
    done = subprocess.run([*command, *flags(options)], capture_output=True, text=True, cwd=folder)
    wall = time.perf_counter() - start
    if done.returncode not in (0, 3):
        return {"case": name, "exit_code": done.returncode, "error": done.stderr.strip()[-400:]}
    report = json.loads(done.stdout)
    eager, accuracy = report["torch_eager"], report["accuracy"]
    return {
        "case": name,
        "exit_code": done.returncode,
        "wall_s": round(wall, 1),
        "device": report["target"]["device"],
        "outcome": report["outcome"],
        "reason": report["reason"],
        "shipped": [c["name"] for c in report["candidates"] if c["verdict"] == "shipped"],
        "accuracy": accuracy
        and {k: accuracy[k] for k in ("metric", "n", "original", "optimized", "drop", "low", "high")},
        "cpu_s_ratio": report["ratio"]["cpu_s_per_inference"],
        "cpu_s_ratio_graph": report["ratio_graph"]["cpu_s_per_inference"],
        "cpu_s_to_torch_eager": eager and eager["cpu_s_ratio"],
        "passes": {p["name"]: [p["status"], (p["measured"] or {}).get("accuracy_drop")] for p in report["passes"]},
        "last_word": report["last_word"],
        **read_case(model, options),
        "deployed_agreement": deployed(out, options) if name.startswith("resnet") and "/" in name else None,
    }


def read_case(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Operator counts as read, and a digest of the float32 predictions on the CIFAR images."""
    import onnxruntime

    if "resnet" not in model.name or "resnet8" in model.name:
        return {}
    reading = perwatt.read(
        model, **{k: v for k, v in options.items() if k in ("arch", "trust", "normalize", "data", "eval")}
    )
    counts = reading.artifact.operator_counts()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            str(reading.artifact.save(Path(folder) / "m.onnx")), providers=["CPUExecutionProvider"]
        )
        scores = session.run(None, {session.get_inputs()[0].name: images()})[0]
    return {
        "convolutions": counts.get("Conv", 0),
        "matrix_products": counts.get("Gemm", 0) + counts.get("MatMul", 0),
        "fp32_predictions": "".join(str(c) for c in scores.argmax(1)),
    }


def images() -> np.ndarray:
    """The CIFAR test images as the ResNets take them: float32 [1017, 3, 32, 32]."""
    with np.load(models.DATA / "cifar10" / "cifar10_test_lossless_1017.npz") as archive:
        raw = archive["images"].astype(np.float32) / 255
    scaled = (raw - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def deployed(bundle: Path, options: dict[str, Any]) -> float:
    """Top-1 of the bundle as `perwatt.load` runs it in this process."""
    scores = next(iter(perwatt.load(bundle).run(images()).values()))
    with np.load(models.DATA / "cifar10" / "cifar10_test_lossless_1017.npz") as archive:
        return float((scores.argmax(1) == archive["labels"]).mean())


def startup() -> dict[str, float]:
    """CPU seconds (user + system) of `optimize --help` and of `import perwatt`, interpreter included: medians of 7."""

    def spent(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    optimize = str(Path(sys.executable).parent / "optimize")
    return {
        "help_cpu_s": round(median(spent(optimize, "--help") for _ in range(7)), 3),
        "import_cpu_s": round(median(spent(sys.executable, "-c", "import perwatt") for _ in range(7)), 3),
    }


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the issue asks for, and whether it holds; one line each."""
    lines = []
    for depth in (20, 56):
        forms = [r for name, r in results.items() if name.startswith(f"resnet{depth}/") and "error" not in r]
        if not forms:
            continue
        same = len({r["fp32_predictions"] for r in forms}) == 1
        counts = {(r["convolutions"], r["matrix_products"]) for r in forms}
        worst = max(r["accuracy"]["drop"] for r in forms)
        eager = [r["cpu_s_to_torch_eager"]["value"] for r in forms if r["cpu_s_to_torch_eager"]]
        slowest = max(r["wall_s"] for r in forms)
        lines += [
            f"resnet{depth}: {len(forms)} of {len(models.FORMATS)} formats ran; same float32 predictions: {same}; "
            f"(convolutions, matrix products): {counts}",
            f"resnet{depth}: worst drop {worst:.2f} points (0.5 allowed): {worst <= 0.5}",
            f"resnet{depth}: least gain over torch eager {1 / max(eager):.1f}× in CPU seconds (2 wanted): {1 / max(eager) >= 2}"
            if eager
            else "",
            f"resnet{depth}: slowest command {slowest:.0f} s"
            + (f" (60 wanted): {slowest <= 60}" if depth == 20 else ""),
        ]
    for name in ("resnet8", "mnist", "face", "minilm", "minilm-offline"):
        r = results.get(name)
        if r and "error" not in r:
            a = r["accuracy"]
            drop = (
                f"{a['original']:.4f} → {a['optimized']:.4f} ({a['drop']:+.2f} points lost, n = {a['n']})"
                if a
                else "accuracy not known"
            )
            lines.append(
                f"{name}: {r['outcome']}, {drop}; CPU seconds × {r['cpu_s_ratio']['value']:.3f}; "
                f"quantize-int8 {r['passes'].get('quantize-int8')}; {r['wall_s']:.0f} s"
            )
    lines += [f"{name}: FAILED: {r['error']}" for name, r in results.items() if "error" in r]
    return [line for line in lines if line]


def as_markdown(kept: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    lines = [
        "# What was measured",
        "",
        "Written by `python bench/suites/spine.py` from `bench/results/spine.json`. CPU seconds are user + system",
        "seconds per inference; ratios are optimized ÷ other side, both measured in one run in interleaved windows, with 95 %",
        "intervals. Energy is modelled on this machine (no counter), so CPU seconds per inference decide.",
        "",
        f"Machine: {kept['machine']['device']}, {kept['machine']['cpus']} CPUs, {kept['machine']['system']}; shared, so wall",
        "times vary.",
        "",
        "| model | outcome | what shipped | accuracy before → after (n) | CPU s ÷ original | ÷ torch eager | wall s | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in kept["cases"].items():
        if "error" in r:
            lines.append(f"| {name} | failed: {r['error']} | | | | | | {r['revision']} |")
            continue
        a = r["accuracy"]
        accuracy = (
            f"{a['metric']} {a['original']:.4f} → {a['optimized']:.4f} ({a['n']})" if a else "not known: no labels"
        )
        cells = [
            name,
            r["outcome"],
            ", ".join(r["shipped"]),
            accuracy,
            _interval(r["cpu_s_ratio"]),
            _interval(r["cpu_s_to_torch_eager"]),
        ]
        lines.append("| " + " | ".join([*cells, f"{r['wall_s']:.0f}", r["revision"]]) + " |")
    return "\n".join(
        [*lines, "", "## What holds", "", *(f"- {line}" for line in verdicts(kept["cases"])), *_startup_lines(kept), ""]
    )


def _interval(ratio: dict[str, float] | None) -> str:
    if not ratio or ratio["value"] is None:
        return "–"
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _startup_lines(kept: dict[str, Any]) -> list[str]:
    found = kept.get("startup")
    if not found:
        return []
    shown, imported = found["help_cpu_s"], found["import_cpu_s"]
    return [
        f"- `optimize --help`: {shown:.2f} s of CPU time (0.4 wanted): {shown < 0.4}",
        f"- `import perwatt`: {imported:.2f} s of CPU time, interpreter included (0.3 wanted): {imported < 0.3}",
    ]


def revision() -> str:
    """The commit that is measured, with a mark where the tree is not clean."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(models.ROOT), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", "optimizer", "passes", "targets", "bench/*.py") else ""
    )


def main() -> None:
    """Run the cases that were asked for and are not known yet; write the results; say what holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="prefixes of case names; all without")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models.enter(folder)
        for name, (model, chosen) in cases(folder).items():
            if options.cases and not any(name.startswith(prefix) for prefix in options.cases):
                continue
            known = kept["cases"].get(name)
            if known and known.get("revision") == revision() and "error" not in known and not options.again:
                continue
            result = run_case(name, model, chosen, folder)
            kept["cases"][name] = {**result, "revision": revision()}
            print(f"{name}: {result.get('outcome', result.get('error'))}, {result.get('wall_s')} s", flush=True)
            kept["machine"] = {"cpus": os.cpu_count(), "system": platform.system(), "device": result.get("device", "")}
            kept["startup"] = startup()
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            (models.ROOT / "docs" / "results.md").write_text(as_markdown(kept))
    print("\n".join(verdicts(kept["cases"])))


if __name__ == "__main__":
    main()
