"""N:M and unstructured zeros on a ViT and a Llama-style decoder: how far each algorithm moves the logits.

    python sparsity.py [--small] [--models vit-b,llama] [--decays 0,0.75] [--samples 64] [--quick]

ViT-B/16 and the decoder (SmolLM-135M's shape) of fusion_models.py (`--small`: a quarter of their width), after the default
passes of the stages CLEAN and FUSE, pruned by `prune-n-of-m` (2:4) and `prune-weights` (half of the weights). An error is the
RMS of what logits moved by over the RMS of the logits, in ONNX Runtime without optimization, on inputs that calibration didn't
see: sequences of 128 random tokens, made-up pictures.

With decay 0 weights are drawn independently, as they were built, and what they give is hardly correlated. With any other, the
decoder's are mixed as weights.py says, and the ViT's in the same way: one basis for all that is added to its tokens (the patches'
convolution, class token, positions, the second product of each branch), another for each of the other products.

Wanted: with 2:4 and the steepest decay, SparseGPT's error is at most half of magnitude's, on both. Writes
bench/results/sparsity.json, exits 1 where that was missed; `--quick` tries it out: small, the steepest decay, few samples,
nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _fusion_counts as counts
import architectures
import numpy as np
import weights
from fusion_models import Files, built

from perwatt import registry
from perwatt.artifact import Artifact, Step
from perwatt.bench.fingerprint import fingerprint
from perwatt.contract import Pass
from perwatt.data import Samples
from perwatt.passes.prune_n_of_m import PruneNOfM
from perwatt.passes.prune_weights import PruneWeights
from perwatt.signature import Batch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "sparsity.json"
ALGORITHMS = ("magnitude", "wanda", "sparsegpt")
SHARE_WANTED = 0.5
EVALUATED, QUICK_SAMPLES = 8, 16


# Models ---------------------------------------------------------------------------------------------------------------


def model(name: str, small: bool, power: float, folder: Path) -> Artifact:
    """The architecture after the passes that keep its outputs, with weights that decay."""
    if name == "llama":
        plain = weights.decoder(small, folder)
        return weights.decaying(plain, power) if power else plain
    read = Artifact.load(built(Files(name, small=small), "dynamo"))
    whole = counts.pipeline(read, None, folder).for_target(registry.target("onnxruntime").capabilities())
    plain = whole.run(read, counts.fusing_passes())[0]
    return decaying_vit(plain, power) if power else plain


def decaying_vit(artifact: Artifact, power: float) -> Artifact:
    """The ViT with weights as the module's docstring says."""
    model = artifact.edit()
    first = next(node for node in model.graph if node.op_type == "LayerNormalization")
    width = first.inputs[1].const_value.shape[0]
    common = weights.mixer(width, 0, power)
    for node in model.graph:
        if node is first:
            break
        for value in node.inputs:
            tensor = None if value is None else value.const_value
            if tensor is not None and len(tensor.shape) == 3 and tensor.shape[-1] == width:
                weights.mix(value, common)
            elif tensor is not None and node.op_type == "Conv" and len(tensor.shape) == 4:
                mix_outputs(value, common)
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    for number, node in enumerate(products):
        end = behind_bias(node.outputs[0])
        added = any(use.node.op_type == "Add" for use in end.uses())
        if not end.is_graph_output():
            weight = node.inputs[1]
            weights.mix(weight, common if added else weights.mixer(weight.const_value.shape[1], number + 1, power))
    return artifact.after(model, Step("decay"))


def mix_outputs(value: Any, by: np.ndarray) -> None:
    """`weights.mix` of a convolution's output channels."""
    import onnx_ir as ir

    old = value.const_value.numpy()
    new = np.tensordot(by.T, old, axes=1)
    new *= np.linalg.norm(old) / np.linalg.norm(new)
    value.const_value = ir.Tensor(np.ascontiguousarray(new, np.float32), name=value.name)


def behind_bias(value: Any) -> Any:
    """The value, or what an Add of a stored vector makes of it."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        (other,) = (each for each in uses[0].node.inputs if each is not value)
        if other.const_value is not None:
            return uses[0].node.outputs[0]
    return value


def inputs(artifact: Artifact, count: int, seed: int) -> Batch:
    """Made-up inputs: pictures, or sequences."""
    names = [spec.name for spec in artifact.signature.inputs]
    if names == ["pixel_values"]:
        return {"pixel_values": architectures.pictures(count, seed)}
    (shape,) = (spec.shape for spec in artifact.signature.outputs)
    assert shape is not None and isinstance(shape[-1], int)
    return weights.sequences(count, shape[-1], seed)


# Errors ---------------------------------------------------------------------------------------------------------------


def passes(algorithm: Any, count: int) -> dict[str, Pass]:
    """What is run, by the pattern's name."""
    return {
        "2:4": PruneNOfM(algorithm=algorithm, subset_size=count, anyway=True),
        "unstructured": PruneWeights(algorithm=algorithm, subset_size=count, anyway=True),
    }


def errors(artifact: Artifact, algorithms: Sequence[str], count: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each pattern and algorithm."""
    given = weights.context(Samples([inputs(artifact, count, 1)]), folder)
    fresh = inputs(artifact, EVALUATED, 2)
    wanted = weights.logits(artifact, fresh, folder)
    rows = []
    for algorithm in algorithms:
        for pattern, made_by in passes(algorithm, count).items():
            start = time.process_time()
            after, changes = made_by.run(artifact, given)
            cpu_s = time.process_time() - start
            off = weights.logits(after, fresh, folder) - wanted
            error = float(np.linalg.norm(off) / np.linalg.norm(wanted))
            rows.append(
                {"pattern": pattern, "algorithm": algorithm, "error": error, "cpu_s": cpu_s, "changes": changes}
            )
            print(f"  {pattern:12} {algorithm:9} error {error:.4f}   {cpu_s:6.1f} s", flush=True)
    return rows


def verdict(name: str, rows: Sequence[dict[str, Any]], pattern: str) -> tuple[str, bool]:
    """What is wanted of a pattern, and whether it holds."""
    found = {row["algorithm"]: row["error"] for row in rows if row["pattern"] == pattern}
    share = found["sparsegpt"] / found["magnitude"]
    return f"{name}, {pattern}: SparseGPT's error is {share:.2f} of magnitude's", share <= SHARE_WANTED


def main() -> int:
    """Every model, decay, pattern and algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the width")
    parser.add_argument("--models", default="vit-b,llama")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS), help="magnitude and sparsegpt are needed")
    parser.add_argument("--samples", type=int, default=64, help="items to calibrate on")
    parser.add_argument("--decays", default="0,0.5,0.75", help="powers, the steepest last")
    parser.add_argument("--quick", action="store_true", help="small, the steepest decay, few samples, nothing written")
    asked = parser.parse_args()
    decays = sorted(map(float, asked.decays.split(",")))[-1 if asked.quick else 0 :]
    small, count = asked.small or asked.quick, QUICK_SAMPLES if asked.quick else asked.samples
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as aside:
        for name in asked.models.split(","):
            for decay in decays:
                artifact = model(name, small, decay, Path(aside))
                print(f"{name}, decay {decay:g}, {artifact.size_bytes() / 1e6:.0f} MB", flush=True)
                rows = errors(artifact, asked.algorithms.split(","), count, Path(aside))
                found.setdefault(name, {})[f"{decay:g}"] = rows
    steepest = f"{decays[-1]:g}"
    for name, by_decay in found.items():
        for decay_words, rows in by_decay.items():
            for pattern in passes("magnitude", count):
                if (decay_words, pattern) != (steepest, "2:4"):
                    print(f"     {verdict(name, rows, pattern)[0]} (decay {decay_words}, told only)")
    lines = [verdict(name, by_decay[steepest], "2:4") for name, by_decay in found.items()]
    for words, holds in lines:
        print(f"{'ok  ' if holds else 'MISS'} {words}")
    if not asked.quick:
        settings = {"small": small, "samples": count, "decays": decays}
        RESULTS.write_text(
            json.dumps({"machine": fingerprint(), "settings": settings, "errors": found}, indent=1) + "\n"
        )
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
