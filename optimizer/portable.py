"""The portable bundle: what can be done for a backend that is not on this machine, and its completion where it is.

Every graph that the passes lead to is written as ONNX, each verified and judged by the reference on this machine's CPU,
with a script that builds and times them by the backend's own tools. Nothing is measured, so nothing is chosen: on the
machine with the backend `optimize BUNDLE --target …` takes the graphs as they are, and does the rest.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from perwatt import metrics, registry
from perwatt import recipe as recipes
from perwatt.artifact import Artifact
from perwatt.bundle import LOCK, Bundle, copy_assets, copy_model, digest_of, is_bundle, open_bundle, write_json, writing
from perwatt.candidates import Branch
from perwatt.contract import Tolerance
from perwatt.drift import drift
from perwatt.errors import BackendError
from perwatt.isolation import Worker
from perwatt.options import build_recipe
from perwatt.pipeline import Pipeline, Row
from perwatt.preparation import Prepared, operating_point
from perwatt.recipe import Recipe
from perwatt.worker import load_outputs

NOT_MEASURED = ("throughput", "latency", "CPU time", "energy", "memory", "accuracy of the lowered programs")
SAME_AS_WRITTEN = Tolerance(atol=1e-4, rtol=1e-3)
"""Between what a graph gave where it was made and what it gives here, both by the reference."""


def write_portable(
    recipe: Recipe, prepared: Prepared, branches: Sequence[Branch], pipeline: Pipeline, folder: Path, checks: Worker,
    out: Path,
) -> Bundle:  # fmt: skip
    """Write the graphs of `branches`, judged, into the bundle `out`, whole or not at all."""
    absent = prepared.absent
    assert absent is not None
    target = registry.target(absent.target)
    taken: set[str] = set()
    distinct = _distinct(branches, prepared.source)
    made = [_variant(branch, recipe, prepared, folder, checks, taken) for branch in distinct]
    plain = next(branch for branch in reversed(branches) if not branch.lossy)
    signature = prepared.source.signature
    with writing(out) as where:
        copy_model(plain.artifact.file(folder), where / "model.onnx")
        (where / "variants").mkdir()
        for entry, artifact in made:
            copy_model(artifact.file(folder), where / entry["file"])
        _save_check(pipeline, prepared, made, where)
        models = ["model.onnx", *(entry["file"] for entry, _ in made)]
        batch = operating_point(recipe).batch
        script = target.build_script(models, signature, batch if isinstance(signature.batch, str) else 1)
        if script is not None:
            (where / script[0]).write_text(script[1])
            (where / script[0]).chmod(0o755)
        copy_assets(prepared.reading.assets, where)
        variants = [entry for entry, _ in made]
        program = {"target": absent.target, "portable": True, "signature": asdict(signature), "variants": variants}
        write_json(where / "program.json", program)
        (where / "recipe.yaml").write_text(recipes.dump(recipe))
        write_json(where / "report.json", _report(recipe, prepared, branches, variants, script[0] if script else None))
        write_json(where / LOCK, _lock(recipe, prepared, where))
    return Bundle(out)


def _distinct(branches: Sequence[Branch], source: Artifact) -> list[Branch]:
    seen = {source.digest()} | {b.artifact.digest() for b in branches if not b.lossy}
    kept = []
    for branch in branches:
        if branch.lossy and branch.artifact.digest() not in seen:
            seen.add(branch.artifact.digest())
            kept.append(branch)
    return kept


def _variant(
    branch: Branch, recipe: Recipe, prepared: Prepared, folder: Path, checks: Worker, taken: set[str]
) -> tuple[dict[str, Any], Artifact]:
    """A lossy graph's entry in program.json: its file, its passes, and what it loses by the reference."""
    name = "+".join(n for n in branch.applied() if registry.pass_class(n).tolerance is None)
    if name in taken:
        # The same pass with other settings.
        name = f"{name}-{branch.artifact.digest()[:8]}"
    taken.add(name)
    entry: dict[str, Any] = {
        "file": f"variants/{name}.onnx",
        "passes": [row.to_json() for row in branch.rows],
        "digest": branch.artifact.digest(),
        "size_bytes": branch.artifact.size_bytes(),
        "drop": None,
        "drop_high": None,
        "permitted": False,
        "reason": "accuracy unknown: there are no samples to judge it on",
    }
    evaluation = prepared.evaluation
    if evaluation is None:
        return entry, branch.artifact
    out = folder / f"variant-{branch.artifact.digest()[:16]}"
    try:
        checks.call(
            "reference", model=str(branch.artifact.file(folder)), samples=str(evaluation.folder), out=str(out),
            optimized=True,
        )  # fmt: skip
    except BackendError as error:
        return {**entry, "reason": f"accuracy unknown: the reference can't run it: {error}"}, branch.artifact
    comparison = metrics.compare(evaluation.metric, evaluation.original, evaluation.score(load_outputs(out)))
    worst = comparison.high if recipe.budget.prove_accuracy else comparison.drop
    permitted = worst <= prepared.max_drop + 1e-9
    unit = " points" if evaluation.metric.unit == "fraction" else ""
    words = f"loses {comparison.drop:.2f}{unit} of {prepared.max_drop:g} allowed (n = {comparison.n})"
    bound = comparison.high if math.isfinite(comparison.high) else None
    judged = {"drop": comparison.drop, "drop_high": bound, "permitted": permitted, "reason": words}
    return {**entry, **judged}, branch.artifact


def _save_check(
    pipeline: Pipeline, prepared: Prepared, made: Sequence[tuple[dict[str, Any], Artifact]], where: Path
) -> None:
    """A few samples and what each graph gives for them, so that the other machine can tell that it runs the same."""
    prepared.samples["check"].without_labels().save(where / "check" / "samples")
    for entry, artifact in made:
        outputs = pipeline.outputs(artifact)
        if isinstance(outputs, str):
            continue
        folder = where / "check" / Path(entry["file"]).stem
        folder.mkdir(parents=True)
        for number, batch in enumerate(outputs, 1):
            np.savez(folder / f"{number:06d}.npz", **batch)  # type: ignore[arg-type]


def _report(
    recipe: Recipe, prepared: Prepared, branches: Sequence[Branch], variants: list[dict[str, Any]], script: str | None
) -> dict[str, Any]:
    absent = prepared.absent
    assert absent is not None
    rows = {id(row): row for branch in branches for row in branch.rows}
    return {
        "schema_version": 1,
        "perwatt_version": version("perwatt"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "outcome": "portable",
        "reason": f"nothing that serves {recipe.target.name} can be used on this machine",
        "reasons": list(absent.reasons),
        "model": {"path": recipe.model.path, "digest": prepared.source.digest(), "format": prepared.reading.format},
        "target": {"name": recipe.target.name, "prepared_for": absent.target, "scenario": recipe.target.scenario},
        "passes": [row.to_json() for row in rows.values()],
        "variants": [{name: value for name, value in entry.items() if name != "passes"} for entry in variants],
        "script": script,
        "not_measured": list(NOT_MEASURED),
        "notes": list(dict.fromkeys(prepared.notes)),
    }


def _lock(recipe: Recipe, prepared: Prepared, folder: Path) -> dict[str, Any]:
    path = Path(recipe.model.path)
    return {
        "lock_version": 1,
        "model": {"name": path.stem if path.is_file() else path.resolve().name, "path": recipe.model.path,
                  "sha256": digest_of(path), "artifact": prepared.source.digest()},
        "data": dict(prepared.roles.sources),
        "recipe": recipe.model_dump(mode="json"),
        "decisions": {"outcome": "portable"},
        "seeds": {"seed": recipe.seed},
        "versions": {"python": platform.python_version(), "perwatt": version("perwatt")},
        "hardware": {"machine": platform.machine(), "system": platform.system()},
        "outputs": {str(p.relative_to(folder)): digest_of(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }  # fmt: skip


# Completing it ----------------------------------------------------------------------------------------------------


def is_portable(path: Path) -> bool:
    """Whether `path` is a bundle that waits for its hardware."""
    return is_bundle(path) and bool(open_bundle(path).program.get("portable"))


def kept_branches(recipe: Recipe, pipeline: Pipeline, folder: Path) -> list[Branch] | None:
    """The graphs of the portable bundle that the recipe's model is, those that its budget permitted; None where it is
    none. A graph that gives something else here than where it was made is left out."""
    path = Path(recipe.model.path)
    if not is_portable(path):
        return None
    branches = [Branch(pipeline.original)]
    for entry in open_bundle(path).program["variants"]:
        if not _permitted(entry, recipe):
            continue
        artifact = Artifact.load(path / entry["file"])
        rows = tuple(_row(plain) for plain in entry["passes"])
        if not _differs(path, entry, artifact, pipeline):
            branches.append(Branch(artifact, rows, lossy=True, judged=True))
    return branches


def _permitted(entry: dict[str, Any], recipe: Recipe) -> bool:
    """Whether what a graph was found to lose is within the budget, which may be another one now."""
    budget = recipe.budget
    if budget.max_drop is None or entry["drop"] is None:
        return bool(entry["permitted"])
    worst = entry["drop_high"] if budget.prove_accuracy else entry["drop"]
    return worst is not None and worst <= budget.max_drop + 1e-9


def _row(plain: dict[str, Any]) -> Row:
    sizes, operators = plain.get("size_bytes"), plain.get("operators")
    return Row(
        **{
            **plain,
            "size_bytes": (sizes["before"], sizes["after"]) if sizes else None,
            "operators": (operators["before"], operators["after"]) if operators else None,
        }
    )


def _differs(path: Path, entry: dict[str, Any], artifact: Artifact, pipeline: Pipeline) -> bool:
    stored = path / "check" / Path(entry["file"]).stem
    if not stored.is_dir():
        return False
    try:
        here = pipeline.proof.reference_on(artifact, path / "check" / "samples")
    except BackendError:
        # Nothing here can tell: it is left out, as one that gives something else.
        return True
    return bool(drift(load_outputs(stored), here, SAME_AS_WRITTEN).reasons)


def words(bundle: Bundle) -> list[str]:
    """What a person should know of a portable bundle, line by line."""
    report = bundle.report
    said = [
        f"Portable bundle for {report['target']['name']}: {bundle.path}",
        "Not finished here:",
        *(f"  {reason}" for reason in report["reasons"]),
        "",
        "  model.onnx  the model, cleaned; every change verified on your samples",
    ]
    for entry in report["variants"]:
        mark = "" if entry["permitted"] else " (not permitted by the budget)"
        said.append(f"  {entry['file']}  {entry['reason']}{mark}")
    said += ["", f"Not measured: {', '.join(report['not_measured'])}."]
    if report["script"]:
        said.append(f"With the backend's own tools:  sh {bundle.path / report['script']}")
    said.append(f"To finish it where the hardware is:  optimize {bundle.path} --target {report['target']['name']}")
    return said


def recipe_for(config: str | Path | None, **options: Any) -> Recipe:
    """The recipe of a run. A portable bundle that is given without a recipe brings its own; data of it that are not on
    this machine are left out, and what was judged where it was made then counts. Raises InputError as `build_recipe`."""
    model = options.get("model")
    if config is not None or model is None or not is_portable(Path(model)):
        return build_recipe(config, **options)
    own = build_recipe(Path(model) / "recipe.yaml")
    data = own.data
    gone = {
        name: None
        for name in ("all", "calibrate", "eval", "train")
        if (where := getattr(data, name)) and not _here(where)
    }
    plain = own.model_copy(update={"data": data.model_copy(update=gone)}).model_dump(mode="json")
    # The model in it was made ready for its inputs already.
    plain["inputs"], plain["model"] = {}, {"path": str(model)}
    return build_recipe(None, base=plain, **options)


def _here(where: str) -> bool:
    return Path(where.rsplit(":", 1)[0] if ".py:" in where else where).exists()
