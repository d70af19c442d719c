"""What tests with git repositories share: making one, and seeing that it stayed exactly as it was."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

SETTINGS = ("user.name=T", "user.email=t@example.org", "init.defaultBranch=main", "protocol.file.allow=always")


def git(folder: Path, *arguments: object) -> str:
    """What git says in `folder`; nobody's own configuration takes part."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    settings = [part for setting in SETTINGS for part in ("-c", setting)]
    environment = {**plain, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *settings, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def repository(folder: Path, **files: str | bytes) -> Path:
    """A new repository with one commit; keyword arguments would not do for paths, so `commit` takes more."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    if files:
        commit(folder, files)
    return folder


def commit(folder: Path, files: dict[str, str | bytes | None], message: str = "change") -> str:
    """Write (None: remove) files, commit them all; the new commit's hash."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def everything(folder: Path) -> dict[str, str]:
    """All files of a work tree and of its `.git`, with their contents: index, refs, logs, objects, worktrees, stash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def told(folder: Path) -> dict[str, str]:
    """What git tells of a repository: HEAD, branches, status, stash and worktrees."""
    return {
        "head": git(folder, "rev-parse", "--symbolic-full-name", "HEAD") + git(folder, "rev-parse", "HEAD"),
        "refs": git(folder, "for-each-ref"),
        "status": git(folder, "status", "--porcelain=v1", "--ignored"),
        "stash": git(folder, "stash", "list"),
        "worktrees": git(folder, "worktree", "list", "--porcelain"),
    }
