"""What `import perwatt` offers: optimize a model, rewrite or read one, load a bundle and run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perwatt import registry
from perwatt.bundle import Bundle, open_bundle
from perwatt.compilation import compile_model, out_folder
from perwatt.contract import OperatingPoint, Program
from perwatt.errors import InputError, TargetError
from perwatt.fronts import pick
from perwatt.isolation import Worker
from perwatt.options import build_recipe
from perwatt.portable import recipe_for
from perwatt.preparation import read_model
from perwatt.reading import Reading
from perwatt.rewriting import Rewritten, rewrite_model
from perwatt.signature import Array, Batch, Signature


def optimize(
    model: str | Path | None = None,
    *,
    target: str | None = None,
    config: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    fresh: bool = False,
    cluster: str | None = None,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Bundle:
    """Optimize `model` for `target` and leave a bundle.

    `options` are those of the command line with underscores: data, eval, train, confirm, image, resize, normalize, text, label,
    metric, expect, max_drop, p99, min_gain, size, memory, time, objective, trials, prove_accuracy, passes, threads, scenario,
    batch, precision, tune, on, allow_power_control, arch, arch_args, input, inputs, trust, seed, max_samples. `config` is a
    recipe file that options override. `fresh`: search even where the answer of the same search is in the cache.
    `cluster`: who makes the trials of a search, "auto", a number of workers on this machine, or HOST:PORT of a Ray cluster.
    `progress(stage, share)` is called along the way with the share done, 0 to 1.

    Raises InputError for what was given, TargetError where the target can't be used here, BackendError where a backend
    fails on this model. A budget that can't be met is no error: `bundle.outcome` says `budget_not_met`."""
    recipe = recipe_for(config, model=str(model) if model is not None else None, target=target, **options)
    told = progress or (lambda stage, share: None)
    where = out_folder(recipe, out)
    return compile_model(recipe, where, force=force, fresh=fresh, cluster=cluster, progress=told)


def read(model: str | Path, **options: Any) -> Reading:
    """Read a model as perwatt sees it: its artifact, signature, format and notes. Options as for `optimize`."""
    recipe = build_recipe(None, model=str(model), **options)
    with Worker("reading") as worker:
        return read_model(recipe, worker)


def rewrite(
    model: str | Path | None = None,
    *,
    target: str | None = None,
    config: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Rewritten:
    """Run passes on `model`, prove each on samples, and write the ONNX file `out` (`<stem>-rewritten.onnx` by default) that
    they lead to, in the form that `target` runs best; by default no operator is put in that some backend lacks.

    Nothing is lowered or measured, and lossy passes run only where `passes` lists them. Options of `optimize` that count:
    passes, seed, and all that say what the model and its samples are. Raises InputError for what was given, TargetError for
    a target that is neither here nor can be prepared for."""
    recipe = build_recipe(config, model=str(model) if model is not None else None, target=target, **options)
    return rewrite_model(recipe, out, force=force, progress=progress or (lambda stage, share: None))


class Model:
    """A bundle's program, loaded into this process. Needs the backend and NumPy; not torch."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def signature(self) -> Signature:
        """Typed inputs and outputs."""
        return self._program.signature

    @property
    def facts(self) -> dict[str, Any]:
        """Execution precision, threads, streams and versions as really set."""
        return self._program.facts()

    def run(self, inputs: Array | Mapping[str, Array]) -> Batch:
        """{name: array} out for an array (models with one input) or {name: array} in, any number of items on the batch
        axis. Types of one kind are converted, as float64 to float32. Raises InputError where names, types or shapes don't fit."""
        specs = self.signature.inputs
        if not isinstance(inputs, Mapping):
            if len(specs) != 1:
                raise InputError(f"the model has the inputs {[s.name for s in specs]}", fix="give {name: array}")
            inputs = {specs[0].name: inputs}
        batch = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        for spec in specs:
            given = batch.get(spec.name)
            if (
                given is not None
                and str(given.dtype) != spec.dtype
                and np.can_cast(given.dtype, spec.dtype, "same_kind")
            ):
                batch[spec.name] = given.astype(spec.dtype)
        problems = self.signature.problems(batch)
        if problems:
            raise InputError("; ".join(problems))
        return self._program.run(batch)


def load(bundle: str | Path | Bundle, *, rate: float | None = None, p99_ms: float | None = None) -> Model:
    """Load a bundle's program at its operating point, or at the one of its front that costs least for the load at hand:
    `rate` inferences a second, 99 % of calls within `p99_ms`, the time that a batch takes to fill up included.
    `facts["operating_point"]` says which batch to gather.

    Raises InputError for a folder that is no bundle, or where no point serves such a load; TargetError where its backend
    is missing here."""
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    facts = opened.program
    if facts.get("portable"):
        raise InputError(
            f"{opened.path} is not finished: nothing was lowered",
            fix=f"optimize {opened.path} --target {facts['target']}",
        )
    target = registry.target(facts["target"])
    missing = target.missing_to_run()
    if missing:
        raise TargetError(f"{facts['target']} can't be used here: {'; '.join(missing)}")
    wanted = facts if rate is None and p99_ms is None else pick(facts.get("front", []), rate, p99_ms)
    point = OperatingPoint(**wanted["operating_point"])
    return Model(target.load(opened.path / target.name(), opened.signature, point))


__all__ = ["Model", "Reading", "load", "optimize", "read", "rewrite"]
