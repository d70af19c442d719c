"""What ONNX Runtime's own graph optimizers bring on this CPU: each switched off in turn, beside all of them on.

    python onnxruntime_fusions.py [--models bert-base,…] [--optimizers SkipLayerNormFusion,…] [--rounds 12] [--quick]

The models are those of architectures.py (random weights), float32, one thread, two sequences or pictures a call. All sessions
of a model are open in this process and take turns in random order; figures are CPU seconds of a call, ratios are taken within
rounds, with their 95 % intervals. A ratio below 1: the optimizer costs more than it saves, and the target had better switch
it off (`NOT_WORTH_IT` in targets/onnxruntime.py rests on this). Exits 1 where one that is switched off there pays here.
Writes bench/results/onnxruntime_fusions.json; `--quick` writes nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import onnxruntime

from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.statistics import paired_ratio
from perwatt.targets.onnxruntime import NOT_WORTH_IT

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "onnxruntime_fusions.json"
OPTIMIZERS = (
    "SkipLayerNormFusion", "LayerNormFusion", "BiasGeluFusion", "GeluFusionL2", "MatMulAddFusion", "ConvActivationFusion",
    "ConvAddActivationFusion", "NchwcTransformer", "TransposeOptimizer", "MatmulTransposeFusion", "MatMulScaleFusion",
)  # fmt: skip
BATCH = 2


def session(path: Path, disabled: list[str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def measured(path: Path, feed: dict[str, Any], optimizers: list[str], rounds: int) -> dict[str, Any]:
    """For each optimizer: CPU seconds without it ÷ with all."""
    sessions = {"": session(path, []), **{name: session(path, [name]) for name in optimizers}}
    cost: dict[str, list[float]] = {name: [] for name in sessions}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(sessions), len(sessions)):
            start = time.process_time()
            sessions[name].run(None, feed)
            if number:  # the first one warms up
                cost[name].append(time.process_time() - start)
    found = {}
    for name in optimizers:
        ratio = paired_ratio(cost[name], cost[""])
        found[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return {"all_on_cpu_s": float(np.median(cost[""])) / BATCH, "without_to_with": found}


def table(results: dict[str, Any]) -> str:
    """Ratios, as Markdown."""
    models = list(results)
    names = list(dict.fromkeys(name for its in results.values() for name in its["without_to_with"]))
    lines = ["| switched off | " + " | ".join(models) + " |", "| --- |" + " --- |" * len(models)]
    for name in names:
        cells = [results[model]["without_to_with"].get(name) for model in models]
        told = [
            "–" if c is None or c["value"] is None else f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]"
            for c in cells
        ]
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert-base,minilm,vit-b16,resnet50,mobilenetv2")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    results = {}
    for name in options.models.split(","):
        files = architectures.built(name)
        with np.load(files.samples) as archive:
            feed = {key: archive[key][:BATCH] for key in archive.files}
        results[name] = measured(
            files.fp32, feed, options.optimizers.split(","), 2 if options.quick else options.rounds
        )
        print(table({name: results[name]}), flush=True)
    if not options.quick:
        RESULTS.write_text(
            json.dumps(
                {"machine": fingerprint(), "onnxruntime": onnxruntime.__version__, "batch": BATCH, "models": results},
                indent=1,
            )
            + "\n"
        )
    print(table(results))
    missed = [
        (model, name) for model, its in results.items() for name in NOT_WORTH_IT
        if name in its["without_to_with"] and (its["without_to_with"][name]["low"] or 0) > 1
    ]  # fmt: skip
    for model, name in missed:
        print(f"MISSED: {name} pays on {model}, and the target switches it off")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
