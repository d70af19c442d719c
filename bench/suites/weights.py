"""Weights in 4 and 8 bits on a Llama-style decoder: how far each algorithm of `quantize-weights` moves the logits.

    python weights.py [--small] [--types int4,…] [--groups 64,…] [--algorithms round,…] [--decays 0,0.75] [--samples 64] [--quick]

The decoder is the one of fusion_models.py (30 layers, SmolLM-135M's shape, 211 products; `--small`: a quarter of its
width), after the default passes of the stages CLEAN and FUSE. An error is the RMS of what logits moved by over the RMS of the
logits, in ONNX Runtime without optimization, on sequences of 128 random tokens that calibration didn't see.

With decay 0 weights are drawn independently, as they were built: what they give is hardly correlated, so that there is little
which GPTQ could use. With any other, weights are multiplied from the right by Q·diag(k^−decay)·Qᵀ (k = 1, 2, …; Q a random
orthogonal matrix) and brought back to their norm, so that standard deviations of what they give fall off as k^−decay, much
as power laws are found in trained nets: one Q for the embedding and all that is added to it, another for each of the
other products. The head stays.

`plain` is rounding as others do it, with the scale that clips nothing; `round` is ours, whose scales have the least squared
error. Wanted: with int4 and the steepest decay, GPTQ's error is at most half of that of either. Writes
bench/results/weights.json, exits 1 where that was missed; `--quick` tries it out: small, int4 in groups of 64, nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _fusion_counts as counts
import numpy as np
from fusion_models import Files, built

from perwatt import registry
from perwatt.artifact import Artifact, Step
from perwatt.bench.fingerprint import fingerprint
from perwatt.contract import Capabilities, Context, QuantizationStyle
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.passes import _weight_quantizers as quantizers
from perwatt.passes.quantize_weights import QuantizeWeights
from perwatt.recipe import Budget
from perwatt.reference import Reference
from perwatt.signature import Batch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "weights.json"
TYPES, GROUPS = ("int4", "uint4", "int8"), (32, 64, 128, 0)
ALGORITHMS = ("plain", "round", "awq", "gptq")
UNCLIPPED = {
    kind: replace(scheme, positive=scheme.symmetric, search=False) for kind, scheme in quantizers.SCHEMES.items()
}
TOKENS, EVALUATED, CALL = 128, 8, 4
SHARE_WANTED = 0.5
OTHERS = ("plain", "round")


# The decoder ----------------------------------------------------------------------------------------------------------


def decoder(small: bool, folder: Path) -> Artifact:
    """The decoder after the passes that keep its outputs."""
    read = Artifact.load(built(Files("llama", small=small), "dynamo"))
    whole = counts.pipeline(read, None, folder).for_target(registry.target("onnxruntime").capabilities())
    return whole.run(read, counts.fusing_passes())[0]


def decaying(artifact: Artifact, power: float) -> Artifact:
    """The decoder with weights as the module's docstring says."""
    model = artifact.edit()
    table = next(node for node in model.graph if node.op_type == "Gather").inputs[0]
    common = mixer(table.const_value.shape[1], 0, power)
    mix(table, common)
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    for number, node in enumerate(products):
        (value,) = node.outputs
        added = any(use.node.op_type == "Add" for use in value.uses())
        if not value.is_graph_output():
            weight = node.inputs[1]
            mix(weight, common if added else mixer(weight.const_value.shape[1], number + 1, power))
    return artifact.after(model, Step("decay"))


def mixer(width: int, seed: int, power: float) -> np.ndarray:
    """Q·diag(k^−power)·Qᵀ."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
    return np.asarray(basis * np.arange(1.0, width + 1) ** -power @ basis.T)


def mix(value: Any, by: np.ndarray) -> None:
    """Multiply a stored matrix from the right, and keep its norm."""
    import onnx_ir as ir

    old = value.const_value.numpy()
    new = old @ by
    new *= np.linalg.norm(old) / np.linalg.norm(new)
    value.const_value = ir.Tensor(new.astype(np.float32), name=value.name)


# Errors ---------------------------------------------------------------------------------------------------------------


def sequences(count: int, words: int, seed: int) -> Batch:
    """Random tokens, none masked."""
    ids = np.random.default_rng(seed).integers(0, words, (count, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def context(samples: Samples, folder: Path) -> Context:
    """What the pass is given: a backend that has every form, and the reference in this process."""

    def execute(
        made: Artifact, batches: Samples, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False
    ) -> Iterator[Batch]:
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            yield from Reference(made, Path(aside), taps, optimized=optimized).run(batches)

    def not_here(*_: Any) -> Any:
        raise BackendError("nothing is measured here")

    styles = tuple(QuantizationStyle(f"{kind}-weights", "float", kind, True, True) for kind in TYPES)
    return Context(
        samples=lambda role: samples, capabilities=Capabilities(quantization_styles=styles), budget=Budget(), seed=0,
        deadline=None, progress=lambda text: None, execute=execute, measure=not_here, profile=not_here,
        judge=not_here,
    )  # fmt: skip


def logits(artifact: Artifact, batch: Batch, folder: Path) -> np.ndarray:
    """The decoder's outputs by the numeric reference."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        (name,) = (spec.name for spec in artifact.signature.outputs)
        found = Reference(artifact, Path(aside)).run(Samples([batch]).batches(CALL))
        return np.concatenate([outputs[name] for outputs in found])


def errors(
    artifact: Artifact, kinds: Sequence[str], groups: Sequence[int], algorithms: Sequence[str], count: int, folder: Path
) -> list[dict[str, Any]]:
    """One row for each type, group and algorithm."""
    (shape,) = (spec.shape for spec in artifact.signature.outputs)
    assert shape is not None and isinstance(shape[-1], int)
    given = context(Samples([sequences(count, shape[-1], 1)]), folder)
    fresh = sequences(EVALUATED, shape[-1], 2)
    wanted = logits(artifact, fresh, folder)
    rows = []
    for kind in kinds:
        for group in groups:
            for algorithm in algorithms:
                how: Any = "round" if algorithm == "plain" else algorithm
                made_by = QuantizeWeights(type=kind, group_size=group, algorithm=how, subset_size=count)  # type: ignore[arg-type]
                start = time.process_time()
                with patch.dict(quantizers.SCHEMES, UNCLIPPED if algorithm == "plain" else {}):
                    after, changes = made_by.run(artifact, given)
                cpu_s = time.process_time() - start
                off = logits(after, fresh, folder) - wanted
                error = float(np.linalg.norm(off) / np.linalg.norm(wanted))
                rows.append({
                    "type": kind, "group_size": group, "algorithm": algorithm, "error": error, "cpu_s": cpu_s,
                    "size_bytes": after.size_bytes(), "changes": changes,
                })  # fmt: skip
                print(
                    f"  {kind:6} {group or 'channel':>7} {algorithm:6} error {error:.4f}   {cpu_s:6.1f} s", flush=True
                )
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What is wanted, and whether it holds: one line a group."""
    found = {(row["type"], row["group_size"], row["algorithm"]): row["error"] for row in rows}
    lines = []
    for group in dict.fromkeys(row["group_size"] for row in rows if row["type"] == "int4"):
        words = f"groups of {group}" if group else "whole channels"
        for other in OTHERS:
            share = found["int4", group, "gptq"] / found["int4", group, other]
            lines.append((f"int4, {words}: GPTQ's error is {share:.2f} of {other}'s", share <= SHARE_WANTED))
    return lines


def main() -> int:
    """Every decay, type, group and algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the width")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)), help="0: whole channels")
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS), help="plain, round and gptq are needed")
    parser.add_argument("--decays", default="0,0.5,0.75", help="powers, the steepest last")
    parser.add_argument("--quick", action="store_true", help="small, int4 in groups of 64, nothing written")
    asked = parser.parse_args()
    kinds = ("int4",) if asked.quick else tuple(asked.types.split(","))
    groups = (64,) if asked.quick else tuple(map(int, asked.groups.split(",")))
    algorithms, decays = asked.algorithms.split(","), sorted(map(float, asked.decays.split(",")))
    small = asked.small or asked.quick
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as aside:
        plain = decoder(small, Path(aside))
        for decay in decays:
            artifact = decaying(plain, decay) if decay else plain
            print(f"decay {decay:g}, {artifact.size_bytes() / 1e6:.0f} MB", flush=True)
            found[f"{decay:g}"] = errors(artifact, kinds, groups, algorithms, asked.samples, Path(aside))
    for decay in decays[:-1]:
        for words, _ in verdicts(found[f"{decay:g}"]):
            print(f"     {words} (decay {decay:g}, told only)")
    lines = verdicts(found[f"{decays[-1]:g}"])
    for words, holds in lines:
        print(f"{'ok  ' if holds else 'MISS'} {words}")
    if not asked.quick:
        settings = {"small": small, "samples": asked.samples, "decays": decays}
        RESULTS.write_text(
            json.dumps({"machine": fingerprint(), "settings": settings, "errors": found}, indent=1) + "\n"
        )
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
