"""Writes the bundle of a finished run: the deployable model, how to run it, and the evidence."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perwatt import recipe as recipes
from perwatt import registry
from perwatt.bundle import LOCK, Bundle, copy_assets, copy_model, digest_of, program_json, write_json, writing
from perwatt.candidates import cost_in, cost_of, gain_of
from perwatt.compilation import Run, model_name
from perwatt.contract import Stage
from perwatt.datasets_fit import parse_normalization
from perwatt.finals import AT_POINT
from perwatt.measurement import Ratio
from perwatt.measuring import FIGURES, cpu_ratio, figures, ratios, side_by_side
from perwatt.report import Report
from perwatt.sides import Side
from perwatt.study import Result

LABELLED = ("power_w", "energy_j_per_inference", "throughput_per_watt")
RECORDED_PACKAGES = (
    "perwatt", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "nncf", "torch", "transformers",
    "safetensors", "pydantic", "pillow",
)  # fmt: skip


def write_bundle(run: Run, out: Path) -> Bundle:
    """Write everything into `out`, whole or not at all."""
    winner = run.result.sides.get("optimized", run.result.sides["original"])
    with writing(out) as folder:
        artifact = run.result.winner.branch.artifact
        copy_model(artifact.file(run.folder), folder / "model.onnx")
        backend = run.result.winner.backend
        target = registry.target(backend.name)
        deployed = winner.worker.call("save", folder=str(folder / target.name()))["files"]
        write_json(
            folder / "program.json",
            program_json(backend.name, artifact.signature, winner.facts, preprocessing(run), front_of(run)),
        )
        script = target.script()
        if script is not None:
            (folder / "run.py").write_text(script)
        copy_assets(run.prepared.reading.assets, folder)
        (folder / "recipe.yaml").write_text(recipes.dump(resolved(run)))
        report = build_report(run, _sizes(run, winner, deployed))
        (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
        _write_html(report, folder)
        write_json(folder / LOCK, lock(run, folder))
    return Bundle(out)


def front_of(run: Run) -> list[dict[str, Any]]:
    """The operating points of the shipped graph that no other one beats, for loaders: those that the saved program can
    take. Empty where none were searched."""
    front, winner = run.result.front, run.result.winner
    if front is None:
        return []
    fixed = registry.target(winner.backend.name).fixed_once_saved
    kept = [t for t in front.undominated() if all(getattr(t.point, f) == getattr(winner.point, f) for f in fixed)]
    return [trial.to_json() for trial in kept]


def preprocessing(run: Run) -> dict[str, Any] | None:
    """How uint8 pictures became inputs, for whoever deploys; None where that was not asked for, or is in the graph."""
    normalize = run.recipe.data.normalize
    if normalize is None or run.recipe.inputs:
        return None
    found = parse_normalization(normalize)
    if found is None or found.raw:
        return {"normalize": normalize, "mean": None, "std": None}
    return {"normalize": normalize, "mean": list(found.mean), "std": list(found.std)}


def _write_html(report: Report, folder: Path) -> None:
    from perwatt.report_html import render

    (folder / "report.html").write_text(render(report), encoding="utf-8")


def _sizes(run: Run, winner: Side, deployed: list[str]) -> dict[str, int]:
    """Bytes of what each side deploys; the winner's files are in the bundle already."""
    sizes = {}
    for label, side in run.result.sides.items():
        if label == "torch eager":
            continue
        where = run.folder / f"saved-{label.replace(' ', '-')}"
        files = deployed if side is winner else side.worker.call("save", folder=str(where))["files"]
        sizes[label] = sum(Path(file).stat().st_size for file in files)
    return sizes


def resolved(run: Run) -> recipes.Recipe:
    """The recipe with what was decided spelled out: passes and metric."""
    data = run.recipe.data
    if run.prepared.evaluation is not None and data.metric is None:
        data = data.model_copy(update={"metric": run.prepared.evaluation.metric.name})
    budget = run.recipe.budget
    if budget.max_drop is None and run.prepared.evaluation is not None:
        budget = budget.model_copy(update={"max_drop": run.prepared.max_drop})
    return run.recipe.model_copy(update={"passes": run.steps, "data": data, "budget": budget})


def build_report(run: Run, sizes: dict[str, int]) -> Report:
    """The report of a finished run."""
    result, sides = run.result, run.result.sides
    original = sides["original"]
    shipped = sides.get("optimized", original)
    energy = run.energy
    peaks = {label: side.peak_memory_bytes for label, side in sides.items()}
    comparison = result.comparison
    score = result.score.value if result.score is not None else None
    baseline_accuracy = run.prepared.evaluation.original.value if run.prepared.evaluation is not None else None

    measured = {label: figures(side.windows, side.energy_windows) for label, side in sides.items()}
    if "optimized" in sides:
        # Of the same rounds, so that the columns of a table divide to its ratios.
        measured["optimized"], measured["original"] = side_by_side(shipped, original)

    def side_figures(label: str, accuracy: float | None) -> dict[str, Any]:
        side = sides[label]
        found: dict[str, Any] = dict(measured[label])
        for name in LABELLED:
            found[name] = {"value": found[name], "method": energy["method"], "boundary": energy["boundary"]}
        return {
            **found,
            "size_bytes": sizes.get(label),
            "peak_memory_bytes": peaks[label],
            "accuracy": accuracy,
            "operating_point": side.facts["operating_point"],
            "execution_precision": side.facts["execution_precision"],
        }

    label = "optimized" if "optimized" in sides else "original"
    first, last = side_figures("original", baseline_accuracy), side_figures(label, score)
    # Where the shipped graph is the original's own, the graph's share of the gain is none.
    same_graph = result.winner.branch is result.baseline.branch
    graph_base = label if same_graph else AT_POINT if AT_POINT in sides else "original"
    best_lossy = _last_word(run)
    return Report.model_validate(
        {
            "perwatt_version": version("perwatt"),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - run.started, 2),
            "outcome": result.outcome,
            "reason": result.reason,
            "model": _model_facts(run),
            "target": _target_facts(run, shipped),
            "original": first,
            "optimized": last,
            "ratio": _ratio_figures(shipped, original, sizes, peaks, label, "original", score, baseline_accuracy),
            "ratio_graph": _ratio_figures(
                shipped, sides[graph_base], sizes, peaks, label, graph_base, score, baseline_accuracy
            ),
            "accuracy": _accuracy(run) if comparison is not None else None,
            "ratio_point": _point_figures(sides, sizes, peaks, label, same_graph, score, baseline_accuracy),
            "tuning": _tuning(result),
            "search": result.search,
            "account": result.account.to_json() if result.account is not None else None,
            "run_cost": run.charge.total(first, last).to_json(),
            "torch_eager": _eager(sides, shipped),
            "passes": [row.to_json() for row in run.rows],
            "candidates": [_candidate(c) for c in result.candidates],
            "energy": energy,
            "measuring": _measuring(original),
            "data": data_facts(run),
            "notes": list(dict.fromkeys(result.notes)),
            "last_word": best_lossy,
        }
    )


def data_facts(run: Run) -> dict[str, Any]:
    """Samples of each role, and how many of those that judge took no part in choosing."""
    roles, samples = run.prepared.roles, run.prepared.samples
    real = bool(roles.sources) or roles.calibrate is not None or roles.select is not None
    return {
        "synthetic": not real,
        "samples": {role: len(found) for role, found in samples.items() if role not in ("check", "timing", "confirm")},
        "unseen": len(roles.confirm) if roles.confirm is not None else 0,
        "metric": run.recipe.data.metric,
    }


def _model_facts(run: Run) -> dict[str, Any]:
    signature = run.prepared.reading.artifact.signature
    return {
        "name": model_name(run.recipe),
        "path": run.recipe.model.path,
        "format": run.prepared.reading.format,
        "digest": run.prepared.reading.artifact.digest(),
        "inputs": [str(spec) for spec in signature.inputs],
        "outputs": [str(spec) for spec in signature.outputs],
        "weights_bytes": run.prepared.reading.artifact.size_bytes(),
    }


def _target_facts(run: Run, side: Side) -> dict[str, Any]:
    return {
        "name": run.recipe.target.name,
        "on": run.on,
        "tried": [backend.name for backend in run.prepared.backends],
        "backend": side.facts["backend"],
        "device": side.facts["device"],
        "scenario": run.recipe.target.scenario,
        "batch": side.facts["operating_point"]["batch"],
        "versions": run.result.winner.backend.versions,
        "isa": list(run.result.winner.backend.capabilities.isa),
    }


def _ratio_figures(ours: Side, theirs: Side, sizes: dict[str, int], peaks: dict[str, int | None], label: str, base: str,
                   accuracy: float | None, baseline_accuracy: float | None) -> dict[str, Any]:  # fmt: skip
    if ours is theirs:
        # One program: nothing was measured twice, so there is no noise to report.
        measured = {
            name: Ratio(1.0, 1.0, 1.0) if figures(ours.windows, ours.energy_windows)[name] is not None else Ratio(None)
            for name in FIGURES
        }
    else:
        measured = ratios(ours, theirs)
    plain = {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in measured.items()}

    def exact(a: float | None, b: float | None) -> dict[str, float | None]:
        value = a / b if a is not None and b else None
        return {"value": value, "low": value, "high": value}

    plain["size_bytes"] = exact(sizes.get(label), sizes.get(base))
    plain["peak_memory_bytes"] = exact(peaks[label], peaks[base])
    plain["accuracy"] = exact(accuracy, baseline_accuracy)
    return plain


def _point_figures(sides: dict[str, Side], sizes: dict[str, int], peaks: dict[str, int | None], label: str,
                   same_graph: bool, score: float | None, original: float | None) -> dict[str, Any] | None:  # fmt: skip
    """The original's graph at the shipped operating point ÷ at its own: the point's share of the gain. None where the
    shipped point is the original's own."""
    if same_graph and label == "optimized":
        return _ratio_figures(sides[label], sides["original"], sizes, peaks, label, "original", score, original)
    if AT_POINT in sides:
        return _ratio_figures(sides[AT_POINT], sides["original"], sizes, peaks, AT_POINT, "original", None, None)
    return None


def _tuning(result: Result) -> dict[str, Any] | None:
    """What was searched: every operating point that was measured, and for how long."""
    if result.front is None:
        return None
    trials = [trial.to_json() for trial in result.front.trials]
    return {"seconds": round(result.front.seconds, 2), "points": trials}


def _accuracy(run: Run) -> dict[str, Any]:
    comparison, evaluation, result = run.result.comparison, run.prepared.evaluation, run.result
    assert comparison is not None and evaluation is not None and result.score is not None
    return {
        "metric": evaluation.metric.name,
        "unit": evaluation.metric.unit,
        "higher_is_better": evaluation.metric.higher_is_better,
        "n": comparison.n,
        "n_unseen": data_facts(run)["unseen"],
        "original": evaluation.original.value,
        "optimized": result.score.value,
        "drop": comparison.drop,
        "low": comparison.low if math.isfinite(comparison.low) else None,
        "high": comparison.high if math.isfinite(comparison.high) else None,
        "flips_lost": comparison.flips_lost,
        "flips_gained": comparison.flips_gained,
        "max_drop": run.prepared.max_drop,
        "original_as_run": result.original_as_run,
    }


def _eager(sides: dict[str, Side], shipped: Side) -> dict[str, Any] | None:
    side = sides.get("torch eager")
    if side is None or not side.windows:
        return None
    found = figures(side.windows, side.energy_windows)
    ratio = cpu_ratio(shipped, side)
    return {
        "version": side.facts["version"],
        "cpu_s_per_inference": found["cpu_s_per_inference"],
        "throughput_per_s": found["throughput_per_s"],
        "latency_p50_ms": found["latency_p50_ms"],
        "cpu_s_ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
    }


def _candidate(candidate: Any) -> dict[str, Any]:
    def plain(name: str) -> dict[str, Any] | None:
        found = candidate.ratios.get(name)
        return None if found is None else {"value": found.value, "low": found.low, "high": found.high}

    return {
        "name": candidate.name,
        "passes": candidate.branch.applied(),
        "floating_precision": candidate.point.floating_precision,
        "backend": candidate.backend.name,
        "operating_point": candidate.point.to_json(),
        "verdict": candidate.verdict,
        "reason": candidate.reason,
        "cpu_s_ratio": plain("cpu_s_per_inference"),
        "throughput_ratio": plain("throughput_per_s"),
        "drop": candidate.drop.drop if candidate.drop is not None else None,
    }


def _measuring(side: Side) -> dict[str, Any]:
    return {
        "protocol": "one process for each side, windows interleaved in randomised ABBA blocks, ratios within blocks, "
        "95 % bootstrap intervals of the trimmed mean of log-ratios",
        "rounds": len(side.windows),
        "window_s": round(sum(w.wall_s for w in side.windows) / len(side.windows), 3),
        "calls": sum(len(w.latencies_ms) for w in side.windows),
    }


def _last_word(run: Run) -> str | None:
    """What would bring more: samples, or a larger budget."""
    lossy = [c for c in run.result.candidates if c.branch.lossy and c.verdict == "rejected" and c.ratios]
    faster = [c for c in lossy if (cost_in(c.ratios, c.backend).high or 9) < 1]
    if not faster:
        return None
    best = min(faster, key=cost_of)
    if cost_of(best) >= cost_of(run.result.winner):
        return None
    gain = gain_of(best).value
    name = best.branch.applied()[-1]
    if run.prepared.evaluation is None:
        return f"{name} would be {gain:.1f}× (speed measured, accuracy unknown): give about 100 samples with --data"
    if best.drop is not None and best.drop.drop > run.prepared.max_drop:
        unit = " points" if run.prepared.evaluation.metric.unit == "fraction" else ""
        needed = math.ceil(best.drop.drop * 100) / 100
        allowed = f"{name} would be {gain:.1f}× at {needed:.2f}{unit} lost: --max-drop {needed:.2f} would allow it"
        return f"{allowed}{_learning_words(best.branch.applied())}"
    return None


def _learning_words(applied: Sequence[str]) -> str:
    """How what pruning lost may come back."""
    classes = [registry.pass_class(name) for name in applied]
    if not any(cls.stage is Stage.PRUNE and cls.tolerance is None and not cls.mends for cls in classes):
        return ""
    learnt = any(cls.mends for cls in classes)
    return (
        ", more minutes to recover may bring it back"
        if learnt
        else ", --passes +recover --train PATH may bring it back"
    )


def lock(run: Run, folder: Path) -> dict[str, Any]:
    """What went in, what was decided, what came out: digests, recipe, decisions, seeds, versions, hardware."""
    model = Path(run.recipe.model.path)
    return {
        "lock_version": 1,
        "model": {"name": model_name(run.recipe), "path": run.recipe.model.path, "sha256": digest_of(model),
                  "artifact": run.prepared.reading.artifact.digest()},
        "data": dict(run.prepared.roles.sources),
        "recipe": resolved(run).model_dump(mode="json"),
        "decisions": {
            "outcome": run.result.outcome,
            "passes": [{"name": s.name, "settings": s.settings} for s in run.result.winner.branch.artifact.steps],
            "operating_point": run.result.winner.point.to_json(),
            "backend": run.result.winner.backend.name,
            "artifact": run.result.winner.branch.artifact.digest(),
        },
        "seeds": {"seed": run.recipe.seed},
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "on": run.on,
                     "fingerprint": run.machine["fingerprint"],
                     "isa": list(run.result.winner.backend.capabilities.isa),
                     "device": run.result.sides["original"].facts["device"]},
        "outputs": {str(p.relative_to(folder)): digest_of(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
