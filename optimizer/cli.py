"""The command line: `optimize MODEL …` and its subcommands. Imports nothing heavy until there is work to do.

Exit codes: 0 done (also unchanged), 1 a gate failed (nothing else), 2 usage or input, 3 budget not met (the best so far
is kept) or a gate is inconclusive, 4 target not usable here, 5 internal. 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from perwatt.cli_options import (
    BUDGET,
    CONFIG,
    MODEL,
    ON,
    POINT,
    RUN,
    SAMPLES,
    SCENARIO,
    TARGET,
    TRAINING,
    TUNING,
    complete_pass,
    complete_target,
    with_options,
)  # fmt: skip

EXIT_CODES = """\b
Exit codes:
  0  done (also when the answer is the original: outcome "unchanged")
  1  a gate failed; nothing else ever ends with 1
  2  usage or input: a file, a flag, a recipe, the data
  3  budget not met, the best so far is kept; or a gate is inconclusive
  4  the target can't be used here; for a GPU that is elsewhere a portable bundle was written all the same
  5  internal error, or a backend failed
"""

EXAMPLES = """\b
Examples:
  optimize model.onnx --target cpu
  optimize model.pt --target cpu --data val/ --image 224 --normalize imagenet
  optimize ./bert-folder --target cpu --data reviews.csv --text sentence --label label
  optimize weights.th --arch net.py:resnet20 --data calib.npz --eval test.npz --max-drop 0.5
  optimize --config recipe.yaml
  optimize rewrite model.onnx --target onnxruntime --out fused.onnx
  optimize bench model-cpu other.onnx
  optimize gate --base main-bundle --head pr-bundle --limits gate.yaml
"""


class Program(click.Group):
    """`optimize MODEL …`: whatever is no subcommand is the main command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in self.commands:
            return super().resolve_command(ctx, args)
        if args and not Path(args[0]).exists():
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.7)
            if near:
                ctx.fail(f"there is no command and no model {args[0]}: did you mean optimize {near[0]}?")
        return "run", self.commands["run"], args

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        # Options before the model belong to the main command, not to the group.
        if args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Nobody reads on: click would end with 1, which is a failed gate's.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        run = self.commands["run"]
        formatter.write_usage(ctx.command_path, "MODEL [OPTIONS]  |  COMMAND [ARGS]…")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(
                "Makes a trained model do more inferences per joule on a target, proves every change on that model, "
                "measures it against the original, and leaves a bundle that can be deployed without perwatt."
            )
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, c.get_short_help_str(80)) for name, c in sorted(self.commands.items()) if not c.hidden]
            )
        run.format_options(ctx, formatter)
        for block in (EXAMPLES, EXIT_CODES):
            formatter.write_paragraph()
            formatter.write_text(block)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in sorted(self.commands) if not self.commands[name].hidden]


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="perwatt", prog_name="perwatt")
def cli() -> None:
    """The program; see `Program.format_help`."""


@cli.command("run", hidden=True)
@click.argument("model", required=False, type=click.Path())
@with_options(TARGET, ON, CONFIG, SAMPLES, TRAINING, BUDGET, SCENARIO, POINT, TUNING, MODEL, RUN)
def run(model: str | None, **flags: Any) -> None:
    """Optimize MODEL."""
    from perwatt.portable import recipe_for

    shown = {
        name: flags.pop(name)
        for name in ("as_json", "quiet", "verbose", "dry_run", "force", "fresh", "cluster", "out", "config")
    }
    options = {name.rstrip("_"): value for name, value in flags.items()}
    recipe = recipe_for(shown["config"], model=model, **options)
    from perwatt.compilation import out_folder

    out = out_folder(recipe, shown["out"])
    if shown["dry_run"]:
        _dry_run(recipe, out, shown)
        return
    mode = "silent" if shown["quiet"] or shown["as_json"] else ("lines" if shown["verbose"] else "bar")
    bundle = _compile(recipe, out, mode, **{name: shown[name] for name in ("force", "fresh", "cluster")})
    report = bundle.report
    if bundle.outcome == "portable":
        _not_here(bundle, shown)
    if shown["as_json"]:
        click.echo(json.dumps(report, indent=2))
    elif not shown["quiet"]:
        from perwatt.report import Report
        from perwatt.terminal import print_report

        if bundle.from_cache:
            click.echo(f"from the cache: this is the answer of {report['created']} (--fresh searches anew)")
        print_report(Report.model_validate(report), bundle.path, verbose=shown["verbose"])
    if bundle.outcome == "budget_not_met":
        raise SystemExit(3)


def _not_here(bundle: Any, shown: dict[str, Any]) -> None:
    """Tell of a portable bundle, and end with the code of a target that can't be used here."""
    from perwatt.portable import words

    if shown["as_json"]:
        click.echo(json.dumps(bundle.report, indent=2))
    elif not shown["quiet"]:
        click.echo("\n".join(words(bundle)))
    raise SystemExit(4)


def _compile(recipe: Any, out: Path, mode: Any, **how: Any) -> Any:
    from perwatt.compilation import compile_model
    from perwatt.progress import Progress

    with Progress(mode) as shown:
        last = ""

        def progress(stage: str, share: float) -> None:
            nonlocal last
            if stage != last:
                shown.stage(stage, share, until=share)
            else:
                shown.stage_at(share)
            last = stage

        return compile_model(
            recipe, out, progress=progress, announce=lambda plan: shown.tell(_planned(plan.words())), **how
        )


def _planned(words: list[str]) -> list[str]:
    return ["the plan:", *(f"  {line}" for line in words)]


def _dry_run(recipe: Any, out: Path, shown: dict[str, Any]) -> None:
    from perwatt import datasets, registry, searching
    from perwatt import recipe as recipes
    from perwatt.bundle import check_destination, is_bundle
    from perwatt.compilation import inputs_of, model_name, resolve_steps
    from perwatt.reading import detect

    steps = resolve_steps(recipe)
    registry.serving(recipe.target.name)
    check_destination(out, model_name(recipe), shown["force"], inputs_of(recipe))
    for where in inputs_of(recipe)[1:]:
        datasets.kind_of(where)
    path = Path(recipe.model.path)
    kind = "bundle" if is_bundle(path) else detect(path)
    # A search has more to choose from than the default passes, and would be bound to them where they were spelled out.
    free = searching.wanted(recipe) and recipe.passes == "default"
    resolved = recipe if free else recipe.model_copy(update={"passes": steps})
    notes = registry.out_of_order(steps)
    mode = "silent" if shown["quiet"] or shown["as_json"] else ("lines" if shown["verbose"] else "bar")
    if shown["as_json"]:
        plan = _plan(recipe, out, mode)
        told = {"model_format": kind, "out": str(out), "notes": notes, "recipe": resolved.model_dump(mode="json")}
        click.echo(json.dumps({**told, "plan": None if plan is None else plan.to_json()}, indent=2))
    elif not shown["quiet"]:
        said = "".join(f"# {note}\n" for note in notes)
        click.echo(f"# {path}: {kind}; the bundle would be {out}\n{said}{recipes.dump(resolved)}", nl=False)
        plan = _plan(recipe, out, mode)
        if plan is not None:
            # As comments: what is printed is a recipe.
            click.echo("\n".join(f"# {line}" for line in _planned(plan.words())))


def _plan(recipe: Any, out: Path, mode: Any) -> Any:
    """The plan of a search; None where the recipe asks for none."""
    from perwatt.compilation import plan_model
    from perwatt.progress import Progress

    with Progress(mode) as shown:
        return plan_model(recipe, out, progress=lambda stage, share: shown.stage(stage, share, until=share))


@cli.command()
@click.argument("model", type=click.Path())
@click.option("--arch", metavar="FILE.py:NAME", help="Callable that builds the network which weights belong to.")
@click.option("--input", "input_", multiple=True, metavar="SPEC", help='Input type, as "x:float32[batch,3,32,32]".')
@click.option("--trust", is_flag=True, help="Allow code that the model file carries to run.")
def init(model: str, arch: str | None, input_: tuple[str, ...], trust: bool) -> None:
    """Print a commented starter recipe for MODEL: optimize init model.pt > recipe.yaml"""
    from perwatt.starter import starter

    click.echo(starter(Path(model), arch, list(input_), trust), nl=False)


@cli.command()
@click.argument("name", required=False, shell_complete=complete_pass)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def passes(name: str | None, as_json: bool) -> None:
    """What passes there are, or one pass's page."""
    from perwatt import catalogue

    entry = catalogue.one_pass(name) if name else catalogue.all_passes()
    click.echo(json.dumps(entry, indent=2) if as_json else catalogue.as_text(entry))


@cli.command()
@click.argument("name", required=False, shell_complete=complete_target)
@click.option("--probe", is_flag=True, help="Measure what the hardware rewards, about 10 s; later calls show it.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def targets(name: str | None, probe: bool, as_json: bool) -> None:
    """What targets there are, what each and this machine reward, what is missing here and how to get it; or one
    target's page, which ends with 4 where it can't be used here."""
    from perwatt import doctor, doctor_words
    from perwatt.progress import Progress

    if probe and name:
        raise click.UsageError("--probe measures the machine and not one target: leave the name out")
    measured = None
    if probe:
        with Progress("silent" if as_json else "bar") as shown:
            measured = doctor.probe(lambda text, share: shown.stage(text, share, until=share))
    pages = doctor.one(name) if name else []
    examined = None if name else doctor.examine(measured)
    if as_json:
        click.echo(json.dumps(examined or (pages[0] if len(pages) == 1 else pages), indent=2))
    else:
        click.echo(doctor_words.page(examined) if examined else "\n\n".join(map(doctor_words.target_page, pages)))
    if pages and all(page["missing"] for page in pages):
        raise SystemExit(4)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.argument("other", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(bundle: str, other: str | None, as_json: bool) -> None:
    """A bundle's report in the terminal; with two, what differs."""
    from perwatt.bundle import open_bundle
    from perwatt.portable import words
    from perwatt.report import Report
    from perwatt.terminal import print_difference, print_report

    opened = [open_bundle(path) for path in (bundle, other) if path]
    if as_json:
        plain = [each.report for each in opened]
        click.echo(json.dumps(plain[0] if len(plain) == 1 else plain, indent=2))
        return
    waiting = next((each for each in opened if each.outcome == "portable"), None)
    if waiting is not None:
        click.echo("\n".join(words(waiting)))
        return
    reports = [Report.model_validate(each.report) for each in opened]
    if len(reports) == 1:
        print_report(reports[0], opened[0].path)
    else:
        print_difference(reports[0], reports[1], (bundle, str(other)))


@cli.command()
@click.argument("kind", type=click.Choice(["recipe", "report", "limits", "gate", "bench"]))
def schema(kind: str) -> None:
    """Print a JSON Schema: of a recipe, of report.json, of gate.yaml (limits), of what gate or bench say with --json."""
    from perwatt import bench_report, gate_report, limits, registry, report

    made = {
        "recipe": registry.recipe_schema, "report": report.schema, "limits": limits.schema, "gate": gate_report.schema,
        "bench": bench_report.schema,
    }  # fmt: skip
    click.echo(json.dumps(made[kind](), indent=2))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell: eval "$(optimize completion bash)" """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    for name in ("optimize", "perwatt"):
        click.echo(found(cli, {}, name, f"_{name.upper()}_COMPLETE").source())


def _more_commands() -> None:
    from perwatt.cli_measuring import bench, gate, history
    from perwatt.cli_rewriting import rewrite

    for command in (bench, gate, history, rewrite):
        cli.add_command(command)


_more_commands()


def main() -> None:
    """Run the program; every failure ends in one line and a documented exit code."""
    as_json = "--json" in sys.argv
    # Threads that spin while they wait make learning many times slower on a busy machine; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with contextlib.suppress(ValueError):
        # A job that is cancelled must not leave workers, meters or builds behind: the way out is that of an error.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cli.main(standalone_mode=False)
    except SystemExit as stop:
        from perwatt.cli_measuring import Verdict

        # rich ends the process with 1 where nobody reads on, which must not look like a failed gate.
        if stop.code == 1 and not isinstance(stop, Verdict):
            raise SystemExit(0) from None
        raise
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except (click.Abort, KeyboardInterrupt) as stop:
        # click hides what was raised behind an Abort of its own.
        from perwatt.errors import Stopped

        cause = stop.__cause__ or stop
        said = str(cause)
        if isinstance(cause, Stopped):
            _fail(f"stopped; {said}", 130, as_json)
        _fail(f"stopped; nothing was written{f', {said}' if said else ''}", 130, as_json)
    except click.ClickException as error:
        _fail(error.format_message(), 2, as_json)
    except Exception as error:
        from perwatt.errors import PerwattError

        if isinstance(error, PerwattError):
            _fail(str(error), error.exit_code, as_json)
        hint = " (--verbose shows where)"
        if "--verbose" in sys.argv or "-v" in sys.argv:
            import traceback

            traceback.print_exc()
            hint = ""
        words = " ".join(str(error).split())[:300]
        _fail(f"internal error: {type(error).__name__}: {words}{hint}", 5, as_json)


def _fail(message: str, code: int, as_json: bool) -> None:
    with contextlib.suppress(OSError):
        if as_json:
            click.echo(json.dumps({"error": message, "exit_code": code}))
        click.echo(f"optimize: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
