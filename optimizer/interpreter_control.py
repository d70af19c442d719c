"""Operators of the interpreter that run subgraphs. A subgraph is a module; the outer values that it uses come beside it
and go first in its call. Loops are unrolled where their count is a host value, so a compiled graph holds every turn; a
count or condition in a tensor is read to the host, which ends a compiled graph.

Limits: what a loop of no turns stacks is a float tensor of shape (0,), as nothing says how its elements look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import as_tensor, ints, one_int, tensors

Body = Callable[..., tuple[Any, ...]]


@operator("If", host=(0,))
def if_(
    cond: Any,
    *,
    then_branch: Body,
    else_branch: Body,
    then_branch_outer: tuple[Any, ...] = (),
    else_branch_outer: tuple[Any, ...] = (),
    outputs: int = 1,
) -> tuple[Any, ...]:
    return then_branch(*then_branch_outer) if _truth(cond) else else_branch(*else_branch_outer)


@operator("Loop", host=True)
def loop(
    trips: Any = None,
    cond: Any = None,
    *state: Any,
    body: Body,
    body_outer: tuple[Any, ...] = (),
    outputs: int = 1,
    device: torch.device | None = None,
) -> tuple[Any, ...]:
    most = None if trips is None else one_int(trips)
    going = True if cond is None else cond
    turn, elements = 0, []
    while (most is None or turn < most) and _truth(going):
        going, *found = body(*body_outer, turn, going, *state)
        state = tuple(found[: len(state)])
        elements.append(found[len(state) :])
        turn += 1
    return (*state, *_stacked(elements, outputs - len(state), device=device))


@operator("Scan", since=9)
def scan(
    *given: Any,
    body: Body,
    body_outer: tuple[Any, ...] = (),
    num_scan_inputs: int,
    scan_input_axes: tuple[int, ...] | None = None,
    scan_input_directions: tuple[int, ...] | None = None,
    scan_output_axes: tuple[int, ...] | None = None,
    scan_output_directions: tuple[int, ...] | None = None,
    outputs: int = 1,
    device: torch.device | None = None,
) -> tuple[Any, ...]:
    held = len(given) - num_scan_inputs
    state = tuple(given[:held])
    backward = scan_input_directions or (0,) * num_scan_inputs
    axes = scan_input_axes or (0,) * num_scan_inputs
    sequences = [one.unbind(axis) for one, axis in zip(tensors(*given[held:]), axes, strict=True)]
    steps = [one[::-1] if turned else one for one, turned in zip(sequences, backward, strict=True)]
    elements = []
    for step in zip(*steps, strict=True):
        found = body(*body_outer, *state, *step)
        state = tuple(found[:held])
        elements.append(found[held:])
    return (*state, *_stacked(elements, outputs - held, scan_output_axes, scan_output_directions, device))


@operator("Scan", since=8, host=(0,))
def scan_8(
    lengths: Any,
    *given: Any,
    body: Body,
    body_outer: tuple[Any, ...] = (),
    num_scan_inputs: int,
    directions: tuple[int, ...] | None = None,
    outputs: int = 1,
    device: torch.device | None = None,
) -> tuple[Any, ...]:
    """One example of the batch (axis 0) after the other; what is stacked is padded to the longest sequence (axis 1)."""
    held, given = len(given) - num_scan_inputs, tensors(*given)
    batch, longest = given[held].shape[:2]
    counts = [longest] * batch if lengths is None else ints(lengths)
    rows = []
    for number, count in enumerate(counts):
        own = [one[number] if at < held else one[number, :count] for at, one in enumerate(given)]
        row = scan(
            *own, body=body, body_outer=body_outer, num_scan_inputs=num_scan_inputs,
            scan_input_directions=directions, outputs=outputs, device=device,
        )  # fmt: skip
        rows.append([one if at < held else _lengthened(one, longest) for at, one in enumerate(row)])
    return tuple(torch.stack(tensors(*column)) for column in zip(*rows, strict=True))


def _truth(condition: Any) -> bool:
    return bool(condition[0] if isinstance(condition, (tuple, list)) else condition)


def _stacked(
    elements: Sequence[Sequence[Any]],
    count: int,
    axes: Sequence[int] | None = None,
    backward: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """What each turn gave, by output: turns along a new axis. `count`: of outputs, for where there was no turn."""
    if not elements:
        return [torch.empty(0, device=device) for _ in range(count)]
    columns = [[as_tensor(one, device=device) for one in column] for column in zip(*elements, strict=True)]
    none = [0] * len(columns)
    turned = [column[::-1] if back else column for column, back in zip(columns, backward or none, strict=True)]
    return [torch.stack(column, axis) for column, axis in zip(turned, axes or none, strict=True)]


def _lengthened(data: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(data, [0, 0] * (data.ndim - 1) + [0, length - data.shape[0]])
