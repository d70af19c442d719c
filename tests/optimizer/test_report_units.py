"""`perwatt.report_units` and the judgements of `perwatt.report_table`: figures as people read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perwatt.measurement import Ratio
from perwatt.report import RatioFigure
from perwatt.report_table import judged
from perwatt.report_units import SIZES, TIMES, compact, in_units, number, plain, ratio_words, signed

sys.path.insert(0, str(Path(__file__).parent))
from reports import exact


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.617, "0.617"), (12.34, "12.3"), (7690.4, "7,690"), (999.6, "1,000"), (9.996, "10.0"), (0, "0"), (None, "–"),
     (float("nan"), "–"), (float("inf"), "–"), (1.234e-5, "1.23e−05"), (-0.5, "−0.500")],
)  # fmt: skip
def test_numbers_have_three_significant_digits_and_missing_is_a_dash(value: float | None, text: str) -> None:
    assert number(value) == text


def test_compact_numbers_end_without_zeros() -> None:
    assert [compact(0.5), compact(100.0), compact(1.05)] == ["0.5", "100", "1.05"]


def test_what_is_compared_shares_a_unit() -> None:
    assert in_units([0.0013, 0.00085], TIMES) == ["1.30 ms", "0.850 ms"]
    assert in_units([1.3, 0.003], TIMES) == ["1,300 ms", "3.00 ms"]
    assert in_units([1_090_000, None], SIZES) == ["1.09 MB", "–"]


def test_ratios_are_as_fine_as_their_interval() -> None:
    assert ratio_words(RatioFigure(value=1.62, low=1.58, high=1.66)) == ("1.62×", "[1.58, 1.66]")
    assert ratio_words(RatioFigure(value=1.0021, low=1.0011, high=1.0031)) == ("1.002×", "[1.001, 1.003]")
    assert ratio_words(exact(0.284)) == ("0.28×", "")
    assert ratio_words(RatioFigure(value=None)) == ("–", "")


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [signed(-0.001, 2), signed(-0.1, 2), signed(0.2, 1)] == ["0.00", "−0.10", "+0.2"]


def test_a_change_within_its_interval_is_no_change() -> None:
    assert judged(RatioFigure(value=1.02, low=0.99, high=1.05), more_is_better=True) == "≈ same"
    assert judged(RatioFigure(value=1.02, low=1.01, high=1.03), more_is_better=True) == "better"
    assert judged(RatioFigure(value=1.02, low=1.01, high=1.03), more_is_better=False) == "worse"
    assert judged(exact(1.0), more_is_better=True) == "same"
    assert judged(RatioFigure(value=None), more_is_better=True) == ""


def test_plain_makes_one_line_of_it() -> None:
    assert plain("a\tb\n c\x00") == "a b c�"


def test_ratio_of_measurement_fits_the_report() -> None:
    ratio = Ratio(0.5, 0.4, 0.6).inverse()
    assert ratio_words(RatioFigure(value=ratio.value, low=ratio.low, high=ratio.high)) == ("2.00×", "[1.67, 2.50]")
