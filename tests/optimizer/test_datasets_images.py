"""Folders of pictures: layouts, labels, sizes, and what bad folders say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perwatt.datasets import Roles, open_roles, peek
from perwatt.datasets_images import _cropped, _Plan
from perwatt.errors import InputError
from perwatt.recipe import DataSection, RawInput
from perwatt.signature import Signature, TensorSpec

RGB = Signature((TensorSpec("x", "float32", ("n", 3, 16, 16)),), ())


def picture(path: Path, color: object = (255, 0, 0), size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]
    return path


def classes(folder: Path, names: tuple[str, ...] = ("dog", "cat"), each: int = 4) -> Path:
    for number, name in enumerate(names):
        for i in range(each):
            picture(folder / name / f"{i}.png", (10 * number, i, 0))
    return folder


def opened(folder: Path, signature: Signature = RGB, **fields: object) -> Roles:
    return open_roles(DataSection(all=str(folder), **fields), signature)  # type: ignore[arg-type]


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no picture")
    roles = opened(classes(tmp_path))
    assert roles.class_names == ("cat", "dog")
    assert roles.evaluation and roles.evaluation.labels is not None
    red = [round(float(v) * 255) for chunk in roles.evaluation.chunks for v in chunk["x"][:, 0, 0, 0]]
    assert [{10: 0, 0: 1}[value] for value in red] == list(roles.evaluation.labels)
    notes = " ".join(roles.notes)
    assert "fed as x/255" in notes and "1 files that are no pictures" in notes and "cat = 0, dog = 1" in notes


def test_the_models_own_class_numbers_win(tmp_path: Path) -> None:
    section = DataSection(all=str(classes(tmp_path)))
    roles = open_roles(section, RGB, label2id={"Cat": 5, "dog": 2, "emu": 0})
    assert roles.evaluation and roles.evaluation.labels is not None
    assert set(roles.evaluation.labels) == {5, 2}
    assert roles.class_names is not None and roles.class_names[2] == "dog" and roles.class_names[5] == "cat"
    with pytest.raises(InputError, match="unknown class 'dog'"):
        open_roles(section, RGB, label2id={"cat": 0, "dogs": 1})
    assert open_roles(section, RGB, label2id={"LABEL_0": 0, "LABEL_1": 1}).class_names == ("cat", "dog")


@pytest.mark.parametrize("header", ["", "filename,label\n"])
def test_labels_from_a_table(tmp_path: Path, header: str) -> None:
    for i in range(9):
        picture(tmp_path / f"{i}.png", (i, 0, 0))
    (tmp_path / "labels.csv").write_text(header + "".join(f"{i}.png,{i % 3}\n" for i in range(8)))
    roles = opened(tmp_path)
    assert roles.evaluation and roles.evaluation.labels is not None
    red = [round(float(v) * 255) % 3 for chunk in roles.evaluation.chunks for v in chunk["x"][:, 0, 0, 0]]
    assert red == list(roles.evaluation.labels)
    assert any("1 pictures that labels.csv doesn't name" in note for note in roles.notes)
    (tmp_path / "labels.csv").write_text("gone.png,1\n0.png,1\nnone.png,2\n")
    with pytest.raises(InputError, match=r"names 'none\.png', which is not in"):
        opened(tmp_path)


def test_flat_folders_have_no_labels(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.jpg")
    roles = opened(tmp_path)
    assert roles.evaluation and roles.evaluation.labels is None and roles.class_names is None


def test_layout_channels_and_types(tmp_path: Path) -> None:
    classes(tmp_path)
    gray = Signature((TensorSpec("x", "float32", ("n", 1, 16, 16)),), ())
    nhwc = Signature((TensorSpec("x", "float32", ("n", 16, 16, 3)),), ())
    raw = Signature((TensorSpec("x", "uint8", ("n", 16, 16, 3)),), ())
    for signature, shape in [(gray, (1, 16, 16)), (nhwc, (16, 16, 3)), (raw, (16, 16, 3))]:
        roles = opened(tmp_path, signature)
        assert roles.calibrate and roles.calibrate.chunks[0]["x"].shape[1:] == shape
    roles = open_roles(DataSection(all=str(tmp_path)), raw, raw_inputs={"x": RawInput(layout="NHWC")})
    assert roles.evaluation and roles.evaluation.chunks[0]["x"].dtype == np.uint8


def test_pictures_are_normalised_like_arrays(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", (10, 20, 30))
    roles = opened(tmp_path, normalize="imagenet")
    assert roles.calibrate
    wanted = (np.array([10, 20, 30]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(roles.calibrate.chunks[0]["x"][0, :, 3, 3], wanted, rtol=1e-5)


def test_size_comes_from_the_flag_or_the_model(tmp_path: Path) -> None:
    classes(tmp_path)
    open_size = Signature((TensorSpec("x", "float32", ("n", 3, "h", "w")),), ())
    with pytest.raises(InputError, match="give --image SIDE"):
        opened(tmp_path, open_size)
    roles = opened(tmp_path, open_size, image=[12, 20])
    assert roles.calibrate and roles.calibrate.chunks[0]["x"].shape[1:] == (3, 12, 20)
    with pytest.raises(InputError, match="--image 20,20 doesn't fit"):
        opened(tmp_path, image=20)
    with pytest.raises(InputError, match="--resize 8 is smaller"):
        opened(tmp_path, resize=8)
    assert peek(DataSection(all=str(tmp_path))) is None
    assert peek(DataSection(all=str(tmp_path), image=16)) == [TensorSpec("images", "float32", ("batch", 3, 16, 16))]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(0, 30))
def test_crops_always_have_the_size(wide: int, high: int, height: int, width: int, more: int) -> None:
    for resize in (None, min(height, width) + more):
        plan = _Plan(height, width, resize, 3, True, np.dtype("float32"), None)
        assert _cropped(Image.new("RGB", (wide, high)), plan).size == (width, height)


def test_the_custom_resize_keeps_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[16:240, 144:368] = 255
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    roles = opened(tmp_path, Signature((TensorSpec("x", "float32", ("n", 3, 224, 224)),), ()))
    assert roles.calibrate and roles.calibrate.chunks[0]["x"].min() == 1.0


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
    roles = opened(tmp_path)
    assert roles.calibrate
    first = roles.calibrate.chunks[0]["x"][0, 0]
    assert first[0].max() == 0 and first[-1].min() == 1


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / f"{i}.png")
    roles = opened(tmp_path, Signature((TensorSpec("x", "float32", ("n", 1, 16, 16)),), ()), normalize="none")
    assert roles.calibrate and roles.calibrate.chunks[0]["x"].max() == 128


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in it"):
        opened(tmp_path / "empty")
    classes(tmp_path / "splits" / "train")
    classes(tmp_path / "splits" / "val")
    with pytest.raises(InputError, match=r"whole data sets.*splits/val"):
        opened(tmp_path / "splits")
    flat = Signature((TensorSpec("x", "float32", ("n", 768)),), ())
    with pytest.raises(InputError, match="takes no pictures"):
        opened(tmp_path / "splits" / "val", flat)
    with pytest.raises(InputError, match="pictures feed one input"):
        opened(tmp_path / "splits" / "val", Signature((*RGB.inputs, TensorSpec("z", "float32", ("n", 1))), ()))


@pytest.mark.parametrize("damage", [b"no picture", b""])
def test_a_corrupt_picture_is_named(tmp_path: Path, damage: bytes) -> None:
    classes(tmp_path)
    (tmp_path / "cat" / "2.png").write_bytes(damage)
    with pytest.raises(InputError, match=r"cat/2\.png can't be read"):
        opened(tmp_path)


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    classes(tmp_path)
    Image.fromarray(noise).save(tmp_path / "cat" / "2.png")
    whole = (tmp_path / "cat" / "2.png").read_bytes()
    (tmp_path / "cat" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cat/2\.png can't be read"):
        opened(tmp_path)


def test_the_digest_covers_names_and_contents(tmp_path: Path) -> None:
    classes(tmp_path)
    before = opened(tmp_path).sources
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "9.png")
    renamed = opened(tmp_path).sources
    picture(tmp_path / "cat" / "9.png", (77, 0, 0))
    changed = opened(tmp_path).sources
    assert len({tuple(d.values()) for d in (before, renamed, changed)}) == 3
