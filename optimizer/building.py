"""From what a person names as one side of a comparison to a bundle: a bundle as it is, a git ref, the working tree.

    main-bundle          as it is, as is a model file
    git:origin/main      that commit's files and its own version of the recipe, built as `optimize --config` would there
    nothing, or .        the working tree

A git ref is built as if it were checked out here: its files in a folder of their own, the same subfolder as the working
directory, and what git does not keep (data, models) taken from the working tree, which a note says. The build is a
process of its own, because paths in a recipe are relative to its working directory, which a process has only one of.
What was built once from the same content on the same machine comes from the cache.

Limits: only files that the recipe names are taken from the working tree. A path that is absolute, and a package that is
imported from the Python environment, are the same for every ref; a note says so.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as once
from pathlib import Path

from perwatt import building_git as repositories
from perwatt.building_cache import Cache, default_folder, entry_name, external_weights, from_environment, named_files
from perwatt.building_cache import path_of as path_in_recipe
from perwatt.building_git import Repository
from perwatt.bundle import Bundle, digest_of, is_bundle
from perwatt.errors import BackendError, InputError, PerwattError, TargetError
from perwatt.isolation import workspace
from perwatt.options import build_recipe
from perwatt.recipe import Recipe, missing_file
from perwatt.subjects import owner_of

GIT = "git:"
WORKING_TREE = "working tree"
Progress = Callable[[str, float], None]

BUILD_BEGINS = 0.05
"""Share of the whole that lies before the build: checking out, and looking into the cache."""

_SAID = re.compile(r"\s*[\d.]+ s\s+(\d+) %  (.+)")
_ERRORS = {InputError.exit_code: InputError, TargetError.exit_code: TargetError, PerwattError.exit_code: BackendError}
_BUDGET_NOT_MET = "budget_not_met"
_LAST_LINES = 30
_STOPPING_S = 10.0


@dataclass(frozen=True)
class Built:
    """One side, ready to be compared. `commit` is the full hash; of the working tree, HEAD's, and `dirty` says whether
    files that git keeps were changed since. `seconds`: wall time of getting it, whether built or found."""

    label: str
    path: Path
    commit: str | None
    dirty: bool
    from_cache: bool
    seconds: float
    notes: tuple[str, ...]


@dataclass
class Job:
    """What is to be built: `optimize --config config` in the folder `here`, which lies below `root` where it is a checkout.

    `code` stands for all that Python code may read there; `borrowed`: files of the working tree take part."""

    label: str
    here: Path
    config: Path
    recipe: Recipe
    code: Callable[[], str]
    root: Path | None = None
    commit: str | None = None
    dirty: bool = False
    borrowed: bool = False
    notes: list[str] = field(default_factory=list)


def resolve(
    spec: str | None,
    config: Path | None,
    *,
    cache: Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage, share: None,
) -> Built:
    """The bundle that `spec` stands for: a bundle or model file, `git:REF`, or None (also `.`) for the working tree.

    `config` is the recipe, as seen from the working directory; refs and the working tree need it. `cache` is the folder
    of bundles built before (None: `$PERWATT_CACHE`, else the user's cache folder), `force` builds anew. `progress` is
    told stages and the share (0..1) that is done. Raises InputError for what can't be found or read, and the build's own
    error where that fails. A budget that was not met is no error: the bundle is there, and a note says so."""
    started = time.perf_counter()
    if spec is not None and spec.startswith(GIT):
        with workspace() as scratch:
            job = _ref_job(spec, _needed(config, spec), Path(scratch), progress)
            return _built(job, Cache(cache or default_folder()), force, progress, started)
    if spec is None or (spec == "." and config is not None):
        job = _working_tree_job(_needed(config, WORKING_TREE))
        return _built(job, Cache(cache or default_folder()), force, progress, started)
    return Built(spec, _as_given(spec), None, False, False, time.perf_counter() - started, ())


def _needed(config: Path | None, label: str) -> Path:
    if config is None:
        if label == WORKING_TREE:
            raise InputError(
                "without --head the working tree is built, and that takes a recipe",
                fix="name --head, or add --config recipe.yaml",
            )
        raise InputError(f"building {label} takes a recipe, and none was given", fix="add --config recipe.yaml")
    return config


def _as_given(spec: str) -> Path:
    """A bundle, or a model file or folder, where it lies."""
    from perwatt.reading import detect

    path = Path(spec)
    if not path.exists() and _is_ref(spec):
        raise InputError(f"there is no bundle {spec}", fix=f"the git ref is written {GIT}{spec}")
    if not is_bundle(path) and owner_of(path) is None:
        detect(path)
    return path


def _is_ref(spec: str) -> bool:
    try:
        repositories.commit_of(repositories.find(Path.cwd()), spec)
    except InputError:
        return False
    return True


def _working_tree_job(config: Path) -> Job:
    """The files as they are now; git, where there is any, only tells which commit they come from."""
    recipe = build_recipe(config)
    unknowable = os.urandom(16).hex()
    try:
        repository = repositories.find(Path.cwd())
    except InputError:
        # Nobody can tell which files the recipe's code reads: a key that never comes again.
        return Job(WORKING_TREE, Path.cwd(), config, recipe, code=lambda: unknowable, borrowed=True)
    commit = repositories.head(repository)
    dirty = bool(repositories.changes(repository, untracked=False))
    return Job(
        WORKING_TREE, Path.cwd(), config, recipe, once(lambda: _state(repository, commit)),
        commit=commit, dirty=dirty, borrowed=True,
    )  # fmt: skip


def _state(repository: Repository, commit: str | None) -> str:
    """Stands for all files of the work tree that git does not ignore; a clean one's is that of its commit."""
    tree = repositories.tree_of(repository, commit) if commit is not None else ""
    parts = [tree]
    for name in repositories.changes(repository, untracked=True):
        path = repository.top / name
        if not _is_product(path, repository.top):
            parts.append(f"{name} {digest_of(path) if path.exists() else None}")
    return "\n".join(parts)


def _is_product(path: Path, top: Path) -> bool:
    """Whether building itself leaves such a file: compiled Python, and bundles."""
    inside = (folder for folder in path.parents if folder != top and folder.is_relative_to(top))
    return "__pycache__" in path.parts or any(is_bundle(folder) for folder in inside)


def _ref_job(spec: str, config: Path, scratch: Path, progress: Progress) -> Job:
    """The files of `git:REF` in a folder below `scratch`, completed from the working tree."""
    ref = spec.removeprefix(GIT)
    cwd = Path.cwd().resolve()
    repository = repositories.find(cwd)
    commit = repositories.commit_of(repository, ref)
    name = f"{ref} ({commit[:10]})"
    progress(f"checking out {ref}", 0.0)
    # At its own path below a root of ours: `../data` then leads to a place that can be filled, outside of nothing else.
    root = scratch / "files"
    notes = repositories.check_out(repository, commit, _below(root, repository.top), scratch)
    here = _below(root, cwd)
    here.mkdir(parents=True, exist_ok=True)
    there = _config_at(config, repository, root, name, notes)
    try:
        recipe = build_recipe(there)
    except InputError as error:
        raise InputError(f"{spec}: {_plain(error.message, here, root)}", fix=error.fix) from None
    config = Path(os.path.relpath(there, here)) if there.is_relative_to(root) else there
    tree = repositories.tree_of(repository, commit)
    job = Job(spec, here, config, recipe, lambda: tree, root, commit, notes=notes)
    _complete(job, repository, root, cwd, name)
    return job


def _below(root: Path, path: Path) -> Path:
    """Where the absolute `path` is mirrored below `root`."""
    return root.joinpath(*path.parts[1:])


def _config_at(config: Path, repository: Repository, root: Path, name: str, notes: list[str]) -> Path:
    """The commit's own version of the recipe. Raises InputError where it has none."""
    ways = (Path(os.path.normpath(config.absolute())), config.resolve())
    absolute = next((path for path in ways if path.is_relative_to(repository.top)), None)
    if absolute is None:
        notes.append(f"{config} lies outside the repository: it is the same for every ref")
        return config.absolute()
    there = _below(root, absolute)
    if not there.is_file():
        if not config.is_file():
            raise missing_file(config, "recipe")
        fix = "the change that brings the recipe has nothing to be compared with: merge it first, or give a bundle as that side"
        raise InputError(f"the recipe {config} does not exist at {name}", fix=fix)
    return there


def _plain(message: str, here: Path, root: Path | None) -> str:
    """An error's words with paths as the person knows them."""
    return message if root is None else message.replace(f"{here}{os.sep}", "").replace(str(root), "")


def _complete(job: Job, repository: Repository, root: Path, cwd: Path, name: str) -> None:
    """Make what the recipe names and the commit lacks visible in the checkout, as links to the working tree's files:
    what would be there if the ref were checked out here, because git does not keep it."""
    for where in dict.fromkeys(named_files(job.recipe).values()):
        path = path_in_recipe(where)
        if path.is_absolute():
            if path.is_relative_to(repository.top):
                job.borrowed = True
                job.notes.append(f"{path} is an absolute path: it is the working tree's for every ref")
            continue
        ours, theirs = Path(os.path.normpath(job.here / path)), Path(os.path.normpath(cwd / path))
        if not ours.is_relative_to(root):
            raise InputError(f"{job.label}: {where} leads above the root folder", fix="correct the path in the recipe")
        if not _inside(ours, root):
            job.notes.append(f"{path} is behind a link that leads out of the repository: it is the same for every ref")
            continue
        missing = not ours.exists() and theirs.exists()
        if missing:
            _link(ours, theirs)
            job.borrowed = True
            job.notes.append(f"{path} is not in {name}: taken from the working tree")
        elif ours.is_dir() and theirs.is_dir() and theirs.resolve().is_relative_to(repository.top.resolve()):
            _fill(job, ours, theirs, f"{path} that are not in {name}")
        _add_weights(job, ours, theirs, linked=missing)
    if from_environment(job.recipe, job.here) is not None:
        package = str(job.recipe.model.arch).partition(":")[0]
        job.notes.append(f"{package} is imported from the Python environment: it is the same for every ref")


def _inside(path: Path, root: Path) -> bool:
    """Whether `path`, links followed, lies below `root`: what a commit's link leads to outside is the person's own. A
    link that leads nowhere is judged by where it stands."""
    real = path.resolve() if path.exists() else path.parent.resolve() / path.name
    return real.is_relative_to(root.resolve())


def _link(ours: Path, theirs: Path) -> None:
    try:
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.unlink(missing_ok=True)  # a link of the commit's that leads nowhere here
        ours.symlink_to(theirs)
    except OSError as error:
        raise InputError(f"can't put {theirs} into the checkout: {error.strerror}") from None


def _fill(job: Job, ours: Path, theirs: Path, what: str) -> None:
    """Link the files of a folder that git does not keep, each by itself: what reads folders follows no links inside."""
    count = 0
    for name in repositories.untracked_in(theirs):
        if not os.path.lexists(ours / name) and (theirs / name).exists():
            _link(ours / name, theirs / name)
            count += 1
    if count:
        job.borrowed = True
        job.notes.append(f"{count} {'file' if count == 1 else 'files'} of {what}: taken from the working tree")


def _add_weights(job: Job, ours: Path, theirs: Path, *, linked: bool) -> None:
    """Weights beside an ONNX model that the commit lacks. Beside a linked model they are linked, beside one of the
    commit's copied: runtimes refuse weights that a link leads away to."""
    for name in external_weights(ours):
        source, target = theirs.parent / name, ours.parent / name
        if target.exists() or not source.is_file() or ".." in Path(name).parts:
            continue
        if linked:
            _link(target, source)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        job.borrowed = True
        job.notes.append(f"{name}, the weights of {ours.name}: taken from the working tree")


def _built(job: Job, cache: Cache, force: bool, progress: Progress, started: float) -> Built:
    """The job's bundle, from the cache or built into it."""
    progress(f"looking for {job.label} in the cache", BUILD_BEGINS / 2)
    name = entry_name(job.recipe, job.here, job.code)
    with cache.building(name, lambda: progress(f"waiting: {job.label} is being built already", BUILD_BEGINS)) as path:
        found = None if force else cache.use(name)
        if found is None:
            _build(job, path, progress)
            _check_unchanged(job, name, path)
            cache.prune()
    notes = job.notes
    if Bundle(path).outcome == _BUDGET_NOT_MET:
        notes = [*notes, "the budget was not met: the bundle holds the best so far"]
    seconds = time.perf_counter() - started
    return Built(job.label, path, job.commit, job.dirty, found is not None, seconds, tuple(notes))


def _check_unchanged(job: Job, name: str, path: Path) -> None:
    """Files that the recipe names may change under the build: its result then belongs to no key. What code of the
    recipe's writes into the working tree meanwhile does not count."""
    if job.borrowed and entry_name(build_recipe(job.here / job.config), job.here, job.code) != name:
        shutil.rmtree(path, ignore_errors=True)
        raise InputError(f"{job.label}: files changed while they were being built", fix="run it again")


def _build(job: Job, out: Path, progress: Progress) -> None:
    """Run `optimize` on the job. Raises the error that it ends with."""
    progress(f"building {job.label}", BUILD_BEGINS)
    last: deque[str] = deque(maxlen=_LAST_LINES)
    # A session of its own: Ctrl-C reaches this process, which then ends the build in order.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "perwatt.cli", "--config", str(job.config), "--out", str(out), "--force", "--verbose"],
        cwd=job.here, env={**repositories.environment(), "PYTHONIOENCODING": "utf-8"}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said = _SAID.match(line)
            if said:
                share = BUILD_BEGINS + (1 - BUILD_BEGINS) * int(said[1]) / 100
                progress(f"{job.label}: {said[2].strip()}", min(1.0, share))
            elif line.strip():
                last.append(line.strip())
        code = process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        process.stderr.close()
    if code not in (0, 3) or not is_bundle(out):
        raise _failure(job, code, last)


def _stop(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C would: it ends its workers and removes what it has half written."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOPPING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(job: Job, code: int, last: deque[str]) -> PerwattError:
    """What the build's exit code stands for, with its last words."""
    told = [line.removeprefix("optimize: ") for line in last if line.startswith("optimize: ")]
    words = _plain((told or list(last) or ["it said nothing"])[-1], job.here, job.root)
    if code in _ERRORS:
        return _ERRORS[code](f"{job.label}: {words}")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return BackendError(f"{job.label}: the build {how}: {words}")
