"""Makes an array fit a model's input: layout, missing or surplus singleton axes, type, normalisation.

A picture array is turned only where it doesn't fit as it is. uint8 data for a float input is normalised as asked, else
fed as 0..255, and a note says so; every other conversion keeps the values or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.datasets_source import Notes
from perwatt.errors import InputError, nearest
from perwatt.recipe import RawInput
from perwatt.signature import Array, TensorSpec

PICTURE_CHANNELS = (1, 3)

_NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "unit": ((0.0,), (1.0,)),
}


@dataclass(frozen=True)
class Normalization:
    """(x / 255 − mean) ÷ std, per channel or one value for all; `raw` feeds 0..255 as it is."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    raw: bool = False

    def apply(self, array: Array, channel_axis: int | None, what: str) -> Array:
        """float32 array of the same shape. Raises InputError where the channels don't match."""
        out = array.astype(np.float32)
        if self.raw:
            return out
        out /= np.float32(255)
        for values, operation in ((self.mean, np.subtract), (self.std, np.divide)):
            operation(out, self._shaped(values, out, channel_axis, what), out=out)
        return out

    @staticmethod
    def _shaped(values: tuple[float, ...], array: Array, channel_axis: int | None, what: str) -> Array:
        if len(values) == 1:
            return np.array(values[0], dtype=np.float32)
        channels = None if channel_axis is None else array.shape[channel_axis]
        if channel_axis is None or channels != len(values):
            have = f"{channels} channels" if channels is not None else "no channel axis"
            raise InputError(
                f"--normalize has {len(values)} values, {what} has {have}", fix="give one value for all, as 0.5/0.5"
            )
        shape = [1] * array.ndim
        shape[channel_axis] = len(values)
        return np.array(values, dtype=np.float32).reshape(shape)


def parse_normalization(text: str | None) -> Normalization | None:
    """`imagenet`, `cifar10`, `unit` (x/255), `none` (0..255), or `mean,…/std,…` of 0..1 values; None stays None.

    Raises InputError for anything else."""
    if text is None:
        return None
    if text == "none":
        return Normalization(raw=True)
    if text in _NORMALIZATIONS:
        return Normalization(*_NORMALIZATIONS[text])
    mean_text, slash, std_text = text.partition("/")
    if not slash:
        known = (*_NORMALIZATIONS, "none")
        raise InputError(nearest(text, known, "normalization"), fix="or give mean,…/std,… as 0.5,0.5,0.5/0.2,0.2,0.2")
    try:
        mean = tuple(float(part) for part in mean_text.split(","))
        std = tuple(float(part) for part in std_text.split(","))
    except ValueError:
        raise InputError(f"--normalize {text!r} is not mean,…/std,…", fix="write 0.5,0.5,0.5/0.25,0.25,0.25") from None
    if not all(np.isfinite((*mean, *std))) or min(std) <= 0:
        raise InputError(f"--normalize {text!r}: every std must be above 0")
    if max(map(abs, mean)) > 1.5 or max(std) > 1.5:
        raise InputError(f"--normalize {text!r} is meant for pictures of 0..1", fix="divide mean and std by 255")
    return Normalization(mean, std)


def looks_like_pictures(dtype: str, shape: tuple[int, ...]) -> bool:
    """uint8 [N, H, W, 1 or 3]."""
    return dtype == "uint8" and len(shape) == 4 and shape[3] in PICTURE_CHANNELS


def fed_spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """What an array of this type and shape would be fed as to a model that isn't known yet: pictures as float32 NCHW,
    other uint8 as float32, wide floats as float32, everything else as it is; axis 0 is the batch."""
    dims = shape[1:]
    if looks_like_pictures(dtype, shape) and shape[1] not in PICTURE_CHANNELS:
        dims = (shape[3], shape[1], shape[2])
    elif dtype == "uint8" and len(shape) == 3:
        dims = (1, shape[1], shape[2])
    kind = np.dtype(dtype).kind
    fed = "float32" if dtype == "uint8" or kind == "f" else "int64" if kind in "iu" else dtype
    return TensorSpec(name, fed, ("batch", *dims))


def fit(
    array: Array,
    spec: TensorSpec,
    *,
    normalization: Normalization | None,
    raw: RawInput | None,
    fixed_batch: bool = False,
    notes: Notes,
) -> Array:
    """`array` [n, …] as the input `spec` wants it: C-contiguous, of its dtype, axis 0 free unless `fixed_batch`.

    Raises InputError, in one line, where shape or type can't be made to fit without guessing."""
    arranged = _arrange(array, spec, raw, fixed_batch, notes)
    return np.ascontiguousarray(_convert(arranged, spec, normalization, raw, notes))


def _arrange(array: Array, spec: TensorSpec, raw: RawInput | None, fixed_batch: bool, notes: Notes) -> Array:
    for what, move in _moves(array, spec, raw):
        moved = move(array)
        if _fits(moved.shape, spec, fixed_batch):
            if what:
                notes.add(f"input {spec.name}: arrays {what}")
            return moved
    raise InputError(
        f"input {spec} can't take arrays of shape {list(array.shape)}",
        fix="the first axis counts the samples, the others must be the model's",
    )


def _moves(array: Array, spec: TensorSpec, raw: RawInput | None) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Ways to lay out `array`, as it is first; each is a view, so trying costs nothing."""
    to_nchw = ("turned from NHWC to NCHW", lambda a: a.transpose(0, 3, 1, 2))
    to_nhwc = ("turned from NCHW to NHWC", lambda a: a.transpose(0, 2, 3, 1))
    pictures = looks_like_pictures(str(array.dtype), array.shape) and array.shape[1] not in PICTURE_CHANNELS
    shape = spec.shape
    free = shape is None or (len(shape) == 4 and isinstance(shape[1], str) and isinstance(shape[3], str))
    if pictures and free and (raw is None or raw.layout != "NHWC"):
        # Nothing in the signature says which axis the channels are: NCHW is what nearly all such models take.
        yield to_nchw
    yield "", lambda a: a
    if array.ndim == 4 and array.shape[3] in (1, 3, 4):
        yield to_nchw
    if array.ndim == 4 and array.shape[1] in (1, 3, 4):
        yield to_nhwc
    if array.ndim in (1, 2, 3):
        yield "given an axis of 1 after the first", lambda a: a[:, None]
    if array.ndim in (2, 3):
        yield "given a last axis of 1", lambda a: a[..., None]
    for axis in range(1, array.ndim):
        if array.shape[axis] == 1:
            yield f"relieved of axis {axis}, which is 1", lambda a, axis=axis: a.squeeze(axis)  # type: ignore[misc]
    if array.ndim > 2 and shape is not None and len(shape) == 2 and isinstance(shape[1], int):
        yield "flattened to one row an item", lambda a: a.reshape(len(a), -1)


def _fits(shape: tuple[int, ...], spec: TensorSpec, fixed_batch: bool) -> bool:
    if spec.shape is None:
        return True
    if len(shape) != len(spec.shape):
        return False
    first = 0 if fixed_batch else 1
    wanted = zip(spec.shape[first:], shape[first:], strict=True)
    return all(isinstance(want, str) or want < 0 or want == have for want, have in wanted)


def _convert(
    array: Array, spec: TensorSpec, normalization: Normalization | None, raw: RawInput | None, notes: Notes
) -> Array:
    what = f"input {spec}"
    wanted = dtype_of(spec)
    if wanted.kind in "OUS":
        raise InputError(f"{what} takes text, which arrays can't feed", fix="cut the text handling off the model")
    if array.dtype.kind not in "biufV" or (array.dtype.kind == "V" and array.dtype.names is not None):
        raise InputError(f"{what} can't take data of type {array.dtype}")
    if is_float(wanted):
        return _to_float(array, spec, wanted, normalization, raw, notes)
    if array.dtype.kind not in "biu":
        raise InputError(f"{what} takes whole numbers, the data is {array.dtype}", fix=f"save it as {spec.dtype}")
    if array.size and wanted.kind != "b":
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(wanted)
        if low < limits.min or high > limits.max:
            raise InputError(f"{what} holds {limits.min}..{limits.max}, the data goes from {low} to {high}")
    if wanted.kind == "b" and array.size and not ((array == 0) | (array == 1)).all():
        raise InputError(f"{what} takes booleans, the data has other values than 0 and 1")
    return array.astype(wanted, copy=False)


def _to_float(
    array: Array, spec: TensorSpec, wanted: np.dtype[Any], normalization: Normalization | None,
    raw: RawInput | None, notes: Notes,
) -> Array:  # fmt: skip
    if raw is None and array.dtype == np.uint8:
        if normalization is None:
            notes.add(
                f"warning: no --normalize was given, so input {spec.name} is fed its uint8 data as 0..255 "
                "(--normalize unit, imagenet, … changes that)"
            )
            return array.astype(wanted)
        return normalization.apply(array, channel_axis(array.shape, spec), f"input {spec}").astype(wanted, copy=False)
    if normalization is not None and raw is None:
        notes.add(f"input {spec.name}: the data is {array.dtype}, so --normalize is not applied (it is for uint8)")
    if is_float(array.dtype) and array.dtype.kind == "f" and not np.isfinite(array).all():
        unknown = np.isnan(array.reshape(len(array), -1) if array.ndim else array).any(axis=-1)
        if unknown.any():
            # Whatever is chosen by what a model makes of them, calibration and accuracy alike, is chosen by nothing.
            raise InputError(
                f"input {spec.name}: samples have NaN in them, {int(unknown.sum())} of {unknown.size} looked at",
                fix="leave them out of the data, or mend them",
            )
        notes.add(f"input {spec.name}: the data has infinity in it")
    with np.errstate(over="ignore"):
        return array.astype(wanted, copy=False)


def channel_axis(shape: tuple[int, ...], spec: TensorSpec) -> int | None:
    """Which axis of pictures [n, …] the channels are on: 1 or 3 (None for anything but four axes)."""
    if len(shape) != 4:
        return None
    known = spec.shape if spec.shape is not None and len(spec.shape) == 4 else shape
    for dims in (known, shape):
        for axis in (1, 3):
            if dims[axis] in PICTURE_CHANNELS:
                return axis
    return 1


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """NumPy dtype of an input; bfloat16 and float8 come from ml_dtypes. Raises InputError where it is unknown."""
    try:
        return np.dtype(spec.dtype)
    except TypeError:
        import ml_dtypes

        scalar = getattr(ml_dtypes, spec.dtype, None)
        if scalar is None:
            raise InputError(f"input {spec}: this type can't be fed") from None
        found: np.dtype[Any] = np.dtype(scalar)
        return found


def is_float(dtype: np.dtype[Any]) -> bool:
    """float16 to float64, and ml_dtypes' (kind V)."""
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)
