"""`perwatt.gate_markdown`: what stands in a pull request, and that nobody's text can become markup there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from perwatt import markdown as md
from perwatt.gate_markdown import marker, render
from perwatt.gate_report import GateReport

sys.path.insert(0, str(Path(__file__).parent))
from gates import (
    GATES,
    WATT,
    a_check,
    a_gate,
    a_gate_side,
    disturbed_gate,
    failed_gate,
    inconclusive_gate,
    modelled_gate,
    unmeasurable_gate,
)

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PLAIN = {"text", "html_inline", "softbreak"}


def tokens(text: str) -> list[Token]:
    """All tokens, those within lines too."""
    return [token for outer in PARSER.parse(text) for token in (outer, *(outer.children or []))]


def rendered(text: str) -> str:
    """What a reader sees of one line of Markdown: its text without tags."""
    return "".join(token.content for token in tokens(text) if token.type == "text")


def part(text: str, begin: str) -> str:
    """From `begin` to the end of its fold."""
    return text[text.index(begin) :].split("</details>")[0]


@pytest.mark.parametrize("name", ["fail", "disturbed", "unmeasurable"])
def test_as_recorded(name: str, golden: Any) -> None:
    golden(f"gate_{name}_markdown", render(GATES[name]()))


def test_the_hidden_marker_comes_first_and_is_the_same_for_the_same_name() -> None:
    assert render(a_gate()).split("\n")[0] == render(failed_gate()).split("\n")[0] == marker("resnet20")
    assert marker("resnet20") == "<!-- perwatt-gate: resnet20 -->"
    assert marker("a") != marker("b")


def test_a_name_can_not_end_the_marker() -> None:
    for name in ("x --> <img src=x>", "--", "x\n<b>", "->", "--!>"):
        said = marker(name)
        assert said.startswith("<!-- ") and said.endswith(" -->") and "\n" not in said
        assert "--" not in said[4:-3] and ">" not in said[4:-3]


def test_the_headline_is_a_heading_with_verdict_number_and_limit() -> None:
    lines = render(failed_gate()).split("\n")
    assert lines[1] == (
        "### ✗ FAIL: CPU time per inference: 1.11× [1.08, 1.14], limit: at most 5 % more (and 1 more limit failed)"
    )
    assert render(a_gate()).split("\n")[3] == "every limit holds"


def test_the_table_of_limits() -> None:
    text = render(failed_gate())
    assert (
        "| **CPU time per inference**: at most 5 % more | 130 µs ±0.8 % | 144 µs ±0.9 % | 1.11× [1.08, 1.14] | 1.2 % | "
        "**✗ fail** |"
    ) in text
    assert "| limit | base | head | head ÷ base | noise | verdict |" in text
    assert "decided by CPU time per inference" in render(modelled_gate())


def test_noisy_figures_are_folded_apart_from_those_that_changed() -> None:
    text = render(failed_gate())
    changed, rest = part(text, "<details><summary>Other figures that"), part(text, "<details><summary>Within the noise")
    assert "(4)</summary>" in changed and "| throughput |" in changed and "| worse |" in changed
    assert "| power (counter, package) |" in rest and "| noise |" in rest
    assert "| power" not in changed and "| throughput |" not in rest
    assert "Other figures that changed" not in render(inconclusive_gate())


def test_every_figure_shown_has_its_meaning() -> None:
    text = part(render(failed_gate()), "<details><summary>What each")
    assert "- **CPU time per inference**: User + system seconds" in text and "- **accuracy**:" in text
    assert "throughput**" not in part(render(unmeasurable_gate()), "<details><summary>What each")


def test_conditions_sides_and_joules_are_there() -> None:
    text = render(disturbed_gate())
    assert "> **Disturbed run**: other processes used 31 % of the machine" in text
    basis = part(text, "<details><summary>How it was measured")
    for said in (
        "- disturbed: the hypervisor",
        "working tree: bundle",
        "boundary package",
        "- idle: 1.70 W",
        "exit code 3",
    ):
        assert said in basis
    assert "**What to do**\n\n- measure longer" in text


def test_missing_is_a_dash_with_its_reason() -> None:
    text = render(unmeasurable_gate())
    assert "| **CPU time per inference**: at most 5 % more | – | 130 µs | – | – | **? inconclusive** |" in text
    assert "unavailable: no energy counter, and Foo 1 is not in the power table" in text
    assert "None" not in text


@pytest.mark.parametrize("name", GATES)
def test_every_table_parses_as_one_and_every_fold_is_closed(name: str) -> None:
    text = render(GATES[name]())
    found = [token.type for token in PARSER.parse(text)]
    assert found.count("table_open") == text.count("\n| --- |") >= 2
    assert text.count("<details>") == text.count("</details>") >= 2


# Nobody's text is markup ------------------------------------------------------------------------------------------

NASTY = [
    "a|b", "`code`", "<img src=x onerror=alert(1)>", "line\nbreak\n# heading", "[link](javascript:alert(1))", "*b* _i_ ~~s~~",
    "</details>", "<!-- x", "&lt;b&gt;", "![i](http://x)", "# heading", "- item", "1. item", "> quote", "---", "\\", "\\|",
    "http://x [1, 2](y)",
    "[0.9, 1.1](http://x)", "/close", "| --- |", "$x$", "[x]: http://y",
    "[1, 2]: http://y", "x [1, 2]: y", "[1, 2][3, 4]", "+ a", "=", "a\\", "[^1]",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_text_stays_text(text: str) -> None:
    said = md.safe(text)
    assert {token.type for token in tokens(said)} <= {"paragraph_open", "paragraph_close", "inline", *PLAIN}
    assert rendered(said) == " ".join(text.split())


@given(text=st.text(alphabet=st.sampled_from("ab1.)(|`<>[]!*_~#-+=&\\\n\t@$/:\"' "), max_size=40))
def test_any_text_stays_text_alone_in_a_list_and_in_a_cell(text: str) -> None:
    said = md.safe(text)
    expected = " ".join(text.split())
    assert rendered(said).strip() == expected
    found = PARSER.parse(md.table(["a", "b"], [[f"x {said}", "end"]]))
    cells = [token.content for token in found if token.type == "inline"]
    assert len(cells) == 4 and cells[3] == "end"
    assert rendered(cells[2]).strip() == f"x {expected}".strip()
    kinds = {token.type for token in tokens(md.bullets([text or "x"]))}
    assert kinds <= {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close", "paragraph_open",
                     "paragraph_close", "inline", *PLAIN}  # fmt: skip


def test_nobody_is_notified_by_a_name_in_a_path() -> None:
    assert md.safe("git:@octocat/x") == "git:@<!-- -->octocat/x"


@pytest.mark.parametrize("text", NASTY)
def test_a_report_of_hostile_text_has_the_same_shape(text: str) -> None:
    def shape(word: str) -> list[str]:
        report = a_gate(
            "fail", name=word, base=a_gate_side(word, path=word, kind=word, notes=[word]), reason=word, notes=[word],
            checks=[a_check(limit=word, verdict="fail", reason=word)], disturbed=[word], machine={word: word},
        )  # fmt: skip
        html = {"html_block"}
        return [token.type for token in PARSER.parse(render(report)) if token.type not in html]

    assert shape(text) == shape("word")


# It always fits ---------------------------------------------------------------------------------------------------


def size(report: GateReport) -> int:
    text = render(report)
    assert text.startswith(marker(report.name)[:20])
    assert "### " in text and text.count("<details>") == text.count("</details>")
    return len(text.encode())


def test_long_notes_are_cut_and_many_are_counted() -> None:
    text = render(a_gate(notes=["x" * 5000] * 100))
    assert "x" * 399 + "…" in text and "x" * 400 not in text
    assert "- and 80 more" in text


@pytest.mark.parametrize("filler", ["x", "|", "@", "🌈", "<", "é "])
def test_it_is_never_more_than_a_comment_may_hold(filler: str) -> None:
    long = filler * 2_000
    side = a_gate_side(long, path=long, kind=long, notes=[long] * 60, operating_point={str(i): long for i in range(99)})
    report = a_gate(
        "fail", name=long, reason=long, base=side, head=side, notes=[long] * 60, disturbed=[long] * 60,
        checks=[a_check(WATT, long, "fail", reason=long) for _ in range(90)], machine={str(i): long for i in range(60)},
        measuring={str(i): long for i in range(60)}, energy={"method": "counter", "how": long},
    )  # fmt: skip
    assert size(report) <= md.MAX_BYTES
    assert md.CUT in render(report)


def test_only_what_is_too_long_is_left_out() -> None:
    text = render(a_gate(checks=[a_check(limit="@" * 120) for _ in range(200)]))
    assert len(text.encode()) <= md.MAX_BYTES and md.CUT in text
    assert "How it was measured" in text and "| limit |" not in text
    assert md.CUT not in render(failed_gate())
