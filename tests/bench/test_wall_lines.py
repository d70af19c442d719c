"""The line protocol of external meters: what docs/wall-meter.md shows is understood, and garbage is refused in words."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.wall_lines import Header, Sample, parse_line

DOCS = Path(__file__).parents[2] / "docs" / "wall-meter.md"


def test_the_documented_lines_are_understood():
    lines = [line.strip() for line in DOCS.read_text().splitlines() if line.startswith("    {")]
    assert len(lines) == 4
    parsed = [parse_line(line.encode()) for line in lines]
    assert parsed[0] == Sample(None, 61.4, None)
    assert parsed[2] == Sample(1731.25, 61.4, 10452.7)
    assert parsed[3] == Header("Yokogawa WT310", 0.1, "wall")


@given(st.binary(max_size=60))
def test_no_line_whatever_it_holds_raises_anything_but_valueerror(line):
    try:
        assert isinstance(parse_line(line), Header | Sample)
    except ValueError as error:
        assert str(error)


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.none() | numbers, numbers, st.none() | numbers)
def test_every_finite_sample_is_read_back_as_it_was(time_s, power_w, energy_j):
    line = json.dumps({"time_s": time_s, "power_w": power_w, "energy_j": energy_j}).encode()
    assert parse_line(line) == Sample(time_s, power_w, energy_j)


@pytest.mark.parametrize(
    "line",
    [
        b"[1]", b"{}", b'{"power_w": null}', b'{"power_w": true}', b'{"power_w": NaN}', b'{"power_w": 1e999}',
        b'{"energy_j": "1"}', b'{"time_s": 1}', b'{"interval_s": 0}', b'{"boundary": "planet"}', b"\xff\xfe",
        b'{"power_w": 1' + b"0" * 400 + b"}", b"[" * 60000,
    ],
)  # fmt: skip
def test_lines_that_say_nothing_useful_are_refused(line):
    with pytest.raises(ValueError, match=r"\w"):
        parse_line(line)


def test_nothing_that_is_not_finite_gets_in():
    with pytest.raises(ValueError, match="power_w"):
        parse_line(json.dumps({"power_w": math.inf}).encode())
