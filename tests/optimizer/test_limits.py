"""gate.yaml: what can be limited and how; mistakes are named in one line with what was meant."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from perwatt.errors import InputError
from perwatt.figures import FIGURES
from perwatt.limits import DEFAULT, amount, check_accuracy_limit, read_limits, schema

WHOLE = """
limits:
  cpu_s_per_inference: {max_increase: 5%}
  throughput_per_watt: {max_decrease: 0.05}
  latency_p99_ms: {max: 20, max_increase: 10%}
  accuracy: {max_drop: 0.5, min: 90%}
  size_bytes: {max: 5MB}
on_inconclusive: pass
"""


def written(tmp_path, text):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    return path


def test_a_whole_file_is_read(tmp_path):
    found = read_limits(written(tmp_path, WHOLE))
    assert found.limits["cpu_s_per_inference"].max_increase == 0.05
    assert found.limits["throughput_per_watt"].max_decrease == 0.05
    assert (found.limits["latency_p99_ms"].max, found.limits["latency_p99_ms"].max_increase) == (20, 0.1)
    assert found.limits["accuracy"].max_drop == 0.5
    assert found.on_inconclusive == "pass"


def test_without_a_file_the_defaults_hold():
    assert read_limits(None) is DEFAULT
    assert DEFAULT.on_inconclusive == "block"


@pytest.mark.parametrize(
    ("figure", "value", "wanted"),
    [
        ("latency_p99_ms", 20, 20.0), ("latency_p99_ms", "20ms", 20.0), ("latency_p99_ms", "0.02s", 20.0),
        ("size_bytes", "5MB", 5e6), ("size_bytes", "5 MiB", 5 * 2**20), ("size_bytes", "800", 800.0),
        ("accuracy", "91.5%", 0.915), ("accuracy", 0.915, 0.915), ("cpu_s_per_inference", "2ms", 0.002),
        ("power_w", "35W", 35.0), ("throughput_per_s", 1000, 1000.0),
    ],
)  # fmt: skip
def test_amounts_carry_units(figure, value, wanted):
    assert amount(figure, value) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limits: {latency_p99: {max: 20}}", "did you mean latency_p99_ms"),
        ("limits: {power_w: {max_inkrease: 5%}}", "did you mean max_increase"),
        ("limits: {accuracy: {max_increase: 5%}}", "accuracy takes max_drop, max or min"),
        ("limits: {size_bytes: {max_drop: 1}}", "size_bytes takes max_increase"),
        ("limits: {size_bytes: {max: 5 bananas}}", "write 5MB or 800KiB"),
        ("limits: {size_bytes: {}}", "a limit wants max_increase"),
        ("limits: {}", "limits"),
        ("limit: {}", "did you mean limits"),
        ("limits: {power_w: {max_increase: -5%}}", "no fraction"),
        ("on_inconclusive: pass", "limits"),
        ("[1]", "no file of limits"),
        ("limits: {accuracy: {max_drop: 0,5}}", "write decimals with a point"),
        ("limits: {power_w: {max: 3}, on_inconclusive: pass}", "stands beside limits"),
        ("power_w: {max: 3}", "belongs under limits"),
        ("limits: {power_w: {max_increase: 5}}", "for 5 percent write 5% or 0.05"),
        ("limits: {accuracy: {max_drop: 0.5%}}", "write 0.5 (points"),
        ("limits: {power_w: {max: 3}}\non_inconclusive: maybe", "on_inconclusive"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        read_limits(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_schema_takes_the_example_and_refuses_unknown_figures():
    made = schema()
    jsonschema.validate(yaml.safe_load(WHOLE), made)
    for bad in ("limits: {latency_p99: {max: 20}}", "limits: {power_w: {maxi: 3}}", "limits: {power_w: {max: [1]}}"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(bad), made)
    assert set(made["properties"]["limits"]["propertyNames"]["enum"]) == set(FIGURES)
    json.dumps(made)


def test_a_bound_that_no_fraction_reaches_is_refused_once_the_metric_is_known(tmp_path):
    limits = read_limits(written(tmp_path, "limits: {accuracy: {min: 90}}"))
    with pytest.raises(InputError) as caught:
        check_accuracy_limit(limits, "fraction")
    assert "write 90% or 0.9" in str(caught.value.fix)
    for_text = read_limits(written(tmp_path, "limits: {accuracy: {min: 150%}}"))
    with pytest.raises(InputError, match="150% is more than any accuracy can be"):
        check_accuracy_limit(for_text, "fraction")
    check_accuracy_limit(limits, "metric")
    check_accuracy_limit(read_limits(written(tmp_path, "limits: {accuracy: {min: 90%}}")), "fraction")


def test_a_misspelt_file_names_the_nearest(tmp_path):
    written(tmp_path, WHOLE)
    with pytest.raises(InputError, match=r"there is no file of limits .*gat\.yaml — did you mean .*gate\.yaml"):
        read_limits(tmp_path / "gat.yaml")
