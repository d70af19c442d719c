"""`optimize init MODEL`: a starter recipe, commented, for this very model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from perwatt import registry
from perwatt.errors import InputError
from perwatt.recipe import OneOf, PassStep


def starter(path: Path, arch: str | None, inputs: list[str], trust: bool) -> str:
    """YAML with what is known filled in and what is to be decided commented. Raises InputError where the model can't be
    read; types that only the user knows are left to fill in."""
    from perwatt.api import read

    found: Any = None
    try:
        found = read(path, arch=arch, input=inputs, trust=trust)
        signature = found.artifact.signature
        inputs_, outputs = (", ".join(map(str, specs)) for specs in (signature.inputs, signature.outputs))
        facts = f"{found.format}; inputs {inputs_}; outputs {outputs}"
    except InputError as error:
        if "--input" not in str(error):
            raise
        facts = f"not read yet: {' '.join(str(error).split())}"
    text = found is not None and found.tokenizer is not None
    specs = found.artifact.signature.inputs if found is not None else ()
    pictures = [s.shape for s in specs if s.shape and len(s.shape) == 4]
    sides = [d for d in (pictures[0][1:] if pictures else ()) if isinstance(d, int) and d not in (1, 3)]
    section: dict[str, Any] = {"path": str(path)}
    if arch:
        section["arch"] = arch
    if inputs:
        section["input"] = inputs
    if trust:
        section["trust"] = True
    model = yaml.safe_dump({"model": section}, sort_keys=False, allow_unicode=True)
    return "\n".join(
        [
            "# yaml-language-server: $schema=recipe.schema.json   (optimize schema recipe > recipe.schema.json)",
            f"# {path.name}: {facts}",
            model.rstrip(),
            *(
                []
                if arch
                else ["  # arch: net.py:build          # for weights alone: the callable that builds the network"]
            ),
            "",
            *_data_lines(text, bool(pictures), sides[0] if sides else 224),
            "",
            "budget:",
            "  max_drop: 1.0               # points of accuracy that may be lost (metric units otherwise)",
            "  min_gain: 3%                # least gain worth shipping",
            "  # p99_ms: 20                # latency that 99 % of calls must stay under",
            "  # time: 10m                 # time budget of the run",
            "",
            "passes: default               # what `default` is today:",
            *_pass_lines(),
            "",
            "target:",
            "  name: cpu",
            "  scenario: single-stream     # or offline: throughput instead of latency",
            "  # threads: 2                # the backend's own choice otherwise",
            "  # batch: 1",
            "  # precision: f32            # what is calculated in where the graph says float32; measured otherwise",
            "",
        ]
    )


def _data_lines(text: bool, picture: bool, side: int) -> list[str]:
    lines = ["# Without data nothing lossy is shipped. About 100 samples are enough to calibrate.", "data: {}"]
    example = {
        "text": ["#   all: reviews.csv", "#   text: sentence", "#   label: label"],
        "picture": [
            "#   all: val/                 # one subfolder for each class, or an .npz",
            f"#   image: {side}",
            "#   normalize: imagenet",
        ],
        "array": ["#   all: samples.npz          # one array for each input, and labels"],
    }["text" if text else "picture" if picture else "array"]
    return [*lines, "# data:", *example, "#   # or apart: calibrate: train/, eval: val/"]


def _step_words(step: PassStep) -> str:
    """`quantize-int8: {operators: all}`."""
    settings = ", ".join(f"{key}: {value}" for key, value in step.settings.items())
    return f"{step.name}: {{{settings}}}" if settings else step.name


def _pass_lines() -> list[str]:
    lines = []
    for step in registry.default_steps():
        if isinstance(step, OneOf):
            lines += [
                "# - one-of:                   # the measured best wins",
                *(f"#   - {_step_words(one)}" for one in step.steps),
            ]
        else:
            lines.append(f"# - {step.name}")
    return lines
