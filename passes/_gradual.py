"""A share that goes in rounds, with learning between them."""

from __future__ import annotations

from perwatt.artifact import Artifact


def share_left(ratio: float, cumulative: bool, artifact: Artifact, name: str) -> float:
    """The share of what is there now that goes, where `ratio` counts what steps of the pass `name` took before. A round that
    took nothing left no step, so the next one has that to take, too. 0 where so much is gone already."""
    if not cumulative:
        return ratio
    before = max((float(step.settings["ratio"]) for step in artifact.steps if step.name == name), default=0.0)
    return max(0.0, 1 - (1 - ratio) / (1 - before)) if before < 1 else 0.0
