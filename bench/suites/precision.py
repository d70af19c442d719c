"""Precision held against others': calibration's CPU time, what is shipped for trained networks, and layer by layer.

    python precision.py [--parts calibration,trained,assigned] [--models minilm,…] [--time 120]
                        [--rounds 12] [--seconds 1] [--quick]

Three parts:

- `calibration`: CPU seconds of `quantize-int8` and of NNCF with its defaults, for BERT-base, ResNet-50 and MiniLM, each in a
  process of its own, in both orders (see _precision_calibration.py). Wanted: a third of NNCF's CPU time, at an output error
  (relative RMS) of at most 1.1 × NNCF's on samples that neither has seen; for MiniLM, whose weights are trained, an
  accuracy on SST-2's test set at most half a point below NNCF's.
- `trained`: what `optimize --target cpu` ships for MiniLM (half a point may be lost), ResNet-20, ResNet-56, ResNet-8 and MNIST
  (a point) beside float32, bf16, NNCF's int8 and ONNX Runtime's, each on OpenVINO and ONNX Runtime (see
  _precision_trained.py). `--time` is what each optimization may take. Wanted: at most 1.03 × the CPU seconds of the best
  alternative within the budget, and no more lost than the budget allows.
- `assigned`: `assign-precision` on MobileNetV2, ResNet-50, BERT-base and ViT-B beside every single answer, one thread of
  OpenVINO (see _precision_assigned.py). Wanted: at most 1.03 × the fastest. How near outputs stay to float32's is told.

"At most 1.03" holds too where the low end of the interval does and the interval reaches at most 3 % to either side. Ratios are
of CPU seconds per inference, with 95 % intervals over the rounds. Writes bench/results/precision.json after each model (what
a run leaves out stays as it was), prints tables in Markdown, exits 1 where something wanted was missed. `--quick` tries
it out: few samples and rounds, 40 s for each optimization, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _precision_assigned
import _precision_calibration
import _precision_trained
import models
from _fusion_speed import Effort

from perwatt.bench.fingerprint import fingerprint

RESULTS = models.ROOT / "bench" / "results" / "precision.json"
PARTS: dict[str, Any] = {
    "calibration": _precision_calibration, "trained": _precision_trained, "assigned": _precision_assigned
}  # fmt: skip


def run_part(part: str, name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part on one model."""
    effort = Effort(options.rounds, options.seconds)
    if part == "calibration":
        return _precision_calibration.calibration(name, options.quick, folder)
    if part == "trained":
        return _precision_trained.trained(name, options.time, effort, folder)
    return _precision_assigned.assigned(name, effort, folder)


def tables(kept: dict[str, Any], parts: list[str]) -> str:
    """What was found, as Markdown."""
    return "\n\n".join(f"### {part}\n\n{PARTS[part].table(kept[part])}" for part in parts if kept.get(part))


def verdicts(kept: dict[str, Any], ran: dict[str, list[str]]) -> list[tuple[str, bool]]:
    """What is wanted of the models of this run, and whether it holds."""
    lines = []
    for part, names in ran.items():
        measured = {name: its for name, its in kept.get(part, {}).items() if name in names}
        lines += PARTS[part].verdicts(measured)
    return lines


def parsed() -> argparse.Namespace:
    """What was asked for."""
    known = list(dict.fromkeys(name for part in PARTS.values() for name in part.MODELS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"among {', '.join(PARTS)}")
    parser.add_argument("--models", default=",".join(known), help=f"among {', '.join(known)}")
    parser.add_argument("--time", type=float, default=120.0, help="seconds that each optimization may take")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window")
    parser.add_argument("--quick", action="store_true", help="few samples and rounds, and nothing is written")
    options = parser.parse_args()
    for words, names in (("parts", list(PARTS)), ("models", known)):
        given = getattr(options, words).split(",")
        if unknown := [name for name in given if name not in names]:
            parser.error(f"unknown {words}: {', '.join(unknown)}; known are {', '.join(names)}")
        setattr(options, words, given)
    if options.quick:
        options.rounds, options.seconds, options.time = 3, 0.3, 40.0
    return options


def main() -> None:
    """Run the parts, write after each model, tell."""
    options = parsed()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.quick else {}
    ran = {part: [name for name in PARTS[part].MODELS if name in options.models] for part in options.parts}
    for part, names in ran.items():
        for name in names:
            print(f"{part}, {name}", file=sys.stderr, flush=True)
            # Artifacts of one model are of no use to the next, and large.
            with tempfile.TemporaryDirectory() as scratch:
                kept.setdefault(part, {})[name] = run_part(part, name, options, Path(scratch))
            kept |= {"machine": fingerprint(), "load_average": os.getloadavg()[0]}
            if not options.quick:
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(tables(kept, options.parts))
    found = verdicts(kept, ran)
    print("\n" + "\n".join(f"- {'holds' if holds else 'MISSED'}: {line}" for line, holds in found))
    raise SystemExit(0 if all(holds for _, holds in found) else 1)


if __name__ == "__main__":
    main()
