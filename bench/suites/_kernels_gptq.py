"""GPTQ, 4 bits, symmetric, groups of 128, on layers of (out × in) 768 × 768 (BERT-base's attention), 3072 × 768 (its
feed-forward) and 2048 × 2048 (the attention of a Llama-style decoder of a billion parameters), whole and the columns alone.

The others: the algorithm as it is usually written in torch and in NumPy (the inverse Hessian's factor by two factorizations
and an inversion; blocks of 128 columns, rank-one updates within), in float32, with the working copy transposed so that a
column is contiguous, from weights [out, in] to int8 codes [out, in] as ours; and for whole layers NNCF's own, on torch and on
NumPy arrays. NNCF writes into weights and Hessian, so it gets copies. Once a code differs, later ones do, too: so what counts
as the same is the squared error over the layer's outputs, within 2 %.

ONNX Runtime's own (onnxruntime.quantization.neural_compressor.weight_only.gptq, 1.31) is left out: it reads the half of
the factor that is zero, so nothing makes up for anything, and it leaves several times the error.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import gptq

SIZES = ((768, 768), (3072, 768), (2048, 2048))
BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01
HALF = 2.0 ** (BITS - 1)


def layer(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of inputs that are correlated as activations are."""
    chance = np.random.default_rng(width)
    hidden = chance.normal(size=(2 * width, width // 4)) @ chance.normal(size=(width // 4, width))
    inputs = hidden / np.sqrt(width // 4) + 0.3 * chance.normal(size=hidden.shape)
    weights = 0.02 * chance.normal(size=(rows, width))
    return weights.astype(np.float32), np.asarray(2 / len(inputs) * inputs.T @ inputs, np.float32)


def in_torch(weights: Any, hessian: Any, upper: Any = None) -> Run:
    """GPTQ in torch; with `upper`, the factor of the inverse, the columns alone."""
    import torch

    @torch.inference_mode()
    def run() -> tuple[Any, Any]:
        factor = factor_in_torch(hessian) if upper is None else upper
        moved = weights.T.contiguous()
        width, rows = moved.shape
        codes = torch.empty_like(moved, dtype=torch.int8)
        scales, errors = moved.new_empty((width // GROUP, rows)), moved.new_empty((BLOCK, rows))
        code = moved.new_empty(rows)
        for start in range(0, width, BLOCK):
            stop = start + BLOCK
            block, part = moved[start:stop], factor[start:stop, start:stop]
            inverse = (1 / part.diagonal()).tolist()
            for i in range(BLOCK):
                if (start + i) % GROUP == 0:
                    least, most = torch.aminmax(moved[start + i : start + i + GROUP], dim=0)
                    scale = torch.div(torch.where(most > -least, most, least), -HALF, out=scales[(start + i) // GROUP])
                    reciprocal = 1 / scale
                torch.mul(block[i], reciprocal, out=code).round_().clamp_(-HALF, HALF - 1)
                codes[start + i].copy_(code)
                torch.sub(block[i], code.mul_(scale), out=errors[i]).mul_(inverse[i])
                block[i + 1 :].addr_(part[i, i + 1 :], errors[i], alpha=-1)
            moved[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        found = codes.T.contiguous(), scales.T.contiguous()
        if weights.is_cuda:
            torch.cuda.synchronize()
        return found

    return run


def factor_in_torch(hessian: Any) -> Any:
    """U, upper triangular, with UᵀU = H⁻¹."""
    import torch

    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def in_numpy(weights: np.ndarray, hessian: np.ndarray, upper: np.ndarray | None = None) -> Run:
    """The same in NumPy, with SciPy's factorizations in place."""

    def run() -> tuple[np.ndarray, np.ndarray]:
        factor = factor_in_numpy(hessian) if upper is None else upper
        moved = np.ascontiguousarray(weights.T)
        width, rows = moved.shape
        codes = np.empty(moved.shape, np.int8)
        scales, errors = np.empty((width // GROUP, rows), np.float32), np.empty((BLOCK, rows), np.float32)
        code = np.empty(rows, np.float32)
        for start in range(0, width, BLOCK):
            stop = start + BLOCK
            block, part = moved[start:stop], factor[start:stop, start:stop]
            for i in range(BLOCK):
                if (start + i) % GROUP == 0:
                    group = moved[start + i : start + i + GROUP]
                    least, most = group.min(axis=0), group.max(axis=0)
                    scale = scales[(start + i) // GROUP]
                    np.divide(np.where(most > -least, most, least), np.float32(-HALF), out=scale)
                    reciprocal = 1 / scale
                np.multiply(block[i], reciprocal, out=code)
                np.rint(code, out=code)
                np.clip(code, -HALF, HALF - 1, out=code)
                codes[start + i] = code
                code *= scale
                np.subtract(block[i], code, out=errors[i])
                errors[i] /= part[i, i]
                block[i + 1 :] -= part[i, i + 1 :, None] * errors[i]
            moved[stop:] -= factor[start:stop, stop:].T @ errors
        return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)

    return run


def factor_in_numpy(hessian: np.ndarray) -> np.ndarray:
    """As `factor_in_torch`."""
    from scipy.linalg.lapack import spotrf, spotri

    damped = hessian.copy()
    np.fill_diagonal(damped, hessian.diagonal() + np.float32(DAMPING) * hessian.diagonal().mean())
    lower, _ = spotrf(damped.T, lower=1, clean=0, overwrite_a=1)
    inverse, _ = spotri(lower, lower=1, overwrite_c=1)
    return np.ascontiguousarray(spotrf(inverse, lower=1, clean=0, overwrite_a=1)[0].T)


def in_nncf(weights: np.ndarray, hessian: np.ndarray, kind: Callable[[np.ndarray], Any]) -> Run:
    """NNCF's, on tensors of one `kind`; it returns weights as they are read again, and scales."""
    from nncf import CompressWeightsMode
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.gptq import GPTQ
    from nncf.tensor import Tensor

    theirs = GPTQ(damp_percent=DAMPING, block_size=BLOCK)
    theirs._backend_entity = SimpleNamespace(convolution_metatypes=())
    layout = SimpleNamespace(constant_attributes={1: {"transpose": True}})
    parameters = SimpleNamespace(
        node_with_weight=SimpleNamespace(metatype=None, layer_attributes=layout),
        weight_port_id=1,
        compression_config=WeightCompressionConfig(mode=CompressWeightsMode.INT4_SYM, group_size=GROUP),
        reduction_axes=(1,),
    )

    def run() -> np.ndarray:
        given = [Tensor(kind(array.copy())) for array in (hessian, weights)]
        return np.asarray(theirs._quantize_weights(parameters, *given, [])[0].data)

    return run


def same_for(weights: np.ndarray, hessian: np.ndarray) -> Callable[[object, object], None]:
    """Both leave the same squared error over the outputs."""

    def left(found: Any) -> float:
        if isinstance(found, tuple):
            codes, scales = (np.asarray(part if isinstance(part, np.ndarray) else part.cpu()) for part in found[:2])
            found = gptq.Quantized(codes.astype(np.int8), scales, None).dequantized(GROUP)
        missed = weights - found
        return float(np.vdot(missed @ hessian, missed))

    def same(mine: Any, other: Any) -> None:
        ours, theirs = left(mine), left(other)
        assert abs(theirs / ours - 1) <= 0.02, f"an error of {theirs:g} over the outputs, ours is {ours:g}"

    return same


def whole(rows: int, width: int) -> Case:
    """The factorization and the columns."""
    import torch

    weights, hessian = layer(rows, width)
    others: dict[str, Run] = {
        "torch": in_torch(torch.from_numpy(weights), torch.from_numpy(hessian)),
        "NumPy": in_numpy(weights, hessian),
        "NNCF on torch": in_nncf(weights, hessian, torch.from_numpy),
        "NNCF on NumPy": in_nncf(weights, hessian, lambda array: array),
    }
    return Case(
        "gptq", f"GPTQ of {rows} × {width}", lambda: gptq.compute(weights, hessian, BITS, GROUP, damping=DAMPING), others,
        same_for(weights, hessian), cuda=lambda: on_gpu(weights, hessian, False),
    )  # fmt: skip


def columns(rows: int, width: int) -> Case:
    """The columns, given each one's own factor."""
    import torch

    weights, hessian = layer(rows, width)
    factor = gptq.factorize(hessian, damping=DAMPING)
    upper = factor_in_torch(torch.from_numpy(hessian))
    others = {
        "torch": in_torch(torch.from_numpy(weights), torch.from_numpy(hessian), upper.contiguous()),
        "NumPy": in_numpy(weights, hessian, upper.contiguous().numpy()),
    }
    return Case(
        "gptq", f"GPTQ's columns of {rows} × {width}", lambda: gptq.compute_columns(weights, factor, BITS, GROUP), others,
        same_for(weights, hessian), cuda=lambda: on_gpu(weights, hessian, True),
    )  # fmt: skip


def on_gpu(given: np.ndarray, inputs: np.ndarray, columns_alone: bool) -> tuple[Run, dict[str, Run]]:
    """Both on arrays that lie on the GPU, to results that stay there."""
    import torch

    from perwatt.kernels import _gptq_cpu, _gptq_cuda

    weights, hessian = torch.from_numpy(given).cuda(), torch.from_numpy(inputs).cuda()
    width = len(hessian)
    order, factors = torch.arange(width).cuda(), torch.empty(0).cuda()
    blocks = gptq._blocks(width, GROUP, False)

    def factorized() -> tuple[Any, Any]:
        diagonal = hessian.diagonal().double()
        mean = diagonal.mean()
        share = diagonal / mean
        return _gptq_cuda.factorize(hessian, order, share + DAMPING, 1 / mean.item(), True), share.float()

    kept = factorized()

    def ours() -> tuple[Any, Any]:
        triangle, importance = kept if columns_alone else factorized()
        codes, scales, _ = _gptq_cuda.compute_columns(
            weights, triangle, order, importance, BITS, GROUP, False, _gptq_cpu.SIGNED, factors, blocks
        )
        found = codes.to(torch.int8).contiguous(), scales.contiguous()
        torch.cuda.synchronize()
        return found

    upper = factor_in_torch(hessian).contiguous() if columns_alone else None
    return ours, {"torch": in_torch(weights, hessian, upper)}


def cases() -> list[Case]:
    """Whole layers, then the columns alone."""
    return [make(*size) for make in (whole, columns) for size in SIZES]
