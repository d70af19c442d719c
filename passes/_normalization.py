"""What the passes that put normalizations together ask about a match: axes, types, channels, scale and shift.

The names in it are those of `_normalization_forms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perwatt.fusion import Builder
from perwatt.passes._normalization_forms import cast_target, keeps_axes
from perwatt.patterns import (
    Match,
    axes_of,
    dims,
    from_the_end,
    given,
    is_stored,
    made_by,
    number,
    numbers,
    only_user,
    rank,
    size,
    stored,
)

NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
KEEPS_LAST_AXIS = NORMALIZATIONS | {"Add", "Sub", "Mul", "Div", "Cast", "Identity", "Relu", "Gelu", "Tanh", "Sigmoid"}
"""Operators whose result is as long, on its last axis, as the longest of their inputs is there."""


# Which axes -----------------------------------------------------------------------------------------------------------


def normalized_axes(match: Match) -> list[int] | None:
    """The axes that are normalized, counted from the end; None where that isn't known or mean and variance differ."""
    done = match.named.get("whole")
    if done is not None:
        axis = from_the_end([done.attributes.get_int("axis", -1)], rank(match["x"]))
        return None if axis is None else list(range(axis[0], 0))
    nodes = _reductions(match)
    found = [from_the_end(_reduced(node, rank_within(match)), rank_within(match)) for node in nodes]
    return found[0] if found[0] and all(axes == found[0] for axes in found) else None


def axes_refusal(match: Match) -> Iterator[str]:
    """Why the axes are not known, or not those of all that is normalized."""
    axes, of = normalized_axes(match), rank_within(match)
    if axes is not None:
        yield from _restored_refusal(match, axes)
        return
    known = [from_the_end(_reduced(node, of), of) for node in _reductions(match)]
    if known and all(known):
        yield "its mean and variance are taken over different axes"
    else:
        yield "which axes it normalizes is not known"


def _restored_refusal(match: Match, axes: Sequence[int]) -> Iterator[str]:
    """Why the variance, where it lost its axes and got them back, may not have those that it lost."""
    node = match.named.get("restored")
    if node is None or (node.op_type == "Unsqueeze" and from_the_end(axes_of(node), rank_within(match)) == axes):
        return
    source = next((found for value in _same_shape(match) if (found := dims(value)) is not None), None)
    if source is None or not becomes(node, [1 if at - len(source) in axes else n for at, n in enumerate(source)]):
        yield "the shapes don't prove that the variance gets those axes back that it lost"


def becomes(node: Any, wanted: Sequence[int | str | None]) -> bool:
    """Whether the result of a Reshape, Unsqueeze or Expand provably has the shape `wanted`, where a Reshape is of as many
    elements and keeps its first axis."""
    noted, asked = dims(node.outputs[0]), numbers(node.inputs[1]) if node.op_type == "Reshape" else None
    if None in wanted:
        return False
    if asked is None or len(asked) != len(wanted):
        return noted == wanted
    copies = not node.attributes.get_int("allowzero", 0)
    return all(
        length in (target, -1) or (axis == 0 and length == 0 and copies)
        for axis, (length, target) in enumerate(zip(asked, wanted, strict=True))
    )


def rank_within(match: Match) -> int | None:
    """How many axes there are where mean and variance are taken."""
    seen = [*_same_shape(match), *(node.outputs[0] for node in _reductions(match) if keeps_axes(node))]
    asked = numbers(match["groups"]) if "group" in match.named else None
    return next((found for value in seen if (found := rank(value)) is not None), len(asked) if asked else None)


def _same_shape(match: Match) -> list[Any]:
    """Values of the shape that is normalized: x, unless it is reshaped first, and what mean and variance are taken of."""
    x = [] if "group" in match.named else [match["x"]]
    return [*x, *(node.inputs[0] for node in _reductions(match))]


def _reductions(match: Match) -> list[Any]:
    return [match.named[name] for name in ("mean", "inner mean", "variance") if name in match.named]


def _reduced(node: Any, of: int | None) -> list[int] | None:
    if node.op_type == "GlobalAveragePool":
        return None if of is None else list(range(2, of))
    return axes_of(node)


def last_lengths(match: Match) -> list[int] | None:
    """How long the normalized axes are, where they are the last ones and all of that is known."""
    axes, seen = normalized_axes(match), _same_shape(match)
    if not axes or axes != list(range(-len(axes), 0)):
        return None
    lengths = [next((n for value in seen if (n := size(value, axis)) is not None), None) for axis in axes[:-1]]
    lengths.append(next((n for value in seen if (n := last_length(value)) is not None), None))
    known = [length for length in lengths if length is not None]
    return known if len(known) == len(axes) else None


def last_length(value: Any, steps: int = 8) -> int | None:
    """How long the last axis is: as noted, or as the operators before it tell where nothing is noted."""
    node = value.producer() if value is not None else None
    found = size(value, -1)
    if found is not None or node is None or node.domain != "" or not steps:
        return found
    if node.op_type == "MatMul":
        right = node.inputs[1]
        return size(right, -1) if (rank(right) or 0) >= 2 else None
    if node.op_type == "Gather":
        table, axis = node.inputs[0], node.attributes.get_int("axis", 0)
        return size(table, -1) if axis not in (-1, (rank(table) or 0) - 1) else None
    if node.op_type == "Reshape":
        joined = made_by(node.inputs[1], "Concat")
        asked = numbers(joined.inputs[-1] if joined is not None else node.inputs[1])
        return asked[-1] if asked and asked[-1] > 0 else None
    if node.op_type not in KEEPS_LAST_AXIS:
        return None
    # Whatever is longer than 1 here is what the others are broadcast to.
    lengths = (last_length(each, steps - 1) for each in given(node))
    return next((length for length in lengths if length is not None and length > 1), None)


# Which type -----------------------------------------------------------------------------------------------------------


def dtype_of(value: Any) -> str | None:
    """ONNX's name of a value's type (`FLOAT`, `FLOAT16`), where it is known."""
    import onnx_ir as ir

    if value is None or value.dtype is not None:
        return None if value is None else value.dtype.name
    tensor = ir.convenience.get_const_tensor(value) if is_stored(value) else None
    return None if tensor is None else tensor.dtype.name


def normalized_type(match: Match) -> str | None:
    """The type of x: what the operator that is put in takes and gives; None where it is not known."""
    done = there_already(match)
    if done is not None:
        return dtype_of(done.inputs[1])
    return dtype_of(match["x"]) or (dtype_of(match["epsilon"]) if "up" not in match.named else None)


def type_refusal(match: Match, kind: str) -> Iterator[str]:
    """Why the types don't fit an operator that computes in float32, then casts to the type of x, then scales and shifts."""
    if there_already(match) is not None:
        return
    inside, x = dtype_of(match["epsilon"]), normalized_type(match)
    weights = [dtype_of(match.get(name)) for name in ("scale", "shift") if match.get(name) is not None]
    down = match.named.get("down")
    result = weights[0] if weights else cast_target(down) if down is not None else inside
    if inside != "FLOAT":
        yield f"it is computed in {(inside or 'an unknown type').lower()}, {kind} computes in float"
    elif x is None:
        yield "the type of what it normalizes is not known"
    elif x != result:
        yield f"it makes {(result or 'an unknown type').lower()} of {x.lower()}"


def epsilon_of(match: Match) -> float:
    """ε under the root."""
    done = there_already(match)
    if done is not None:
        return float(done.attributes.get_float("epsilon", 1e-5))
    return number(match["epsilon"]) or 0.0


def stash_type_of(match: Match) -> int | None:
    """The type in which an operator that is there computes, where it isn't float."""
    done = there_already(match)
    stash = 1 if done is None else done.attributes.get_int("stash_type", 1)
    return None if stash == 1 else int(stash)


def last_axes_refusals(match: Match, kind: str) -> Iterator[str]:
    """Why an operator that normalizes the last axes, with a scale and shift along them, can't take the place of a match."""
    yield from axes_refusal(match)
    yield from type_refusal(match, kind)
    yield from weights_refusal(match)
    axes, lengths = normalized_axes(match), last_lengths(match)
    own = [match[name] for name in ("scale", "shift") if name in match.values]
    if axes is not None and axes != list(range(-len(axes), 0)):
        yield "the axes that it normalizes are not the last ones"
    elif lengths is None:
        yield "how long the axes are that it normalizes is not known"
    elif not all(fits_last(value, lengths, rank_within(match)) for value in own):
        yield "its scale or shift varies along other axes than those normalized"


def channel_refusals(match: Match, of: int | None, channels: int | None) -> Iterator[str]:
    """Why an operator with a scale and shift for each channel can't take the place of a match on [N, C, …]."""
    own = [match[name] for name in ("scale", "shift") if name in match.values]
    if of is None or channels is None:
        yield "the rank or number of channels of what it normalizes is not known"
    elif of < 3:
        yield "there is no axis behind the channels"
    elif not all(fits_channels(value, of, channels) for value in own):
        yield "its scale or shift varies along other axes than the channels"


# Scale and shift ------------------------------------------------------------------------------------------------------


def following(match: Match) -> list[Any]:
    """Scale and shift of this match; without any, the stored operand of the Mul or Add that follows."""
    own = [match[name] for name in ("scale", "shift") if match.get(name) is not None]
    user = only_user(match.outputs[0]) if not own else None
    if user is not None and user.domain == "" and user.op_type in ("Mul", "Add"):
        return [value for value in user.inputs if is_stored(value)]
    return own


def is_channels_business(match: Match) -> bool:
    """Whether this is rather an instance or group normalization: over all axes behind the batch or the channels, and
    scaled or shifted, if at all, by channel."""
    axes, of = normalized_axes(match), rank_within(match)
    if (
        "whole" in match.named
        or axes is None
        or of is None
        or of < 3
        or axes not in (list(range(2 - of, 0)), list(range(1 - of, 0)))
    ):
        return False
    # A single number may be broadcast either way.
    weights = [array for value in following(match) if (array := stored(value)).size > 1]
    return any(array.shape[-1] == 1 for array in weights) or (not weights and len(axes) > 1)


def fits_last(value: Any, lengths: Sequence[int], of: int | None) -> bool:
    """Whether a stored `value` is broadcast along the last axes of a tensor of rank `of`, and only there."""
    shape = stored(value).shape
    extra = max(len(shape) - len(lengths), 0)
    if extra and (of is None or len(shape) > of or any(length != 1 for length in shape[:extra])):
        return False
    inner = shape[extra:]
    return all(mine in (1, theirs) for mine, theirs in zip(reversed(inner), reversed(lengths), strict=False))


def fits_channels(value: Any, of: int, channels: int) -> bool:
    """Whether a stored `value` is broadcast along axis 1 of a tensor of rank `of`, and only there."""
    shape = stored(value).shape
    if len(shape) > of:
        return False
    full = (1,) * (of - len(shape)) + shape
    return full[1] in (1, channels) and all(length == 1 for axis, length in enumerate(full) if axis != 1)


def channels_of(match: Match) -> int | None:
    """How many channels x has, on axis 1."""
    seen = [match["x"]] if "group" in match.named else _same_shape(match)
    return next((found for value in seen if (found := size(value, 1)) is not None), None)


def there_already(match: Match) -> Any:
    """The normalization that is there as one operator, None where there are only pieces."""
    return match.named.get("whole") or match.named.get("instance")


def own_arrays(match: Match) -> list[Any]:
    """Scale and shift of the operator that is there already; None for one that is computed."""
    done = there_already(match)
    return [] if done is None else [stored(value) for value in given(done)[1:]]


def weights_refusal(match: Match) -> Iterator[str]:
    """Why the scale and shift behind an operator that is there can't be merged with its own."""
    own = own_arrays(match)
    if any(array is None for array in own):
        yield "the operator's own scale or shift is computed, not stored"
    elif own and normalized_type(match) != "FLOAT" and not _is_neutral(own):
        yield f"a scale of type {(normalized_type(match) or 'unknown').lower()} would be rounded once more"


def merged_weights(match: Match, build: Builder, shape: Sequence[int], first: Sequence[Any] = ()) -> tuple[Any, Any]:
    """Scale and shift of the operator that is put in, of that shape; the shift is None where there is none.

    `first`: arrays of the scale and shift that are applied before those of the match. Values that have the shape already
    are used as they are; products are computed in float64 and rounded once."""
    scale, shift = match.get("scale"), match.get("shift")
    stem, dtype = match.root.outputs[0].name, _numpy(normalized_type(match))
    if not _is_neutral(first):
        factor = _along(scale, shape, 1, "plus one" in match.named)
        old = [np.broadcast_to(array.astype(np.float64), shape) for array in first]
        moved = (old[1] * factor if len(old) > 1 else 0) + _along(shift, shape, 0)
        shift_is_there = len(old) > 1 or shift is not None
        scale_value = build.constant((old[0] * factor).astype(dtype), f"{stem}_scale")
        return scale_value, build.constant(moved.astype(dtype), f"{stem}_shift") if shift_is_there else None
    if scale is None or stored(scale).shape != tuple(shape) or "plus one" in match.named:
        scale = build.constant(_along(scale, shape, 1, "plus one" in match.named).astype(dtype), f"{stem}_scale")
    if shift is not None and stored(shift).shape != tuple(shape):
        shift = build.constant(_along(shift, shape, 0).astype(dtype), f"{stem}_shift")
    return scale, shift


def no_shift(match: Match, build: Builder, channels: int) -> Any:
    """Zeros, for operators that must be given a shift."""
    zeros = np.zeros(channels, _numpy(normalized_type(match)))
    return build.constant(zeros, f"{match.root.outputs[0].name}_shift")


def _along(value: Any, shape: Sequence[int], otherwise: float, plus_one: bool = False) -> Any:
    """A stored value along `shape`, in float64; `otherwise` where there is none."""
    array = np.float64(otherwise) if value is None else stored(value).astype(np.float64) + plus_one
    inner = array.shape[array.ndim - len(shape) :] if array.ndim >= len(shape) > 1 else (-1,) if array.ndim else ()
    return np.broadcast_to(array.reshape(inner), shape)


def _is_neutral(arrays: Sequence[Any]) -> bool:
    """Whether these are a scale of ones and a shift of zeros, or nothing."""
    return all(bool((array == (position == 0)).all()) for position, array in enumerate(arrays))


def _numpy(dtype: str | None) -> Any:
    import onnx_ir as ir

    return ir.DataType[dtype or "FLOAT"].numpy()
