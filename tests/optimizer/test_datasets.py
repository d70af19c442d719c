"""Roles: what a data set is, how it is shared out, arrays made to fit, callables, and what bad input says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.datasets import Roles, kind_of, open_roles, peek
from perwatt.datasets_fit import fit, parse_normalization
from perwatt.datasets_source import Notes
from perwatt.errors import InputError
from perwatt.recipe import DataSection, RawInput
from perwatt.signature import Array, Signature, TensorSpec

IMAGES = Signature((TensorSpec("x", "float32", ("n", 3, 8, 6)),), (TensorSpec("y", "float32", ("n", 10)),))
PAIR = Signature(
    (TensorSpec("ids", "int64", ("n", 5)), TensorSpec("scale", "float32", ("n",))),
    (TensorSpec("y", "float32", ("n", 2)),),
)


def npz(folder: Path, name: str = "data.npz", **arrays: Array) -> str:
    np.savez(folder / name, **arrays)
    return str(folder / name)


def pictures(count: int, shape: tuple[int, ...] = (8, 6, 3)) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def numbered(count: int) -> dict[str, Array]:
    """Pictures whose first pixel tells which one they are, and the same as labels."""
    images = np.zeros((count, 8, 6, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return {"images": images, "labels": np.arange(count, dtype=np.uint8)}


def told(part: object) -> list[int]:
    return [int(v) for chunk in part.chunks for v in chunk["x"][:, 0, 0, 0]]  # type: ignore[attr-defined]


def opened(where: str, signature: Signature = IMAGES, seed: int = 0, **fields: object) -> Roles:
    return open_roles(DataSection(all=where, **fields), signature, seed=seed)  # type: ignore[arg-type]


# Sharing out


def test_one_set_is_split_and_the_report_says_how(tmp_path: Path) -> None:
    where = npz(tmp_path, **numbered(100))
    roles = opened(where)
    assert roles.calibrate and roles.select and roles.confirm and roles.evaluation
    assert (len(roles.calibrate), len(roles.select), len(roles.confirm)) == (25, 37, 38)
    everything = told(roles.calibrate) + told(roles.select) + told(roles.confirm)
    assert sorted(everything) == list(range(100))
    assert roles.calibrate.labels is None
    for part in (roles.select, roles.confirm, roles.evaluation):
        assert part.labels is not None and part.labels.dtype == np.int64
        assert told(part) == list(part.labels)
    assert any("25 samples calibrate, 37 choose, 38 judge" in note for note in roles.shares)
    assert list(roles.sources) == [where] and len(roles.sources[where]) == 64


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    where = npz(tmp_path, **numbered(60))
    first, again, other = opened(where, seed=1), opened(where, seed=1), opened(where, seed=2)
    assert first.confirm and again.confirm and other.confirm
    assert first.confirm.digest() == again.confirm.digest() != other.confirm.digest()


def test_calibrate_eval_and_train(tmp_path: Path) -> None:
    small, big = npz(tmp_path, "a.npz", **numbered(20)), npz(tmp_path, "b.npz", images=pictures(400))
    roles = open_roles(DataSection(calibrate=big, eval=small, train=small), IMAGES)
    assert roles.calibrate and roles.select and roles.confirm and roles.learn
    assert (len(roles.calibrate), len(roles.select), len(roles.confirm), len(roles.learn)) == (300, 10, 10, 20)
    assert not set(told(roles.select)) & set(told(roles.confirm))
    assert any("300 of 400 samples" in note for note in roles.shares)
    assert set(roles.sources) == {small, big}


def test_training_data_calibrates_where_nothing_else_does(tmp_path: Path) -> None:
    small, big = npz(tmp_path, "a.npz", **numbered(20)), npz(tmp_path, "b.npz", images=pictures(40))
    roles = open_roles(DataSection(eval=small, train=big), IMAGES)
    assert roles.calibrate and roles.evaluation and len(roles.calibrate) == 40 and len(roles.evaluation) == 20


@pytest.mark.parametrize("field", ["all", "eval", "calibrate"])
def test_a_lone_set_is_split_whatever_it_was_given_as(tmp_path: Path, field: str) -> None:
    roles = open_roles(DataSection(**{field: npz(tmp_path, **numbered(40))}), IMAGES)  # type: ignore[arg-type]
    assert roles.calibrate and roles.select and roles.confirm
    assert (len(roles.calibrate), len(roles.select), len(roles.confirm)) == (10, 15, 15)


def test_too_few_to_split(tmp_path: Path) -> None:
    roles = opened(npz(tmp_path, **numbered(3)))
    assert roles.calibrate and len(roles.calibrate) == 3 and roles.evaluation is None
    assert any("accuracy stays unknown" in note for note in roles.shares)


def test_max_samples_and_no_data(tmp_path: Path) -> None:
    roles = opened(npz(tmp_path, **numbered(100)), max_samples=20)
    assert roles.calibrate and roles.evaluation and len(roles.calibrate) + len(roles.evaluation) == 20
    nothing = open_roles(DataSection(), IMAGES)
    assert (nothing.calibrate, nothing.learn, nothing.evaluation) == (None, None, None)


# Arrays


def test_named_arrays_and_safe_casts(tmp_path: Path) -> None:
    where = npz(tmp_path, scale=np.ones(8), ids=np.ones((8, 5), np.int32), other=np.ones(8), labels=np.ones((8, 1)))
    roles = opened(where, PAIR)
    assert roles.evaluation and roles.evaluation.labels is not None
    chunk = roles.evaluation.chunks[0]
    assert {name: str(a.dtype) for name, a in chunk.items()} == {"ids": "int64", "scale": "float32"}
    assert roles.evaluation.labels.dtype == np.float32 and roles.evaluation.labels.ndim == 1
    assert any("other not used" in note for note in roles.notes)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((8, 3, 8, 6)))
    roles = opened(str(tmp_path / "x.npy"))
    assert roles.evaluation and roles.evaluation.labels is None and roles.evaluation.chunks[0]["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((4, 5)), "scale": np.ones(4)}, "arrays a, scale, the model's inputs are ids, scale"),
        ({"idz": np.zeros((4, 5)), "scale": np.ones(4)}, "did you mean idz"),
        ({"ids": np.zeros((4, 6), np.int64), "scale": np.ones(4)}, r"\[4, 6\]|\[1, 6\]"),
        ({"ids": np.zeros((4, 5), np.int64), "scale": np.ones(3)}, "different lengths: ids 4, scale 3"),
        ({"ids": np.zeros((4, 5), np.int64), "scale": np.ones(4), "labels": np.ones(3)}, "3 entries, there are 4"),
        ({"ids": np.zeros((4, 5)), "scale": np.ones(4)}, "takes whole numbers, the data is float64"),
        ({"ids": np.full((4, 5), 2**63, np.uint64), "scale": np.ones(4)}, "the data goes from"),
        ({"ids": np.full((4, 5), None), "scale": np.ones(4)}, "pickled objects"),
        ({"ids": np.zeros((0, 5), np.int64), "scale": np.ones(0)}, "no samples"),
        ({"labels": np.zeros(3)}, "no array to feed"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(npz(tmp_path, **arrays), PAIR)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_data_sets(tmp_path: Path) -> None:
    whole = Path(npz(tmp_path, **numbered(20))).read_bytes()
    for name, content, message in [
        ("cut.npz", whole[: len(whole) // 2], "damaged or cut short"),
        ("flipped.npz", whole[:300] + bytes(1000) + whole[1300:], "damaged or cut short"),
        ("empty.npz", b"", "is empty"),
        ("random.bin", bytes(range(256)), "no data set that perwatt knows"),
        ("code.py", b"def batches(): ...", "code.py:NAME"),
        ("cut.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr'", "damaged or cut short"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            opened(str(tmp_path / name))
    with pytest.raises(InputError, match="no such data set"):
        kind_of(str(tmp_path / "missing.npz"))


def test_a_model_without_a_batch_axis_gets_calls(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("a", "float32", (3, 2)), TensorSpec("b", "float32", (5,))), ())
    stacked = opened(npz(tmp_path, a=np.ones((8, 3, 2)), b=np.ones((8, 5)), labels=np.ones(8)), signature)
    assert stacked.calibrate and [c["a"].shape for c in stacked.calibrate] == [(3, 2), (3, 2)]
    single = opened(npz(tmp_path, a=np.ones((3, 2)), b=np.ones(5)), signature)
    assert single.calibrate and [c["b"].shape for c in single.calibrate] == [(5,)]


# Fitting

FITS = [
    ((4, 8, 6, 3), ("n", 3, 8, 6), (4, 3, 8, 6)),
    ((4, 8, 6, 3), ("n", 8, 6, 3), (4, 8, 6, 3)),
    ((4, 3, 8, 6), ("n", 8, 6, 3), (4, 8, 6, 3)),
    ((4, 8, 6), ("n", 1, 8, 6), (4, 1, 8, 6)),
    ((4, 8, 6), ("n", 8, 6, 1), (4, 8, 6, 1)),
    ((4, 8, 6, 1), (1, 1, 8, 6), (4, 1, 8, 6)),
    ((4, 1, 8, 6), ("n", 8, 6), (4, 8, 6)),
    ((4, 8, 6), ("n", 48), (4, 48)),
    ((4, 8, 6, 3), ("n", "c", "h", "w"), (4, 3, 8, 6)),
    ((4, 16), ("n", 1, 16), (4, 1, 16)),
]


@pytest.mark.parametrize(("given_shape", "wanted", "fitted"), FITS)
def test_layouts(given_shape: tuple[int, ...], wanted: tuple[int | str, ...], fitted: tuple[int, ...]) -> None:
    array = np.arange(np.prod(given_shape)).reshape(given_shape).astype(np.uint8)
    notes = Notes()
    out = fit(array, TensorSpec("x", "float32", wanted), normalization=None, raw=None, notes=notes)
    assert out.shape == fitted and out.flags.c_contiguous and out.dtype == np.float32
    assert sorted(out.ravel()) == sorted(array.ravel())
    assert any("--normalize" in note for note in notes)


def test_shapes_that_fit_in_no_way() -> None:
    spec = TensorSpec("x", "float32", ("n", 3, 8, 6))
    for shape in [(4, 3, 8, 7), (4, 7, 6, 3), (4, 144), (3, 8, 6)]:
        with pytest.raises(InputError, match="can't take arrays of shape"):
            fit(np.zeros(shape, np.uint8), spec, normalization=None, raw=None, notes=Notes())


@given(st.sampled_from(["unit", "imagenet", "cifar10", "0.5/0.25", "0.1,0.2,0.3/1,0.5,0.25"]), st.booleans())
def test_normalization_is_the_formula(text: str, channels_last: bool) -> None:
    array = pictures(2)
    normalization = parse_normalization(text)
    assert normalization is not None
    shape = ("n", 8, 6, 3) if channels_last else ("n", 3, 8, 6)
    out = fit(array, TensorSpec("x", "float32", shape), normalization=normalization, raw=None, notes=Notes())
    wanted = (array / 255 - np.array(normalization.mean)) / np.array(normalization.std)
    np.testing.assert_allclose(out if channels_last else out.transpose(0, 2, 3, 1), wanted, rtol=1e-5, atol=1e-6)


def test_normalization_spellings() -> None:
    assert parse_normalization(None) is None
    none = parse_normalization("none")
    assert none is not None and none.raw
    for text, message in [
        ("imagnet", "did you mean imagenet"),
        ("a/b", "not mean"),
        ("0.5/0", "above 0"),
        ("127/58", "divide mean and std by 255"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_normalization(text)
    with pytest.raises(InputError, match=r"3 values, input x:.* has 1 channels"):
        fit(
            pictures(2, (8, 6, 1)), TensorSpec("x", "float32", ("n", 1, 8, 6)),
            normalization=parse_normalization("imagenet"), raw=None, notes=Notes(),
        )  # fmt: skip


def test_raw_inputs_get_raw_bytes(tmp_path: Path) -> None:
    data = numbered(8)
    raw = Signature((TensorSpec("x", "uint8", ("n", 8, 6, 3)),), ())
    section = DataSection(all=npz(tmp_path, **data), normalize="imagenet")
    roles = open_roles(section, raw, raw_inputs={"x": RawInput(layout="NHWC")})
    assert roles.evaluation
    fed = roles.evaluation.chunks[0]["x"]
    assert fed.dtype == np.uint8 and fed.shape[1:] == (8, 6, 3) and fed.max() <= 8


def test_samples_with_nan_are_an_error_and_infinity_is_told(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "float32", ("n", 4)),), ())
    array = np.ones((30, 4), np.float32)
    array[3, 1], array[7] = np.nan, np.nan
    with pytest.raises(InputError, match=r"input x: samples have NaN in them, \d of \d+ looked at — leave them out"):
        opened(npz(tmp_path, x=array), signature)
    array[np.isnan(array)] = -np.inf
    assert any("the data has infinity in it" in note for note in opened(npz(tmp_path, x=array), signature).notes)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9))
def test_integers_keep_their_values(values: list[int]) -> None:
    out = fit(np.array(values, np.int64), TensorSpec("i", "int32", ("n",)), normalization=None, raw=None, notes=Notes())
    assert out.dtype == np.int32 and list(out) == values


# Peeking


@pytest.mark.parametrize(
    ("array", "dtype", "shape"),
    [
        (np.zeros((2, 8, 6, 3), np.uint8), "float32", ("batch", 3, 8, 6)),
        (np.zeros((2, 8, 6, 1), np.uint8), "float32", ("batch", 1, 8, 6)),
        (np.zeros((2, 3, 8, 6), np.uint8), "float32", ("batch", 3, 8, 6)),
        (np.zeros((2, 8, 6), np.uint8), "float32", ("batch", 1, 8, 6)),
        (np.zeros((2, 8, 6), np.float64), "float32", ("batch", 8, 6)),
        (np.zeros((2, 8), np.int32), "int64", ("batch", 8)),
    ],
)
def test_peek_says_what_would_be_fed(tmp_path: Path, array: Array, dtype: str, shape: tuple[int | str, ...]) -> None:
    where = npz(tmp_path, x=array, labels=np.zeros(2))
    assert peek(DataSection(all=where)) == [TensorSpec("x", dtype, shape)]


def test_peek_without_knowledge(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nhello,1\n")
    assert peek(DataSection()) is None
    assert peek(DataSection(all=str(tmp_path / "a.csv"))) is None


# Callables


def code(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text("import numpy as np\nimport beside\n\ndef batches():\n" + body)
    (folder / "beside.py").write_text("SIZE = 4\n")
    return str(folder / "mine.py") + ":batches"


@pytest.mark.parametrize(
    "body",
    [
        "    for i in range(3): yield {'x': np.zeros((beside.SIZE, 8, 6, 3), np.uint8)}, np.full(4, i)\n",
        "    for i in range(3): yield np.zeros((4, 3, 8, 6)), [i] * 4\n",
        "    return [{'x': np.zeros((4, 3, 8, 6)), 'labels': np.full(4, i)} for i in range(3)]\n",
    ],
)
def test_callables(tmp_path: Path, body: str) -> None:
    where = code(tmp_path, body)
    assert peek(DataSection(all=where)) is not None
    roles = opened(where)
    assert roles.calibrate and roles.evaluation and roles.evaluation.labels is not None
    assert len(roles.calibrate) + len(roles.evaluation) == 12
    assert set(roles.evaluation.labels) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    raise KeyError('gone')\n", "failed.*KeyError: 'gone'"),
        ("    yield {'x': np.zeros((4, 3, 8, 6))}\n    1 / 0\n", "failed at batch 1: ZeroDivisionError"),
        ("    yield 'text', object()\n", "is no array"),
        ("    yield 1, 2, 3\n", "3 values"),
        ("    return 5\n", "must give batches"),
        ("    return []\n", "yields no batch"),
        ("    yield np.zeros((4, 3, 8, 6)), np.zeros(3)\n", "3 labels for 4 samples"),
        ("    yield np.zeros((4, 3, 8, 6)), [1] * 4\n    yield np.zeros((4, 3, 8, 6))\n", "some batches"),
        ("    exit(3)\n", "SystemExit"),
    ],
)
def test_callables_that_go_wrong(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(code(tmp_path, body))


def test_callables_that_are_not_there(tmp_path: Path) -> None:
    where = code(tmp_path, "    return []\n")
    for text, message in [
        (where + "x", "did you mean batches"), (str(tmp_path / "no.py") + ":f", "no such file"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            opened(text)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(InputError, match="can't be imported: SyntaxError"):
        opened(str(tmp_path / "broken.py") + ":f")


def test_an_endless_callable_is_stopped(tmp_path: Path) -> None:
    body = "    while True: yield np.zeros((4, 3, 8, 6))\n"
    roles = opened(code(tmp_path, body), max_samples=16)
    assert roles.calibrate and roles.evaluation and len(roles.calibrate) + len(roles.evaluation) == 16


# Real data


@pytest.fixture
def shared() -> Path:
    folder = Path(os.environ.get("PERWATT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no shared data in {folder}: set PERWATT_DATA")
    return folder


def test_cifar10_and_mnist(shared: Path) -> None:
    cifar = shared / "cifar10" / "cifar10_test_lossless_1017.npz"
    signature = Signature((TensorSpec("input", "float32", ("n", 3, 32, 32)),), ())
    roles = opened(str(cifar), signature, normalize="imagenet")
    assert roles.evaluation and len(roles.evaluation) == 1017 - 254
    mnist = shared / "mnist" / "mnist_calib_train_1000.npz"
    roles = opened(str(mnist), Signature((TensorSpec("Input3", "float32", (1, 1, 28, 28)),), ()))
    assert roles.evaluation and roles.evaluation.chunks[0]["Input3"].max() == 255
