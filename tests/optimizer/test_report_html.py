"""`perwatt.report_html`: one page, self-contained, escaped, and saying what the report says."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from perwatt.report import RatioFigure, Report
from perwatt.report_chart import Axis, bars
from perwatt.report_html import operator_changes, render
from perwatt.report_waterfall import bars as waterfall_bars
from perwatt.report_waterfall import ticks, waterfall

sys.path.insert(0, str(Path(__file__).parent))
from reports import (
    a_change,
    a_pass,
    a_report,
    a_search,
    a_share,
    a_side,
    a_trial,
    an_account,
    an_accuracy,
    exact,
    ratios,
    without_energy,
)

VOID = {"meta", "br", "link", "img", "rect", "line"}


class Page(HTMLParser):
    """Reads a page: visible text, tags with their attributes, and whether all tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All visible text, on one line."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def page(report: Report) -> Page:
    return Page(render(report))


def test_the_page_is_well_formed_and_has_its_landmarks() -> None:
    found = page(a_report())
    assert found.open == []
    names = [tag for tag, _ in found.tags]
    assert names.count("h1") == 1 and names.count("main") == 1 and "footer" in names and "header" in names
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = [a["aria-labelledby"] or "" for _, a in found.tags if "aria-labelledby" in a]
    assert referred and all(one in ids for refer in referred for one in refer.split())


def test_it_says_what_was_gained() -> None:
    text = page(a_report()).text
    assert "1.62× the inferences per joule" in text
    assert "95 % interval [1.58, 1.66]; joules modelled (package)" in text
    assert "top-1 n = 1,017 91.64 % 91.54 % −0.10 points [−0.4, +0.2] ≈ same" in text
    assert "CPU time / inference 130 µs 80.2 µs 0.62× [0.60, 0.63] better" in text
    assert "Right before and wrong now: 12 of 1,017. Wrong before and right now: 11." in text
    assert "rolled back drift 0.2 is above the tolerance 1e-05" in text
    assert "drift 3.1e−06 (relative 1.4e−06)" in text
    assert "operators BatchNormalization 19 → 0" in text
    assert "int8-everything" in text and "loses 2.30 points, the budget is 0.5" in text
    assert "modelled, boundary package: CPU seconds × 2.50 W" in text
    assert "source: https://example.org/datasheet" in text
    assert 'perwatt.load("PATH/TO/THIS/FOLDER").run(x)' in text and "python run.py" in text
    assert "It takes x:float32[batch,3,32,32]" in text
    assert "None" not in text and "nan" not in text.split()


def test_it_needs_nothing_from_anywhere() -> None:
    html = render(a_report())
    assert len(html.encode()) < 200_000
    found = Page(html)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [a for _, a in found.tags if {"src", "onload", "onclick", "onerror"} & set(a)]
    assert all((a["href"] or "").startswith("#") for _, a in found.tags if "href" in a)
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_light_dark_and_print() -> None:
    html = render(a_report())
    assert "prefers-color-scheme: dark" in html and "@media print" in html and "viewport" in html


def test_hostile_names_are_escaped_everywhere() -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'$version${style}&\x1b[2J"
    a = a_report()
    report = a_report(
        reason=evil, notes=[evil], last_word=evil, created=evil, perwatt_version=evil,
        model={"name": evil, "digest": evil, "inputs": [evil]},
        target={"name": evil, "backend": evil, "device": evil, "scenario": evil, "batch": 1, "versions": {evil: evil}},
        passes=[a_pass(evil, "applied", changes=[evil], reason=evil, settings={evil: [evil]}, measured={evil: evil},
                       operators={"before": {evil: 1}, "after": {}})],
        candidates=[a.candidates[0].model_copy(update={"name": evil, "passes": [evil], "reason": evil})],
        energy={"method": "modelled", "boundary": "package", "how": evil, "source": evil, "uncertainty": evil},
        measuring={evil: evil}, data={evil: {evil: evil}}, accuracy=an_accuracy(metric=evil),
        original=a_side(1e-4, operating_point={evil: evil}, execution_precision=evil),
        account=an_account(cost_is=evil, decision=evil, notes=[evil], droppable=[evil],
                           shares=[a_share(evil, None, why=evil), a_share(evil, 0.5, prefix=a_change(0.5, reason=evil))]),
        search=a_search(ended=evil, objectives=[evil], trials=[a_trial(1, 0.5, choice=evil, reason=evil, missed={evil: 1.0})]),
    )  # fmt: skip
    html = render(report)
    found = Page(html)
    assert found.open == []
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in page(a_report()).tags}
    assert not [a for _, a in found.tags if "onerror" in a]
    assert "<script" not in html and "\x1b" not in html
    assert "$version${style}" in found.text


def test_the_chart_is_said_in_words_and_drawn_inside_the_page() -> None:
    html = render(a_report())
    described = re.search(r'<desc id="chart-desc">(.*?)</desc>', html)
    assert described is not None
    assert "inferences per joule: 1.62× better [1.58, 1.66]" in described[1]
    assert "CPU time / inference: 1.62× better" in described[1]
    assert "size: 3.52× better" in described[1]
    positions = [float(p) for p in re.findall(r'x[12]?="(-?[\d.]+)%"', html)]
    assert positions and min(positions) >= 0 and max(positions) <= 100


def test_the_chart_leaves_out_what_is_missing_and_survives_extremes() -> None:
    assert "inferences per joule" not in [bar.label for bar in bars(without_energy())]
    latency = RatioFigure(value=1e5, low=0.0, high=1e9)
    far = ratios(1.0).model_copy(update={"size_bytes": exact(1e-6), "latency_p99_ms": latency})
    html = render(a_report(ratio=far))
    positions = [float(p) for p in re.findall(r'x[12]?="(-?[\d.]+)%"', html)]
    assert min(positions) >= 0 and max(positions) <= 100
    assert Axis(0.9, 1.2).ticks() == [1.0, 1.1]


def test_one_program_on_both_sides_needs_no_chart() -> None:
    ones = ratios(1).model_copy(update=dict.fromkeys(type(ratios(1)).model_fields, exact(1.0)))
    assert "<svg" not in render(a_report(outcome="unchanged", ratio=ones, accuracy=None))


# What each pass brings --------------------------------------------------------------------------------------------------------


def test_the_waterfall_goes_from_the_original_to_what_ships() -> None:
    rows = waterfall_bars(an_account(), " points")
    assert [row.label for row in rows] == [
        "the original", "where and how it runs", "fold-batchnorm", "drop-blocks (2 times)", "recover", "quantize-int8",
        "remove-dead", "without remove-dead", "what ships",
    ]  # fmt: skip
    assert all(row.start == before.end for before, row in pairwise(rows[:-1]))
    assert rows[-1].start == 0.0 and rows[-1].end == pytest.approx(0.864 * 0.432 * 1.001) and rows[-1].words == "37.4 %"
    quantized = rows[5]
    assert quantized.low == pytest.approx(quantized.start * 0.58) and quantized.high == pytest.approx(
        quantized.start * 0.62
    )
    assert quantized.css == "better" and quantized.detail == "size 0.25×, accuracy 0.1 points worse"
    assert (rows[4].css, rows[4].low, rows[4].detail) == ("same", None, "accuracy 8.9 points better")


def test_the_waterfall_is_said_in_words_and_drawn_inside_the_page() -> None:
    html = render(a_report(account=an_account()))
    described = re.search(r'<desc id="waterfall-desc">(.*?)</desc>', html)
    assert described is not None
    assert "drop-blocks (2 times): 0.80× [0.78, 0.82], size 0.80×, accuracy 9.1 points worse" in described[1]
    positions = [float(p) for p in re.findall(r'x[12]?="(-?[\d.]+)%"', html)]
    assert positions and min(positions) >= 0 and max(positions) <= 100
    assert html.count("<svg") == 3 and page(a_report(account=an_account())).open == []


def test_a_pass_that_costs_goes_to_the_right_and_the_axis_grows_with_it() -> None:
    found = an_account(point=None, shares=[a_share("add", 3.0, "costs"), a_share("take", 0.2)], dropped=False)
    rows = waterfall_bars(found)
    assert [row.css for row in rows] == ["same", "worse", "better", "same"] and rows[1].end == 3.0
    assert rows[-1].end == pytest.approx(0.6)
    positions = [float(p) for p in re.findall(r'x[12]?="(-?[\d.]+)%"', waterfall(found))]
    assert min(positions) >= 0 and max(positions) <= 100


def test_what_is_not_known_leaves_a_row_without_a_bar() -> None:
    found = an_account(point=None, shares=[a_share("odd", None), a_share("even", 0.5)], dropped=False)
    rows = waterfall_bars(found)
    assert (rows[1].words, rows[1].end, rows[1].detail) == ("not measured", None, "the backend refused the model")
    assert rows[2].start == 1.0 and rows[2].end == 0.5
    assert waterfall(an_account(shares=[a_share("odd", None)])) == ""


@pytest.mark.parametrize(("most", "shown"), [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3.06, [0, 1, 2, 3])])
def test_the_axis_of_the_waterfall_has_round_numbers(most: float, shown: list[float]) -> None:
    assert ticks(most) == pytest.approx(shown)


def test_every_pass_is_in_the_table_beside_the_waterfall() -> None:
    text = page(a_report(account=an_account())).text
    assert "What each pass brings all passes together: 0.43× [0.41, 0.45] the CPU seconds" in text
    assert "quantize-int8 earns its keep: earns its keep, measured 0.60× [0.58, 0.62] 0.60× [0.58, 0.62]" in text
    assert "0.25× 0.10 points [−0.10, 0.40]" in text
    assert "without it: accuracy: it would have to be learnt again" in text
    assert "drop-blocks 2 times" in text
    assert "nothing measurable comes of remove-dead; left out: without all of that an inference takes 1.00×" in text
    assert "None" not in text and "nan" not in text.split()


def test_an_account_that_could_not_be_made_says_why() -> None:
    unknown = a_change(None, drop=None)
    found = an_account(
        shares=[], whole=unknown, point=None, droppable=[], notes=["the account is not complete: a reason"]
    )
    text = page(a_report(account=found)).text
    assert "the account is not complete: a reason" in text and "what the passes bring together is not known" in text
    assert "What each pass brings" not in page(a_report()).text
    assert "What each pass brings" not in page(a_report(account=found.model_copy(update={"notes": []}))).text


def test_the_search_shows_its_front_and_counts_the_others() -> None:
    text = page(a_report(search=a_search())).text
    assert "6 trials of 7,840 choices in 9 min 02 s; it ended: the time is up" in text
    assert "trial choice cost ÷ original accuracy lost size" in text
    assert "2 drop-blocks 0.1 on openvino in f32 shipped 0.43× 0.30 points 310 kB" in text
    assert "4 drop-blocks 0.3 on openvino in f32 misses accuracy by 700 % 0.30× 4.0 points" in text
    others = "3 others: 1 within the budget, and beaten, 1 missed accuracy, 1 could not be made or run."
    assert f"{others} All of them are in report.json." in text
    assert "The search" not in page(a_report()).text


def test_what_ships_is_shown_where_it_is_not_on_the_front() -> None:
    several = a_search(
        front=[0], shipped=2, objectives=["latency", "throughput"],
        trials=[a_trial(0, 0.8, objectives=[0.8, 0.9]), a_trial(1, 0.7, None), a_trial(2, 0.5, missed={"p99": 0.25})],
    )  # fmt: skip
    text = page(a_report(search=several)).text
    assert "latency ÷ original time per inference ÷ original" in text and "0.80× 0.90×" in text
    assert "3 drop-blocks 0.2 on openvino in f32 shipped misses p99 by 25 % 0.50× –" in text
    assert "The search" in page(a_report(search={"ended": "stopped by Ctrl-C"})).text


def test_worse_is_drawn_to_the_left_and_called_worse() -> None:
    slower = {bar.label: bar for bar in bars(a_report(ratio=ratios(0.5)))}
    bar = slower["throughput"]
    assert bar.words().startswith("2.00× worse")
    assert bar.gain.value is not None and bar.gain.value < 1


def test_without_energy_and_without_accuracy() -> None:
    text = page(without_energy(accuracy=None, torch_eager=None)).text
    assert "1.62× the inferences per CPU second" in text
    assert "joules unavailable" in text
    assert "inferences per joule – – unavailable" in text
    assert "Not measured: there were no samples to judge it on." in text
    assert "eager" not in text


@pytest.mark.parametrize(("outcome", "headline"), [("unchanged", "unchanged"), ("budget_not_met", "budget not met")])
def test_other_outcomes_say_why(outcome: str, headline: str) -> None:
    html = render(a_report(outcome=outcome, reason="nothing clears the noise"))
    assert f"<h1>{headline}</h1>" in html
    assert f'<header class="{outcome}">' in html
    assert "nothing clears the noise" in html


def test_missing_is_never_zero() -> None:
    gone = {"latency_p50_ms": None, "latency_p99_ms": None, "size_bytes": None, "peak_memory_bytes": None}
    none = ratios(1.62).model_copy(update=dict.fromkeys(gone, RatioFigure(value=None)))
    text = page(a_report(original=a_side(1e-4, **gone), optimized=a_side(5e-5, **gone), ratio=none)).text
    for label in ("latency p50", "latency p99", "size", "peak memory"):
        assert f"{label} – – –" in text


def test_long_ledgers_stay_small() -> None:
    many = [a_pass(f"pass-{i}", "applied", changes=["x" * 100] * 50) for i in range(500)]
    html = render(a_report(passes=many, candidates=a_report().candidates * 100, notes=[]))
    assert len(html.encode()) < 250_000
    for more in ("400 more", "and 38 more", "260 more"):
        assert f"{more} in report.json" in html


def test_operator_changes_name_only_what_moved() -> None:
    assert operator_changes({"Conv": 19, "Relu": 2}, {"Conv": 21, "Relu": 2, "Gelu": 1}) == "Conv 19 → 21, Gelu 0 → 1"
    assert operator_changes({"Conv": 1}, {"Conv": 1}) == "unchanged"
