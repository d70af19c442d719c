"""Metrics against plain definitions, paired intervals against a search, and the check against chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.data import Samples
from perwatt.errors import InputError
from perwatt.metrics import Score, compare, near_chance, resolve
from perwatt.metrics_paired import binomial_tail, t_quantile, tango_interval
from perwatt.signature import Array, Batch


def samples(labels: Any = None, count: int | None = None) -> Samples:
    array = None if labels is None else np.asarray(labels)
    length = count if array is None else len(array)
    assert length is not None
    return Samples([{"x": np.zeros((length, 1), np.float32)}], array)


def cut(array: Array, edges: list[int], name: str = "y") -> list[Batch]:
    return [{name: part} for part in np.split(array, sorted({e % len(array) for e in edges} - {0}))]


def value(name: str, outputs: list[Batch], made: Samples, reference: list[Batch] | None = None) -> float:
    return resolve(name, made, outputs).score(outputs, made, reference).value


@given(st.integers(1, 20), st.integers(2, 8), st.lists(st.integers(0, 20), max_size=4), st.integers(0, 9))
def test_top_k_is_the_plain_definition_however_batches_are_cut(n: int, c: int, edges: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (n, c)).astype(np.float32)  # with ties
    labels = random.integers(0, c, n)
    outputs, made = cut(scores, edges), samples(labels)
    assert value("top1", outputs, made) == np.mean(scores.argmax(axis=1) == labels)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert value("top5", outputs, made) == np.mean([label in best for label, best in zip(labels, order, strict=True)])


def test_top1_forms_of_output() -> None:
    made = samples([0, 1, 1, 0])
    logits = np.array([-2.0, 3.0, -1.0, 1.0], np.float32)
    assert value("top1", [{"y": logits}], made) == 0.5
    assert value("top1", [{"y": logits[:, None]}], made) == 0.5
    assert value("top1", [{"y": np.array([0.2, 0.7, 0.4, 0.1])}], made) == 0.75
    assert value("top1", [{"y": np.array([0, 1, 1, 1])}], made) == 0.75
    four = np.eye(2, dtype=np.float32)[[0, 1, 0, 0]]
    assert value("top1", [{"boxes": np.zeros((4, 3, 4), np.float32), "y": four}], made) == 0.75
    assert value("top1", [{"y": four[:, :, None, None]}], made) == 0.75
    broken = four.copy()
    broken[0, 1] = np.nan
    assert value("top1", [{"y": broken}], made) == 0.5


def test_what_suits_no_metric() -> None:
    scores = [{"y": np.zeros((3, 10), np.float32)}]
    for name, outputs, made, message in [
        ("top1", scores, samples([0, 1, 100]), r"labels go from 0 to 100, the model has 10 classes \(0 to 9\)"),
        ("top1", scores, samples([-1, 1, 2]), "labels go from -1"),
        ("top1", scores, samples(count=3), "needs labels"),
        ("top1", scores, samples([0, 1]), "3 results for 2 labels"),
        ("top1", scores, samples(np.zeros(3, np.float32)), "class numbers"),
        ("top1", [{"y": np.zeros((3, 4, 5), np.float32)}], samples([0, 1, 2]), "needs class scores"),
        ("mse", scores, samples(np.zeros((3, 2), np.float32)), r"labels' shape \[3, 2\]"),
        ("topp1", scores, samples([0, 1, 2]), "did you mean"),
    ]:
        with pytest.raises(InputError, match=message):
            value(name, outputs, made)


@given(st.lists(st.integers(0, 12), max_size=3), st.lists(st.integers(0, 12), max_size=3))
def test_agreement_with_the_original_however_both_are_cut(ours: list[int], theirs: list[int]) -> None:
    random = np.random.default_rng(1)
    before, after = random.normal(size=(2, 12, 3)).astype(np.float32)
    found = value("agreement", cut(after, ours), samples(count=12), cut(before, theirs))
    assert found == np.mean(before.argmax(axis=1) == after.argmax(axis=1))
    assert value("agreement", cut(after, ours), samples(count=12)) == 1.0


def test_cosine_and_mse() -> None:
    made = samples(count=4)
    y = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    assert value("cosine", [{"y": 2 * y}], made, [{"y": y}]) == pytest.approx(1)
    assert value("cosine", [{"y": -y, "z": y}], made, [{"y": y, "z": y}]) == pytest.approx(0)
    assert value("cosine", [{"y": 0 * y}], made, [{"y": 0 * y}]) == 1
    assert value("cosine", [{"y": np.full_like(y, np.nan)}], made, [{"y": y}]) == 0
    masked = np.where(y > 0, y, -np.inf)
    assert value("cosine", [{"y": masked}], made, [{"y": masked}]) == pytest.approx(1)
    assert value("mse", [{"y": y + 0.5}], made, [{"y": y}]) == pytest.approx(0.25, rel=1e-5)
    targets = samples(np.array([1, 2, 3, 4], np.float32))
    assert value("mse", [{"y": np.array([[1], [2], [3], [6]], np.float32)}], targets) == 1
    assert value("mse", [{"y": np.full(4, np.nan, np.float32)}], targets) == math.inf


def test_outputs_without_a_batch_axis_count_by_call() -> None:
    made = Samples([{"x": np.zeros((3, 2))}, {"x": np.zeros((3, 2))}], None, 3)
    calls: list[Batch] = [{"y": np.arange(5, dtype=np.float32)}, {"y": np.ones(5, np.float32)}]
    score = resolve("agreement", made, calls).score(calls, made, calls)
    assert (score.value, score.n) == (pytest.approx(1), 2)


def test_the_usual_metric() -> None:
    scores: list[Batch] = [{"y": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}]
    column: list[Batch] = [{"y": np.zeros((4, 1), np.float32)}]
    unit = scores[0]["y"] / np.linalg.norm(scores[0]["y"], axis=1, keepdims=True)
    assert resolve(None, samples([0, 1, 2, 0]), scores).name == "top1"
    assert resolve(None, samples([0, 1, 1, 0]), column).name == "top1"
    assert resolve(None, samples([3, 15, 20, 7]), column).name == "mse"
    assert resolve(None, samples(np.zeros(4, np.float32)), column).name == "mse"
    assert resolve(None, samples(count=4), scores).name == "agreement"
    assert resolve(None, None, [{"y": unit}]).name == "cosine"
    assert resolve(None, None, scores * 2).name == "agreement"
    assert resolve(None, None, [{"h": np.zeros((4, 7, 3), np.float32), **scores[0]}]).name == "cosine"
    assert resolve("agreement", None, [{"a": scores[0]["y"], "b": scores[0]["y"]}]).name == "cosine"


def test_custom_metrics(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "def mean(outputs, labels): return outputs['y'].mean()\n"
        "def each(outputs, labels): return [float(len(row)) for row in outputs['y']]\n"
        "def short(outputs, labels): return [1.0]\n"
        "def bad(outputs, labels): raise RuntimeError('no')\n"
    )
    made = samples([0, 0, 1, 1])
    uneven: list[Batch] = [{"y": np.ones((2, 3))}, {"y": np.ones((2, 5))}]
    even: list[Batch] = [{"y": np.ones((4, 3))}]
    whole = resolve(f"{tmp_path}/m.py:mean", made, even)
    score = whole.score(even, made, None)
    assert (score.value, score.per_sample) == (1.0, None)
    assert math.isinf(compare(whole, score, score).high)
    assert value(f"{tmp_path}/m.py:each", uneven, made) == 4
    for name, message in [
        ("short", "gave .1. numbers for 4"),
        ("bad", "RuntimeError: no"),
        ("eech", "did you mean each"),
    ]:
        with pytest.raises(InputError, match=message):
            value(f"{tmp_path}/m.py:{name}", even, made)


# Comparing


def binary(values: Any) -> Score:
    array = np.asarray(values, dtype=np.float64)
    return Score(float(array.mean()), array, len(array))


def test_flips_are_counted_and_drops_are_in_points() -> None:
    top1 = resolve("top1", None, None)
    found = compare(top1, binary([1, 1, 1, 0]), binary([1, 0, 0, 1]))
    assert (found.drop, found.flips_lost, found.flips_gained, found.n) == (25.0, 2, 1, 4)
    assert found.low < 25 < found.high


def test_lower_is_better_turns_the_sign() -> None:
    found = compare(resolve("mse", None, None), binary([1.0, 2.0, 3.0]), binary([2.0, 3.0, 4.5]))
    assert found.drop == pytest.approx(3.5 / 3) and found.low < found.drop < found.high and found.flips_lost is None
    broken = compare(resolve("mse", None, None), binary([1.0, 2.0]), binary([1.0, math.inf]))
    assert broken.drop == math.inf and broken.high == math.inf


def test_different_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="3 and 2 samples"):
        compare(resolve("top1", None, None), binary([1, 1, 1]), binary([1, 1]))


def test_tango_interval_solves_its_own_equation() -> None:
    # Without flips the interval is closed form: z² / (n + z²).
    z2 = 1.959963984540054**2
    low, high = tango_interval(0, 0, 100)
    assert (low, high) == (pytest.approx(-z2 / (100 + z2)), pytest.approx(z2 / (100 + z2)))
    # With flips: at each bound the score statistic is ±z, its nuisance share found by search over the likelihood.
    for lost, gained, n in [(12, 2, 50), (9, 14, 1017), (3, 0, 40)]:
        for difference in tango_interval(lost, gained, n):
            share = np.linspace(max(0.0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 2_000_001)
            rest = np.log1p(-2 * share - difference)
            likelihood = lost * np.log(share + difference) + (n - lost - gained) * rest + gained * np.log(share)
            best = share[likelihood.argmax()]
            z = (lost - gained - n * difference) / math.sqrt(n * (2 * best + difference * (1 - difference)))
            assert abs(z) == pytest.approx(math.sqrt(z2), abs=2e-3)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 500))
def test_tango_interval_holds_the_estimate_and_mirrors(lost: int, gained: int, agreed: int) -> None:
    n = lost + gained + agreed
    low, high = tango_interval(lost, gained, n)
    assert -1 <= low <= high <= 1
    if n:
        assert low - 1e-9 <= (lost - gained) / n <= high + 1e-9
        mirrored = tango_interval(gained, lost, n)
        assert (low, high) == (pytest.approx(-mirrored[1], abs=1e-9), pytest.approx(-mirrored[0], abs=1e-9))


def test_quantiles_and_tails_are_the_tables() -> None:
    for freedom, wanted in [(1, 12.7062), (2, 4.3027), (10, 2.2281), (100, 1.9840), (1016, 1.9623), (5000, 1.9600)]:
        assert t_quantile(freedom) == pytest.approx(wanted, abs=6e-4)
    assert binomial_tail(0, 10, 0.3) == pytest.approx(1)
    assert binomial_tail(10, 10, 0.5) == pytest.approx(2**-10)
    assert binomial_tail(6, 10, 0.5) == pytest.approx(0.376953, abs=1e-6)


# Chance


def chance(labels: Array, predicted: Array) -> str | None:
    made = samples(labels)
    scores = [{"y": np.eye(int(labels.max()) + 1, dtype=np.float32)[predicted]}]
    metric = resolve("top1", made, scores)
    return near_chance(metric, metric.score(scores, made, None), made)


def test_near_chance() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 500)
    message = chance(labels, random.integers(0, 10, 500))
    assert message is not None and "check normalisation or class order" in message and "% on your labels" in message
    assert chance(labels, np.zeros(500, np.int64)) is not None  # always the same class
    assert chance(labels, (labels + 1) % 10) is not None  # classes in another order
    assert chance(labels, np.where(random.random(500) < 0.4, labels, random.integers(0, 10, 500))) is None
    assert chance(labels[:20], random.integers(0, 10, 20)) is None  # too few to tell
    assert chance(np.zeros(100, np.int64), np.zeros(100, np.int64)) is None  # one class


def test_lopsided_classes_are_no_alarm_for_a_model_that_tells_them_apart() -> None:
    labels = np.repeat([0, 1], [950, 50])
    finds_some = labels.copy()
    finds_some[950:970] = 0  # misses 20 of 50
    finds_some[:45] = 1  # and takes 45 too many: 93.5 %, below always guessing 0
    assert chance(labels, finds_some) is None
    assert chance(labels, np.zeros(1000, np.int64)) is not None
