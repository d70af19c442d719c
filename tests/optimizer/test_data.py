"""Samples: what is put in comes out, whichever way it is cut, drawn, divided or stored."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.data import Samples
from perwatt.signature import rows


@st.composite
def samples(draw: st.DrawFn) -> Samples:
    """Chunks of several lengths; item i holds the number i everywhere, and so does its label."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4))
    chunks, first = [], 0
    for count, length in sizes:
        ids = np.repeat(np.arange(first, first + count)[:, None], length, axis=1)
        chunks.append({"ids": ids, "mask": ids.astype(np.float32)})
        first += count
    labels = np.arange(first) if draw(st.booleans()) else None
    return Samples(chunks, labels, batch_size=draw(st.integers(1, 5)))


def numbers(made: Samples) -> list[int]:
    return [int(value) for batch in made for value in batch["ids"][:, 0]]


@given(samples(), st.integers(1, 9))
def test_batches_hold_every_item_once_in_order(made: Samples, size: int) -> None:
    batches = list(made.batches(size))
    assert all(rows(batch) <= size for batch in batches)
    assert [int(v) for b in batches for v in b["ids"][:, 0]] == list(range(len(made)))


@given(samples(), st.data())
def test_subset_keeps_items_and_labels_together(made: Samples, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(made) - 1), max_size=10))
    part = made.subset(wanted)
    assert numbers(part) == sorted(set(wanted))
    if made.labels is not None:
        assert part.labels is not None and list(part.labels) == sorted(set(wanted))


@given(samples(), st.integers(0, 40), st.integers(0, 3))
def test_take_draws_without_replacement_and_by_seed(made: Samples, count: int, seed: int) -> None:
    part = made.take(count, seed)
    assert len(part) == min(count, len(made))
    assert len(set(numbers(part))) == len(part)
    assert numbers(part) == numbers(made.take(count, seed))


@given(samples(), st.floats(0.1, 0.8))
def test_divide_shares_everything_out(made: Samples, fraction: float) -> None:
    parts = made.divide({"one": fraction, "other": 1 - fraction}, seed=3)
    assert sorted(numbers(parts["one"]) + numbers(parts["other"])) == list(range(len(made)))


@given(samples())
def test_save_and_load_give_the_same(made: Samples) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaded = Samples.load(made.save(Path(folder)))
        assert loaded.digest() == made.digest()
        assert loaded.batch_size == made.batch_size
        assert numbers(loaded) == numbers(made)


def test_digest_sees_values_types_and_labels() -> None:
    chunk = {"x": np.zeros((2, 3), np.float32)}
    variants = [
        Samples([chunk]),
        Samples([chunk], np.array([0, 1])),
        Samples([{"x": np.ones((2, 3), np.float32)}]),
        Samples([{"x": np.zeros((2, 3), np.int32)}]),
        Samples([{"y": np.zeros((2, 3), np.float32)}]),
    ]
    assert len({made.digest() for made in variants}) == len(variants)


def test_labels_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 labels for 2 samples"):
        Samples([{"x": np.zeros((2, 1))}], np.zeros(3, np.int64))


def test_without_labels() -> None:
    assert Samples([{"x": np.zeros((2, 1))}], np.zeros(2, np.int64)).without_labels().labels is None
