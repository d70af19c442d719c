"""Nodes of a graph after fusion: ours beside those of onnxslim, onnxscript's optimizer and ONNX Runtime's two.

Counted alike for all: every node, those in subgraphs and (inlined) functions too, but for `Constant` and `Identity`. Forms:

- `standard`: operators that every backend runs, against onnxslim and onnxscript;
- `openvino`: what that target names in its capabilities besides, against the same two; what that target wants in pieces our
  passes take apart, and so the same passes take it apart in what the others made (all pieces count on both sides);
- `onnxruntime`: with that target's capabilities, against ONNX Runtime's transformer optimizer and its session optimizer at
  level extended. A session fuses further whatever file it is given, so that all of them are counted as the session runs
  them; what is in the file is told beside (`onnxruntime-file`);
- `newest`: every operator of the standard allowed; in this one the operators are held against the architecture.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Context, Pass, Stage
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.pipeline import Pipeline, Proof, Row
from perwatt.recipe import Budget, PassStep
from perwatt.reference import Reference

NOT_COUNTED = ("Constant", "Identity")
FIRST_NEWER_OPSET = 23
RIVALS = {
    "standard": ("onnxslim", "onnxscript"),
    "openvino": ("onnxslim", "onnxscript"),
    "onnxruntime": ("transformer-optimizer", "session"),
}
TARGETS = ("openvino", "onnxruntime")
TAKES_APART = "decompose-"
"""How names of passes begin that write one operator as several, where a target runs these better."""


# Counting -------------------------------------------------------------------------------------------------------------


def operators(path: Path) -> dict[str, int]:
    """How many nodes of each operator the file has, most first; of other domains with the domain in front."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    model = ir.load(str(path))
    if model.functions:
        model = common.InlinePass()(model).model
    kinds = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
        for node in model.graph.all_nodes()
    )
    return {kind: times for kind, times in kinds.most_common() if kind not in NOT_COUNTED}


def total(kinds: dict[str, int]) -> int:
    """All nodes."""
    return sum(kinds.values())


def compared(has: dict[str, int], kinds: dict[str, int]) -> dict[str, dict[str, int]]:
    """What an architecture `has` beside what was found: {operators: {"wanted", "found"}}."""
    found = {named: sum(kinds.get(kind, 0) for kind in named.split("|")) for named in has}
    return {named: {"wanted": wanted, "found": found[named]} for named, wanted in has.items()}


# Rivals ---------------------------------------------------------------------------------------------------------------


def onnxslim(path: Path, out: Path) -> Path:
    """What onnxslim makes of a file."""
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(str(path)), out)
    return out


def onnxscript(path: Path, out: Path) -> Path:
    """What onnxscript's optimizer makes of a file."""
    import onnx_ir as ir
    from onnxscript import optimizer

    model = ir.load(str(path))
    optimizer.optimize_ir(model)
    ir.save(model, str(out))
    return out


def session(path: Path, out: Path) -> Path:
    """What a session of ONNX Runtime at level extended makes of a file (layouts are left as they are)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def transformer_optimizer(path: Path, out: Path, kinds: Sequence[str], heads: int, hidden: int) -> Path:
    """What ONNX Runtime's transformer optimizer makes of a file: the fewest nodes among the model types that it may be
    taken for, each with the optimizer's own level and with level 2 (extended) before."""
    from onnxruntime.transformers import optimizer

    best: tuple[int, Any] | None = None
    failure: Exception | None = None
    for kind in kinds:
        for level in (None, 2):
            try:
                made = optimizer.optimize_model(str(path), kind, num_heads=heads, hidden_size=hidden, opt_level=level)
                made.save_model_to_file(str(out))
                count = total(operators(out))
            except Exception as error:
                failure = failure or error
                continue
            if best is None or count < best[0]:
                best = count, made
    if best is None:
        assert failure is not None
        raise failure
    best[1].save_model_to_file(str(out))
    return out


def rivals(path: Path, folder: Path, kinds: Sequence[str], heads: int, hidden: int) -> dict[str, Any]:
    """Operators of what each rival makes of a file, or why it makes nothing."""
    makers = {
        "onnxslim": onnxslim,
        "onnxscript": onnxscript,
        "transformer-optimizer": lambda source, out: transformer_optimizer(source, out, kinds, heads, hidden),
        "session": session,
    }
    told: dict[str, Any] = {}
    for name, maker in makers.items():
        try:
            with _quiet():
                told[name] = {"operators": operators(maker(path, folder / f"{name}.onnx"))}
        except Exception as error:
            told[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    for name in RIVALS["openvino"]:
        if "operators" in told[name]:
            told[name]["in_pieces"] = in_pieces(folder / f"{name}.onnx", folder)
    with contextlib.suppress(Exception), _quiet():
        # Only what runs can be a rival; a session runs what the other has made.
        ran = session(folder / "transformer-optimizer.onnx", folder / "both.onnx")
        told["transformer-optimizer"]["as_run"] = operators(ran)
    return told


def in_pieces(path: Path, folder: Path) -> dict[str, int]:
    """Operators of a file once what OpenVINO wants in pieces is taken apart, as in our own form for it."""
    artifact = Artifact.load(path)
    apart = [made for made in fusing_passes() if made.name().startswith(TAKES_APART)]
    capabilities = registry.target("openvino").capabilities()
    after, _ = pipeline(artifact, None, folder).for_target(capabilities).run(artifact, apart)
    return operators(after.file(folder))


@contextlib.contextmanager
def _quiet() -> Any:
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# Ours -----------------------------------------------------------------------------------------------------------------


def fusing_passes(edits: str = "") -> list[Pass]:
    """The default passes of the stages CLEAN and FUSE, in order, with `edits` as the command line has them (`+name`, `-name`)."""
    found = registry.default_steps()
    steps = [step for step in (registry.edit_steps(found, edits) if edits else found) if isinstance(step, PassStep)]
    return [made for made in map(registry.bind, steps) if made.stage in (Stage.CLEAN, Stage.FUSE)]


def newest() -> Capabilities:
    """Every operator of the standard that is newer than what all backends run."""
    import onnx

    named = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return Capabilities(operators=tuple(sorted(name for name in named if first[name] >= FIRST_NEWER_OPSET)))


def forms() -> dict[str, Capabilities]:
    """Form → capabilities."""
    return {
        "standard": Capabilities(), **{name: registry.target(name).capabilities() for name in TARGETS},
        "newest": newest(),
    }  # fmt: skip


def pipeline(artifact: Artifact, samples: dict[str, np.ndarray] | None, folder: Path) -> Pipeline:
    """A pipeline from `artifact` that checks every pass as `optimize` does; without samples nothing is run to compare."""
    given = Samples([samples] if samples else [])

    def not_here(*_: Any) -> Any:
        raise BackendError("passes of these stages neither run nor measure anything")

    def reference(made: Artifact) -> Any:
        if samples is None:
            raise BackendError("not compared here")
        return list(Reference(made, folder).run(given))

    def check(made: Artifact) -> list[str]:
        import onnx

        try:
            onnx.checker.check_model(str(made.file(folder)), full_check=samples is not None)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return [" ".join(str(error).split())[:300]]
        return []

    context = Context(
        samples=lambda role: given, capabilities=Capabilities(), budget=Budget(), seed=0, deadline=None,
        progress=lambda text: None, execute=not_here, measure=not_here, profile=not_here,
        judge=not_here,
    )  # fmt: skip

    def isolated(made_by: Pass, before: Artifact, capabilities: Capabilities) -> Any:
        return made_by.run(before, replace(context, capabilities=capabilities))

    return Pipeline(artifact, context, Proof(check, reference, isolated, lambda *_: not_here()))


def ours(artifact: Artifact, samples: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    """Operators in each form, what each pass did, and what it moved."""
    told: dict[str, Any] = {}
    whole = pipeline(artifact, samples, folder)
    for form, capabilities in forms().items():
        after, rows = whole.for_target(capabilities).run(artifact, fusing_passes())
        path = after.file(folder)
        told[form] = {"operators": operators(path), "passes": {row.name: told_of(row) for row in rows}}
        told[form]["drift_from_original"] = next(
            (r.drift_from_original for r in reversed(rows) if r.drift_from_original), None
        )
        if form == "onnxruntime":
            with _quiet():
                told[form]["as_run"] = operators(session(path, folder / "as-run.onnx"))
    return told


def told_of(row: Row) -> dict[str, Any]:
    """A row of the ledger, short."""
    short: dict[str, Any] = {"status": row.status, "seconds": row.seconds}
    if row.status == "applied":
        short |= {"changes": row.changes, "drift": row.drift}
    return short | ({"reason": row.reason} if row.reason else {})


# Judging --------------------------------------------------------------------------------------------------------------


def nodes(told: dict[str, Any], form: str) -> int:
    """Nodes of ours in that form: as the session runs them in ONNX Runtime's."""
    its = told["ours"][form]
    return total(its["as_run"] if form == "onnxruntime" else its["operators"])


def rival_nodes(told: dict[str, Any], form: str) -> dict[str, int]:
    """Nodes of each rival in that form, without those that failed."""
    found = {}
    for name in RIVALS.get(form, ()):
        its = told["rivals"][name]
        kinds = its.get({"openvino": "in_pieces"}.get(form, "operators"))
        if form == "onnxruntime" and name == "transformer-optimizer":
            kinds = its.get("as_run")
        if kinds is not None:
            found[name] = total(kinds)
    return found


def verdicts(title: str, told: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is wanted of one graph, and whether it holds."""
    lines = []
    for form in RIVALS:
        theirs, mine = rival_nodes(told, form), nodes(told, form)
        if theirs:
            best = min(theirs, key=lambda name: theirs[name])
            lines.append((f"{title}, {form}: {mine} nodes, {best} {theirs[best]}", mine <= theirs[best]))
    for named, its in told["has"].items():
        lines.append(
            (f"{title}: {named} {its['found']}, the architecture has {its['wanted']}", its["found"] == its["wanted"])
        )
    for name, row in told["ours"]["newest"]["passes"].items():
        if row["status"] == "rolled-back":
            lines.append((f"{title}: {name} rolled back: {row.get('reason')}", False))
    return lines


def table(results: dict[str, dict[str, Any]]) -> str:
    """Nodes by graph, ours beside the rivals', as Markdown."""
    lines = [
        "| graph | original | onnxslim: file, in pieces | onnxscript: file, in pieces | ours: standard | openvino | newest "
        "| transformer optimizer: file, as run | session | ours for onnxruntime: file, as run |",
        "| --- |" + " --- |" * 9,
    ]
    for title, told in results.items():
        theirs = {
            name: str(total(its["operators"])) if "operators" in its else "failed"
            for name, its in told["rivals"].items()
        }
        both = told["rivals"]["transformer-optimizer"].get("as_run")
        pieces = {name: total(told["rivals"][name].get("in_pieces", {})) for name in RIVALS["openvino"]}
        forms_of = {form: str(total(its["operators"])) for form, its in told["ours"].items()}
        cells = [
            title, str(total(told["original"])), *(f"{theirs[name]}, {pieces[name]}" for name in RIVALS["openvino"]),
            *(forms_of[form] for form in ("standard", "openvino", "newest")),
            f"{theirs['transformer-optimizer']}, {total(both) if both else 'does not run'}", theirs["session"],
            f"{forms_of['onnxruntime']}, {total(told['ours']['onnxruntime']['as_run'])}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matches(results: dict[str, dict[str, Any]]) -> str:
    """What each pass did in each graph, in the newest form, beside what the architecture has, as Markdown."""
    lines = ["| graph | operators: found / in the architecture | what passes did |", "| --- | --- | --- |"]
    for title, told in results.items():
        has = ", ".join(
            f"{named.replace('|', '+')} {its['found']}/{its['wanted']}" for named, its in told["has"].items()
        )
        done = "; ".join(
            f"{name}: {', '.join(row['changes'])}"
            for name, row in told["ours"]["newest"]["passes"].items()
            if "changes" in row
        )
        lines.append(f"| {title} | {has} | {done.replace('|', '/')} |")
    return "\n".join(lines)
