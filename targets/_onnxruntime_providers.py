"""The execution providers of ONNX Runtime that a user may have: one row for each variant of the target.

A row says which provider stands first, who packages it and how it is told what an operating point asks for. Nodes that it
has no kernel for run by the providers after it; how many these are is in the facts. ROCm has no row: ONNX Runtime gave
that provider up for MIGraphX. DNNL, XNNPACK and others come only with builds of one's own.

Only the CPU provider ran on real hardware so far; the rows of the others were written without one at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from perwatt.contract import Capabilities, OperatingPoint, QuantizationStyle
from perwatt.targets._cpu import cpu_isa

CPU = "CPUExecutionProvider"

INTEGER_OPERATORS = ("Add", "AveragePool", "GlobalAveragePool")
"""Residual additions in integers decide it on processors with VNNI and no AMX: ResNet-20 in int8 takes 1.47 × float32's CPU time
with products alone, as each addition goes back to floating point, and 0.50 × with these."""

ASYMMETRIC = QuantizationStyle("asymmetric-activations", "uint8", "int8", False, True)
SYMMETRIC = QuantizationStyle("symmetric", "int8", "int8", activation_symmetric=True, weight_per_channel=True)
SIGNED = QuantizationStyle("symmetric", "int8", "int8", True, True, unsigned_activations=False)

WEIGHTS_ALONE = tuple(
    QuantizationStyle(f"{kind}-weights", "float", kind, True, True) for kind in ("int4", "uint4", "int8")
)
"""Taken into a product (MatMulNBits) where weights lie [in, out] in groups of 16, 32, 64 and so on, or of whole channels; it
rounds activations to 8 bits in groups then."""


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    `precisions`: floating precision → the options that ask for it, its default first. `graphs`: the option that records
    and replays calls. `behind`: providers for what this one does not take, the CPU's aside. `concurrent`: one session may
    be called by several threads at once. `memory`: where recorded calls keep their values. `device` is what does the
    arithmetic: an accelerator beside the CPU counts as gpu, as CPU meters don't see it."""

    name: str
    package: str
    device: Literal["cpu", "gpu"] = "gpu"
    options: dict[str, str] = field(default_factory=dict)
    precisions: dict[str, dict[str, str]] = field(default_factory=lambda: {"f32": {}})
    graphs: str | None = None
    behind: tuple[str, ...] = ()
    concurrent: bool = True
    memory: str = "cpu"
    half_types: tuple[str, ...] = ()
    styles: tuple[QuantizationStyle, ...] = ()


PROVIDERS = {
    # Measured with VNNI and AMX: signed and unsigned activations cost the same (they are turned into unsigned ones), both
    # a third to a quarter of f32, unsigned weights more than f32. Asymmetric ones come first: they resolve finer.
    "": Provider(
        CPU,
        "onnxruntime",
        "cpu",
        styles=(
            *(replace(style, operators=INTEGER_OPERATORS) for style in (ASYMMETRIC, SYMMETRIC)),
            *WEIGHTS_ALONE,
        ),
    ),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "onnxruntime-gpu[cuda,cudnn]",
        options={"device_id": "0"},
        # TF32 is the provider's own default for fp32 matrix products.
        precisions={"tf32": {"use_tf32": "1"}, "f32": {"use_tf32": "0"}},
        graphs="enable_cuda_graph",
        memory="cuda",
        half_types=("float16",),
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "onnxruntime-gpu[cuda,cudnn] tensorrt",
        options={"device_id": "0"},
        # It has no switch for TF32, which TensorRT takes for float32 where the GPU has it.
        precisions={"tf32": {}, "f16": {"trt_fp16_enable": "1"}, "bf16": {"trt_bf16_enable": "1"}},
        graphs="trt_cuda_graph_enable",
        behind=("CUDAExecutionProvider",),
        memory="cuda",
        half_types=("float16", "bfloat16"),
        styles=(SIGNED,),
    ),
    "migraphx": Provider(
        "MIGraphXExecutionProvider",
        "onnxruntime-migraphx",
        options={"device_id": "0"},
        precisions={"f32": {}, "f16": {"migraphx_fp16_enable": "1"}},
        half_types=("float16",),
    ),
    "dml": Provider(
        "DmlExecutionProvider",
        "onnxruntime-directml",
        options={"device_id": "0"},
        concurrent=False,
        half_types=("float16",),
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider", "onnxruntime", options={"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"}
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "onnxruntime-openvino",
        "cpu",
        options={"device_type": "CPU"},
        precisions={"f32": {"precision": "FP32"}},
        styles=(SYMMETRIC,),
    ),
    "qnn": Provider(
        "QNNExecutionProvider",
        "onnxruntime-qnn",
        options={"backend_type": "htp"},
        precisions={"f16": {"enable_htp_fp16_precision": "1"}, "f32": {"enable_htp_fp16_precision": "0"}},
        styles=(ASYMMETRIC,),
    ),
}


def capabilities(variant: str) -> Capabilities:
    """What the provider rewards. `channel_multiples` stay empty: none was measured."""
    provider = PROVIDERS[variant]
    return Capabilities(
        isa=cpu_isa() if provider.device == "cpu" else (),
        floating_precisions=tuple(provider.precisions),
        half_types=provider.half_types,
        quantization_styles=provider.styles,
        # Measured (bench/suites/fusion.py) on the CPU alone: RotaryEmbedding takes 0.2 ×, RMSNormalization and Attention
        # without a mask 0.7 × what their pieces take. Swish and GroupNormalization have no kernel and are slower whole.
        operators=("Attention", "RMSNormalization", "RotaryEmbedding") if variant == "" else (),
    )


def chain(variant: str, precision: str, point: OperatingPoint) -> list[tuple[str, dict[str, str]]]:
    """The providers in the order in which they may take nodes, each with its options. `point` says threads and streams."""
    provider = PROVIDERS[variant]
    options = {**provider.options, **provider.precisions[precision]}
    if provider.graphs is not None:
        options[provider.graphs] = "1" if point.graphs else "0"
    if variant == "cuda":
        # What the backend does where nothing is asked for is to try all convolution kernels.
        options["cudnn_conv_algo_search"] = "HEURISTIC" if point.autotune is False else "EXHAUSTIVE"
    if variant == "openvino":
        # It has threads of its own, beside those of the session.
        options |= {"num_of_threads": str(point.threads), "num_streams": str(point.streams)}
    return [(provider.name, options), *((name, {}) for name in (*provider.behind, CPU) if name != provider.name)]
