"""PyTorch's compiler: the IR through the interpreter into AOTInductor, on the CPU and on CUDA.

The program is a `.pt2` package of native code with the weights in it, loaded with torch alone. Vector loops are written for
this model by Inductor, large products are oneDNN's on the CPU and cuBLAS's or Triton's on CUDA. Compiling takes tens of
seconds, and a package serves one batch size, one number of threads and one kind of processor: what is loaded keeps those
that it was compiled for, and is refused on a processor that lacks its instructions.

Threads of the CPU sleep between loops instead of spinning: on a machine that others use as well, two spinning threads cost a
ResNet-20 ten times the CPU seconds. `OMP_WAIT_POLICY` says so, and must be set before torch is imported. There is one
stream: torch's bindings hold Python's lock while a package runs (pytorch issue 197516), so that calls from two threads
follow each other anyway. On CUDA, streams overlap copies and kernels of several calls, and `graphs` records the kernels
of a call once. What is for CUDA was written without a GPU at hand.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Clock, OperatingPoint, Program, QuantizationStyle, Target, cpu_seconds
from perwatt.errors import BackendError, install_words
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, inferences
from perwatt.targets._cpu import channel_multiples, cpu_isa, usable_cpus
from perwatt.targets._inductor_compile import Plan, integer_products, package, plan_for
from perwatt.targets._run_script import run_script

# Read by the OpenMP library when torch is imported. A thread that spins for work costs as much as one that has some.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SYMMETRIC = QuantizationStyle("symmetric", "int8", "int8", activation_symmetric=True, weight_per_channel=True)
ASYMMETRIC = QuantizationStyle("asymmetric-activations", "uint8", "int8", False, True)
FLOAT8 = QuantizationStyle("float8", "float8_e4m3fn", "float8_e4m3fn", True, True)
OPERATORS = ("Attention", "GroupNormalization", "RMSNormalization", "RotaryEmbedding", "Swish")
"""The interpreter hands each to torch as one, which fuses them or has a kernel."""
INTEGER_UNITS = {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"}
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16"}


class Inductor(Target):
    """torch's compiler, ahead of time. `inductor` is the CPU, `inductor:cuda` an NVIDIA GPU."""

    variants: ClassVar[tuple[str, ...]] = ("", "cuda")
    serves: ClassVar = {"cpu": "", "gpu": "cuda"}
    fixed_once_saved: ClassVar = ("batch", "threads", "floating_precision", "autotune")
    slow_to_lower: ClassVar[bool] = True

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.device = "gpu" if variant == "cuda" else "cpu"

    def missing_to_run(self) -> list[str]:
        """A package needs torch alone, and the GPU that it is for."""
        compiling = ("C++ compiler", "triton")
        return [reason for reason in self.missing() if not any(word in reason for word in compiling)]

    def missing(self) -> list[str]:
        if find_spec("torch") is None:
            return [f"torch is not installed: {install_words('torch')}"]
        reasons = []
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            reasons.append(
                f"there is no C++ compiler {compiler}, which Inductor needs (Debian, Ubuntu: apt-get install g++)"
            )
        if self.variant != "cuda":
            return reasons
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = f"torch {torch.__version__} is built without CUDA" if built is None else "torch finds no NVIDIA GPU"
            fix = (
                "pip install torch from https://pytorch.org/get-started/locally"
                if built is None
                else "check nvidia-smi"
            )
            reasons.append(f"{why}: {fix}")
        elif find_spec("triton") is None:
            reasons.append("triton is not installed, in which Inductor writes kernels for CUDA: pip install triton")
        return reasons

    def capabilities(self) -> Capabilities:
        return _capabilities_of_cuda() if self.variant == "cuda" else _capabilities_of_cpu()

    def knobs(self, point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
        """Few, because each value costs a compilation; `graphs` and `streams` cost none."""
        several = point.scenario != "single-stream"
        known: dict[str, tuple[Any, ...]] = {}
        if self.variant == "cuda":
            known |= {"graphs": (False, True), "autotune": (None, True)}
            return known | ({"batch": (1, 8, 32, 128), "streams": (1, 2)} if several else {})
        cpus = usable_cpus()
        known |= {"threads": (1, cpus) if cpus > 1 else (1,)}
        return known | ({"batch": (1, 8, 32)} if several else {})

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Compile, or take the package from the cache. Raises BackendError in one line with the words of whoever
        refused: the interpreter names missing operators, the exporter what in a shape depends on data."""
        folder = tempfile.TemporaryDirectory(prefix="perwatt-inductor-")
        precisions = self.capabilities().floating_precisions
        if point.floating_precision not in (None, *precisions):
            raise BackendError(
                f"Inductor has no floating precision {point.floating_precision!r} here: known are {', '.join(precisions)}"
            )
        plan = plan_for(artifact, point, "cuda" if self.variant == "cuda" else "cpu", usable_cpus())
        path, seconds, cached = package(artifact, plan, Path(folder.name))
        program = InductorProgram(path, artifact.signature, point)
        program.compile_s, program.cached, program.folder = seconds, cached, folder
        return program

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """The package that `save` wrote, with the batch, precision and threads that it was compiled for, whatever `point`
        says. Raises BackendError where it was compiled for another processor."""
        return InductorProgram(folder / "model.pt2", signature, point)

    def script(self) -> str:
        return run_script("torch", "inductor_run.py.txt")

    def versions(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in ("torch", "triton") if self.variant == "cuda" else ("torch",):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found


class InductorProgram(Program):
    """A package, loaded. `compile_s`: seconds that making it took, None where it was only loaded."""

    def __init__(self, path: Path, signature: Signature, point: OperatingPoint) -> None:
        from perwatt.targets._inductor_runner import runner

        self.path, self.signature = path, signature
        self.compile_s: float | None = None
        self.cached = False
        self.folder: Any = None
        self.runner, self.plan = runner(path, signature, point)
        self.batch_size = self.plan.batch
        on_cpu = self.plan.device == "cpu"
        self.point = OperatingPoint(
            scenario=point.scenario,
            batch=self.plan.batch or 1,
            threads=self.plan.threads if on_cpu else None,
            streams=self.runner.streams,
            floating_precision=self.plan.precision,
            graphs=None if on_cpu else self.runner.graphs,
            autotune=self.plan.autotune,
            power_limit_w=point.power_limit_w,
            clock_mhz=point.clock_mhz,
        )

    def call(self, batch: Batch) -> Batch:
        found = self.runner.call(self.runner.tensors(batch))
        return {spec.name: array for spec, array in zip(self.signature.outputs, found, strict=True)}

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        """One call after the other; on several streams of a GPU, as many under way as there are streams, unless the
        scenario is single-stream."""
        return self._load(samples, seconds, None, Clock())

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """Requests in the order of their arrival, each as soon as it is due and a stream is free."""
        return self._load(samples, 0.0, arrivals_s, clock or Clock())

    def _load(
        self, samples: Sequence[Batch], seconds: float, arrivals_s: Sequence[float] | None, clock: Clock
    ) -> Window:
        feeds = [self.runner.tensors(batch) for batch in samples]
        counts = [inferences(self.signature, batch) for batch in samples]
        single = self.point.scenario == "single-stream"
        cpu, start = cpu_seconds(), clock.now()
        latencies = self.runner.load(feeds, clock, start, seconds, arrivals_s, 1 if single else self.runner.streams)
        wall = clock.now() - start
        done = sum(counts[turn % len(counts)] for turn in range(len(latencies)))
        return Window(done, wall, cpu_seconds() - cpu, latencies)

    def save(self, folder: Path) -> list[Path]:
        """`model.pt2`: native code and weights, for this kind of processor."""
        target = folder / "model.pt2"
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)
        return [target]

    def facts(self) -> dict[str, Any]:
        return {
            "backend": "inductor",
            "device": self.runner.device_name(),
            "execution_precision": self.plan.precision,
            "integer_products": integer_products(self.path),
            "operating_point": self.point.to_json(),
            "compile_s": None if self.compile_s is None else round(self.compile_s, 3),
            "from_cache": self.cached,
            "settings": self.plan.settings(),
        }


def _capabilities_of_cpu() -> Capabilities:
    isa = cpu_isa()
    halves = bool(BFLOAT16_UNITS & set(isa))
    return Capabilities(
        isa=isa,
        floating_precisions=("f32", "bf16") if halves else ("f32",),
        half_types=("bfloat16",) if halves else (),
        channel_multiples=channel_multiples(isa),
        quantization_styles=(SYMMETRIC, ASYMMETRIC) if INTEGER_UNITS & set(isa) else (),
        operators=OPERATORS,
    )


def _capabilities_of_cuda() -> Capabilities:
    """Of matrix products: torch has no convolution of integers or float8 on CUDA."""
    import torch

    if not torch.cuda.is_available():
        return Capabilities()
    generation = torch.cuda.get_device_capability()
    styles = (SYMMETRIC, ASYMMETRIC) if generation >= (7, 5) else ()
    return Capabilities(
        isa=(f"sm_{generation[0]}{generation[1]}",),
        floating_precisions=("f32", "tf32", "bf16", "f16") if generation >= (8, 0) else ("f32", "f16"),
        half_types=("bfloat16", "float16") if generation >= (8, 0) else ("float16",),
        channel_multiples={"int8": 16, "float8": 16, "bfloat16": 8, "float16": 8},
        quantization_styles=(*styles, FLOAT8) if generation >= (8, 9) else styles,
        operators=OPERATORS,
    )


__all__ = ["Inductor", "InductorProgram", "Plan"]
