"""`perwatt.terminal`: what a person reads after a run, at any width, with and without energy, colours and Unicode."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perwatt.report import RatioFigure, Report
from perwatt.report_table import accuracy_change
from perwatt.terminal import print_difference, print_report

sys.path.insert(0, str(Path(__file__).parent))
from reports import a_pass, a_report, a_search, a_share, a_side, an_account, an_accuracy, ratios, without_energy

BUNDLE = Path("resnet20-cpu")


def shown(report: Report, width: int = 80, **changes: Any) -> str:
    """What `print_report` writes into a pipe of that width."""
    out = io.StringIO()
    print_report(report, BUNDLE, console=Console(file=out, width=width), **changes)
    return out.getvalue()


def row(text: str, label: str) -> str:
    """The line of the table that begins with `label`."""
    return next(line for line in text.split("\n") if line.startswith(label))


# The report -----------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_was_gained() -> None:
    assert shown(a_report()).split("\n")[0] == "1.62× the inferences per joule [1.58, 1.66], modelled"


def test_the_table_in_human_units() -> None:
    text = shown(a_report())
    assert row(text, "inferences per joule").endswith("3,077      4,988         1.62× [1.58, 1.66]  better")
    assert "(modelled)" in text
    assert "130 µs    80.2 µs" in row(text, "CPU time")
    assert "0.62× [0.60, 0.63]  better" in row(text, "CPU time")
    assert "15,385 /s  24,938 /s" in row(text, "throughput")
    assert "≈ same" in row(text, "latency p99")
    assert "91.64 %    91.54 %  −0.10 points [−0.4, +0.2]  ≈ same" in row(text, "top-1 (n = 1,017)")
    assert "1.09 MB   0.310 MB" in row(text, "size")
    assert row(text, "size").split()[-2:] == ["0.28×", "better"]


def test_the_accuracy_line() -> None:
    text = shown(a_report(), width=120)
    assert "top-1 91.64 % → 91.54 %, −0.10 points [−0.4, +0.2], 12 lost / 11 gained of 1,017" in text
    assert "within the budget of 0.5 points" in text
    assert "nothing was chosen on 509 of the 1,017 samples" in text


def test_an_accuracy_over_budget_says_so() -> None:
    text = shown(a_report(accuracy=an_accuracy(optimized=0.8934, drop=2.3, low=1.6, high=3.0)), width=120)
    assert "−2.30 points [−3.0, −1.6]" in row(text, "top-1")
    assert "over budget" in row(text, "top-1")


def test_a_metric_where_less_is_better_moves_the_other_way() -> None:
    found = an_accuracy(
        metric="mse", unit="metric", higher_is_better=False, original=0.0123, optimized=0.013, drop=0.0007, low=0.0005,
        high=0.0009, flips_lost=None, flips_gained=None,
    )  # fmt: skip
    assert accuracy_change(found) == ("+0.000700", "[+0.000500, +0.000900]")
    text = shown(a_report(accuracy=found), width=120)
    assert "mean squared error 0.0123 → 0.0130" in text
    assert "lost" not in text


def test_an_accuracy_without_an_interval_has_none() -> None:
    text = shown(a_report(accuracy=an_accuracy(low=None, high=None)), width=120)
    assert "−0.10 points, 12 lost" in text
    assert "None" not in text


def test_every_pass_has_its_line_with_its_reason() -> None:
    text = shown(a_report(), width=140)
    assert "✓ fold-batchnorm       folded 19 BatchNormalization into the Conv before them" in text
    assert "– common-subexpression no two nodes compute the same" in text
    assert "– fold-constants       refused: the model has external data" in text
    assert "✗ remove-dead          rolled back: drift 0.2 is above the tolerance 1e-05" in text
    assert "✗ cast-half            not chosen: no faster than the backend's own bf16" in text
    assert "38 Q/DQ pairs; and 1 more; measured: inferences per CPU second 1.62× [1.58, 1.66]" in text
    assert "accuracy 0.1 points worse" in " ".join(text.split())


def test_backends_that_were_not_taken_are_told_with_their_best_answer() -> None:
    assert "Backends" not in shown(a_report())
    found = [row.model_copy(update={"backend": "openvino"}) for row in a_report().candidates]
    twice, thrice = (
        found[1].model_copy(
            update={"backend": "onnxruntime", "name": f"{kind} on onnxruntime", "cpu_s_ratio": RatioFigure(value=value)}
        )
        for kind, value in (("int8", 2.0), ("f32", 3.0))
    )
    refused = found[2].model_copy(update={"backend": "inductor", "reason": "it lacks Foo", "cpu_s_ratio": None})
    lossy = twice.model_copy(update={"cpu_s_ratio": RatioFigure(value=0.5), "drop": 30.0})
    text = " ".join(shown(a_report(candidates=[*found, thrice, twice, lossy, refused]), width=160).split())
    assert "Backends onnxruntime: at its best 0.50× the original's inferences per CPU second (int8) inductor" in text
    assert "inductor: it lacks Foo" in text
    first = found[1].model_copy(update={"backend": "onnxruntime", "cpu_s_ratio": None})
    text = shown(a_report(candidates=[first, found[0], twice]), width=160)
    assert "onnxruntime: the original runs best there, and nothing beats what is shipped" in text


def test_joules_say_how_they_were_come_by() -> None:
    text = shown(a_report(), width=120)
    assert "Joules      modelled, boundary package: CPU seconds × 2.50 W for one busy core" in text
    assert "325 µJ → 200 µJ per inference" in text


def test_the_account_tells_of_the_largest_shares_and_counts_the_others() -> None:
    text = shown(a_report(account=an_account()), width=140)
    lines = [line.strip() for line in text[text.index("Account") : text.index("Joules")].rstrip().split("\n")]
    assert lines == [
        "Account     all passes together: 0.43× [0.41, 0.45] the CPU seconds, at the same operating point",
        "where and how it runs: 0.86× [0.84, 0.88], before any pass",
        "fold-batchnorm 0.90× [0.88, 0.92]: earns its keep",
        "drop-blocks (2 times) 0.80× [0.78, 0.82], size 0.80×, accuracy 9.1 points worse: earns its keep",
        "recover 1.00×, accuracy 8.9 points better: for accuracy",
        "quantize-int8 0.60× [0.58, 0.62], size 0.25×, accuracy 0.1 points worse: earns its keep",
        "and remove-dead: brings nothing",
        "nothing measurable comes of remove-dead; left out: without all of that an inference takes 1.00× [0.98, 1.02] the CPU "
        "seconds",
    ]  # fmt: skip
    many = [a_share(f"pass-{n}", 0.99 - n / 100) for n in range(6)] + [a_share("idle", 1.0, "brings nothing")]
    text = shown(a_report(account=an_account(shares=many)), width=140)
    assert "and 3 more, of which 2 earn their keep, 1 bring nothing (-v names them)" in text
    assert "pass-5 0.94×" in text and "pass-1 0.98×" not in text and "idle" not in text
    assert "Account" not in shown(a_report())


def test_verbose_tells_of_every_pass_why() -> None:
    text = " ".join(shown(a_report(account=an_account()), width=140, verbose=True).split())
    assert "remove-dead 1.00× [0.98, 1.02]: brings nothing (brings nothing, measured)" in text
    assert "-v names them" not in text
    unknown = shown(a_report(account=an_account(shares=[a_share("odd", None, "not known")])), width=140, verbose=True)
    assert "odd not measured (the backend refused the model): not known" in unknown


def test_the_search_has_one_line() -> None:
    assert "Search      6 trials of 7,840 choices in 9 min 02 s; it ended: the time is up" in shown(
        a_report(search=a_search())
    )
    assert "Search      1 trial of 7,840 choices" in shown(a_report(search=a_search(trials=a_search()["trials"][:1])))
    assert "Search" not in shown(a_report())


def test_torch_eager_stands_beside() -> None:
    assert "16.3× [16.0, 16.7] fewer CPU seconds than torch eager (torch 2.11.0" in shown(a_report(), width=120)
    slower = a_report().torch_eager
    assert slower is not None
    slower = slower.model_copy(update={"cpu_s_ratio": RatioFigure(value=1.2, low=1.1, high=1.3)})
    assert "1.20× [1.10, 1.30] the CPU seconds of torch eager" in shown(a_report(torch_eager=slower), width=120)
    assert "eager" not in shown(a_report(torch_eager=None))


def test_ratio_and_ratio_graph_are_two_figures_each_with_its_name() -> None:
    text = shown(a_report(ratio_graph=ratios(1.4)), width=180)
    best, graph = "1.62× [1.58, 1.66] inferences per joule", "1.40× [1.36, 1.44] inferences per joule"
    assert f"{best}, each side at its own operating point (the headline)" in text
    assert (
        f"{graph}, both sides at the shipped operating point, each in its floating precision (the graph's share)"
        in text
    )
    point = shown(a_report(ratio_graph=ratios(1.4), ratio_point=ratios(1.16)), width=140)
    assert "1.16× [1.12, 1.20] inferences per joule, the original's graph at the two points" in point
    alone = shown(a_report(ratio_graph=ratios(1.0), ratio_point=ratios(1.62)), width=140)
    assert f"{best}, all of it by the operating point: the graph is the original's own" in alone
    assert "both sides ran at the same operating point: 1.62×" in shown(a_report(), width=140)


def test_deployment_and_the_last_word_come_last() -> None:
    lines = shown(a_report(last_word="int8 would be 1.6×: give samples")).rstrip("\n").split("\n")
    assert lines[-1] == "int8 would be 1.6×: give samples"
    assert lines[-4:-1] == [
        "Bundle: resnet20-cpu",
        '  in Python:        perwatt.load("resnet20-cpu").run(x)',
        "  without perwatt:  python resnet20-cpu/run.py",
    ]


def test_paths_and_the_last_word_stay_in_one_piece_in_a_pipe() -> None:
    bundle, word = Path("/data/" + "long/" * 40 + "name"), "give about 100 samples with --data " * 5
    out = io.StringIO()
    print_report(a_report(last_word=word), bundle, console=Console(file=out, width=80))
    assert f"Bundle: {bundle}\n" in out.getvalue()
    assert out.getvalue().endswith(word.strip() + "\n")


def test_without_energy_cpu_time_leads() -> None:
    text = shown(without_energy())
    assert text.startswith("1.62× the inferences per CPU second [")
    rows = [line for line in text.split("\n") if line.startswith(("inferences per joule", "CPU time"))]
    assert rows[0].startswith("CPU time / inference")
    assert rows[1].split() == ["inferences", "per", "joule", "–", "–", "unavailable"]
    assert "unavailable: no counter, and Foo 1 is not in the power table" in text
    assert "CPU time per inference leads instead" in text


def test_two_methods_are_never_compared() -> None:
    other = a_side(80e-6)
    other.throughput_per_watt.method = "metered"
    text = shown(a_report(optimized=other))
    assert "not comparable" in row(text, "inferences per joule")
    assert "the two sides were not metered by the same method" in text


def test_unchanged_says_why() -> None:
    same = RatioFigure(value=1, low=1, high=1)
    ones = ratios(1).model_copy(update=dict.fromkeys(type(ratios(1)).model_fields, same))
    changes = {"optimized": a_side(130e-6), "ratio": ones, "ratio_graph": ones}
    text = shown(a_report(outcome="unchanged", reason="nothing clears the noise", **changes))
    assert text.split("\n")[0] == "unchanged: nothing clears the noise"
    assert row(text, "throughput").split()[-2:] == ["1.00×", "same"]
    assert "better" not in text
    assert "Ratios" not in text


def test_budget_not_met_says_why_and_keeps_the_best() -> None:
    text = shown(a_report(outcome="budget_not_met", reason="p99 latency is 22 ms, 20 ms allowed"))
    assert text.split("\n")[0] == "budget not met: p99 latency is 22 ms, 20 ms allowed"
    assert "Bundle (the best so far): resnet20-cpu" in text


def test_missing_is_never_zero() -> None:
    gone = {"latency_p50_ms": None, "latency_p99_ms": None, "size_bytes": None, "peak_memory_bytes": None}
    missing = RatioFigure(value=None)
    none = ratios(1.62).model_copy(update=dict.fromkeys(gone, missing))
    text = shown(a_report(original=a_side(130e-6, **gone), optimized=a_side(80e-6, **gone), ratio=none, accuracy=None))
    for label in ("latency p50", "latency p99", "size", "peak memory"):
        assert row(text, label).split()[-3:] == ["–", "–", "–"]
    assert row(text, "accuracy").split() == ["accuracy", "–", "–", "not", "measured"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_nothing_is_cut_off_at_any_width(width: int) -> None:
    text = shown(a_report(account=an_account(), search=a_search()), width=width)
    assert "…" not in text
    free = [line for line in text.split("\n") if "perwatt" not in line]
    assert max(map(len, free)) <= width
    together = "".join(text.split())
    assert "modelledjoulesneverdecidebythemselves" in together


def test_at_80_columns_every_row_but_the_first_takes_one_line() -> None:
    text = shown(a_report())
    table = text[text.index("────") :].split("\n\n")[0].split("\n")
    assert len(table) == 10


def test_a_pipe_gets_no_escapes_and_no_trailing_spaces() -> None:
    text = shown(a_report())
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_colours_on_a_terminal_and_none_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminal() -> str:
        out = io.StringIO()
        console = Console(file=out, width=80, force_terminal=True, color_system="standard")
        print_report(a_report(), BUNDLE, console=console)
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in terminal() and "better" in terminal()


def test_hostile_names_steer_nothing() -> None:
    report = a_report(
        model={"name": "[red]x[/red]\x1b[2J"}, passes=[a_pass("p\x1b]0;t\x07", "refused", reason="[/bold]\nnext")],
        account=an_account(shares=[a_share("p\x1b]0;t\x07", 0.5)], decision="\x1b[2J"), search=a_search(ended="\x1b[2J"),
    )  # fmt: skip
    text = shown(report)
    assert "[red]x[/red]�[2J on cpu" in text
    assert "refused: [/bold] next" in text
    assert "\x1b" not in text and "\x07" not in text


def test_where_unicode_cannot_be_shown_ascii_is() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_report(a_report(), BUNDLE, console=Console(file=out, width=80))
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert text.startswith("1.62x the inferences per joule")
    assert "+ fold-batchnorm" in text


def test_verbose_adds_drift_candidates_and_versions() -> None:
    text = shown(a_report(), width=120, verbose=True)
    assert "drift 3.10e−06 (relative 1.40e−06)" in text
    assert "calibrated on 300 samples" in text
    assert "int8-everything, rejected: loses 2.30 points, the budget is 0.5; accuracy 2.3 points worse" in text
    assert "openvino 2026.4.0" in text
    assert "threads: backend's default" in text
    assert "None" not in text


# Two reports ----------------------------------------------------------------------------------------------------


def difference(a: Report, b: Report, width: int = 120) -> str:
    out = io.StringIO()
    print_difference(a, b, ("one", "two"), console=Console(file=out, width=width))
    return out.getvalue()


def test_two_equal_reports_differ_in_nothing() -> None:
    text = difference(a_report(), a_report())
    assert "same model, target, scenario, batch, outcome, passes and versions" in text
    assert row(text, "throughput").split()[-2:] == ["1.00×", "same"]
    assert "not measured in one run" in text and "differences are noise" in text.replace("\n", " ")


def test_what_differs_is_listed() -> None:
    a = a_report()
    b = a_report(
        model={**a.model, "digest": "sha256:" + "aa" * 32},
        target={**a.target, "batch": 8, "versions": {"openvino": "2026.5.0"}},
        passes=a.passes[:-1],
        optimized=a_side(40.1e-6),
    )
    text = difference(a, b)
    assert row(text, "batch").split() == ["batch", "1", "8"]
    assert row(text, "cast-half").endswith("not in the recipe")
    assert "sha256:3f3f3f" in row(text, "model digest")
    assert row(text, "openvino version").split()[-2:] == ["2026.4.0", "2026.5.0"]
    assert row(text, "CPU time").split()[-5:] == ["80.2", "µs", "40.1", "µs", "0.50×", "better"][-5:]
    assert "outcome " not in text
    assert "They come from different models" in text


def test_between_runs_small_differences_are_the_same_and_methods_are_not_mixed() -> None:
    text = difference(a_report(), without_energy(optimized=a_side(82e-6, energy=False)))
    assert row(text, "throughput").split()[-2:] == ["≈", "same"]
    assert row(text, "inferences per joule").endswith("not comparable")


def test_nothing_heavy_is_imported_for_help() -> None:
    import subprocess

    code = "import sys, perwatt.terminal; print([m for m in ('rich', 'pydantic', 'onnx_ir') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
