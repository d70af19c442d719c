"""The commands that measure and judge: bench, gate, history. Imports nothing heavy until there is work to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from perwatt.cli_options import MODEL, POINT, SAMPLES, TARGET, Decorator, with_options

SCENARIO: list[Decorator] = [
    click.option(
        "--scenario",
        type=click.Choice(["single-stream", "offline", "server"]),
        help="MLPerf's: latency, throughput, or Poisson arrivals.  [default: the bundle's, else single-stream]",
    ),
]
MEASURING: list[Decorator] = [
    click.option(
        "--meter",
        default=None,
        metavar="METER",
        help="auto, rapl, rapl:psys, nvml[:0,1], wall:COMMAND, wall:tcp://HOST:PORT, modelled, none.  [default: auto]",
    ),
    click.option(
        "--profile",
        type=click.Choice(["quick", "long"]),
        default="quick",
        show_default=True,
        help="long follows MLPerf's rules: 600 s, performance and power from the same run.",
    ),
    click.option("--time", metavar="TIME", help="Time to measure, as 30s.  [default: until the ratio is known well]"),
    click.option("--seed", type=int, default=0, help="Seed of everything random.  [default: 0]"),
]
OUTPUT: list[Decorator] = [
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output."),
    click.option("--out", "-o", type=click.Path(dir_okay=False), help="Write the report as JSON into this file."),
    click.option("--markdown", type=click.Path(dir_okay=False), help="Write it as Markdown into this file."),
    click.option(
        "--history", type=click.Path(dir_okay=False), help="SQLite file.  [default: $PERWATT_HISTORY, else the user's]"
    ),
    click.option("--no-history", is_flag=True, help="Don't record this."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--verbose", "-v", is_flag=True, help="Print every step, and the trace of an internal error."),
]


class Verdict(SystemExit):
    """The end of a gate: nothing else may end with exit code 1."""


def _split(flags: dict[str, Any]) -> dict[str, Any]:
    """The options that describe models and data, as the API names them."""
    shown = (
        "meter",
        "profile",
        "time",
        "seed",
        "as_json",
        "out",
        "markdown",
        "history",
        "no_history",
        "quiet",
        "verbose",
    )
    return {name.rstrip("_"): value for name, value in flags.items() if name not in shown and value not in (None, ())}


def _seconds(text: str | None) -> float | None:
    from perwatt.errors import InputError
    from perwatt.recipe import parse_seconds

    if text is None:
        return None
    try:
        found = float(parse_seconds(text))
    except ValueError as error:
        raise InputError(f"--time: {error}") from None
    if found <= 0:
        raise InputError(f"--time {text}: give a time above 0")
    return found


def _shown(flags: dict[str, Any], work: Callable[[Any], Any]) -> Any:
    """Run `work(progress)` with a progress bar, lines, or nothing."""
    from perwatt.progress import Progress

    mode: Any = "silent" if flags["quiet"] or flags["as_json"] else ("lines" if flags["verbose"] else "bar")
    with Progress(mode) as shown:
        last = ""

        def progress(stage: str, share: float) -> None:
            nonlocal last
            if stage != last:
                shown.stage(stage, share, until=share)
            else:
                shown.stage_at(share)
            last = stage

        return work(progress)


def _check_outputs(*paths: str | None) -> None:
    """Refuse, before any work is done, files that can't be written."""
    from perwatt.errors import InputError

    for path in paths:
        if path is None:
            continue
        folder = Path(path).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"can't write {path}: no such folder, or no permission", fix=f"create {folder}")


def _write(path: str | None, text: str) -> None:
    if path is not None:
        from perwatt.bundle import write_text

        write_text(Path(path), text)


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path())
@with_options(TARGET, SCENARIO, POINT)
@click.option("--streams", type=int, help="Calls under way at once.  [default: the backend's own]")
@click.option("--rate", metavar="RATE", help="Your traffic, as 40/s or 2400/min: joules per request, idle included.")
@click.option("--price", metavar="PRICE", help="Of electricity, as 0.20EUR/kWh: money per million requests.")
@click.option("--latency-bound", metavar="TIME", help="For the server scenario: what 99 % of requests must meet.")
@with_options(SAMPLES, MODEL, MEASURING, OUTPUT)
def bench(
    models: tuple[str, ...], rate: str | None, price: str | None, latency_bound: str | None, **flags: Any
) -> None:
    """Measure bundles, models or OpenVINO files: throughput per watt, latency, CPU time.

    Several are measured side by side and compared with the first. Give a bundle that `optimize` wrote, an .onnx, .pt or
    .pt2 file, a Hugging Face folder, or an OpenVINO .xml file.
    """
    from perwatt.bench.traffic import parse_price, parse_rate
    from perwatt.errors import InputError
    from perwatt.recipe import parse_milliseconds

    _check_outputs(flags["out"], flags["markdown"])
    if price is not None and rate is None:
        raise InputError("--price wants the traffic that it is asked for", fix="add --rate 40/s")
    try:
        bound = None if latency_bound is None else float(parse_milliseconds(latency_bound))
    except ValueError as error:
        raise InputError(f"--latency-bound: {error}") from None
    asked: dict[str, Any] = {
        "rate_per_s": None if rate is None else parse_rate(rate),
        "price": None if price is None else parse_price(price),
        "latency_bound_ms": bound,
        "time_s": _seconds(flags["time"]),
    }
    from perwatt.benching import benchmark

    report = _shown(
        flags,
        lambda progress: benchmark(
            *models, profile=flags["profile"], meter=flags["meter"] or "auto", seed=flags["seed"], progress=progress,
            **asked, **_split(flags),
        ),
    )  # fmt: skip
    text = report.model_dump_json(indent=2) + "\n"
    _write(flags["out"], text)
    if flags["markdown"]:
        from perwatt.bench_markdown import render

        _write(flags["markdown"], render(report))
    if not flags["no_history"]:
        from perwatt.history import record_bench

        _note(record_bench(report, flags["history"]), flags)
    if flags["as_json"]:
        click.echo(text, nl=False)
    elif not flags["quiet"]:
        from perwatt.bench_terminal import print_bench

        print_bench(report, verbose=flags["verbose"])


@click.command()
@click.option("--base", required=True, metavar="SIDE", help="What it is compared with: a bundle, a model, or git:REF.")
@click.option("--head", metavar="SIDE", help="The change: the same kinds.  [default: the working tree, with --config]")
@click.option(
    "--config", "-c", type=click.Path(dir_okay=False), help="Recipe that git:REF and the working tree are built with."
)
@click.option(
    "--limits", type=click.Path(dir_okay=False), help="What a change may cost: gate.yaml.  [default: see docs/gate.md]"
)
@click.option("--rebuild", is_flag=True, help="Build git:REF and the working tree anew, whatever the cache holds.")
@with_options(TARGET, SCENARIO, POINT, SAMPLES, MODEL, MEASURING)
@click.option("--junit", type=click.Path(dir_okay=False), help="Write it as JUnit XML into this file.")
@with_options(OUTPUT)
def gate(
    base: str, head: str | None, config: str | None, limits: str | None, rebuild: bool, junit: str | None, **flags: Any
) -> None:
    """Judge a change: both sides measured in one job, against limits.

    Exit codes: 0 pass, 1 a limit failed, 3 inconclusive (0 with `on_inconclusive: pass` in gate.yaml), 2 usage or
    input, 4 a side can't run here, 5 internal. Where GITHUB_STEP_SUMMARY is set, the summary goes there too.
    """
    from perwatt.limits import read_limits

    _check_outputs(flags["out"], flags["markdown"], junit)
    asked = read_limits(limits)
    time_s = _seconds(flags["time"])
    from perwatt.gating import gate as run_gate

    report = _shown(
        flags,
        lambda progress: run_gate(
            base, head, config=config, limits=asked, rebuild=rebuild, time_s=time_s, meter=flags["meter"] or "auto",
            profile=flags["profile"], seed=flags["seed"], progress=progress, **_split(flags),
        ),
    )  # fmt: skip
    text = report.model_dump_json(indent=2) + "\n"
    _write(flags["out"], text)
    _write_gate(report, flags["markdown"], junit)
    if not flags["no_history"]:
        from perwatt.history import record_gate

        _note(record_gate(report, flags["history"]), flags)
    try:
        if flags["as_json"]:
            click.echo(text, nl=False)
        elif not flags["quiet"]:
            from perwatt.gate_terminal import print_gate

            print_gate(report, verbose=flags["verbose"])
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # Whoever read this has gone; the verdict stands.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise Verdict(report.exit_code)


def _write_gate(report: Any, markdown: str | None, junit: str | None) -> None:
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if markdown or summary:
        from perwatt.gate_markdown import render

        text = render(report)
        _write(markdown, text)
        if summary:
            # Other steps write there too: it is added to, never replaced.
            try:
                with open(summary, "a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:
                click.echo(f"optimize: GITHUB_STEP_SUMMARY can't be written: {error.strerror}", err=True)
    if junit:
        from perwatt.gate_junit import render as render_junit

        _write(junit, render_junit(report))


def _note(note: str | None, flags: dict[str, Any]) -> None:
    """History is a help: what goes wrong with it is told, and changes no verdict."""
    if note is not None and not flags["quiet"]:
        click.echo(f"optimize: {note}", err=True)


@click.command()
@click.argument("name", required=False)
@click.option("--figure", default="cpu_s_per_inference", show_default=True, help="Which figure.")
@click.option("--limit", type=click.IntRange(min=1), default=30, show_default=True, help="At most this many entries.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write the trend as .svg or .html.")
@click.option("--all-machines", is_flag=True, help="Other machines' entries too, each for itself.")
@click.option(
    "--history", type=click.Path(dir_okay=False), help="SQLite file.  [default: $PERWATT_HISTORY, else the user's]"
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def history(name: str | None, figure: str, limit: int, plot: str | None, all_machines: bool, history: str | None,
            as_json: bool) -> None:  # fmt: skip
    """What was measured before, and the trend: by model and where it lies, machine and operating point, never mixed.

    NAME is a model's name, or a path as it was given to bench or gate.
    """
    from perwatt import history_command

    text = history_command.run(
        name, figure=figure, limit=limit, plot=plot, all_machines=all_machines, path=history, as_json=as_json
    )
    if text is not None:
        click.echo(text, nl=False)
