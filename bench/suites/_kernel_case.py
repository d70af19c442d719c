"""What a suite says of one kernel: ours beside every alternative that a person could take instead, on the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel on arrays of one size.

    `ours` and each of `others` (title → call) do the same work on the same arrays and return what they made; `same` raises
    AssertionError where what another made is not what ours made. `moved_bytes`: what has to be read and written at least,
    None where arithmetic and not memory is the limit. `cuda`: the same on a GPU, made there, because compiling needs one:
    called with nothing it returns (ours, others) as calls that leave the device idle; None where there is none.
    """

    kernel: str
    title: str
    ours: Run
    others: dict[str, Run]
    same: Callable[[object, object], None]
    moved_bytes: int | None = None
    cuda: Callable[[], tuple[Run, dict[str, Run]]] | None = field(default=None, compare=False)
