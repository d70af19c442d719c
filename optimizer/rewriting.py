"""A model rewritten by passes, each proved on samples: one ONNX file, nothing lowered and nothing measured.

For who lowers it with other tools, or wants to see what passes make of a graph. What `optimize` ships is decided by
measuring; here the graph is kept whatever it brings.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perwatt import registry
from perwatt.artifact import Artifact, copy_with_path, external_files
from perwatt.bundle import no_room
from perwatt.compilation import full_disk_explained, inputs_of, model_name, resolve_steps
from perwatt.contract import Capabilities
from perwatt.errors import InputError
from perwatt.isolation import Worker, workspace
from perwatt.pipeline import Row
from perwatt.place import Place
from perwatt.preparation import Opened, Progress, first_row, open_eager, open_model, source_outputs, usable_backends
from perwatt.proving import open_pipeline
from perwatt.recipe import OneOf, PassStep, Recipe


@dataclass(frozen=True)
class Rewritten:
    """What passes made of a model: the file, the model as read and as written, a row for each pass, and notes."""

    path: Path
    before: Artifact
    after: Artifact
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: path, digest, operators and bytes of weights before and after, passes, notes."""
        return {
            "schema_version": 1,
            "path": str(self.path),
            "digest": self.after.digest(),
            "operators": {"before": self.before.operator_counts(), "after": self.after.operator_counts()},
            "size_bytes": {"before": self.before.size_bytes(), "after": self.after.size_bytes()},
            "passes": [row.to_json() for row in self.rows],
            "notes": self.notes,
        }


def rewrite_model(
    recipe: Recipe, out: str | Path | None = None, *, force: bool = False,
    progress: Progress = lambda stage, share: None,
) -> Rewritten:  # fmt: skip
    """Run the recipe's passes and write the model that they lead to into `out`, `<stem>-rewritten.onnx` by default.

    Where the recipe names no passes, or only edits the default ones, those run that promise to keep outputs. The form is
    the one that the recipe's target runs best; for an alias, which stands for several, no operator is put in that some
    backend lacks. What the recipe says of precision, operating point and budget is about running, and not looked at.
    Raises PerwattError; then nothing was written."""
    where = Path(out) if out is not None else Path(f"{model_name(recipe)}-rewritten.onnx")
    _check_file(where, force, inputs_of(recipe))
    steps, notes = _straight(recipe)
    notes += _form_words(recipe)
    with full_disk_explained(), workspace() as scratch, Worker("checks") as checks, ExitStack() as cleanup:
        folder = Path(scratch)
        capabilities = _capabilities(recipe, checks)
        opened = open_model(recipe, folder, checks, progress, cleanup, registry.imports(steps))
        eager = open_eager(opened, recipe, folder, Place(), cleanup)
        begun = 0

        def told(text: str) -> None:
            nonlocal begun
            # What a pass tells of itself begins with its name and a colon.
            begun += ": " not in text
            progress(f"running {text}", 0.3 + 0.65 * min(1.0, (begun - 1) / max(1, len(steps))))

        pipeline = open_pipeline(recipe, opened, folder, checks, told)
        row = first_row(
            opened.reading,
            pipeline.outputs(opened.source),
            lambda: source_outputs(opened.reading, opened.saved["check"], eager.result(), recipe, folder),
        )
        after, rows = pipeline.for_target(capabilities).run(opened.source, [registry.bind(step) for step in steps])
        progress(f"writing {where}", 0.97)
        _write(after, where)
    notes = [
        *_proof_words(opened), *notes, *registry.out_of_order(steps), *_not_judged(rows), *_for_nobody(recipe, rows)
    ]  # fmt: skip
    return Rewritten(
        where, _without_scratch(opened.source, folder), copy_with_path(after, where), [row, *rows],
        list(dict.fromkeys(notes)),
    )  # fmt: skip


def _straight(recipe: Recipe) -> tuple[list[PassStep], list[str]]:
    """The steps but alternatives, between which only measuring decides, and of the default ones those that keep outputs;
    and notes on what is left out."""
    kept, left = [], []
    for step in resolve_steps(recipe):
        if isinstance(step, OneOf):
            left.append(" or ".join(dict.fromkeys(one.name for one in step.steps)))
        elif recipe.passes == "default" and registry.pass_class(step.name).tolerance is None:
            left.append(step.name)
        else:
            kept.append(step)
    why = "which only measuring can decide on (optimize MODEL; --passes with all passes by name runs it here)"
    return kept, [f"left out: {names}, {why}" for names in left]


def _proof_words(opened: Opened) -> list[str]:
    """What the passes were proved on, and what was said of the data."""
    items = len(opened.samples["check"])
    if opened.roles.calibrate is None and opened.roles.select is None and opened.roles.confirm is None:
        return [f"no data: each pass was proved on {items} synthetic samples"]
    return [f"each pass was proved on {items} samples", *opened.notes]


def _form_words(recipe: Recipe) -> list[str]:
    """Why an operator may not have been put in although a backend has it."""
    if recipe.target.name not in registry.ALIASES:
        return []
    return [
        "no backend was named, so nothing was put in that some lack, as Attention: --target onnxruntime gives its form"
    ]


def _not_judged(rows: Sequence[Row]) -> list[str]:
    """That passes which promise nothing changed the model, and nobody judged what that costs."""
    lossy = [r.name for r in rows if r.status == "applied" and registry.pass_class(r.name).tolerance is None]
    if not lossy:
        return []
    return [f"warning: accuracy was not judged after {', '.join(lossy)}: see its drift, or run optimize MODEL"]


def _for_nobody(recipe: Recipe, rows: Sequence[Row]) -> list[str]:
    """That passes were refused for what a backend has to have, and none was named."""
    asked = [row.name for row in rows if row.status == "refused" and "this backend" in str(row.reason)]
    if recipe.target.name not in registry.ALIASES or recipe.passes == "default" or not asked:
        return []
    names = ", ".join(dict.fromkeys(asked))
    return [f"warning: {names}: refused because no backend was named: --target openvino, onnxruntime, … gives its form"]


def _capabilities(recipe: Recipe, checks: Worker) -> Capabilities:
    """What the form follows: the named target's, also where it is elsewhere; of an alias nothing in particular."""
    if recipe.target.name in registry.ALIASES:
        return Capabilities()
    anything = recipe.target.model_copy(update={"precision": None})
    backends, _, absent = usable_backends(recipe.model_copy(update={"target": anything}), checks)
    if backends:
        return backends[0].capabilities
    assert absent is not None
    return absent.capabilities


def _without_scratch(artifact: Artifact, folder: Path) -> Artifact:
    """The artifact, forgetting a file of it that is about to go."""
    gone = artifact.path is not None and artifact.path.is_relative_to(folder)
    return Artifact(model=artifact.model, steps=artifact.steps) if gone else artifact


# The file -------------------------------------------------------------------------------------------------------------


def _check_file(path: Path, force: bool, inputs: Sequence[str]) -> None:
    """Refuse, before any work is done, a file that can't or mustn't be written. Raises InputError."""
    other = "give another file with --out"
    if path.is_dir():
        raise InputError(f"{path} is a folder", fix="give a file with --out, as model.onnx")
    model = Path(inputs[0])
    weights = external_files(model) if model.suffix == ".onnx" else []
    read = {os.path.realpath(one) for one in (*inputs, *(str(model.with_name(name)) for name in weights))}
    for written in (path, weights_beside(path)):
        if os.path.realpath(written) in read:
            raise InputError(f"{written} is what is read here", fix=other)
        if written.exists() and not force:
            raise InputError(f"{written} exists", fix=f"{other}, or --force to replace it")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist", fix="create it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"can't write into {parent}", fix=other)


def weights_beside(path: Path) -> Path:
    """Where the weights of a large model lie."""
    return path.with_name(f"{path.name}.data")


def _write(artifact: Artifact, path: Path) -> None:
    """The model as `path`, weights above 1.5 GB beside it: written aside, the file that names the others last."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
        try:
            # A twin, so that the artifact doesn't remember a file that is about to move.
            Artifact(model=artifact.model).save(aside / path.name)
            _into_place(weights_beside(aside / path.name), weights_beside(path))
            _into_place(aside / path.name, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        why = "no room on its disk" if no_room(error) else error.strerror
        raise InputError(f"can't write {path}: {why}", fix="give another file with --out") from None


def _into_place(written: Path, path: Path) -> None:
    """Move a file that was written to where it belongs; where nothing was, take away what is there of an earlier one."""
    if not written.exists():
        path.unlink(missing_ok=True)
        return
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
