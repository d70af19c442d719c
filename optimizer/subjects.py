"""What a person names to be measured, opened: a bundle, a model in any format that is read, or a backend's own file.

Each subject gets two worker processes where memory allows: what two processes of one model differ by is the noise floor
of the job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perwatt import datasets, registry
from perwatt.artifact import Artifact
from perwatt.backends import precision_refusal
from perwatt.bundle import digest_of, is_bundle, open_bundle
from perwatt.contract import OperatingPoint, Scenario
from perwatt.data import Samples
from perwatt.datasets_source import WARNING
from perwatt.errors import BackendError, InputError, TargetError
from perwatt.isolation import Worker
from perwatt.options import PLACES, build_recipe
from perwatt.preparation import OFFLINE_BATCH, operating_point, read_model
from perwatt.recipe import DataSection, Recipe
from perwatt.sides import Side
from perwatt.signature import Signature, TensorSpec
from perwatt.synthetic import made_up, synthetic
from perwatt.worker_load import TIMED_ITEMS

DATA_OPTIONS = ("data", *(name for name, (section, _) in PLACES.items() if section == "data"))
MODEL_OPTIONS = ("arch", "arch_args", "input", "trust")
READ_AS = ("image", "resize", "normalize", "text", "label")
"""How samples become inputs: a bundle's recipe says it, a model file says nothing."""
MEMORY_FACTOR = 6
"""A process holds its model's files several times over while it compiles: more than this is not doubled."""


@dataclass
class Subject:
    """One thing to measure. `replicas` are processes that run the same program."""

    label: str
    path: Path
    kind: str
    target: str
    device: str
    signature: Signature
    point: OperatingPoint
    recipe: Recipe
    replicas: list[Side] = field(default_factory=list)
    artifact: Artifact | None = None
    tokenizer: Path | None = None
    label2id: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)
    roles: datasets.Roles | None = None
    samples: Path | None = None

    @property
    def main(self) -> Side:
        """The process that answers where one is enough."""
        return self.replicas[0]

    @property
    def name(self) -> str:
        """The model's name, by which history is kept: a bundle's is that of the model it was made from."""
        path = Path(self.recipe.model.path) if self.kind == "bundle" else self.path
        return path.name if path.is_dir() else path.stem

    def digest(self) -> str | None:
        """SHA-256 of the model's files as they are deployed."""
        where = self.path / self.target if self.kind == "bundle" else self.path
        if where.is_dir():
            return digest_of(where)
        found = [digest_of(file) for file in _with_weights(where)]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def close(self) -> None:
        """End its processes."""
        for side in self.replicas:
            side.close()


def options_recipe(path: Path, options: Mapping[str, Any]) -> Recipe:
    """The recipe that the command's options make for one model."""
    return build_recipe(None, model=str(path), **{name: value for name, value in options.items() if value is not None})


def open_subject(
    path: Path, label: str, options: Mapping[str, Any], folder: Path, checks: Worker, *, most_replicas: int = 2
) -> Subject:
    """Start what runs `path`; `load` makes it ready. `options` are those of the command line with underscores.

    Raises InputError for what can't be read, TargetError where its backend can't be used here."""
    check_named_data(options)
    if not path.exists():
        raise InputError(f"there is no {path}", fix="give a bundle, a model file or a Hugging Face folder")
    if is_bundle(path):
        subject, operation, parameters = _bundle(path, label, options, checks)
    elif owner := owner_of(path):
        subject, operation, parameters = _own_file(path, label, options, owner, checks)
    else:
        subject, operation, parameters = _model(path, label, options, folder, checks)
    judging = subject.recipe.data.eval
    if judging and options.get("data") not in (None, judging):
        subject.notes.append(f"{options['data']} is not used: nothing is calibrated here, and {judging} judges")
    parameters = {**parameters, "target": subject.target, "point": asdict(subject.point)}
    try:
        for number in range(_replicas(path, most_replicas)):
            name = f"{label} (process {number + 1})"
            subject.replicas.append(Side.to_open(name, operation, **parameters))
    except BaseException:
        subject.close()
        raise
    return subject


def check_named_data(options: Mapping[str, Any]) -> None:
    """Refuse samples that the command itself names and that are not there: only a recipe's may be gone. Raises InputError."""
    for name in ("data", "eval"):
        where = options.get(name)
        if where is not None and datasets.kind_of(str(where)) == "callable" and not _is_there(str(where)):
            raise InputError(f"no such data set: {where}", fix="give file.py:callable of a file that is there")


def _with_weights(path: Path) -> list[Path]:
    """A model file, and those beside it that hold its weights: `net.xml` and `net.bin`, `net.onnx` and `net.onnx.data`."""
    beside = [path.with_suffix(".bin"), path.with_suffix(".data"), path.with_name(path.name + ".data")]
    return [path, *sorted({file for file in beside if file != path and file.is_file()})]


def _replicas(path: Path, most: int) -> int:
    files = _with_weights(path) if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return most if MEMORY_FACTOR * size * 2 * most < memory else 1


def _check_target(name: str, precision: str | None, checks: Worker) -> dict[str, Any]:
    facts = checks.call("target", name=name)
    if facts["missing"]:
        raise TargetError(f"target {name} can't be used here: {'; '.join(facts['missing'])}")
    if refusal := precision_refusal(facts["capabilities"]["floating_precisions"], precision):
        raise TargetError(f"target {name} can't be used here: {refusal}")
    return facts


def _bundle(path: Path, label: str, options: Mapping[str, Any], checks: Worker) -> tuple[Subject, str, dict[str, Any]]:
    bundle = open_bundle(path)
    program = bundle.program
    target = str(program["target"])
    if program.get("portable"):
        raise InputError(f"{path} is not finished: nothing was lowered", fix=f"optimize {path} --target {target}")
    asked = options.get("target")
    if asked is not None and target not in registry.serving(asked):
        raise InputError(
            f"{path} is a bundle for {target}, not for {asked}", fix=f"give its {path / 'model.onnx'}, or no --target"
        )
    precision, saved_in = options.get("precision"), program["operating_point"].get("floating_precision")
    if precision not in (None, saved_in) and "floating_precision" in registry.target(target).fixed_once_saved:
        raise InputError(
            f"{path} was compiled for {saved_in}, not for {precision}", fix=f"give its {path / 'model.onnx'}"
        )
    facts = _check_target(target, precision, checks)
    saved = path / registry.target(target).name()
    if not saved.is_dir():
        raise InputError(f"the bundle {path} is damaged: it has no folder {saved.name}", fix="make it anew")
    # Its own data, read in its own way, but for what the command says otherwise.
    own, asked_for = build_recipe(path / "recipe.yaml"), _only(options, DATA_OPTIONS)
    recipe = build_recipe(path / "recipe.yaml", **asked_for) if asked_for else own
    recipe, notes = _without_code(recipe, options)
    notes += _overridden(own.data, recipe.data)
    point = _at(OperatingPoint(**program["operating_point"]), options)
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else None
    subject = Subject(
        label, path, "bundle", target, facts["device"], bundle.signature, point, recipe, tokenizer=tokenizer,
        artifact=Artifact(path=path / "model.onnx", signature=bundle.signature), label2id=_label2id(tokenizer), notes=notes,
    )  # fmt: skip
    return subject, "load", {"folder": str(saved), "signature": asdict(bundle.signature)}


def _overridden(own: DataSection, asked: DataSection) -> list[str]:
    """A bundle knows how its samples are to be read: what the command says otherwise is most likely a mistake."""
    found = [(name, getattr(own, name), getattr(asked, name)) for name in READ_AS]
    return [
        f"{WARNING}the bundle's own recipe says {name} {theirs}, but --{name} {ours} was given"
        for name, theirs, ours in found
        if theirs is not None and ours != theirs
    ]


def _without_code(recipe: Recipe, options: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """A bundle may come from anywhere: Python files that its recipe names are run only where the command says so."""
    data = recipe.data
    named = {name: getattr(data, name) for name in ("all", "calibrate", "eval", "train", "metric")}
    said = {str(options[name]) for name in ("data", "eval", "train", "metric") if options.get(name) is not None}
    code = {name: value for name, value in named.items() if value and ".py:" in value and value not in said}
    if not code or options.get("trust"):
        return recipe, []
    note = f"its recipe's {next(iter(code.values()))} is Python and is not run: name it on the command line, or --trust"
    return recipe.model_copy(update={"data": data.model_copy(update=dict.fromkeys(code))}), [note]


def _label2id(tokenizer: Path | None) -> dict[str, int] | None:
    """How a Hugging Face model numbers its classes, from the configuration that travelled with its tokenizer."""
    try:
        found = json.loads((tokenizer / "config.json").read_text()).get("label2id") if tokenizer is not None else None
    except (OSError, ValueError, AttributeError):
        return None
    return {str(name): int(number) for name, number in found.items()} if isinstance(found, dict) else None


def owner_of(path: Path) -> str | None:
    """The target whose own format this file is in, None where it is none's."""
    if not path.is_file() or not path.suffix:
        return None
    return next((name for name in registry.names("targets") if path.suffix in registry.target(name).formats), None)


def _own_file(
    path: Path, label: str, options: Mapping[str, Any], target: str, checks: Worker
) -> tuple[Subject, str, dict[str, Any]]:
    facts = _check_target(target, options.get("precision"), checks)
    try:
        plain = checks.call("file_signature", target=target, path=str(path))["signature"]
    except BackendError as error:
        raise InputError(f"{path} can't be read: {error}") from None
    from perwatt.artifact import signature_from_json

    recipe = options_recipe(path, {**_only(options, DATA_OPTIONS), "target": target})
    point = _at(OperatingPoint(), options)
    signature = signature_from_json(plain)
    subject = Subject(label, path, f"{target}-file", target, facts["device"], signature, point, recipe)
    return subject, "open_file", {"path": str(path), "signature": plain}


def _model(
    path: Path, label: str, options: Mapping[str, Any], folder: Path, checks: Worker
) -> tuple[Subject, str, dict[str, Any]]:
    recipe = options_recipe(path, _only(options, (*DATA_OPTIONS, *MODEL_OPTIONS, "target")))
    # A model file is measured as it is: an alias stands for its best liked backend, whatever would be chosen for it.
    target = registry.serving(recipe.target.name)[0]
    facts = _check_target(target, options.get("precision"), checks)
    reading = read_model(recipe, checks)
    point = _at(operating_point(recipe), options)
    subject = Subject(
        label, path, reading.format, target, facts["device"], reading.artifact.signature, point, recipe,
        artifact=reading.artifact, tokenizer=reading.tokenizer, label2id=reading.label2id, notes=list(reading.notes),
    )  # fmt: skip
    return subject, "open", {"model": str(reading.artifact.file(folder))}


def _only(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _at(point: OperatingPoint, options: Mapping[str, Any]) -> OperatingPoint:
    """The operating point with what the command asks for. Another scenario takes another default batch, and leaves
    threads, streams and requests, which were right for the one before, to the backend."""
    scenario: Scenario = options.get("scenario") or point.scenario
    if scenario != point.scenario:
        batch = OFFLINE_BATCH if scenario == "offline" else 1
        point = replace(point, scenario=scenario, batch=batch, threads=None, streams=None, requests=None)
    asked = {name: options[name] for name in ("batch", "threads", "streams") if options.get(name) is not None}
    if {"threads", "streams"} & set(asked):
        # So many requests were right for other streams.
        point = replace(point, requests=None)
    if options.get("precision") is not None:
        asked["floating_precision"] = options["precision"]
    return replace(point, **asked)


def load(subjects: Sequence[Subject]) -> None:
    """Make every process ready; two at a time. Raises what the first that fails raises."""
    sides = [side for subject in subjects for side in subject.replicas]
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        for done in [pool.submit(side.load) for side in sides]:
            done.result()
    except BaseException:
        # Nobody waits for what is still loading.
        pool.shutdown(wait=False, cancel_futures=True)
        for side in sides:
            side.worker.kill()
        raise
    pool.shutdown()


# Samples --------------------------------------------------------------------------------------------------------


def give_samples(subjects: Sequence[Subject], folder: Path, seed: int) -> str:
    """Find inputs for all subjects and store them for their workers; says in words what they are.

    The first subject's data serve those that name none. Real samples where a recipe or the command names some that are
    here, else made-up ones, the same for all whose inputs are the same."""
    _read_alike(subjects)
    first = subjects[0]
    words = ""
    for number, subject in enumerate(subjects):
        same = next((s for s in subjects[:number] if _same_inputs(s, subject)), None)
        if same is not None:
            subject.roles, subject.samples = same.roles, same.samples
            subject.notes.extend(note for note in same.notes if note.startswith(WARNING) and note not in subject.notes)
            continue
        found, said = _borrowed(subject, first, seed) if number else _timing_samples(subject, seed)
        words = words or said
        subject.samples = found.save(folder / f"samples-{number}")
    return words


def _read_alike(subjects: Sequence[Subject]) -> None:
    """Whoever does not say how samples are to be read takes it from a subject with the same inputs that does: one picture
    normalised for base and not for head would make a guesser of the head."""
    for subject in subjects:
        for other in subjects:
            if other is subject or other.recipe.inputs or subject.recipe.inputs or not _same_shapes(other, subject):
                continue
            ours, theirs = subject.recipe.data, other.recipe.data
            found = {
                n: getattr(theirs, n) for n in READ_AS if getattr(ours, n) is None and getattr(theirs, n) is not None
            }
            if found:
                subject.recipe = subject.recipe.model_copy(update={"data": ours.model_copy(update=found)})
                said = ", ".join(f"{name} {value}" for name, value in found.items())
                subject.notes.append(f"samples are read as for {other.label}: {said}")


def _same_shapes(a: Subject, b: Subject) -> bool:
    """Whether the inputs are alike, whatever they are called."""
    return [(one.dtype, _numbers(one)) for one in a.signature.inputs] == [
        (one.dtype, _numbers(one)) for one in b.signature.inputs
    ]


def _numbers(spec: TensorSpec) -> list[int | None] | None:
    return None if spec.shape is None else [dim if isinstance(dim, int) else None for dim in spec.shape]


def _same_inputs(a: Subject, b: Subject) -> bool:
    data = not names_data(b.recipe.data) or (a.recipe.data == b.recipe.data and a.recipe.inputs == b.recipe.inputs)
    return data and a.signature.inputs == b.signature.inputs and a.label2id == b.label2id and _same_tokenizer(a, b)


def _same_tokenizer(a: Subject, b: Subject) -> bool:
    if a.tokenizer is None or b.tokenizer is None:
        return a.tokenizer is b.tokenizer
    return digest_of(a.tokenizer) == digest_of(b.tokenizer)


def _borrowed(subject: Subject, first: Subject, seed: int) -> tuple[Samples, str]:
    """The subject's own samples, else those of the first one where they fit."""
    own = subject.recipe
    if names_data(own.data) or not names_data(first.recipe.data):
        return _timing_samples(subject, seed)
    subject.recipe = own.model_copy(update={"data": first.recipe.data, "inputs": first.recipe.inputs})
    try:
        return _timing_samples(subject, seed)
    except InputError as error:
        subject.recipe = own
        subject.notes.append(f"the data of {first.label} don't fit it ({error.message}): inputs are made up")
        return _timing_samples(subject, seed)


def names_data(data: DataSection) -> bool:
    """Whether any samples are named."""
    return any((data.all, data.calibrate, data.eval, data.train))


def _timing_samples(subject: Subject, seed: int) -> tuple[Samples, str]:
    data = subject.recipe.data
    if data.eval:
        # Nothing is calibrated or learnt here, so all of `eval` judges. A set that served everything is split as it was
        # when the bundle was made, so that what calibrated does not judge.
        data = data.model_copy(update={"calibrate": data.eval, "train": None})
    if names_data(data):
        missing = [w for w in (data.all, data.eval, data.calibrate, data.train) if w and not _is_there(w)]
        if missing:
            subject.notes.append(f"{missing[0]}, which its recipe names, is not here: inputs are made up")
        else:
            subject.roles = datasets.open_roles(
                data, subject.signature, raw_inputs=subject.recipe.inputs, tokenizer=subject.tokenizer,
                label2id=subject.label2id, seed=subject.recipe.seed,
            )  # fmt: skip
            roles = subject.roles
            subject.notes.extend(roles.notes)
            real = roles.select or roles.confirm or roles.calibrate or roles.learn
            if real is not None:
                # No more than is timed: pages of a file that a process has mapped would count as its memory.
                few = real.without_labels().take(max(TIMED_ITEMS, subject.point.batch))
                read = f", normalize {data.normalize}" if data.normalize else ""
                return few, f"samples from {data.eval or data.all or data.calibrate or data.train}{read}"
    if subject.artifact is not None:
        return synthetic(subject.artifact, seed=seed), "made-up inputs"
    return made_up(subject.signature, seed=seed), "made-up inputs"


def _is_there(where: str) -> bool:
    """Whether a data set exists; `file.py:callable` is there when its file is."""
    path = Path(where)
    return path.exists() or Path(where.rpartition(":")[0] or where).exists()
