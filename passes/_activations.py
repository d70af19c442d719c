"""Why an activation that was found in pieces may still not be put together: what the passes that do so have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perwatt.passes._rearranging import dtype_of, fits_into
from perwatt.patterns import Match, dims, number, stored

FLOATING = frozenset({"FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"})


def refusals(match: Match, bfloat16_since: int = 0) -> Iterator[str]:
    """Reasons against one operator on `match["x"]` in the place of the match. `bfloat16_since`: the opset from which on it
    takes bfloat16."""
    x = match["x"]
    numbers = _numbers(match, x)
    types = {dtype_of(value) for value in (x, match.outputs[0], *numbers)} - {None}
    if types and not types & FLOATING:
        # 7 · Clip(7 + 3, 0, 6) / 6 in integers rounds halfway.
        yield "it is computed in integers"
    if "BFLOAT16" in types and match.root.graph.opset_imports.get("", 0) < bfloat16_since:
        yield f"bfloat16 takes opset {bfloat16_since}"
    if not all(fits_into(stored(value).shape, dims(x)) for value in numbers):
        yield "a constant in it may add an axis"


def _numbers(match: Match, x: Any) -> list[Any]:
    """The single numbers that the match computes with."""
    found = [value for node in match.nodes for value in node.inputs if value is not None and value is not x]
    return [value for value in found if number(value) is not None]
