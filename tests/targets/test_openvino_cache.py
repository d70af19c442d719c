"""Compiled models kept on disk: what comes from there answers the same, and damage costs a compilation, not the answer.

The cache serves GPUs and NPUs; here the CPU plugin, which exports and imports by the same calls, stands in for them."""

import hashlib
import os

import numpy as np
import openvino
import pytest
from models import conv_net, feed

from perwatt.targets import _openvino_cache as cache

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


@pytest.fixture
def source(tmp_path):
    return conv_net(width=16).file(tmp_path)


def compiled(source, folder, batch=2, **settings):
    core = openvino.Core()
    model = core.read_model(str(source))
    model.reshape([batch, 3, 8, 8])
    return cache.compiled(core, model, source, "CPU", {**SETTINGS, **settings}, folder)


def answer(made):
    return np.array(made([feed(conv_net(), items=2)["x"]])[0])


def test_the_second_time_it_comes_from_the_cache_and_answers_the_same(source, tmp_path):
    first, before = compiled(source, tmp_path / "cache")
    second, after = compiled(source, tmp_path / "cache")
    assert (before, after) == (False, True)
    assert np.array_equal(answer(first), answer(second))
    assert int(second.get_property("INFERENCE_NUM_THREADS")) == 1


def test_another_batch_other_settings_or_another_model_are_something_else(source, tmp_path):
    compiled(source, tmp_path / "cache")
    assert not compiled(source, tmp_path / "cache", batch=3)[1]
    assert not compiled(source, tmp_path / "cache", PERFORMANCE_HINT="THROUGHPUT")[1]
    (tmp_path / "other").mkdir()
    assert not compiled(conv_net(width=16, seed=1).file(tmp_path / "other"), tmp_path / "cache")[1]
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut off", "start", "middle", "garbage"])
def test_a_damaged_blob_is_compiled_anew_and_mended(damage, source, tmp_path):
    expected = answer(compiled(source, tmp_path / "cache")[0])
    (blob,) = (tmp_path / "cache").iterdir()
    whole = blob.read_bytes()
    middle = len(whole) // 2
    blob.write_bytes(
        {
            "empty": b"",
            "cut off": whole[:middle],
            "start": bytes(64) + whole[64:],
            "middle": whole[:middle]
            + bytes(255 - byte for byte in whole[middle : middle + 200])
            + whole[middle + 200 :],
            "garbage": b"no blob at all" * 100,
        }[damage]
    )
    again, from_cache = compiled(source, tmp_path / "cache")
    assert not from_cache and np.array_equal(answer(again), expected)
    assert compiled(source, tmp_path / "cache")[1]


def test_a_blob_that_the_plugin_refuses_is_compiled_anew(source, tmp_path):
    compiled(source, tmp_path / "cache")
    (blob,) = (tmp_path / "cache").iterdir()
    foreign = b"whole, but of another making"
    blob.write_bytes(hashlib.sha256(foreign).digest() + foreign)
    assert not compiled(source, tmp_path / "cache")[1]


def test_a_folder_that_can_t_be_written_costs_nothing_but_time(source, tmp_path):
    (tmp_path / "file").write_text("")
    made, from_cache = compiled(source, tmp_path / "file" / "cache")
    assert not from_cache and answer(made).shape == (2, 5)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for number, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (number, number))
    os.utime(tmp_path / "a")
    cache.trim(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d"}


def test_together_blobs_take_no_more_than_the_limit(source, tmp_path, monkeypatch):
    compiled(source, tmp_path / "cache")
    (first,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(cache, "LIMIT_BYTES", int(1.5 * first.stat().st_size))
    os.utime(first, (0, 0))
    compiled(source, tmp_path / "cache", PERFORMANCE_HINT="THROUGHPUT")
    (left,) = (tmp_path / "cache").iterdir()
    assert left != first
    monkeypatch.setattr(cache, "LIMIT_BYTES", 10)
    assert not compiled(source, tmp_path / "cache", batch=5)[1]
    assert list((tmp_path / "cache").iterdir()) == [left]


def test_the_cpu_is_not_cached_by_itself_and_the_folder_is_the_user_s(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache.default_folder() == tmp_path / "home" / "perwatt" / "openvino"
    assert not compiled(source, None)[1] and not compiled(source, None)[1]
    assert not (tmp_path / "home").exists()
