"""What the parts of precision.py share: quantized files, ours and others', passes run alone, and how far outputs lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import _fusion_counts as counts
import _fusion_speed as speed
import numpy as np

from perwatt import calibration, registry
from perwatt.artifact import Artifact
from perwatt.bench.statistics import costs_by_round, half_width
from perwatt.contract import Context, OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.measurement import Ratio
from perwatt.recipe import Budget
from perwatt.reference import Reference, quickly
from perwatt.signature import Batch

WITHIN = 1.03
SETTLED = 0.03
SUBSET = 300
"""Calibration samples: NNCF's own default, and that of `quantize-int8`."""


def near(ratio: Ratio) -> bool:
    """Whether a ratio of CPU seconds is at most WITHIN, by itself or within a noise that is small enough to tell."""
    if ratio.value is None or ratio.low is None:
        return False
    return ratio.value <= WITHIN or (ratio.low <= WITHIN and half_width(ratio) <= SETTLED)


# Ours -----------------------------------------------------------------------------------------------------------------


def lossless(artifact: Artifact, target: str, folder: Path) -> Artifact:
    """What the default passes that keep outputs make of a model for that target."""
    whole = counts.pipeline(artifact, None, folder).for_target(registry.target(target).capabilities())
    return whole.run(artifact, counts.fusing_passes())[0]


def context(samples: Samples, target: str, folder: Path) -> Context:
    """What a pass is given that only needs samples and the reference, both in this process."""

    def execute(
        made: Artifact, batches: Samples, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False
    ) -> Iterator[Batch]:
        return (quickly if quick else Reference)(made, folder, taps, optimized=optimized).run(batches)

    def not_here(*_: Any) -> Any:
        raise BackendError("nothing is measured here")

    return Context(
        samples=lambda role: samples, capabilities=registry.target(target).capabilities(), budget=Budget(), seed=0,
        deadline=None, progress=lambda text: None, execute=execute, measure=not_here, profile=not_here, judge=not_here,
    )  # fmt: skip


def measuring(given: Context, target: str, point: OperatingPoint, fed: Samples, folder: Path) -> Context:
    """The same with what measures: on that target at that point, fed with `fed`. Nothing is judged: weights are random."""
    effort = speed.Effort(rounds=5, seconds=0.5)
    saved = fed.save(folder / "measured-on")

    def measure(artifacts: Sequence[Artifact]) -> list[float]:
        with ExitStack() as cleanup:
            paths = [made.file(folder) for made in artifacts]
            workers = [speed.opened(cleanup, path.stem, path, target, point, saved)[0] for path in paths]
            windows = {str(number): speed.window(worker, effort.seconds) for number, worker in enumerate(workers)}
            found = speed.interleaved(windows, effort.rounds)
        return costs_by_round([found[side] for side in windows])

    def profile(made: Artifact) -> Any:
        return registry.target(target).profile(Artifact.load(made.file(folder)), point, list(fed), 1.0)

    return replace(given, measure=measure, profile=profile, judge=lambda made: None)


# Others' --------------------------------------------------------------------------------------------------------------


def nncf_file(path: Path, calls: Sequence[Batch], transformer: bool, out: Path) -> Path:
    """NNCF's int8 of an ONNX file, with its defaults."""
    import nncf
    import onnx

    kind = nncf.ModelType.TRANSFORMER if transformer else None
    # Its default of 300 samples makes it warn where there are fewer, no more.
    onnx.save(nncf.quantize(onnx.load(path), nncf.Dataset(list(calls)), model_type=kind), out)
    return out


def onnxruntime_file(path: Path, calls: Sequence[Batch], out: Path) -> Path:
    """ONNX Runtime's static int8 of an ONNX file: QDQ, weights by channel, extremes. Activations are unsigned: under bf16
    OpenVINO refuses its default, signed ones with a zero point."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calls)

        def get_next(self) -> Any:
            return next(self.left, None)

    quantization.quantize_static(
        str(path), str(out), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        calibrate_method=quantization.CalibrationMethod.MinMax, activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    return out


def one_by_one(artifact: Artifact, samples: Samples) -> list[Batch]:
    """At most SUBSET calibration samples, each a call of its own."""
    return list(calibration.calls(artifact, samples.take(SUBSET), 1))


# Outputs --------------------------------------------------------------------------------------------------------------


def outputs(artifact: Artifact, samples: Samples, folder: Path) -> np.ndarray:
    """The first output over all samples, by ONNX Runtime without optimization."""
    return first_output(Reference(artifact, folder).run(samples))


def first_output(batches: Any) -> np.ndarray:
    """The first output of all batches, one after the other."""
    return np.concatenate([next(iter(batch.values())) for batch in batches])


def relative_rms(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the differences ÷ RMS of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    """The lowest cosine between outputs of one sample."""
    one, other = (array.reshape(len(array), -1).astype(np.float64) for array in (found, wanted))
    return float(((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)).min())


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples whose highest logit is the label's."""
    return float((logits.argmax(-1) == labels).mean())
