"""`perwatt.gate_junit`: what the test tabs of GitLab, Jenkins and GitHub are given."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.gate_junit import render
from perwatt.gate_report import GateReport

sys.path.insert(0, str(Path(__file__).parent))
from gates import (
    CPU,
    GATES,
    a_check,
    a_gate,
    a_gate_side,
    disturbed_gate,
    failed_gate,
    gate_without_accuracy,
    inconclusive_gate,
    modelled_gate,
    unmeasurable_gate,
)

# What Windy Road's JUnit.xsd and Jenkins' junit-10.xsd both ask for.
SUITE = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time"}
DECIMAL = re.compile(r"[0-9]+\.[0-9]{3}")


def suite(report: GateReport) -> ET.Element:
    root = ET.fromstring(render(report))
    assert root.tag == "testsuites"
    [found] = root
    return found


def cases(report: GateReport) -> dict[str, ET.Element]:
    return {case.attrib["name"]: case for case in suite(report).findall("testcase")}


def check_form(found: ET.Element) -> None:
    """The order, elements and attributes that both schemas allow."""
    tags = [child.tag for child in found]
    count = tags.count("testcase")
    assert tags == ["properties", *["testcase"] * count, "system-out", "system-err"]
    assert set(found.attrib) == SUITE
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", found.attrib["timestamp"])
    assert DECIMAL.fullmatch(found.attrib["time"])
    assert all(found.attrib[name].strip() for name in ("name", "hostname", "package"))
    outcomes = []
    for case in found.findall("testcase"):
        assert set(case.attrib) == {"classname", "name", "time"}
        assert DECIMAL.fullmatch(case.attrib["time"])
        assert len(case) <= 1
        outcomes += [child.tag for child in case]
    assert set(outcomes) <= {"failure", "skipped"}
    said = [int(found.attrib[name]) for name in ("tests", "failures", "errors", "skipped")]
    assert said == [count, outcomes.count("failure"), 0, outcomes.count("skipped")]
    for one in found.find("properties") or []:
        assert set(one.attrib) == {"name", "value"} and one.attrib["name"]


@pytest.mark.parametrize("name", ["fail", "disturbed"])
def test_as_recorded(name: str, golden: Any) -> None:
    golden(f"gate_{name}_junit", render(GATES[name]()))


@pytest.mark.parametrize("name", GATES)
def test_the_form_is_what_both_schemas_take(name: str) -> None:
    check_form(suite(GATES[name]()))


def test_one_case_for_each_limit_by_class_and_name() -> None:
    found = cases(failed_gate())
    assert list(found) == [
        "CPU time per inference: at most 5 % more", "inferences per joule: at most 5 % less", "latency p99: at most 20 ms",
        "accuracy: loses at most 0.5 points",
    ]  # fmt: skip
    assert {case.attrib["classname"] for case in found.values()} == {"perwatt.gate.resnet20"}
    assert suite(a_gate(name="net.v2")).findall("testcase")[0].attrib["classname"] == "perwatt.gate.net_v2"


def test_names_carry_no_measured_number_so_that_the_next_run_finds_them() -> None:
    assert list(cases(failed_gate())) == list(cases(a_gate()))


def test_a_failure_says_why_in_message_and_text() -> None:
    failure = cases(failed_gate())["CPU time per inference: at most 5 % more"].find("failure")
    assert failure is not None and failure.text is not None
    assert failure.attrib == {
        "message": "CPU time per inference is 1.110× the base's [1.080, 1.140]",
        "type": "LimitExceeded",
    }
    assert failure.text.split("\n") == [
        failure.attrib["message"], "base 130 µs, head 144 µs, head ÷ base 1.11× [1.08, 1.14], noise 1.2 %",
    ]  # fmt: skip


def test_an_open_limit_is_skipped_with_its_reason_and_no_failure() -> None:
    case = cases(inconclusive_gate())["CPU time per inference: at most 5 % more"]
    [skipped] = case
    assert skipped.tag == "skipped"
    assert skipped.attrib["message"].startswith("inconclusive: CPU time per inference is 1.040×")
    assert (skipped.text or "").startswith(skipped.attrib["message"])


def test_modelled_joules_name_the_figure_that_decided() -> None:
    [failure] = cases(modelled_gate(1.25, "fail"))["inferences per joule: at most 5 % less"]
    assert "(decided by CPU time per inference)" in failure.attrib["message"]


def test_missing_figures_are_dashes() -> None:
    [skipped] = cases(unmeasurable_gate())["CPU time per inference: at most 5 % more"]
    assert "base –, head 130 µs, head ÷ base –, noise –" in (skipped.text or "")
    assert "None" not in render(gate_without_accuracy())


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_verdict_that_no_limit_carries_has_a_case_of_its_own(verdict: Any) -> None:
    report = a_gate(verdict, reason="the head does not run", checks=[a_check()])
    [said] = cases(report)["the gate as a whole"]
    assert said.tag == ("failure" if verdict == "fail" else "skipped")
    assert "the head does not run" in said.attrib["message"]
    assert len(cases(a_gate("inconclusive", checks=[]))) == 1
    assert "the gate as a whole" not in cases(failed_gate())


def test_two_limits_that_read_the_same_keep_their_own_names() -> None:
    assert len(cases(a_gate(checks=[a_check(), a_check()]))) == 2


def test_properties_tell_sides_energy_machine_and_whether_it_was_disturbed() -> None:
    found = {one.attrib["name"]: one.attrib["value"] for one in suite(disturbed_gate()).iter("property")}
    assert found["base"] == "git:origin/main" and found["head.dirty"] == "yes" and found["base.from_cache"] == "yes"
    assert found["energy.method"] == "counter" and found["energy.boundary"] == "package"
    assert found["machine.fingerprint.name"] == "AMD EPYC 9B14" and found["machine.digest"] == "9c1f02ab77de"
    assert found["disturbed"].startswith("other processes used 31 %")
    assert {one.attrib["name"]: one.attrib["value"] for one in suite(a_gate()).iter("property")}["disturbed"] == "no"


def test_the_cases_share_the_time_of_the_suite() -> None:
    found = suite(a_gate(seconds=10.0))
    assert found.attrib["time"] == "10.000"
    assert [case.attrib["time"] for case in found.findall("testcase")] == ["2.500"] * 4


def test_the_timestamp_is_utc_without_a_zone_and_absent_where_there_is_none() -> None:
    assert suite(a_gate(created="2026-05-04T12:11:12.5+02:00")).attrib["timestamp"] == "2026-05-04T10:11:12"
    assert "timestamp" not in suite(a_gate(created="yesterday")).attrib


def test_the_output_has_the_verdict_and_what_to_do() -> None:
    text = suite(inconclusive_gate()).findtext("system-out") or ""
    assert text.startswith("INCONCLUSIVE  CPU time per inference: 1.04× [0.98, 1.10]")
    assert "measure longer with --time" in text
    assert (suite(disturbed_gate()).findtext("system-err") or "").startswith("disturbed: other processes")


@given(text=st.text(max_size=60))
def test_any_text_makes_a_document_that_reads_back(text: str) -> None:
    """Control characters, lone surrogates, tags and the ends of CDATA among them."""
    nasty = f"{text}\x00\x1b\ud800\ufffe]]>&<"
    report = a_gate(
        "fail", name=nasty, reason=nasty, base=a_gate_side(nasty), machine={nasty: nasty, "hostname": text},
        checks=[a_check(CPU, nasty, "fail", reason=nasty)], disturbed=[nasty], notes=[nasty],
    )  # fmt: skip
    made = render(report)
    made.encode("utf-8")
    found = suite(report)
    check_form(found)
    [failure] = found.findall("testcase")[0]
    assert failure.attrib["message"].endswith("����]]>&<")
