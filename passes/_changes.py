"""What a pass says about its own change, in words: shared by the passes that rewrite whole graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perwatt.artifact import Artifact
from perwatt.contract import Pass


def count_changes(made_by: Pass, before: Artifact, model: Any, extra: Sequence[str] = ()) -> tuple[Artifact, list[str]]:
    """The artifact for the changed `model` with its changes in words; `before` itself where nothing changed."""
    after = before.after(model, made_by.step(()))
    if after.digest() == before.digest():
        return before, []
    old, new = before.operator_counts(), after.operator_counts()
    counts = {name: (old.get(name, 0), new.get(name, 0)) for name in sorted(set(old) | set(new))}
    changed = sorted((n for n, (a, b) in counts.items() if a != b), key=lambda n: -abs(counts[n][0] - counts[n][1]))
    moved = [f"{name} {counts[name][0]} → {counts[name][1]}" for name in changed]
    changes = [*extra]
    if moved:
        more = f" and {len(moved) - 4} more kinds" if len(moved) > 4 else ""
        changes.append(f"{sum(old.values())} → {sum(new.values())} nodes: {', '.join(moved[:4])}{more}")
    elif not changes:
        changes.append("same operators, tidier graph")
    return before.after(model, made_by.step(changes)), changes
