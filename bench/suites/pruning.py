"""What pruning brings, and what learning brings back.

    python pruning.py [--parts channels,frontier] [--models resnet50,…] [--minutes 10] [--rounds 12] [--seconds 1] [--quick]

- `channels`: `prune-channels` at 5 to 60 % of the channels, then `quantize-int8`, beside the whole model in int8, one thread of
  OpenVINO (see _pruning_channels.py). Wanted: 1.25 × as fast at 30 %, and slower at no share.
- `frontier`: `drop-blocks`, `recover` for so many minutes, then the best precision, on ResNet-56 and MiniLM, beside the best
  precision alone (see _pruning_frontier.py). Wanted, at no more than 1 point lost: 1.5 and 1.3 × as fast, in at most 20 minutes.

Ratios are of CPU seconds per inference, with 95 % intervals over the rounds. Writes bench/results/pruning.json after each
model (what a run leaves out stays as it was), prints tables in Markdown, exits 1 where something wanted was missed. `--quick`
tries it out: few rounds, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _pruning_channels
import _pruning_frontier
import models
from _fusion_speed import Effort

from perwatt.bench.fingerprint import fingerprint

RESULTS = models.ROOT / "bench" / "results" / "pruning.json"
PARTS: dict[str, Any] = {"channels": _pruning_channels, "frontier": _pruning_frontier}


def run_part(part: str, name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part on one model."""
    effort = Effort(options.rounds, options.seconds)
    if part == "channels":
        return _pruning_channels.channels(name, effort, folder)
    return _pruning_frontier.frontier(name, options.minutes, effort, folder)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    known = list(dict.fromkeys(name for part in PARTS.values() for name in part.MODELS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"among {', '.join(PARTS)}")
    parser.add_argument("--models", default=",".join(known), help=f"among {', '.join(known)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="that each network may learn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window")
    parser.add_argument("--quick", action="store_true", help="few rounds, and nothing is written")
    options = parser.parse_args()
    for words, names in (("parts", list(PARTS)), ("models", known)):
        given = getattr(options, words).split(",")
        if unknown := [name for name in given if name not in names]:
            parser.error(f"unknown {words}: {', '.join(unknown)}; known are {', '.join(names)}")
        setattr(options, words, given)
    if options.quick:
        options.rounds, options.seconds, options.minutes = 3, 0.3, 0.5
    return options


def main() -> None:
    """Run the parts, write after each model, tell."""
    options = parsed()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.quick else {}
    lines: list[tuple[str, bool]] = []
    for part in options.parts:
        ran = [name for name in PARTS[part].MODELS if name in options.models]
        for name in ran:
            print(f"{part}, {name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                found = run_part(part, name, options, Path(scratch))
            # Parts may have been run on different machines.
            found |= {"machine": fingerprint(), "load_average": os.getloadavg()[0]}
            kept.setdefault(part, {})[name] = found
            if not options.quick:
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"### {part}\n\n{PARTS[part].table(kept[part])}\n")
        lines += PARTS[part].verdicts({name: its for name, its in kept[part].items() if name in ran})
    print("\n".join(f"- {'holds' if holds else 'MISSED'}: {line}" for line, holds in lines))
    raise SystemExit(0 if all(holds for _, holds in lines) else 1)


if __name__ == "__main__":
    main()
