"""What fusion makes of eleven architectures: nodes beside other optimizers', matches, and what it brings in speed.

    python fusion.py [--parts counts,direct,patterns,forms,alone] [--models bert-base,…] [--forms attention,…] [--full]
                     [--rounds 12] [--seconds 1] [--quick]

Five parts, three of them on the architectures of fusion_models.py:

- `counts`: nodes of the graph as exported (by dynamo at opset 23 and by TorchScript at opset 17, attention fused and written
  out) and after onnxslim, onnxscript's optimizer, ONNX Runtime's transformer optimizer, its session optimizer, and our
  passes of the stages CLEAN and FUSE, in each form (see _fusion_counts.py). Every pass is proved as in `optimize`: on
  samples, within its tolerance. Wanted: never more nodes than the best of the others in that form; one operator for each
  place of the architecture; no pass rolled back. Widths are a quarter of the architecture's (see fusion_models.py), which
  no node depends on; `--full` does without.
- `direct`: ViT-B, BERT-base and Swin-tiny in OpenVINO, bf16 and f32: our file against OpenVINO's own conversion of the same
  torch module, and torch's own ONNX, compiled alike and interleaved. Wanted: at most 1 × its CPU seconds within noise.
- `patterns`: all default passes against all but one, for each pass of the stage FUSE (and with one more, for each that is
  not among the default ones), on every model that it changes and in OpenVINO (bf16, f32), ONNX Runtime and Inductor
  (`--sides`), one thread: a short look at each place, a longer one wherever it promises more than the best so far. Told
  is where each pays most. Many places are looked at, so the best of several that bring nothing looks a little better
  than nothing: the interval is told beside it.
- `forms`: whole operators beside their pieces in small graphs (see _fusion_forms.py), on the same sides but Inductor, one
  thread: what `Capabilities.operators` of the targets rests on.
- `alone`: small graphs with what one pass looks for, before and after that pass (see _fusion_alone.py; `--passes`), likewise.

Ratios are of CPU seconds per inference, with 95 % intervals over the rounds. Writes bench/results/fusion.json after each
model (what a run leaves out stays as it was), prints tables in Markdown, exits 1 where something wanted was missed.
`--quick` tries it out: 3 rounds of 0.3 s, nothing written. onnxslim must be installed for its column.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _fusion_alone
import _fusion_counts
import _fusion_forms
import _fusion_speed
import fusion_models
import models
import numpy as np
from _fusion_speed import Effort
from fusion_models import Files

from perwatt.artifact import Artifact
from perwatt.bench.fingerprint import fingerprint

RESULTS = models.ROOT / "bench" / "results" / "fusion.json"
PARTS = ("counts", "direct", "patterns", "forms", "alone")
WITHOUT_MODELS = ("forms", "alone")
EXPORTERS = ("dynamo", "script")


def count(name: str, full: bool, exporters: list[str], attentions: list[str]) -> dict[str, Any]:
    """Everything that is counted of one architecture, by graph."""
    found = {}
    for attention in fusion_models.ALL[name].attentions:
        for exporter in EXPORTERS:
            if attention in attentions and exporter in exporters:
                title = f"{name}, {attention}, {exporter}"
                begun = time.perf_counter()
                try:
                    found[title] = count_graph(Files(name, attention, not full), exporter)
                except RuntimeError as error:
                    found[title] = {"failed": str(error)}
                print(f"{title}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return found


def count_graph(files: Files, exporter: str) -> dict[str, Any]:
    """Nodes of one graph: as exported, after each rival, and after our passes in each form."""
    import perwatt

    path = fusion_models.built(files, exporter)
    what = fusion_models.ALL[files.name]
    hidden = what.hidden if not files.small else what.hidden // 4
    # An older opset is brought to perwatt's own on reading, which the rivals do without.
    artifact = Artifact.load(path) if exporter == "dynamo" else perwatt.read(path).artifact
    with np.load(files.samples) as archive:
        samples = {name: archive[name][: fusion_models.SMALL_BATCH] for name in archive.files}
    with tempfile.TemporaryDirectory() as scratch:
        told = {
            "original": _fusion_counts.operators(path),
            "rivals": _fusion_counts.rivals(path, Path(scratch), what.rival, what.heads, hidden),
            "ours": _fusion_counts.ours(artifact, samples, Path(scratch)),
            "small": files.small,
        }
    told["has"] = _fusion_counts.compared(what.has, told["ours"]["newest"]["operators"])
    return told


def run_part(part: str, name: str, options: argparse.Namespace, kept: dict[str, Any], folder: Path) -> None:
    """One part on one architecture, into `kept`."""
    effort = Effort(options.rounds, options.seconds)
    if part == "counts":
        kept.setdefault(part, {}).update(count(name, options.full, options.exporters, options.attentions))
    elif part == "direct" and name in _fusion_speed.DIRECT:
        kept.setdefault(part, {})[name] = _fusion_speed.direct(name, options.precisions, effort, folder)
    elif part == "forms":
        sides = [side for side in options.sides if side in _fusion_forms.SIDES]
        kept.setdefault(part, {}).update(_fusion_forms.forms(options.forms, sides, effort, folder))
    elif part == "alone":
        sides = [side for side in options.sides if side in _fusion_forms.SIDES]
        kept.setdefault(part, {}).update(_fusion_alone.alone(options.passes, sides, effort, folder))
    elif part == "patterns":
        _fusion_speed.patterns(name, options.sides, options.passes, kept.setdefault(part, {}), effort, folder)


def forget(kept: dict[str, Any], names: list[str]) -> None:
    """Take out what an earlier run said of passes on these models: places are looked at anew."""
    for entries in kept.get("patterns", {}).values():
        entries["screened"] = [place for place in entries["screened"] if place["model"] not in names]
        if entries["best"] and entries["best"]["model"] in names:
            ratios = [place for place in entries["screened"] if place.get("with_to_without", {}).get("value")]
            entries["best"] = min(ratios, key=lambda place: place["with_to_without"]["value"], default=None)


def tables(kept: dict[str, Any], parts: list[str]) -> str:
    """What was found, as Markdown."""
    found = []
    if "counts" in parts and (graphs := {t: its for t, its in kept.get("counts", {}).items() if "failed" not in its}):
        found += [_fusion_counts.table(graphs), _fusion_counts.matches(graphs)]
    if "direct" in parts and kept.get("direct"):
        found.append(_fusion_speed.direct_table(kept["direct"]))
    if "patterns" in parts and kept.get("patterns"):
        found.append(_fusion_speed.patterns_table(kept["patterns"]))
    if "forms" in parts and kept.get("forms"):
        found.append(_fusion_forms.forms_table(kept["forms"]))
    if "alone" in parts and kept.get("alone"):
        found.append(_fusion_alone.alone_table(kept["alone"]))
    return "\n\n".join(found)


def verdicts(kept: dict[str, Any], parts: list[str], names: list[str]) -> list[tuple[str, bool]]:
    """What is wanted of the models of this run, and whether it holds."""
    lines = []
    if "counts" in parts:
        for title, its in kept.get("counts", {}).items():
            if title.split(",")[0] in names:
                failed = [(f"{title}: {its['failed']}", False)] if "failed" in its else []
                lines += failed or _fusion_counts.verdicts(title, its)
    if "direct" in parts:
        measured = {name: its for name, its in kept.get("direct", {}).items() if name in names}
        lines += _fusion_speed.direct_verdicts(measured)
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lists: dict[str, tuple[str, ...]] = {
        "parts": PARTS, "models": tuple(fusion_models.ALL), "exporters": EXPORTERS, "attentions": ("sdpa", "eager"),
        "precisions": ("bf16", "f32"), "sides": _fusion_speed.SIDES, "forms": tuple(_fusion_forms.cases()),
    }  # fmt: skip
    for words, known in lists.items():
        parser.add_argument(f"--{words}", default=",".join(known), help=f"among {', '.join(known)}")
    parser.add_argument("--passes", default="", help="in the parts patterns and alone; all without")
    parser.add_argument("--full", action="store_true", help="count at full widths")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.3 s, and nothing is written")
    options = parser.parse_args()
    for words, known in lists.items():
        given = getattr(options, words).split(",")
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {words}: {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(options, words, given)
    options.passes = [name for name in options.passes.split(",") if name]
    if options.quick:
        options.rounds, options.seconds = 3, 0.3
    return options


def main() -> None:
    """Run the parts, write after each model, tell."""
    options = parsed()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.quick else {}
    if "patterns" in options.parts:
        forget(kept, options.models)
    for part in options.parts:
        for name in options.models if part not in WITHOUT_MODELS else [""]:
            # Artifacts of one model are of no use to the next, and large.
            with tempfile.TemporaryDirectory() as scratch:
                run_part(part, name, options, kept, Path(scratch))
            kept |= {"machine": fingerprint(), "load_average": os.getloadavg()[0]}
            if not options.quick:
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(tables(kept, options.parts))
    found = verdicts(kept, options.parts, options.models)
    print("\n" + "\n".join(f"- {'holds' if holds else 'MISSED'}: {line}" for line, holds in found))
    if "patterns" in options.parts:
        idle = [name for name, entries in kept.get("patterns", {}).items() if not _fusion_speed.pays(entries)]
        print(f"- pays nowhere: {', '.join(sorted(idle)) or 'none'}")
    raise SystemExit(0 if all(holds for _, holds in found) else 1)


if __name__ == "__main__":
    main()
