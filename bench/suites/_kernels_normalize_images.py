"""Pictures to a network's input: `normalize_images` beside whatever else does that.

Sizes: one picture and a batch of 32 for ResNet-50, MobileNetV2 and ViT-B (224×224×3), 128 pictures of CIFAR-10 for ResNet-20
and ResNet-56 (32×32×3), 64 digits of MNIST (28×28×1). The others may fold mean and deviation into one scale and shift, which
saves them a pass and moves the last bits. Those that can write into a given array do; ONNX Runtime and OpenVINO keep
arrays bound, so that nothing is copied to or from them. Pillow works on one picture and has no float32 of three channels.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import normalize_images

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MNIST = ((0.1307,), (0.3081,))

SIZES: tuple[tuple[tuple[int, int, int, int], Any, Any], ...] = (
    ((1, 224, 224, 3), IMAGENET, np.float32),
    ((32, 224, 224, 3), IMAGENET, np.float32),
    ((128, 32, 32, 3), CIFAR10, np.float32),
    ((64, 28, 28, 1), MNIST, np.float32),
    ((32, 224, 224, 3), IMAGENET, np.float16),
    ((32, 224, 224, 3), IMAGENET, ml_dtypes.bfloat16),
)


class Work:
    """Pictures of one size, and what the others make of scale and shift."""

    def __init__(self, shape: tuple[int, int, int, int], statistics: Any, dtype: Any) -> None:
        self.mean, self.deviation = statistics
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.shape = (shape[0], shape[3], shape[1], shape[2])
        self.dtype = np.dtype(dtype)
        self.levels = normalize_images.normalization(self.mean, self.deviation, dtype)
        self.scale = np.float32([1 / (255 * d) for d in self.deviation])
        self.shift = np.float32([-m / d for m, d in zip(self.mean, self.deviation, strict=True)])

    def per_channel(self, values: Any) -> Any:
        return np.reshape(values, (1, -1, 1, 1))


def same(mine: Any, other: Any) -> None:
    """Up to rounding: of the type for half types, of scale and shift (2⁻²² of the largest) for float32."""
    mine, other = (np.asarray(array.cpu().float() if hasattr(array, "cpu") else array) for array in (mine, other))
    coarse = {"float32": 2**-22, "float16": 2**-10, "bfloat16": 2**-7}[mine.dtype.name]
    mine = mine.astype(np.float32)
    np.testing.assert_allclose(other.astype(np.float32), mine, rtol=coarse, atol=coarse * np.abs(mine).max() / 2)


def numpy_forms(work: Work) -> dict[str, Run]:
    """By arithmetic over the transposed view, by arithmetic over separated bytes, by looking up."""
    images, out = work.images, np.empty(work.shape, work.dtype)
    turned, planes, floats = (
        images.transpose(0, 3, 1, 2),
        np.empty(work.shape, np.uint8),
        np.empty(work.shape, np.float32),
    )
    scale, shift, table = work.per_channel(work.scale), work.per_channel(work.shift), work.levels.values

    def finished() -> Any:
        np.add(floats, shift, out=floats)
        if work.dtype == np.float32:
            return floats
        np.copyto(out, floats, casting="same_kind")
        return out

    def view() -> Any:
        np.multiply(turned, scale, out=floats)
        return finished()

    def separated() -> Any:
        np.copyto(planes, turned)
        np.multiply(planes, scale, out=floats)
        return finished()

    def looked_up() -> Any:
        for channel in range(len(table)):
            np.take(table[channel], images[..., channel], out=out[:, channel], mode="clip")
        return out

    return {"NumPy, mul add": view, "NumPy, planes mul add": separated, "NumPy, take": looked_up}


def torch_type(dtype: np.dtype[Any]) -> Any:
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype.name]


def torch_forms(work: Work, device: str = "cpu") -> dict[str, Run]:
    """Eager torch in four orders, and Inductor, which makes one loop of all."""
    import torch

    torch.set_num_threads(1)
    images = torch.from_numpy(work.images).to(device)
    turned = images.permute(0, 3, 1, 2)
    scale, shift, mean, deviation = (
        torch.tensor(work.per_channel(values), dtype=torch.float32, device=device)
        for values in (work.scale, work.shift, work.mean, work.deviation)
    )
    narrow = torch_type(work.dtype)
    floats = torch.empty(work.shape, device=device)
    out = floats if work.dtype == np.float32 else torch.empty(work.shape, dtype=narrow, device=device)
    planes = torch.empty(work.shape, dtype=torch.uint8, device=device)
    last = torch.empty(work.shape, device=device, memory_format=torch.channels_last)

    def finished() -> Any:
        if out is not floats:
            out.copy_(floats)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    @torch.inference_mode()
    def usual() -> Any:
        floats.copy_(turned).div_(255).sub_(mean).div_(deviation)
        return finished()

    @torch.inference_mode()
    def view() -> Any:
        torch.mul(turned, scale, out=floats).add_(shift)
        return finished()

    @torch.inference_mode()
    def copied() -> Any:
        floats.copy_(turned).mul_(scale).add_(shift)
        return finished()

    @torch.inference_mode()
    def separated() -> Any:
        planes.copy_(turned)
        torch.mul(planes, scale, out=floats).add_(shift)
        return finished()

    @torch.inference_mode()
    def channels_last() -> Any:
        torch.mul(turned, scale, out=last).add_(shift)
        floats.copy_(last)
        return finished()

    def folded(given: Any, to: Any) -> None:
        to.copy_(given.permute(0, 3, 1, 2) * scale + shift)

    compiled = torch.compile(folded, dynamic=False)

    @torch.inference_mode()
    def inductor() -> Any:
        compiled(images, out)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return {
        "torch, div sub div": usual,
        "torch, mul add": view,
        "torch, copy mul add": copied,
        "torch, planes mul add": separated,
        "torch, channels_last": channels_last,
        "torch.compile": inductor,
    }


def onnx_model(work: Work, transpose_first: bool) -> bytes:
    """Cast, Mul, Add and Transpose in either order."""
    from onnx import TensorProto, helper, numpy_helper

    as_shape = (1, -1, 1, 1) if transpose_first else (1, 1, 1, -1)
    constants = [("scale", work.scale), ("shift", work.shift)]
    turn = ("Transpose", {"perm": [0, 3, 1, 2]})
    steps: list[tuple[str, dict[str, Any]]] = [("Cast", {"to": TensorProto.FLOAT}), ("Mul", {}), ("Add", {})]
    steps.insert(0 if transpose_first else 3, turn)
    if work.dtype != np.float32:
        steps.append(("Cast", {"to": helper.np_dtype_to_tensor_dtype(work.dtype)}))
    second = {"Mul": ["scale"], "Add": ["shift"]}
    names = ["images", *(f"step{i}" for i in range(1, len(steps))), "out"]
    nodes = [
        helper.make_node(operator, [names[i], *second.get(operator, [])], [names[i + 1]], **settings)
        for i, (operator, settings) in enumerate(steps)
    ]
    graph = helper.make_graph(
        nodes,
        "normalize",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, work.images.shape)],
        [helper.make_tensor_value_info("out", helper.np_dtype_to_tensor_dtype(work.dtype), work.shape)],
        [numpy_helper.from_array(values.reshape(as_shape), name) for name, values in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def onnxruntime_form(work: Work, transpose_first: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = onnx_model(work, transpose_first)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding, out = session.io_binding(), np.empty(work.shape, work.dtype)
    binding.bind_cpu_input("images", work.images)
    binding.bind_output("out", "cpu", 0, session_type(work.dtype), work.shape, out.ctypes.data)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return out

    return run


def session_type(dtype: np.dtype[Any]) -> Any:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(dtype)


def openvino_form(work: Work, prepared: bool) -> Run:
    """`prepared`: OpenVINO's own preprocessing before an empty model; else the ONNX graph."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    narrow = {"float32": openvino.Type.f32, "float16": openvino.Type.f16, "bfloat16": openvino.Type.bf16}[
        work.dtype.name
    ]
    if prepared:
        given = openvino.opset13.parameter(list(work.shape), np.float32)
        steps = PrePostProcessor(openvino.Model([openvino.opset13.result(given)], [given]))
        steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        preprocess = steps.input().preprocess().convert_element_type(openvino.Type.f32)
        preprocess.mean([255 * m for m in work.mean]).scale([255 * d for d in work.deviation])
        steps.output().tensor().set_element_type(narrow)
        model = steps.build()
    else:
        model = core.read_model(onnx_model(work, True))
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    out = openvino.Tensor(narrow, openvino.Shape(work.shape))
    request.set_input_tensor(openvino.Tensor(work.images, shared_memory=True))
    request.set_output_tensor(out)

    def run() -> Any:
        request.infer()
        return out.data if work.dtype.name != "bfloat16" else out.data.view(work.dtype)

    return run


def on_gpu(work: Work) -> tuple[Run, dict[str, Run]]:
    """Arrays are on the GPU for all. torch doesn't hand bfloat16 to Numba; its bits as int16 it does."""
    import torch
    from numba import cuda

    images = cuda.as_cuda_array(torch.from_numpy(work.images).cuda())
    narrow = torch_type(work.dtype)
    out = torch.empty(work.shape, dtype=narrow, device="cuda")
    bits, levels = out, work.levels
    if work.dtype.name == "bfloat16":
        bits, levels = out.view(torch.uint16), normalize_images.normalization(work.mean, work.deviation, np.uint16)
    to = cuda.as_cuda_array(bits)

    def ours() -> Any:
        normalize_images.compute_cuda(images, levels, out=to)
        cuda.synchronize()
        return out

    return ours, torch_forms(work, "cuda")


def case(shape: tuple[int, int, int, int], statistics: Any, dtype: Any) -> Case:
    work = Work(shape, statistics, dtype)
    out = np.empty(work.shape, dtype)
    others = {
        **numpy_forms(work),
        **torch_forms(work),
        "ONNX Runtime, transposed first": onnxruntime_form(work, True),
        "ONNX Runtime, transposed last": onnxruntime_form(work, False),
        "OpenVINO, preprocessing": openvino_form(work, True),
        "OpenVINO, ONNX graph": openvino_form(work, False),
    }
    return Case(
        kernel="normalize_images",
        title=f"{'×'.join(map(str, shape))} uint8 to {work.dtype.name}",
        ours=lambda: normalize_images.compute(work.images, work.levels, out=out),
        others=others,
        same=same,
        moved_bytes=work.images.size + out.nbytes,
        cuda=lambda: on_gpu(work),
    )


def cases() -> list[Case]:
    return [case(*size) for size in SIZES]
