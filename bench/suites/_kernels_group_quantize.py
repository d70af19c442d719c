"""Group-wise quantization beside ONNX Runtime's, NNCF's, ONNX's own, torch's and NumPy's.

Sizes: 768 × 3072 is BERT-base's feed-forward, 2048 × 5632 that of a Llama-style decoder of 1.1 billion weights; [in, out] has
its groups along axis 0 (MatMul), [out, in] along axis 1 (Gemm with transB, and torch's layout).

torch appears twice: operator by operator into buffers made beforehand, and the same formula through `torch.compile`, which
writes and compiles C++ for one shape and one group size (tens of seconds for each; left out where there is no C++
compiler). Neither looks for NaN or infinity, nor for groups of zeros, as ours does. ONNX Runtime's quantizer and NNCF's round
at other places (a reciprocal; the zero point added before rounding), so that one code in a thousand may be off by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import group_quantize
from perwatt.kernels.group_quantize import Scheme

INT4, UINT4 = Scheme(), Scheme("uint4", symmetric=False)
UINT8 = Scheme("uint8", symmetric=False)


def weights_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def at_home(array: Any) -> np.ndarray:
    """On the CPU, as NumPy has it."""
    for fetched in ("copy_to_host", "cpu"):
        array = getattr(array, fetched)() if hasattr(array, fetched) else array
    return np.asarray(array)


def close(mine: Any, other: Any) -> None:
    """Scales equal up to rounding; codes off by one in one of a thousand at most, once they are unpacked."""
    codes, scales = (at_home(part).ravel() for part in mine[:2])
    theirs, its = (at_home(part).ravel() for part in other[:2])
    np.testing.assert_allclose(its, scales, rtol=1e-5)
    if len(codes) != len(theirs):
        raise AssertionError(f"{len(theirs)} codes instead of {len(codes)}")
    missed = np.abs(codes.astype(np.int16) - theirs.astype(np.int16))
    if missed.max() > 1 or (missed > 0).mean() > 1e-3:
        raise AssertionError(f"{(missed > 0).mean():.1e} of the codes differ, by up to {missed.max()}")


def close_packed(kind: str, shape: tuple[int, int]) -> Callable[[Any, Any], None]:
    def same(mine: Any, other: Any) -> None:
        close(
            *(
                (group_quantize.compute_unpack(np.asarray(part[0]).ravel(), shape, kind), part[1])
                for part in (mine, other)
            )
        )

    return same


def equal(mine: Any, other: Any) -> None:
    np.testing.assert_array_equal(np.asarray(other), np.asarray(mine))


def grouped(array: Any, group: int, axis: int) -> Any:
    """With an axis of its own for what is within a group, behind or before the axis of the groups."""
    return array.reshape(-1, group, array.shape[1]) if axis == 0 else array.reshape(array.shape[0], -1, group)


def numpys(weights: np.ndarray, group: int, axis: int, scheme: Scheme) -> Run:
    """NumPy, its buffers made beforehand."""
    blocks = grouped(weights, group, axis)
    within, (low, high) = axis + 1, scheme.bounds
    steps, codes = np.empty_like(blocks), np.empty(blocks.shape, scheme.dtype)

    def run() -> Any:
        least, most = blocks.min(axis=within, keepdims=True), blocks.max(axis=within, keepdims=True)
        if scheme.symmetric:
            scale = np.where(most > -least, most, least) / np.float32(low)
        else:
            scale = (np.maximum(most, 0) - np.minimum(least, 0)) / np.float32(high)
        np.divide(blocks, scale, out=steps)
        np.rint(steps, out=steps)
        if not scheme.symmetric:
            np.add(steps, np.rint(-np.minimum(least, 0) / scale), out=steps)
        np.clip(steps, low, high, out=steps)
        np.copyto(codes, steps, casting="unsafe")
        return codes, scale

    return run


def torchs(weights: Any, group: int, axis: int, scheme: Scheme) -> dict[str, Run]:
    """torch on the device of the weights: operator by operator, and compiled."""
    import torch

    (low, high), within = scheme.bounds, axis + 1
    dtype = torch.int8 if scheme.symmetric else torch.uint8
    blocks = grouped(weights, group, axis)
    steps, codes = torch.empty_like(blocks), torch.empty_like(blocks, dtype=dtype)

    def scale_and_zero(blocks: Any) -> Any:
        least, most = blocks.amin(within, keepdim=True), blocks.amax(within, keepdim=True)
        if scheme.symmetric:
            return torch.where(most > -least, most, least) / low, None
        scale = (most.clamp(min=0) - least.clamp(max=0)) / high
        return scale, torch.round(-least.clamp(max=0) / scale)

    def eager() -> Any:
        scale, zero = scale_and_zero(blocks)
        torch.div(blocks, scale, out=steps).round_()
        if zero is not None:
            steps.add_(zero)
        return codes.copy_(steps.clamp_(low, high)), scale

    def whole(blocks: Any) -> Any:
        scale, zero = scale_and_zero(blocks)
        rounded = torch.round(blocks / scale)
        return torch.clamp(rounded if zero is None else rounded + zero, low, high).to(dtype), scale

    return inferring({"torch": eager}) | compiled({"torch.compile": (whole, blocks)})


def inferring(runs: dict[str, Run]) -> dict[str, Run]:
    """Without autograd, and done when they return."""
    import torch

    def wrapped(run: Run) -> Run:
        def inside() -> object:
            with torch.inference_mode():
                found = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return found

        return inside

    return {name: wrapped(run) for name, run in runs.items()}


def compiled(functions: dict[str, tuple[Callable[[Any], Any], Any]]) -> dict[str, Run]:
    import torch

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return {}
    torch._dynamo.config.recompile_limit = 64  # or the ninth shape would run uncompiled
    runs = {}
    for name, (function, argument) in functions.items():
        made = torch.compile(function, dynamic=False)
        runs[name] = lambda made=made, argument=argument: made(argument)
    return inferring(runs)


def nncfs(weights: Any, group: int, axis: int, scheme: Scheme) -> Run:
    """NNCF, which hands NumPy arrays to a model that it compiles for OpenVINO."""
    from nncf.parameters import CompressWeightsMode
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import do_integer_quantization
    from nncf.tensor import Tensor

    bits = "INT4" if scheme.kind.endswith("t4") else "INT8"
    mode = CompressWeightsMode[f"{bits}_{'SYM' if scheme.symmetric else 'ASYM'}"]
    config = WeightCompressionConfig(mode, group_size=group)
    tensor = Tensor(weights)

    def run() -> Any:
        made = do_integer_quantization(tensor, config, (axis,))
        return made.tensor.data, made.scale.data

    return run


def onnxruntimes(weights: np.ndarray, group: int, scheme: Scheme) -> Run:
    """ONNX Runtime's quantizer in C++, which packs, for axis 0."""
    from onnxruntime.capi._pybind_state import quantize_qdq_matmul_4bits

    rows, columns = weights.shape
    packed, scales = np.zeros(weights.size // 2, np.uint8), np.zeros((rows // group, columns), np.float32)
    zeros = np.zeros(-(-scales.size // 2), np.uint8)

    def run() -> Any:
        quantize_qdq_matmul_4bits(packed, weights, scales, zeros, group, columns, rows, scheme.symmetric)
        return packed, scales

    return run


def then_packed(run: Run) -> Run:
    """Two codes a byte in NumPy, as ONNX packs them."""
    from onnx import numpy_helper

    def packed() -> Any:
        codes, scales = run()[:2]  # type: ignore[index]
        return numpy_helper._pack_4bitx2(np.asarray(codes)), scales

    return packed


def quantizing(title: str, shape: tuple[int, int], group: int, axis: int, scheme: Scheme) -> Case:
    weights = weights_of(shape)

    def cuda() -> tuple[Run, dict[str, Run]]:
        import torch
        from numba import cuda as device

        there = device.to_device(weights)

        def ours() -> Any:
            found = group_quantize.compute_cuda_quantize(there, group, axis, scheme)
            device.synchronize()
            return found

        return ours, torchs(torch.from_numpy(weights).cuda(), group, axis, scheme)

    import torch

    others = {
        "NNCF": nncfs(weights, group, axis, scheme),
        "NumPy": numpys(weights, group, axis, scheme),
        **torchs(torch.from_numpy(weights), group, axis, scheme),
    }
    scales = weights.size // group
    return Case(
        "group_quantize", f"quantize {title}",
        lambda: group_quantize.compute_quantize(weights, group, axis, scheme), others, close,
        weights.size * 5 + scales * (4 if scheme.symmetric else 5), cuda,
    )  # fmt: skip


def packing_too(title: str, shape: tuple[int, int], group: int, axis: int, scheme: Scheme) -> Case:
    import torch

    weights = weights_of(shape)
    others = {
        "NNCF, packed by ONNX": then_packed(nncfs(weights, group, axis, scheme)),
        "NumPy, packed by ONNX": then_packed(numpys(weights, group, axis, scheme)),
        **{
            f"{n}, packed by ONNX": then_packed(r)
            for n, r in torchs(torch.from_numpy(weights), group, axis, scheme).items()
        },
    }
    if axis == 0:
        others["ONNX Runtime"] = onnxruntimes(weights, group, scheme)
    return Case(
        "group_quantize", f"quantize and pack {title}",
        lambda: group_quantize.compute_quantize_packed(weights, group, axis, scheme), others,
        close_packed(scheme.kind, shape),
        weights.size * 9 // 2 + weights.size // group * (4 if scheme.symmetric else 5),
    )  # fmt: skip


def searching(title: str, shape: tuple[int, int], group: int, axis: int) -> Case:
    """The same search in torch, all groups at once, operator by operator and compiled."""
    import torch

    weights, scheme = weights_of(shape), Scheme(search=True)
    blocks, within = grouped(torch.from_numpy(weights), group, axis), axis + 1

    def whole(blocks: Any) -> Any:
        least, most = blocks.amin(within, keepdim=True), blocks.amax(within, keepdim=True)
        scale = torch.where(most > -least, most, least) / -8
        steps, best, smallest = blocks / scale, scale, torch.full_like(scale, torch.inf)
        for factor in map(float, scheme.factors):
            step = steps / factor
            error = (step - torch.clamp(torch.round(step), -8, 7)).square().sum(within, keepdim=True) * factor**2
            best = torch.where(error < smallest, scale * factor, best)
            smallest = torch.minimum(error, smallest)
        return torch.clamp(torch.round(blocks / best), -8, 7).to(torch.int8), best

    def same(mine: Any, other: Any) -> None:
        """Sums in another order choose another factor now and then, of two that are as good."""
        scales = [np.asarray(made[1]).ravel() for made in (mine, other)]
        differ = ~np.isclose(*scales, rtol=1e-5)
        if differ.mean() > 1e-3:
            raise AssertionError(f"{differ.mean():.1e} of the scales differ")

    others = inferring({"torch": lambda: whole(blocks)}) | compiled({"torch.compile": (whole, blocks)})
    return Case(
        "group_quantize", f"search {title}", lambda: group_quantize.compute_quantize(weights, group, axis, scheme), others, same
    )  # fmt: skip


def dequantizing(title: str, shape: tuple[int, int], group: int, axis: int) -> Case:
    import onnxruntime
    import torch
    from nncf.quantization.algorithms.weight_compression.parameters import CompressedWeight
    from nncf.quantization.algorithms.weight_compression.weight_lowering import do_integer_dequantization
    from nncf.tensor import Tensor
    from onnx import TensorProto, helper

    codes, scales, _ = group_quantize.compute_quantize(weights_of(shape), group, axis)
    out, theirs, another = (np.empty(shape, np.float32) for _ in range(3))
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=axis, block_size=group)
    inputs = [("q", TensorProto.INT8, shape), ("s", TensorProto.FLOAT, scales.shape)]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    binding = session.io_binding()
    binding.bind_cpu_input("q", codes)
    binding.bind_cpu_input("s", scales)
    binding.bind_output("y", "cpu", 0, np.float32, shape, theirs.ctypes.data)

    def onnxruntimes() -> Any:
        session.run_with_iobinding(binding)
        return theirs

    within = axis + 1
    blocks, each = grouped(codes, group, axis), np.expand_dims(scales, within)
    made = CompressedWeight(Tensor(blocks), Tensor(each), None)
    q, s, into = torch.from_numpy(blocks), torch.from_numpy(each), torch.empty(blocks.shape)
    others = {
        "ONNX Runtime": onnxruntimes,
        "NNCF": lambda: do_integer_dequantization(made, within - 1).data,
        "NumPy": lambda: np.multiply(blocks, each, out=another.reshape(blocks.shape), dtype=np.float32).reshape(shape),
        **{
            name: lambda run=run: run().reshape(shape)
            for name, run in inferring({"torch": lambda: torch.mul(q, s, out=into)}).items()
        },
    }
    return Case(
        "group_quantize", f"dequantize {title}",
        lambda: group_quantize.compute_dequantize(codes, scales, None, group, axis, out=out), others, equal,
        codes.size * 5 + scales.size * 4,
    )  # fmt: skip


def halves(shape: tuple[int, int]) -> list[Case]:
    """Packing and unpacking alone."""
    import torch
    from nncf.torch.quantization.quantize_functions import pack_int4, unpack_int4
    from onnx import numpy_helper

    codes = np.random.default_rng(0).integers(-8, 8, shape, np.int8)
    packed = group_quantize.compute_pack(codes)
    bytes_ = pack_int4(torch.from_numpy(codes))
    size = f"{shape[0]} × {shape[1]}"

    return [
        Case(
            "group_quantize", f"pack int4 {size}", lambda: group_quantize.compute_pack(codes),
            {"ONNX": lambda: numpy_helper._pack_4bitx2(codes), "NumPy": lambda: group_quantize.reference_pack(codes)},
            equal, codes.size * 3 // 2,
        ),
        Case(
            "group_quantize", f"unpack int4 {size}", lambda: group_quantize.compute_unpack(packed, shape),
            {"ONNX": lambda: (numpy_helper._unpack_4bit(packed, shape) ^ 8).view(np.int8) - np.int8(8),
             "NumPy": lambda: group_quantize.reference_unpack(packed, shape),
             **inferring({"NNCF on torch": lambda: unpack_int4(bytes_).reshape(shape)})},
            equal, codes.size * 3 // 2,
        ),
    ]  # fmt: skip


def cases() -> list[Case]:
    """What `kernels.py` measures."""
    bert, llama = (768, 3072), (2048, 5632)
    return [
        quantizing("int4, groups of 32 of axis 0, 768 × 3072", bert, 32, 0, INT4),
        quantizing("uint4, groups of 128 of axis 0, 2048 × 5632", llama, 128, 0, UINT4),
        quantizing("int4, groups of 32 of axis 1, 3072 × 768", bert[::-1], 32, 1, INT4),
        quantizing("int4, groups of 16 of axis 1, 3072 × 768", bert[::-1], 16, 1, INT4),
        quantizing("uint4, groups of 128 of axis 1, 5632 × 2048", llama[::-1], 128, 1, UINT4),
        quantizing("uint8, groups of 128 of axis 0, 2048 × 5632", llama, 128, 0, UINT8),
        packing_too("int4, groups of 32 of axis 0, 2048 × 5632", llama, 32, 0, INT4),
        packing_too("uint4, groups of 128 of axis 0, 768 × 3072", bert, 128, 0, UINT4),
        packing_too("int4, groups of 32 of axis 1, 5632 × 2048", llama[::-1], 32, 1, INT4),
        searching("int4, groups of 128 of axis 0, 768 × 3072", bert, 128, 0),
        searching("int4, groups of 32 of axis 1, 3072 × 768", bert[::-1], 32, 1),
        dequantizing("int4, groups of 32 of axis 0, 2048 × 5632", llama, 32, 0),
        dequantizing("int4, groups of 32 of axis 1, 5632 × 2048", llama[::-1], 32, 1),
        *halves(llama),
    ]
