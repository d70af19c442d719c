"""Names of nodes: exclusions, costs and NNCF go by them."""

from __future__ import annotations

import fnmatch
import itertools
from typing import Any

from perwatt.artifact import Artifact, Step
from perwatt.errors import PassError


def with_names(artifact: Artifact, step: Step) -> Artifact:
    """The artifact with a name of its own for every node; those that have one keep it."""
    model = artifact.edit()
    given = [node.name for node in model.graph]
    taken: set[str] = set()
    for number, node in enumerate(model.graph):
        wanted = node.name or f"{node.op_type}_{number}"
        free = (f"{wanted}_{n}" for n in itertools.count(number))
        node.name = wanted if wanted not in taken else next(n for n in free if n not in taken and n not in given)
        taken.add(node.name)
    return artifact.after(model, step)


def matching(patterns: tuple[str, ...], graph: Any) -> list[str]:
    """Names of the nodes that shell patterns name. Raises PassError for a pattern that matches none."""
    names = [node.name for node in graph]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise PassError(f"exclude {pattern!r} matches no node; names look like {', '.join(names[:3])}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
