"""Pictures as a camera or a decoder gives them, made into what a network reads: bytes to normalised numbers, in one pass.

uint8 [batch, height, width, channels] becomes [batch, channels, height, width] of float32, float16 or bfloat16. A byte has
256 levels only, so a table [channels, 256] says all: out[n, c, y, x] = table[c, image[n, y, x, c]]. `normalization` makes
that of (level/255 − mean) / deviation, `scaling` that of level·scale + shift; both in float32, rounded after every step
(IEEE 754, ties to even), as torch and NumPy calculate it, then rounded to the narrower type.

`reference` looks every byte up (NumPy); `compute` (Numba on the CPU) and `compute_cuda` (Numba on a GPU) return the same
bits. Arithmetic is faster than looking up where it runs on whole vectors: so for float32 and bfloat16 `compute` divides by
multiplying with the reciprocal in two float32 terms, 1/d ≈ high + low, x/d = fma(x, high, x·low) (Brisebarre, Muller, Raina:
"Accelerating correctly rounded floating-point division when the divisor is known in advance", IEEE Transactions on Computers
53, 2004). It is right for almost all; whether it is here is no matter of faith: before a table is first used, the compiled
arithmetic is run on all its levels, and where one bit differs (overflow, numbers too small to be normal, a processor without
fused multiply-add) `compute` looks up as well.

Limits: 1, 3 or 4 channels. Rows may lie apart, as in a picture cropped out of a larger one; other views are copied first.
Bytes are never NaN or infinite; means, deviations, scales and shifts that are, and deviations of 0, raise ValueError. What
overflows becomes infinite, and a table of one's own may hold anything, NaN too. No pictures or no pixels: an empty result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CHANNELS = (1, 3, 4)

CHUNK = 2048
"""Pixels that are taken apart at once: their bytes and one channel's floats stay in the first-level cache."""

LOOK_UP, FLOAT32, BFLOAT16 = range(3)

GPU_THREADS = 256
GPU_PIXELS = 4
"""Pixels for each GPU thread, a block apart: reading the table into shared memory is paid by 1,024 pixels."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What each byte becomes: `values` [channels of the result, 256], or [1, 256] for all channels alike.

    float32, float16, `ml_dtypes.bfloat16`, or uint16, which is passed on as it is (bit patterns of bfloat16). `steps`, each row
    (high, low, mean, high, low): float32 arithmetic that may give the same; None where there is none. Raises ValueError for
    other shapes and types."""

    values: npt.NDArray[Any]
    steps: Floats | None = None

    def __post_init__(self) -> None:
        values = np.array(self.values, order="C")
        _known(values.dtype)
        if values.ndim != 2 or values.shape[1] != 256 or len(values) not in CHANNELS:
            raise ValueError(f"a table of shape {values.shape}; it needs 1, 3 or 4 rows of 256 levels")
        steps = None if self.steps is None else np.array(self.steps, np.float32, order="C")
        if steps is not None and steps.shape != (len(values), 5):
            raise ValueError(f"steps of shape {steps.shape}; {len(values)} rows of 5 belong to this table")
        for name, array in (("values", values), ("steps", steps)):
            if array is not None:
                array.flags.writeable = False
            object.__setattr__(self, name, array)

    @functools.cached_property
    def bits(self) -> npt.NDArray[Any]:
        """The table as compiled code takes it."""
        return _bits(self.values)  # type: ignore[no-any-return]

    @functools.cached_property
    def method(self) -> int:
        """How `compute` goes about it: by arithmetic where it gives every level's very bits, else by looking up."""
        if self.steps is None or self.values.dtype == np.float16:
            return LOOK_UP
        kind = FLOAT32 if self.values.dtype == np.float32 else BFLOAT16
        channels = len(self.values)
        # 127 is odd down to its last bit: whole vectors, shorter ones and single pixels, each compiled by itself, occur.
        width = 127
        flat = np.repeat(np.arange(256, dtype=np.uint8), width * channels)
        flat.flags.writeable = False
        wanted = self.bits
        found = np.empty(channels * 256 * width, wanted.dtype)
        row = width * channels
        _compiled()(flat, 256 * row, row, 1, 256, width, channels, False, self.steps, wanted, kind, found)
        plain = f"u{wanted.itemsize}"
        same = found.view(plain).reshape(channels, 256, width) == wanted.view(plain)[:, :, None]
        return kind if same.all() else LOOK_UP


def normalization(
    mean: npt.ArrayLike,
    deviation: npt.ArrayLike,
    dtype: npt.DTypeLike = np.float32,
    *,
    scale: npt.ArrayLike | None = None,
) -> Levels:
    """(level/255 − mean) / deviation, one of each for all channels or for each channel of the result; with `scale`,
    (level·scale − mean) / deviation. dtype: float32, float16, `ml_dtypes.bfloat16`, or uint16 for bfloat16's bit patterns.

    Raises ValueError for other types, other than 1, 3 or 4 values, NaN and infinity, and deviations of 0."""
    means, deviations, factors = _per_channel(mean=mean, deviation=deviation, scale=255 if scale is None else scale)
    if not deviations.all():
        raise ValueError("a deviation is 0; nothing can be divided by it")
    levels = np.arange(256, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        shares = levels / factors[:, None] if scale is None else levels * factors[:, None]
        exact = (shares - means[:, None]) / deviations[:, None]
        first = _reciprocal(factors) if scale is None else np.column_stack([factors, np.zeros_like(factors)])
        steps = np.column_stack([first, means, _reciprocal(deviations)])
    return Levels(_narrowed_to(exact, dtype), steps)


def scaling(scale: npt.ArrayLike, shift: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> Levels:
    """level·scale + shift, one of each for all channels or for each channel of the result; dtype as in `normalization`.

    Raises ValueError for other types, other than 1, 3 or 4 values, NaN and infinity."""
    scales, shifts = _per_channel(scale=scale, shift=shift)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.arange(256, dtype=np.float32) * scales[:, None] + shifts[:, None]
    none, one = np.zeros_like(scales), np.ones_like(scales)
    return Levels(_narrowed_to(exact, dtype), np.column_stack([scales, none, -shifts, one, none]))


def reference(
    images: npt.ArrayLike, levels: Levels, *, swap_red_blue: bool = False, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """The pictures [batch, height, width, channels] as [batch, channels, height, width] of the levels' type.

    `swap_red_blue`: the result's channels 0 and 2 come from the pictures' channels 2 and 0 (the levels are the result's).
    `out`: where to put it, C-contiguous and apart from the pictures. Raises ValueError for pictures of another type, number
    of axes or number of channels, levels for another number of channels, channels that can't be swapped, and an `out` of
    another shape or type."""
    pictures, result = _checked(images, levels, swap_red_blue, out)
    for channel in range(pictures.shape[3]):
        source = 2 - channel if swap_red_blue and channel < 3 else channel
        result[:, channel] = levels.values[min(channel, len(levels.values) - 1)][pictures[..., source]]
    return result


def compute(
    images: npt.ArrayLike, levels: Levels, *, swap_red_blue: bool = False, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """What `reference` returns, bit for bit, compiled by Numba; on one thread, without Python's lock."""
    pictures, result = _checked(images, levels, swap_red_blue, out)
    if not pictures.size:
        return result
    batch, height, width, channels = pictures.shape
    if not pictures.flags.c_contiguous and not _rows_are_whole(pictures):
        pictures = np.ascontiguousarray(pictures)
    if pictures.flags.c_contiguous:
        flat, rows, count = pictures.reshape(-1), 1, height * width
        image_step, row_step = count * channels, 0
    else:
        image_step, row_step, rows, count = *pictures.strides[:2], height, width
        length = (batch - 1) * image_step + (height - 1) * row_step + width * channels
        flat = np.lib.stride_tricks.as_strided(pictures, (length,), (1,))
    # Always: Numba would compile once more for bytes that may be written.
    flat.flags.writeable = False
    steps = _NO_STEPS if levels.steps is None else levels.steps
    _compiled()(
        flat, image_step, row_step, batch, rows, count, channels, bool(swap_red_blue), steps, levels.bits, levels.method,
        _bits(result).reshape(-1),
    )  # fmt: skip
    return result


def compute_cuda(images: Any, levels: Levels, *, swap_red_blue: bool = False, out: Any = None) -> Any:
    """What `reference` returns, bit for bit, calculated by a GPU, for arrays on the host; pictures on the device (C-contiguous,
    of anything with a CUDA array interface) give a result on the device, which may still be at work when this returns."""
    from numba import cuda

    pictures = _device_array(images)
    on_device = pictures is not None
    if not on_device:
        pictures, result = _checked(images, levels, swap_red_blue, out)
        pictures = np.ascontiguousarray(pictures)
    else:
        _check(pictures, levels, swap_red_blue)
        if not pictures.is_c_contiguous():
            raise ValueError("pictures on the device are not contiguous")
        result = cuda.device_array(_shape(pictures), levels.values.dtype) if out is None else _device_array(out)
        if result is None:
            raise ValueError("pictures lie on the device, out does not")
        _check_out(result, result.is_c_contiguous(), pictures, levels)
    batch, height, width, channels = pictures.shape
    if not pictures.size:
        return result if out is None else out
    table = _table_on_gpu(levels, cuda.current_context().device.uuid)
    planes = _bits(result) if on_device else cuda.device_array(result.shape, table.dtype)
    pixels = height * width
    blocks = (-(-pixels // (GPU_THREADS * GPU_PIXELS)), min(batch, 65_535))
    source = pictures if on_device else cuda.to_device(pictures)
    kernel = _compiled_cuda(channels, table.dtype.name)
    kernel[blocks, GPU_THREADS](
        source.reshape(batch, pixels * channels), swap_red_blue, table, planes.reshape(batch, channels, pixels)
    )
    if not on_device:
        planes.copy_to_host(_bits(result))
    return result if out is None else out


cuda: Any = None
"""numba.cuda once a kernel is made; global, because the simulator puts its own in the place of a kernel's global `cuda`."""

_BYTE = np.dtype(np.uint8)
_NO_STEPS = np.zeros((1, 5), np.float32)
_NO_STEPS.flags.writeable = False


def _known(dtype: np.dtype[Any]) -> None:
    if dtype.name not in ("float32", "float16", "bfloat16", "uint16") or not dtype.isnative:
        raise ValueError(f"{dtype} is none of float32, float16, bfloat16 and uint16 (bit patterns of bfloat16)")


def _per_channel(**named: npt.ArrayLike) -> list[Floats]:
    """float32, one value for each channel or for all; as many of one as of the other."""
    with np.errstate(over="ignore"):
        arrays = {name: np.atleast_1d(np.asarray(given, dtype=np.float32)) for name, given in named.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or len(array) not in CHANNELS:
            raise ValueError(f"{name} has the shape {array.shape}; it needs 1, 3 or 4 values")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite in float32")
    longest = max(map(len, arrays.values()))
    if any(len(array) not in (1, longest) for array in arrays.values()):
        raise ValueError(f"{' and '.join(arrays)} have {' and '.join(str(len(a)) for a in arrays.values())} values")
    return [np.repeat(array, longest) if len(array) == 1 else array for array in arrays.values()]


def _reciprocal(divisors: Floats) -> Floats:
    """1/d in two float32 terms: [n, 2]."""
    exact = 1 / divisors.astype(np.float64)
    high = exact.astype(np.float32)
    return np.column_stack([high, (exact - high).astype(np.float32)])


def _narrowed_to(exact: Floats, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    wanted = np.dtype(dtype)
    _known(wanted)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if wanted != np.uint16:
            return exact.astype(wanted)
        import ml_dtypes

        return exact.astype(ml_dtypes.bfloat16).view(np.uint16)


def _bits(array: Any) -> Any:
    """Numba knows float32, but neither of the narrower types on every device: those as uint16."""
    return array if array.dtype.itemsize == 4 else array.view(np.uint16)


def _shape(pictures: Any) -> tuple[int, int, int, int]:
    batch, height, width, channels = pictures.shape
    return batch, channels, height, width


def _check(pictures: Any, levels: Levels, swap_red_blue: bool) -> None:
    if pictures.dtype != _BYTE:
        raise ValueError(f"pictures of {pictures.dtype}; uint8 is needed")
    if pictures.ndim != 4 or pictures.shape[3] not in CHANNELS:
        raise ValueError(f"pictures of shape {pictures.shape}; [batch, height, width, 1, 3 or 4 channels] is needed")
    channels = pictures.shape[3]
    if len(levels.values) not in (1, channels):
        raise ValueError(f"levels for {len(levels.values)} channels; the pictures have {channels}")
    if swap_red_blue and channels < 3:
        raise ValueError("pictures of one channel have no red and blue to swap")


def _check_out(out: Any, contiguous: bool, pictures: Any, levels: Levels) -> None:
    if out.shape != _shape(pictures) or out.dtype != levels.values.dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}, the result {levels.values.dtype} {_shape(pictures)}")
    if not contiguous:
        raise ValueError("out is not C-contiguous")


def _checked(
    images: npt.ArrayLike, levels: Levels, swap_red_blue: bool, out: npt.NDArray[Any] | None
) -> tuple[Pixels, npt.NDArray[Any]]:
    pictures = np.asarray(images)
    _check(pictures, levels, swap_red_blue)
    if out is None:
        return pictures, np.empty(_shape(pictures), levels.values.dtype)
    _check_out(out, out.flags.c_contiguous, pictures, levels)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if np.may_share_memory(pictures, out):
        raise ValueError("out lies where the pictures lie")
    return pictures, out


def _rows_are_whole(pictures: Pixels) -> bool:
    """Whether a row's pixels lie side by side, and rows and pictures one after the other."""
    image, row, pixel, channel = pictures.strides
    return channel == 1 and pixel == pictures.shape[3] and row >= 0 and image >= 0


def _split(flat: Pixels, first: Any, count: Any, channels: int, lanes: Pixels) -> None:
    """Each channel's bytes side by side. For bytes alone the compiler finds a processor's shuffles, wherever a channel's
    number is a constant and indices can't be negative; mixed with arithmetic it reads byte by byte."""
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    b, c, d = np.uint64(CHUNK), np.uint64(2 * CHUNK), np.uint64(3 * CHUNK)
    if channels == 1:
        for x in range(count):
            lanes[x] = flat[first + x]
    elif channels == 3:
        for x in range(count):
            lanes[x] = flat[first + three * x]
            lanes[b + x] = flat[first + three * x + one]
            lanes[c + x] = flat[first + three * x + two]
    else:
        for x in range(count):
            lanes[x] = flat[first + four * x]
            lanes[b + x] = flat[first + four * x + one]
            lanes[c + x] = flat[first + four * x + two]
            lanes[d + x] = flat[first + four * x + three]


def _step(lanes: Pixels, lane: Any, count: Any, steps: Floats, row: int, method: int, out: Any, place: Any) -> None:
    """bfloat16 is the upper half of float32, rounded as an integer, ties to even. (float16 takes so many more steps that looking
    up is as fast.)"""
    high, low, mean, high2, low2 = steps[row, 0], steps[row, 1], steps[row, 2], steps[row, 3], steps[row, 4]
    if method == FLOAT32:
        for x in range(count):
            level = np.float32(lanes[lane + x])
            share = (level * high + level * low) - mean
            out[place + x] = share * high2 + share * low2
    else:
        for x in range(count):
            level = np.float32(lanes[lane + x])
            share = (level * high + level * low) - mean
            word = np.float32(share * high2 + share * low2).view(np.uint32)
            odd = np.uint32(np.uint32(word >> 16) & np.uint32(1))
            out[place + x] = np.uint16(np.uint32(word + np.uint32(odd + np.uint32(0x7FFF))) >> 16)


def _look_up(lanes: Pixels, lane: Any, count: Any, values: Any, row: int, out: Any, place: Any) -> None:
    for x in range(count):
        out[place + x] = values[row, lanes[lane + x]]


def _normalize(
    flat: Pixels, image_step: int, row_step: int, batch: int, rows: int, count: int, channels: int, swap_red_blue: bool,
    steps: Floats, values: Any, method: int, out: Any,
) -> None:  # fmt: skip
    """What Numba compiles. `out`: batch · channels · rows · count numbers. Whole arrays and places in them, since a slice
    counts references, and that costs more than its bytes."""
    lanes = np.empty(4 * CHUNK, np.uint8)
    for image in range(batch):
        for row in range(rows):
            for start in range(0, count, CHUNK):
                length = np.uint64(min(CHUNK, count - start))
                first = np.uint64(image * image_step + row * row_step + start * channels)
                _split(flat, first, length, channels, lanes)
                for channel in range(channels):
                    lane = np.uint64(CHUNK * (2 - channel if swap_red_blue and channel < 3 else channel))
                    place = np.uint64(((image * channels + channel) * rows + row) * count + start)
                    if method == LOOK_UP:
                        _look_up(lanes, lane, length, values, min(channel, len(values) - 1), out, place)
                    else:
                        _step(lanes, lane, length, steps, min(channel, len(steps) - 1), method, out, place)


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba
    from numba.extending import register_jitable

    for helper in (_split, _step, _look_up):
        register_jitable(helper)
    # Contraction alone: a product and a sum become one fused multiply-add; nothing else may be rearranged.
    settings = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **settings)(_normalize)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**settings)(_normalize)  # type: ignore[no-any-return]


def _device_array(array: Any) -> Any:
    """The array as Numba's, None where it isn't on a device."""
    from numba import cuda

    if getattr(array, "__cuda_ndarray__", False):
        return array
    return cuda.as_cuda_array(array) if hasattr(array, "__cuda_array_interface__") else None


@functools.lru_cache(16)
def _table_on_gpu(levels: Levels, device: str) -> Any:
    """Taken there once: a copy costs as much as a small batch."""
    from numba import cuda

    return cuda.to_device(levels.bits)


@functools.cache
def _compiled_cuda(channels: int, kind: str) -> Any:
    """Neighbouring threads take neighbouring pixels: a warp reads 32 · channels bytes side by side, and writes each channel's
    32 values side by side. Looking up in shared memory is exact whatever the compiler fuses."""
    global cuda
    import numba
    from numba import cuda

    from perwatt.kernels._cuda_functions import smaller

    value = getattr(numba, kind)

    @cuda.jit  # type: ignore[untyped-decorator]
    def kernel(flat: Any, swap_red_blue: bool, values: Any, out: Any) -> None:
        table = cuda.shared.array((channels, 256), value)
        for at in range(cuda.threadIdx.x, channels * 256, cuda.blockDim.x):
            table[at // 256, at % 256] = values[smaller(at // 256, values.shape[0] - 1), at % 256]
        cuda.syncthreads()
        first = cuda.blockIdx.x * cuda.blockDim.x * GPU_PIXELS + cuda.threadIdx.x
        for image in range(cuda.blockIdx.y, out.shape[0], cuda.gridDim.y):
            for turn in range(GPU_PIXELS):
                pixel = first + turn * cuda.blockDim.x
                if pixel < out.shape[2]:
                    for channel in range(channels):
                        source = 2 - channel if swap_red_blue and channel < 3 else channel
                        out[image, channel, pixel] = table[channel, flat[image, pixel * channels + source]]

    return kernel
