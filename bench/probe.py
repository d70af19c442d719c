"""A short compute probe: what one thread reaches at this moment in each type that the processor has units for.

A shared processor slows down with nothing else to show it. On a virtual machine a bare loop of int8 tile multiplications
(AMX) was seen to fall from 5.8 to 2.4 Tera-operations a second from one moment to the next and to come back as suddenly,
most often while its other virtual CPU was busy: hardware threads of one core share the matrix unit, and a guest is not
told which CPUs are such threads, or who has the other one. The probe runs between the measured windows, in a process of
its own: small matrix multiplications in OpenVINO on one thread, once for each type, whose data fit the second-level cache.
The best of a few repeats counts: whatever disturbs makes slower, and the first finds cold caches (int8: 2.5 ×).

One probe takes 2 ms of one core that is free, 3 to 10 ms of a busy machine. Its figure is there to be compared with
itself: at these sizes OpenVINO reaches 40 to 50 % of what AMX can do, so a slow matrix unit shows weakened. It sees the
core that it happens to run on, and that moment: a probe and the window beside it correlate by 0.3 to 0.6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perwatt.bench.fingerprint import isa
from perwatt.errors import BackendError

REWARDED_BY = {
    "int8": {"amx_int8", "avx512_vnni", "avx_vnni"},
    "bf16": {"amx_bf16", "avx512_bf16"},
}
"""Instruction sets that make a type faster than f32."""
REPEATS = {"int8": 4, "bf16": 6, "f32": 3}
KERNEL_ENDINGS = {"int8": ("i8", "u8"), "bf16": ("bf16",), "f32": ("f32",)}
CACHE_LINE_BYTES = 64

PEAK_QUANTILE = 0.95
"""The peak is what the best twentieth of a job's probes reached: a single best one may be a slip of the clock."""
FACTOR = 2.5
"""By how much the probes of one block may differ; `keep` says why."""
RULE = (
    f"blocks whose probes differ by more than a factor of {FACTOR:g} (geometric mean over the types) are discarded, "
    "unless they are more than half, or fewer than two would stay"
)
LEAST_KEPT = 2
"""One block alone has no interval."""
LOW_FRACTION, LOW_SHARE = 0.5, 0.05
"""Below which fraction of its peak a type is slow, and in which share of the probes it may be."""


class Probe:
    """The compiled probes of one process. Raises BackendError where OpenVINO can't compile them."""

    def __init__(self, types: Sequence[str] | None = None) -> None:
        """`types` among "int8", "bf16" and "f32"; by default those that the processor has units for. A type that
        OpenVINO does not run in a kernel of that type here is left out."""
        self._requests: dict[str, Any] = {}
        self._operations: dict[str, int] = {}
        self._kernels: dict[str, list[str]] = {}
        for kind in rewarded(isa()) if types is None else types:
            self._compile(kind)

    @property
    def types(self) -> tuple[str, ...]:
        """What is probed."""
        return tuple(self._requests)

    def measure(self) -> dict[str, float]:
        """Tera-operations a second by type, best of a few repeats; a multiplication and its addition are two."""
        return {kind: self._operations[kind] / self._best_s(kind) / 1e12 for kind in self._requests}

    def describe(self) -> dict[str, Any]:
        """What is run, by type: kernels as OpenVINO names them, operations of one call, repeats."""
        return {
            kind: {"kernels": self._kernels[kind], "operations": self._operations[kind], "repeats": REPEATS[kind]}
            for kind in self._requests
        }

    def _best_s(self, kind: str) -> float:
        request, best = self._requests[kind], math.inf
        for _ in range(REPEATS[kind]):
            begun = time.perf_counter()
            request.infer()
            best = min(best, time.perf_counter() - begun)
        return best

    def _compile(self, kind: str) -> None:
        import openvino as ov

        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            # Pinned, it would see one core only.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
        }
        model, values, operations = MODELS[kind]()
        try:
            compiled = ov.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"the {kind} probe does not compile: {' '.join(str(error).split())[:200]}") from error
        kernels = matmul_kernels(compiled)
        if not kernels or not all(name.lower().endswith(KERNEL_ENDINGS[kind]) for name in kernels):
            return
        request = compiled.create_infer_request()
        request.set_input_tensor(values)
        request.infer()
        self._requests[kind], self._operations[kind] = request, operations
        self._kernels[kind] = sorted(set(kernels))


def rewarded(flags: Sequence[str]) -> tuple[str, ...]:
    """The types that a processor with these instruction sets computes faster than f32, and f32."""
    return (*(kind for kind, sets in REWARDED_BY.items() if sets & set(flags)), "f32")


def pays() -> bool:
    """Whether this processor has units of their own for small types, whose rate moves apart from ordinary arithmetic's."""
    return rewarded(isa()) != ("f32",)


def matmul_kernels(compiled: Any) -> list[str]:
    """The kernel of every multiplication that a compiled model really runs. Its name tells the type; the runtime
    precision alone doesn't: it is "i8" too where integer weights are unpacked for a float kernel."""
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [
        str(info["primitiveType"].astype(str))
        for info in facts
        if str(info["layerType"].astype(str)) in ("FullyConnected", "MatMul")
    ]


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy that begins at a cache line. NumPy's own allocation begins at any multiple of 16 bytes, differently in every
    process, and AMX loads whole lines: bf16 reaches 1.44 Tera-operations a second aligned and 0.86 not."""
    room = np.empty(array.nbytes + CACHE_LINE_BYTES, np.uint8)
    start = -room.ctypes.data % CACHE_LINE_BYTES
    copy: np.ndarray[Any, Any] = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# Figures of a job -----------------------------------------------------------------------------------------------------


def peaks(series: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By type, the 95th percentile over the job's probes, in Tera-operations a second; empty without probes."""
    return {kind: float(np.quantile([probe[kind] for probe in series], PEAK_QUANTILE)) for kind in _kinds(series)}


def fractions(series: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Each probe as a share of the job's peaks; a little above 1 for the few above the 95th percentile."""
    top = peaks(series)
    return [{kind: probe[kind] / top[kind] for kind in top} for probe in series]


def figure(reached: Mapping[str, float]) -> float:
    """One figure for a probe: the geometric mean over its types, so that each type's changes count alike."""
    return math.exp(sum(math.log(rate) for rate in reached.values()) / len(reached))


def keep(blocks: Sequence[Sequence[Mapping[str, float]]], factor: float = FACTOR) -> list[bool]:
    """Which blocks of windows to keep. `blocks` has each block's probes: one before every window, one after the last.

    The rule: a block is discarded if its best and its worst probe differ by more than `factor` (in `figure`), for then
    the machine changed within the block, and windows that should be compared ran on different machines. Where that would
    be more than half of the blocks, or leave fewer than two, all are kept. What the windows measured has no part in it:
    discarding by outcome would bias.

    What it does, with two equal ResNet-20 (int8 and float, one and two streams) in ABBA blocks of 50 ms windows, 34 runs
    of about 115 blocks on a busy two-core machine: 2.5 discards 2 % of the blocks (0 to 6) and leaves the standard error
    of the trimmed mean as it was, × 0.995 on average (0.91 to 1.04); 2 discards 8 % for × 1.00 (0.91 to 1.15), 1.5 19 %
    for × 1.01 (0.82 to 1.27), 1.25 39 % for × 1.13. Dividing each window by the probes beside it, to the power of 0.25,
    0.5 or 1, gives × 1.00, 1.04 and 1.18 (at most 1.24, 1.36 and 1.67), because it adds the probe's own noise. ABBA order
    and a trimmed mean already take care of what the probe sees; the rule is for machines that jump by more."""
    kept = [not _changed(block, factor) for block in blocks]
    enough = 2 * sum(kept) >= len(kept) and sum(kept) >= LEAST_KEPT
    return kept if enough else [True] * len(kept)


def disturbance(blocks: Sequence[Sequence[Mapping[str, float]]], factor: float = FACTOR) -> list[str]:
    """Why the probes call a run disturbed, in sentences; empty where it was quiet.

    Disturbed is: a type below half of its own peak in more than a twentieth of the probes (fewer than 20 can't tell), or
    so many blocks to discard that all were kept."""
    series = [probe for block in blocks for probe in block]
    shares = fractions(series) if len(series) >= 1 / LOW_SHARE else []
    low = {kind: sum(s[kind] < LOW_FRACTION for s in shares) / len(shares) for kind in _kinds(shares)}
    reasons = [
        f"{kind} arithmetic was below half of its peak in {100 * share:.0f} % of the probes"
        for kind, share in low.items()
        if share > LOW_SHARE
    ]
    changed = sum(_changed(block, factor) for block in blocks)
    if changed and all(keep(blocks, factor)):
        reasons.append(
            f"the machine's speed changed by more than a factor of {factor:g} within {changed} of {len(blocks)} blocks; "
            "none was discarded"
        )
    return reasons


def _changed(block: Sequence[Mapping[str, float]], factor: float) -> bool:
    figures = [figure(reached) for reached in block if reached]
    return bool(figures) and max(figures) > factor * min(figures)


def _kinds(series: Sequence[Mapping[str, float]]) -> list[str]:
    return list(series[0]) if series else []


# Models: each a function that gives (model, values of its input, operations of one call) ------------------------------


def _int8() -> tuple[Any, Any, int]:
    """Multiplications in a row by the same weights. FakeQuantize before each and scaled integers as weights become one
    integer kernel; the scales keep the values' size."""
    import openvino as ov
    import openvino.opset13 as op

    rng = np.random.default_rng(0)
    rows, size, depth = 256, 512, 4
    codes = op.constant(rng.integers(-127, 128, (size, size)).astype(np.int8))
    weight = op.multiply(op.convert(codes, "f32"), np.float32(1 / (73 * math.sqrt(size))))
    x = op.parameter([rows, size], np.float32)
    y, low, high = x, np.float32(-4), np.float32(4 * 127 / 128)
    for _ in range(depth):
        y = op.matmul(op.fake_quantize(y, low, high, low, high, 256), weight, False, True)
    values = ov.Tensor(aligned(rng.standard_normal((rows, size), dtype=np.float32)))
    return ov.Model([y], [x]), values, depth * 2 * rows * size * size


def _bf16() -> tuple[Any, Any, int]:
    """One multiplication, from bf16 to bf16: converting would take longer than multiplying."""
    import openvino as ov
    import openvino.opset13 as op

    rng = np.random.default_rng(0)
    rows, inner, columns = 256, 1024, 256
    x = op.parameter([rows, inner], ov.Type.bf16)
    weight = op.constant(rng.standard_normal((columns, inner), dtype=np.float32))
    y = op.convert(op.matmul(op.convert(x, "f32"), weight, False, True), "bf16")
    # The upper half of a float32 is the bfloat16 nearest to zero.
    bits = (rng.standard_normal((rows, inner), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    values = ov.Tensor(aligned(bits), [rows, inner], ov.Type.bf16)
    return ov.Model([y], [x]), values, 2 * rows * inner * columns


def _f32() -> tuple[Any, Any, int]:
    import openvino as ov
    import openvino.opset13 as op

    rng = np.random.default_rng(0)
    size = 256
    x = op.parameter([size, size], np.float32)
    y = op.matmul(x, op.constant(rng.standard_normal((size, size), dtype=np.float32)), False, True)
    values = ov.Tensor(aligned(rng.standard_normal((size, size), dtype=np.float32)))
    return ov.Model([y], [x]), values, 2 * size**3


MODELS = {"int8": _int8, "bf16": _bf16, "f32": _f32}
