"""The command that only rewrites: `optimize rewrite`. Imports nothing heavy until there is work to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from perwatt.cli_options import CONFIG, MODEL, SAMPLES, TRAIN, Decorator, complete_pass, complete_target, with_options

FORM: list[Decorator] = [
    click.option(
        "--target",
        "-t",
        shell_complete=complete_target,
        help="Whose form the graph takes, as openvino.  [default: no operator is put in that some backend lacks]",
    ),
]
PASSES: list[Decorator] = [
    click.option(
        "--passes",
        metavar="LIST",
        shell_complete=complete_pass,
        help="A list in order, or edits, as -fuse-gelu,+merge-projections.  [default: all default passes that keep outputs]",
    ),
]
OUTPUT: list[Decorator] = [
    click.option("--seed", type=int, help="Seed of everything random.  [default: 0]"),
    click.option("--out", "-o", type=click.Path(), help="ONNX file.  [default: MODEL-rewritten.onnx]"),
    click.option("--force", is_flag=True, help="Replace the file where it is there."),
    click.option(
        "--json", "as_json", is_flag=True, help="Print passes, operators and notes as JSON on standard output."
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--verbose", "-v", is_flag=True, help="Print every pass, and the trace of an internal error."),
]


@click.command()
@click.argument("model", required=False, type=click.Path())
@with_options(FORM, CONFIG, PASSES, SAMPLES, TRAIN, MODEL, OUTPUT)
def rewrite(model: str | None, **flags: Any) -> None:
    """Run passes, prove each on samples, and write the ONNX file that they lead to: nothing is lowered or measured.

    For the graph itself: to look at, or for other tools. What is faster, `optimize MODEL` measures."""
    from perwatt.options import build_recipe
    from perwatt.progress import Progress
    from perwatt.rewriting import rewrite_model
    from perwatt.terminal import print_rewritten

    shown = {name: flags.pop(name) for name in ("as_json", "quiet", "verbose", "force", "out", "config")}
    options = {name.rstrip("_"): value for name, value in flags.items()}
    recipe = build_recipe(shown["config"], model=model, **options)
    mode: Any = "silent" if shown["quiet"] or shown["as_json"] else "lines" if shown["verbose"] else "bar"
    with Progress(mode) as bar:
        out = Path(shown["out"]) if shown["out"] else None
        made = rewrite_model(
            recipe, out, force=shown["force"], progress=lambda text, share: bar.stage(text, share, until=share)
        )
    if shown["as_json"]:
        click.echo(json.dumps(made.to_json(), indent=2))
    elif not shown["quiet"]:
        print_rewritten(made.to_json(), verbose=shown["verbose"])
