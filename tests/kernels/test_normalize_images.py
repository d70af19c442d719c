"""Pictures become what the formula says, the same bits from the table, from compiled arithmetic and from a simulated GPU."""

import os
import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from perwatt.kernels import normalize_images
from perwatt.kernels.normalize_images import LOOK_UP, Levels, compute, normalization, reference, scaling

MODULE = "perwatt.kernels.normalize_images"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint16)


def pictures(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    kind = f"u{wanted.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(kind), np.ascontiguousarray(wanted).view(kind))


ordinary = st.floats(-10, 10, width=32)
extreme = st.floats(allow_nan=False, allow_infinity=False, width=32)
deviations = st.floats(2**-10, 10, width=32) | extreme.filter(bool)


@st.composite
def tables(draw, channels):
    """Levels for so many channels: by each formula, with ordinary and extreme numbers, or any table."""
    rows, dtype = draw(st.sampled_from([1, channels])), draw(st.sampled_from(DTYPES))
    one = draw(st.lists(ordinary | extreme, min_size=rows, max_size=rows))
    other = draw(st.lists(deviations, min_size=rows, max_size=rows))
    kind = draw(st.sampled_from(["normalization", "scaled", "scaling", "any"]))
    if kind == "normalization":
        return normalization(one, other, dtype)
    if kind == "scaled":
        return normalization(one, other, dtype, scale=draw(ordinary))
    if kind == "scaling":
        return scaling(one, other, dtype)
    words = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 1 << 32, (rows, 256), dtype=np.uint32)
    return Levels(words.view(dtype)[:, :256] if np.dtype(dtype).itemsize == 4 else words.astype(np.uint16).view(dtype))


@st.composite
def calls(draw, side=40):
    """Pictures, whole or as a view, levels and settings."""
    channels = draw(st.sampled_from([1, 3, 4]))
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, side)), draw(st.integers(0, side)), channels)
    images = pictures(shape, draw(st.integers(0, 99)))
    view = draw(
        st.sampled_from(["whole", "constant", "cropped", "flipped", "mirrored", "every other", "of more channels"])
    )
    if view == "constant":
        images[:] = draw(st.sampled_from([0, 255]))
    elif view == "cropped":
        images = images[:, 1:, 2:-1]
    elif view == "flipped":
        images = images[:, ::-1]
    elif view == "mirrored":
        images = images[:, :, ::-1]
    elif view == "every other":
        images = images[::-1, ::2, ::3]
    elif view == "of more channels":
        images = pictures((*shape[:3], 7))[..., 1 : 1 + channels]
    return images, draw(tables(channels)), channels > 1 and draw(st.booleans())


@given(calls())
def test_the_kernel_and_the_reference_give_the_same_bits(call):
    images, levels, swap = call
    before = images.copy()
    wanted = reference(images, levels, swap_red_blue=swap)
    batch, height, width, channels = images.shape
    assert wanted.shape == (batch, channels, height, width) and wanted.dtype == levels.values.dtype
    assert_same_bits(compute(images, levels, swap_red_blue=swap), wanted)
    # A table without arithmetic is always looked up.
    assert_same_bits(compute(images, Levels(levels.values), swap_red_blue=swap), wanted)
    out = np.full_like(wanted, 7)
    assert compute(images, levels, swap_red_blue=swap, out=out) is out
    assert_same_bits(out, wanted)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_they_are_equal_around_whole_vectors_and_chunks(channels, dtype):
    levels = normalization([0.485, 0.456, 0.406, 0.5][:channels], [0.229, 0.224, 0.225, 0.5][:channels], dtype)
    chunk = normalize_images.CHUNK
    for width in (*range(1, 70), chunk - 1, chunk, chunk + 1, 2 * chunk + 17):
        images = pictures((2, 2, width, channels), width)
        assert_same_bits(compute(images, levels), reference(images, levels))
        wider = pictures((2, 3, width + 5, channels), width)[:, 1:, 3 : width + 3]
        assert_same_bits(compute(wider, levels), reference(wider, levels))


VIEWS = {
    "cropped": lambda images: images[:, 2:-3, 4:-5, :3],
    "one, flipped": lambda images: images[:1, ::-1, :, 1:],
    "flipped": lambda images: images[:, ::-1],
    "mirrored": lambda images: images[:, :, ::-1],
    "backwards": lambda images: images[::-1],
    "other channel order": lambda images: images[..., ::-1],
    "without alpha": lambda images: images[..., :3],
    "without red": lambda images: images[..., 1:],
    "every other row": lambda images: images[:, ::2],
    "every other column": lambda images: images[:, :, ::2],
    "turned": lambda images: images.transpose(0, 2, 1, 3),
    "one row for all": lambda images: np.broadcast_to(images[:, 1:2], images.shape),
    "one picture for all": lambda images: np.broadcast_to(images[1], images.shape),
    "one pixel for all": lambda images: np.broadcast_to(images[:, :, 1:2], images.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_as_they_are(view):
    for images in (pictures((3, 20, 31, 4)), pictures((3, 22, 40, 4))[:, 1:-1, 3:-6]):
        given = view(images)
        for rows in (given, given[:1], given[:, :1], given[:, :, :1]):
            assert_same_bits(compute(rows, normalization(0.5, 0.25)), reference(rows, normalization(0.5, 0.25)))


@given(calls(side=9), st.data())
def test_the_reference_is_the_table_pixel_by_pixel(call, data):
    images, levels, swap = call
    wanted = reference(images, levels, swap_red_blue=swap)
    if not images.size:
        return
    n, y, x, c = (data.draw(st.integers(0, size - 1)) for size in images.shape)
    source = {0: 2, 1: 1, 2: 0, 3: 3}[c] if swap else c
    row = levels.values[c if len(levels.values) > 1 else 0]
    assert_same_bits(wanted[n, c, y, x].reshape(1), row[images[n, y, x, source]].reshape(1))


@given(st.lists(ordinary, min_size=3, max_size=3), st.lists(deviations, min_size=3, max_size=3))
def test_the_table_is_what_torch_calculates(mean, deviation):
    torch = pytest.importorskip("torch", reason="torch is an extra")
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    as_floats = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    means, deviations = (torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1) for values in (mean, deviation))
    wanted = as_floats.div(255).sub(means).div(deviations)
    assert_same_bits(compute(images, normalization(mean, deviation)), wanted.numpy())
    half = np.dtype(np.float16)
    assert_same_bits(compute(images, normalization(mean, deviation, half)), wanted.half().numpy())
    words = wanted.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert_same_bits(compute(images, normalization(mean, deviation, np.uint16)), words)
    assert_same_bits(compute(images, normalization(mean, deviation, ml_dtypes.bfloat16)).view(np.uint16), words)
    scaled = (as_floats * means + deviations).numpy()
    assert_same_bits(compute(images, scaling(mean, deviation)), scaled)
    shifted = ((as_floats * 0.25 - means) / deviations).numpy()
    assert_same_bits(compute(images, normalization(mean, deviation, scale=0.25)), shifted)


def test_the_table_lies_within_rounding_of_the_exact_formula():
    found = normalization(*IMAGENET).values
    for row, mean, deviation in zip(found, *IMAGENET, strict=True):
        for level, value in enumerate(row.tolist()):
            exact = (Fraction(level, 255) - Fraction(mean)) / Fraction(deviation)
            # Half a unit in the last place of a share below 1, of a mean below ½, and of the result below 4.
            assert abs(Fraction(value) - exact) <= (2**-25 + 2**-26 + 2**-25) / Fraction(deviation) + Fraction(2) ** -23


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_common_normalizations_are_done_by_arithmetic(dtype):
    from llvmlite.binding import get_host_cpu_features

    if not get_host_cpu_features().get("fma"):
        pytest.skip("no fused multiply-add here")
    rng = np.random.default_rng(0)
    common = [
        normalization(*IMAGENET, dtype),
        normalization([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], dtype),
        normalization(0.1307, 0.3081, dtype),
        normalization(0.5, 0.5, dtype),
        normalization(0, 1, dtype),
        normalization(127.5, 127.5, dtype, scale=1),
        normalization([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], dtype, scale=1),
        normalization([103.939, 116.779, 123.68], 1, dtype, scale=1),
        scaling(1 / 255, 0, dtype),
        scaling(2 / 255, -1, dtype),
        scaling(1, 0, dtype),
        *(normalization(rng.uniform(0, 1, 3), rng.uniform(0.05, 1, 3), dtype) for _ in range(20)),
    ]
    expected = dtype != np.float16
    assert [levels.method != LOOK_UP for levels in common] == [expected] * len(common)


@pytest.mark.parametrize(
    "levels",
    [
        scaling(3e38, 0),
        normalization(0, 1e-39),
        normalization(0, 1e-45),
        normalization(0, 3e38),
        normalization(0.5, 1e-30, np.uint16),
        scaling(1e-40, 1e-45),
        scaling(-1, 0),
        scaling(0, -0.0),
        normalization(-0.0, -1),
    ],
    ids=str,
)
def test_what_overflows_or_is_tiny_or_negative_zero_keeps_its_bits(levels):
    images = np.arange(256, dtype=np.uint8).repeat(5).reshape(1, 16, 80, 1)
    assert_same_bits(compute(images, levels), reference(images, levels))


def test_arithmetic_that_gives_something_else_is_not_used():
    levels = normalization(*IMAGENET)
    images = pictures((1, 5, 7, 3))
    for level in (0, 1, 128, 255):
        for row in range(3):
            values = levels.values.copy()
            values[row, level] = np.nextafter(values[row, level], np.float32(9))
            other = Levels(values, levels.steps)
            assert other.method == LOOK_UP
            images[0, 0, 0] = level
            assert_same_bits(compute(images, other), reference(images, other))


def test_bytes_may_be_read_only_and_lists():
    images = pictures((1, 3, 4, 3))
    images.flags.writeable = False
    wanted = reference(images, normalization(0.5, 0.5))
    assert_same_bits(compute(images, normalization(0.5, 0.5)), wanted)
    images = pictures((1, 3, 4, 3))
    compute(images, normalization(0.5, 0.5))
    images[:] = 0  # still writable


def test_a_gpu_gives_the_same_bits(simulated):
    # Over several blocks and turns, and no whole number of either.
    chosen = [(pictures((2, 33, 65, 1)), normalization(0.1307, 0.3081), False)]

    @settings(max_examples=20, database=None, phases=[Phase.generate])
    @given(calls(side=4))
    def choose(call):
        chosen.append(call)

    choose()
    found = simulated(
        [(MODULE, "compute_cuda", (images, levels), {"swap_red_blue": swap}) for images, levels, swap in chosen]
    )
    for (images, levels, swap), result in zip(chosen, found, strict=True):
        assert_same_bits(result, reference(images, levels, swap_red_blue=swap))


ON_DEVICE = """
import numpy as np
from numba import cuda
from perwatt.kernels import normalize_images as kernel
images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
for dtype in (np.float32, np.float16, np.uint16):
    levels = kernel.normalization([0.4, 0.5, 0.6], 0.2, dtype)
    wanted = kernel.reference(images, levels)
    assert (kernel.compute_cuda(cuda.to_device(images), levels).copy_to_host() == wanted).all()
    out = cuda.device_array(wanted.shape, wanted.dtype)
    assert kernel.compute_cuda(cuda.to_device(images), levels, out=out) is out
    assert (out.copy_to_host() == wanted).all()
    here = np.empty_like(wanted)
    assert kernel.compute_cuda(images, levels, out=here) is here and (here == wanted).all()
levels = kernel.normalization(0.5, 0.5)
here = cuda.to_device(images)
turned = cuda.device_array((3, 3, 4, 5), np.float32)
for given, out in ((here[..., :2], None), (here[:, ::2], None), (here, turned), (here, np.empty((3, 3, 5, 4), np.float32))):
    try:
        kernel.compute_cuda(given, levels, out=out)
    except ValueError as error:
        print(error)
"""


def test_arrays_on_a_gpu_stay_there():
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICE], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    messages = ["1, 3 or 4 channels", "are not contiguous", "out is float32", "out does not"]
    assert all(message in line for message, line in zip(messages, lines, strict=True)), lines


@pytest.mark.parametrize("function", [reference, compute, normalize_images.compute_cuda])
def test_what_is_no_picture_is_an_error(function):
    levels, three = normalization(0.5, 0.5), normalization(*IMAGENET)
    good = pictures((2, 4, 5, 3))
    for images, table, message in [
        (good.astype(np.float32), levels, "float32; uint8"),
        (good[0], levels, r"\(4, 5, 3\)"),
        (good[..., :2], levels, "1, 3 or 4 channels"),
        (pictures((1, 4, 4, 4)), three, "levels for 3 channels; the pictures have 4"),
        (pictures((1, 4, 4, 1)), three, "levels for 3 channels; the pictures have 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(images, table)
    with pytest.raises(ValueError, match="no red and blue"):
        function(good[..., :1], levels, swap_red_blue=True)
    shared = np.zeros(2 * 4 * 5 * 3, np.float32)
    for images, out, message in [
        (good, np.empty((2, 3, 5, 4), np.float32), "out is float32"),
        (good, np.empty((2, 3, 4, 5), np.float16), "out is float16"),
        (good, np.empty((2, 3, 4, 10), np.float32)[..., ::2], "not C-contiguous"),
        (shared.view(np.uint8)[:120].reshape(2, 4, 5, 3), shared.reshape(2, 3, 4, 5), "where the pictures lie"),
        (good, np.broadcast_to(np.float32(0), (2, 3, 4, 5)).copy(), None),
    ]:
        if message is None:
            out.flags.writeable = False
        with pytest.raises(ValueError, match=message or "read-only"):
            function(images, levels, out=out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normalization(0.5, 0), "deviation is 0"),
        (lambda: normalization(0.5, [1, 1e-60, 1]), "deviation is 0"),
        (lambda: normalization(np.nan, 1), "mean is not finite"),
        (lambda: normalization(0, np.inf), "deviation is not finite"),
        (lambda: normalization(1e39, 1), "mean is not finite"),
        (lambda: normalization(0, 1, scale=np.nan), "scale is not finite"),
        (lambda: normalization([1, 2], 1), r"mean has the shape \(2,\)"),
        (lambda: normalization([[1]], 1), r"mean has the shape \(1, 1\)"),
        (lambda: normalization([1, 2, 3], [1, 2, 3, 4]), "3 and 4 and 1 values"),
        (lambda: normalization(0, 1, np.float64), "float64 is none of"),
        (lambda: scaling(1, [1, 2]), r"shift has the shape \(2,\)"),
        (lambda: scaling(np.inf, 0), "scale is not finite"),
        (lambda: scaling(1, 0, np.int8), "int8 is none of"),
        (lambda: scaling(1, 0, ">f4"), ">f4 is none of"),
        (lambda: Levels(np.zeros((2, 256), np.float32)), r"\(2, 256\)"),
        (lambda: Levels(np.zeros((3, 255), np.float32)), r"\(3, 255\)"),
        (lambda: Levels(np.zeros(256, np.float32)), r"\(256,\)"),
        (lambda: Levels(np.zeros((1, 256), np.int64)), "int64 is none of"),
        (lambda: Levels(np.zeros((3, 256), np.float32), np.zeros((1, 5))), r"\(1, 5\)"),
    ],
)
def test_what_is_no_table_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_are_read_only_copies():
    values = np.zeros((1, 256), np.float32)
    levels = Levels(values)
    values[:] = 1
    assert not levels.values.any()
    with pytest.raises(ValueError, match="read-only"):
        levels.values[0, 0] = 1


def test_numba_is_imported_by_the_kernel_alone():
    script = """
import sys
import numpy as np
from perwatt.kernels import normalize_images as kernel
images, levels = np.zeros((1, 2, 2, 3), np.uint8), kernel.normalization(0.5, 0.5)
kernel.reference(images, levels)
before = "numba" in sys.modules
kernel.compute(images, levels)
print(before, "numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_it_works_where_nothing_can_be_cached(monkeypatch):
    from numba.core import caching

    images, levels = pictures((1, 3, 5, 3)), normalization(*IMAGENET)
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    normalize_images._compiled.cache_clear()
    try:
        assert_same_bits(compute(images, levels), reference(images, levels))
        assert type(normalize_images._compiled()._cache).__name__ == "NullCache"
    finally:
        normalize_images._compiled.cache_clear()
