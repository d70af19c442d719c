"""The options that several commands share, in the order in which `--help` lists them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

Decorator = Callable[[Any], Any]


def complete_pass(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of passes, for the shell."""
    from perwatt import registry

    return [name for name in registry.names("passes") if name.startswith(incomplete)]


def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of targets, for the shell."""
    from perwatt import registry

    return [name for name in [*registry.ALIASES, *registry.names("targets")] if name.startswith(incomplete)]


TARGET: list[Decorator] = [
    click.option(
        "--target",
        "-t",
        shell_complete=complete_target,
        help="Where it will run; see `optimize targets`.  [default: cpu]",
    ),
]
ON: list[Decorator] = [
    click.option(
        "--on",
        metavar="ssh://USER@HOST",
        help="Compile, tune and measure on that machine, which has perwatt installed (docs/remote.md).",
    ),
]
CONFIG: list[Decorator] = [
    click.option("--config", "-c", type=click.Path(dir_okay=False), help="Recipe file; options override it."),
]
SAMPLES: list[Decorator] = [
    click.option(
        "--data",
        metavar="PATH",
        help="Samples: .npz, folder of pictures, .csv/.tsv, or file.py:callable. Alone it serves everything and is split.",
    ),
    click.option(
        "--eval", "eval_", metavar="PATH", help="Labelled samples that accuracy is judged on; --data then calibrates."
    ),
    click.option("--image", metavar="N|HxW", help="Picture size that the model takes."),
    click.option("--resize", type=int, help="Shorter side before the centre crop."),
    click.option("--normalize", metavar="HOW", help="imagenet, cifar10, unit (x/255), none (0..255), or mean,…/std,…"),
    click.option("--text", metavar="COL[,COL]", help="Column (or two) that holds the text."),
    click.option("--label", metavar="COL", help="Column that holds the label."),
    click.option("--metric", help="top1, top5, mse, cosine, agreement, or file.py:callable.  [default: by the labels]"),
    click.option("--max-samples", type=int, help="Use at most this many samples of each set."),
]
TRAIN: list[Decorator] = [
    click.option("--train", metavar="PATH", help="Samples that passes may learn from."),
]
TRAINING: list[Decorator] = [
    *TRAIN,
    click.option(
        "--confirm", metavar="PATH", help="Labelled samples that the answer is confirmed on.  [default: half of --eval]"
    ),
    click.option("--expect", type=float, metavar="PERCENT", help="Stop unless the original scores this."),
]
BUDGET: list[Decorator] = [
    click.option(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="Accuracy that may be lost: points, or metric units.  [default: 1.0]",
    ),
    click.option(
        "--prove-accuracy",
        is_flag=True,
        default=None,
        help="The interval's bound must hold the budget, not the estimate.",
    ),
    click.option("--p99", metavar="TIME", help="Latency that 99 % of calls must stay under, as 20ms."),
    click.option("--memory", metavar="SIZE", help="Resident memory that the program may take, as 500MB."),
    click.option("--size", metavar="SIZE", help="What the model's weights may take, as 5MB."),
    click.option("--min-gain", metavar="SHARE", help="Least gain worth shipping.  [default: 3%]"),
    click.option(
        "--time",
        metavar="TIME",
        help="Time budget of the run, as 90s, 10m. From 2m on it is spent on a search: what goes on is the same command again.",
    ),
    click.option(
        "--objective",
        metavar="WHAT",
        help="What a search makes as good as can be: inferences-per-joule, latency, throughput, size, or several, the first "
        "of which picks.  [default: inferences-per-joule]",
    ),
    click.option("--trials", type=int, help="At most so many trials of a search; 0: none."),
    click.option(
        "--passes",
        metavar="LIST",
        shell_complete=complete_pass,
        help="default, lossless, a list in order, or edits: +merge-projections,-fuse-gelu. Settings: a recipe (optimize init).",
    ),
]
SCENARIO: list[Decorator] = [
    click.option(
        "--scenario",
        type=click.Choice(["single-stream", "offline"]),
        help="How it will be loaded: one call after the other, or as much as it takes.  [default: single-stream]",
    ),
]
POINT: list[Decorator] = [
    click.option(
        "--batch", type=int, help="Items in a call.  [default: 1; offline 32, from where `optimize` searches]"
    ),
    click.option("--threads", type=int, help="Threads of all streams together.  [default: the backend's own]"),
    click.option(
        "--precision",
        type=click.Choice(["f32", "tf32", "bf16", "f16"]),
        help="What the backend calculates in where the graph says float32.  [default: optimize picks; bench and gate: the "
        "bundle's, else the backend's]",
    ),
]
TUNING: list[Decorator] = [
    click.option(
        "--tune/--no-tune",
        default=None,
        help="Search the operating point whose inferences cost least: batch, streams, threads and what else the backend "
        "has; what --batch and --threads say stays.  [default: --tune]",
    ),
    click.option(
        "--allow-power-control",
        is_flag=True,
        default=None,
        help="The search may set a GPU's power limit and clock (root); they are put back at the end, crash included.",
    ),
]
MODEL: list[Decorator] = [
    click.option("--arch", metavar="FILE.py:NAME", help="Callable that builds the network which weights belong to."),
    click.option("--arch-args", metavar="A=B,…", help="Its arguments: num_classes=10,… or a JSON object."),
    click.option(
        "--input",
        "input_",
        multiple=True,
        metavar="SPEC",
        help='Input type, as "x:float32[batch,3,32,32]". Repeatable.',
    ),
    click.option("--trust", is_flag=True, default=None, help="Allow code that the model file carries to run."),
]
RUN: list[Decorator] = [
    click.option("--seed", type=int, help="Seed of everything random.  [default: 0]"),
    click.option("--out", "-o", type=click.Path(), help="Bundle folder.  [default: MODEL-TARGET]"),
    click.option("--force", is_flag=True, help="Replace whatever the output folder holds."),
    click.option("--fresh", is_flag=True, help="Search, even where the answer of the same search is in the cache."),
    click.option(
        "--cluster",
        metavar="auto|N|HOST:PORT",
        help="Make the trials of a search in several processes here, as many as fit or N, or on a Ray cluster (docs/search.md).",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check flags, recipe and paths, print the resolved recipe and, of a search, its plan; write nothing.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--verbose", "-v", is_flag=True, help="Print every step, and the trace of an internal error."),
]


def with_options(*groups: Sequence[Decorator]) -> Decorator:
    """A decorator that gives a command these groups of options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate
