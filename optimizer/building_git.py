"""What a gate asks git: which commit a ref is, what changed, and a commit's files in a folder.

The repository stays exactly as it was, also when the process is killed: a commit is put into a folder by `git read-tree`
with an index and a work tree of its own, outside the repository. Filters run (Git LFS, line ends), hooks don't, and
submodules are filled from those that are checked out here. `git worktree add` would run hooks, and leave an entry in the
repository after a kill, which only `git worktree prune` removes, with entries that are none of ours; `git archive` leaves
Git LFS pointers and no submodules.

Limits: a submodule that is not checked out here stays empty; a partial clone fetches what it lacks, as git always does.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perwatt.errors import InputError

LOCAL = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_CONFIG", "GIT_DIR", "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INTERNAL_SUPER_PREFIX", "GIT_NAMESPACE", "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_QUARANTINE_PATH", "GIT_REPLACE_REF_BASE", "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
)  # fmt: skip
"""Variables that tie git to one repository (`git rev-parse --local-env-vars`): hooks set them, and they would mislead git
in another folder. Those of `git -c` stay, as git itself keeps them for submodules."""

SAFE = (
    "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.untrackedCache=false", "core.splitIndex=false",
    "core.sparseCheckout=false", "submodule.recurse=false", "advice.detachedHead=false",
)  # fmt: skip
"""Settings of a checkout: whole, and without leaving anything in the repository or starting anything."""

QUIET = {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
"""Words in English, no questions, and no index refreshed on the side."""

KNOWN_AT_MOST = 8


@dataclass(frozen=True)
class Repository:
    """A repository with a work tree: `top` is the work tree's folder, `folder` where git keeps its files."""

    top: Path
    folder: Path


def environment() -> dict[str, str]:
    """This process's environment, without what ties git to one repository."""
    return {name: value for name, value in os.environ.items() if name not in LOCAL}


def find(folder: Path) -> Repository:
    """The repository that holds `folder`. Raises InputError where there is none, or no git."""
    done = _run(folder, "rev-parse", "--show-toplevel", "--absolute-git-dir")
    if done.returncode:
        words = _words(done)
        if "not a git repository" in words:
            raise InputError(f"{folder} is in no git repository", fix="give a bundle instead of a git ref")
        owned = re.search(r"dubious ownership in repository at '(.+?)'", words)
        if owned:
            fix = f"git config --global --add safe.directory {owned[1]}"
            raise InputError(f"git refuses {owned[1]}, which belongs to another user", fix=fix)
        raise InputError(f"git in {folder}: {words}")
    top, inner = done.stdout.rstrip("\n").split("\n")
    return Repository(Path(top), Path(inner))


def commit_of(repository: Repository, ref: str) -> str:
    """The full hash of the commit that `ref` names. Raises InputError that names the nearest refs, and how to fetch."""
    found = None if not ref or ref.startswith("-") else _object(repository.top, f"{ref}^{{commit}}")
    if found is None:
        raise _unknown(repository, ref)
    return found


def head(repository: Repository) -> str | None:
    """The full hash of HEAD; None before the first commit."""
    return _object(repository.top, "HEAD^{commit}")


def tree_of(repository: Repository, commit: str) -> str:
    """The hash of all files of a commit."""
    return git(repository.top, "rev-parse", f"{commit}^{{tree}}").strip()


def changes(repository: Repository, *, untracked: bool) -> list[str]:
    """Files of the work tree, relative to its top, that differ from HEAD, `untracked` ones too (ignored ones never)."""
    which = "all" if untracked else "no"
    how = ("-c", "core.fsmonitor=false", "status", "--porcelain=v1", "-z", "--no-renames")
    said = git(repository.top, *how, f"--untracked-files={which}")
    return sorted(entry[3:] for entry in said.split("\0") if entry)


def untracked_in(folder: Path) -> list[str]:
    """Files in `folder` that git does not keep, ignored ones too, relative to `folder`."""
    return sorted(name for name in git(folder, "ls-files", "-z", "--others").split("\0") if name)


def check_out(repository: Repository, commit: str, destination: Path, scratch: Path) -> list[str]:
    """Put the files of `commit` into the folder `destination`, submodules included; returns notes. `scratch` takes what
    is needed meanwhile. Raises InputError in git's words: no room, a filter that fails, an object that is missing."""
    destination.mkdir(parents=True, exist_ok=True)
    own = {
        "GIT_DIR": str(repository.folder),
        "GIT_WORK_TREE": str(destination),
        "GIT_INDEX_FILE": str(Path(tempfile.mkdtemp(dir=scratch)) / "index"),
    }
    settings = [part for setting in SAFE for part in ("-c", setting)]
    git(destination, *settings, "read-tree", "--reset", "-u", commit, environment=own)
    notes = []
    for path, pinned in _submodules(repository, commit):
        here = repository.top / path
        if not (here / ".git").exists():
            notes.append(f"the submodule {path} is not checked out here, so it is empty at {commit[:10]}")
            continue
        inner = find(here)
        if _object(inner.top, f"{pinned}^{{commit}}") is None:
            notes.append(f"the submodule {path} lacks its commit {pinned[:10]}, so it is empty at {commit[:10]}")
            continue
        notes += check_out(inner, pinned, destination / path, scratch)
    return notes


def _submodules(repository: Repository, commit: str) -> list[tuple[str, str]]:
    """(path, commit) of each submodule at `commit`."""
    entries = git(repository.top, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0")
    found = [entry.partition("\t") for entry in entries if entry.startswith("160000 ")]
    return [(path, facts.split()[2]) for facts, _, path in found]


def git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What git says in `folder`. Raises InputError with git's own words where it fails."""
    done = _run(folder, *arguments, more=environment or {})
    if done.returncode:
        command = next(part for part in arguments if not part.startswith("-") and "=" not in part)
        raise InputError(f"git {command} failed in {folder}: {_words(done)}")
    return done.stdout


def _run(folder: Path, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, env={**environment(), **QUIET, **(more or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, encoding="utf-8", errors="surrogateescape",
        )  # fmt: skip
    except FileNotFoundError:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}") from None
        raise InputError("git is not installed", fix="install it, or give bundles instead of git refs") from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """The line of git's that tells the reason."""
    lines = [line.strip() for line in done.stderr.split("\n") if line.strip()]
    reasons = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    words = (reasons or lines or [f"exit code {done.returncode}"])[0]
    return words.removeprefix("fatal: ").removeprefix("error: ").encode(errors="replace").decode()


def _object(folder: Path, name: str) -> str | None:
    done = _run(folder, "rev-parse", "--verify", "--quiet", name)
    return done.stdout.strip() if done.returncode == 0 else None


def _unknown(repository: Repository, ref: str) -> InputError:
    """Why a ref is not known, with what to do: in CI, the base branch is mostly not fetched."""
    shallow = git(repository.top, "rev-parse", "--is-shallow-repository").strip() == "true"
    kinds = ("refs/heads", "refs/remotes", "refs/tags")
    names = git(repository.top, "for-each-ref", "--format=%(refname:short)", *kinds).split()
    near = [name for name in names if name.endswith(f"/{ref}")] or difflib.get_close_matches(
        ref, names, n=3, cutoff=0.6
    )
    remote, _, branch = ref.partition("/")
    fixes = []
    if near:
        fixes.append(f"did you mean {' or '.join(near)}?")
    if branch and remote in git(repository.top, "remote").split():
        fixes.append(f"git fetch {remote} {branch}:refs/remotes/{remote}/{branch}")
    elif shallow:
        fixes.append("git fetch --unshallow")
    if shallow:
        fixes.append("in GitHub Actions: actions/checkout with fetch-depth: 0")
    if not fixes:
        more = ", …" if len(names) > KNOWN_AT_MOST else ""
        fixes.append(f"known are {', '.join(names[:KNOWN_AT_MOST])}{more}" if names else "nothing is committed yet")
    where = "this shallow clone" if shallow else str(repository.top)
    return InputError(f"git knows no commit {ref!r} in {where}", fix="; ".join(fixes))
