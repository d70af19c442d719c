"""`perwatt.history_chart`: a self-contained picture that can be heard too, and the page around it."""

from __future__ import annotations

import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from perwatt.errors import InputError
from perwatt.gate_report import GateReport
from perwatt.history import Series, record_gate, trend
from perwatt.history_chart import _ticks, render_html, render_svg, write_chart

sys.path.insert(0, str(Path(__file__).parent))
from histories import XEON, a_gate, a_month, a_side

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True, scope="module")
def in_utc() -> Iterator[None]:
    """Dates are shown in local time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def series(tmp_path: Path) -> list[Series]:
    """Five gates of one machine, and one of another."""
    for report in [*a_month(), a_gate(machine=XEON)]:
        if isinstance(report, GateReport):
            assert record_gate(report, tmp_path / "h.sqlite") is None
    return trend("cpu_s_per_inference", path=tmp_path / "h.sqlite")


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_a_panel_for_each_series(series: list[Series]) -> None:
    root = ET.fromstring(render_svg(series))
    panels = [one for one in root.iter(f"{SVG}svg") if one.get("role") == "img"]
    assert len(panels) == len(list(root.iter(f"{SVG}polyline"))) == len(series) == 2
    text = words(root)
    assert "machine 1a2b3c4d5e6f (AMD EPYC 9B14)" in text and "machine ffee00112233 (Intel Xeon 8481C)" in text


def test_every_panel_says_what_it_shows(series: list[Series]) -> None:
    root = ET.fromstring(render_svg(series))
    by_id = {one.get("id"): words(one) for one in root.iter() if one.get("id")}
    labels = [(one.get("aria-labelledby") or "").split() for one in root.iter() if one.get("role") == "img"]
    assert sorted(name for pair in labels for name in pair) == sorted(name for name in by_id if name)
    title, said = (by_id[name] for name in labels[0])
    assert title == "CPU time per inference of resnet20 on cpu"
    assert said.startswith("bundle /srv/models/resnet20, single-stream, batch 1")
    assert "Oldest first: 2026-09-01 10:11, ca97811, 123 µs [121, 125], pass; 2026-09-04 10:11, 3e23e81, 112 µs" in said
    assert "2026-09-12 10:11, 18ac3e7, 114 µs [112, 116], pass, disturbed" in said
    assert "Latest: 3f79bb7+" in said


def test_failed_heads_are_off_the_line(series: list[Series]) -> None:
    root = ET.fromstring(render_svg(series[:1]))
    [line] = root.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]
    dots = [(float(dot.get("cx") or 0), float(dot.get("cy") or 0)) for dot in root.iter(f"{SVG}circle")]
    assert points == dots and len(points) == 4
    [failed] = [one for one in root.iter(f"{SVG}g") if one.get("class") == "failed"]
    assert words(failed) == "2026-09-09 10:11, 2e7d2c0, 133 µs [130, 136], fail"
    # Less is lower; the newest is to the right.
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[1][1] < points[-1][1]


def test_the_picture_needs_nothing_from_elsewhere(series: list[Series]) -> None:
    for text in (render_svg(series), render_html(series)):
        assert "<script" not in text and "href" not in text and "url(" not in text and "@import" not in text
        assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in render_html(series)


def test_the_page_has_every_number_in_a_table(series: list[Series]) -> None:
    page = render_html(series)
    assert page.count("<table>") == page.count("<figure>") == 2
    assert "<h1>CPU time per inference: history</h1>" in page
    when = '<time datetime="2026-09-04T10:11:12+00:00">2026-09-04 10:11</time>'
    assert f'<tr><th scope="row">{when}</th><td>3e23e81</td><td>b</td><td>112 µs [110, 114]</td>' in page
    assert "times are local (UTC)" in page and "bundle /srv/models/resnet20<br>single-stream" in page
    assert "0.71× [0.68, 0.74] since main at 0d6e4079e" in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_several_runs_of_one_day_are_told_apart_under_the_axis(tmp_path: Path) -> None:
    for hour in (8, 9, 21):
        assert record_gate(a_gate(created=f"2026-09-01T{hour:02d}:30:00Z"), tmp_path / "h.sqlite") is None
    root = ET.fromstring(render_svg(trend("cpu_s_per_inference", path=tmp_path / "h.sqlite")))
    under = [words(one) for one in root.iter(f"{SVG}text") if one.get("text-anchor") == "middle"]
    assert under == ["2026-09-01", "08:30", "2026-09-01", "09:30", "2026-09-01", "21:30"]


def test_a_heading_that_is_too_long_gives_way_in_the_middle(tmp_path: Path) -> None:
    name = "begins-" + "x" * 300 + "-ends"
    assert record_gate(a_gate(name=name, head=a_side("a", path=f"/srv/{name}")), tmp_path / "h.sqlite") is None
    text = render_svg(trend("cpu_s_per_inference", path=tmp_path / "h.sqlite"))
    headings = [words(one) for one in ET.fromstring(text).iter(f"{SVG}text") if one.get("x") == "4"]
    assert [len(line) <= 130 for line in headings] == [True] * 3
    assert headings[0].startswith("CPU time per inference of begins-x") and headings[0].endswith("x-ends on cpu")
    assert headings[1].startswith("bundle /srv/begins-x") and headings[1].endswith("x-ends")
    assert name in text, "for those who hear it, all of it"


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&\x1b\x00'
    side = a_side(evil, target=evil, commit=evil)
    machine = {"fingerprint": {"name": evil}, "digest": evil}
    gate = a_gate(side, side, name=evil, machine=machine, measuring={"scenario": evil})
    assert record_gate(gate, tmp_path / "h.sqlite") is None
    series = trend("cpu_s_per_inference", path=tmp_path / "h.sqlite")
    ET.fromstring(render_svg(series))
    for text in (render_svg(series), render_html(series)):
        assert "<script" not in text and "\x1b" not in text and "\x00" not in text
        assert "&lt;script&gt;" in text


def test_write_chart(series: list[Series], tmp_path: Path) -> None:
    write_chart(series, tmp_path / "trend.svg")
    write_chart(series, tmp_path / "trend.HTML")
    assert (tmp_path / "trend.svg").read_text(encoding="utf-8") == render_svg(series)
    assert (tmp_path / "trend.HTML").read_text(encoding="utf-8") == render_html(series)
    for name, fix in (("trend.png", "trend.svg or "), ("trend", "trend.svg or "), ("net-1.2", "net-1.2.svg or ")):
        with pytest.raises(InputError, match=r"neither \.svg nor \.html — write it .*/" + fix):
            write_chart(series, tmp_path / name)
    with pytest.raises(InputError, match="nothing to draw"):
        write_chart([], tmp_path / "empty.svg")
    with pytest.raises(InputError, match=r"can't be written: there is no folder .* — create .*missing"):
        write_chart(series, tmp_path / "missing" / "trend.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InputError, match="can't be written: Is a directory"):
        write_chart(series, tmp_path / "folder.svg")
    assert not (tmp_path / "empty.svg").exists() and not (tmp_path / "trend.png").exists()


@pytest.mark.parametrize(("low", "high"), [(97.5e-6, 137e-6), (0.98, 1.02), (-3.0, 4.0), (1e9, 3e9), (9e-12, 1e-11)])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e3])
def test_ticks_are_round_and_within(low: float, high: float, factor: float) -> None:
    ticks = _ticks(low, high, factor)
    assert 2 <= len(ticks) <= 9
    within = 1e-9 * (high - low)
    assert all(low - within <= tick <= high + within for tick in ticks)
    step = (ticks[1] - ticks[0]) / factor
    digits = f"{step:.3e}".split("e")[0]
    assert digits in ("1.000", "2.000", "5.000")
