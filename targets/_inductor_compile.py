"""From the IR to an AOTInductor package: interpreter, `torch.export`, `aoti_compile_and_package`, and a cache of packages.

The batch is static at the operating point's, other dynamic axes stay dynamic. Weights are frozen into the package, so
that they are folded, cast and laid out for the kernels when it is made (a ResNet-20 takes 30 % less CPU time for it).

Lower precision is `torch.autocast`'s: products take bfloat16 and give it, what is sensitive stays in float32, weights that
only products use are stored in bfloat16; outputs keep the model's own types. A model whose floating point is half already
says what it wants in its graph, and is left as it is.

Inductor has no cache of whole packages (a second compilation of a ResNet-20 takes as long as the first, 13 s), so
packages are kept in `~/.cache/perwatt/inductor/packages` under what they were made from, the oldest dropped first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError, TargetError
from perwatt.signature import TensorSpec
from perwatt.targets._cpu import cpu_isa

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE_BYTES = 4_000_000_000
"""Packages are dropped, the one unused longest first, when together they are larger."""
FORMAT = 3
"""Changes when the same model at the same point would be compiled to another package."""
EXAMPLE_SIZE = 16
"""Of axes that stay dynamic, where the model is traced: torch takes sizes of 0 and 1 for constants."""
HALF = {"bf16": "bfloat16", "f16": "float16"}
INTEGER_PRODUCTS = r"aoti_torch_(?:cpu|cuda)_?_(qlinear|qconv|int_mm|scaled_mm)\w*\("
"""What generated code calls for a product of integers or float8."""


def cache_folder() -> Path:
    """Where compiled things are kept: `$XDG_CACHE_HOME/perwatt/inductor`, else `~/.cache/perwatt/inductor`; among the
    temporary files where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:
        base = Path(tempfile.gettempdir())
    return base / "perwatt" / "inductor"


@dataclass(frozen=True)
class Plan:
    """What decides how a package comes out. `batch` is None where the model has no batch axis; `threads` are baked into
    the loops that Inductor writes."""

    device: str
    batch: int | None
    precision: str
    threads: int
    autotune: bool

    def metadata(self) -> dict[str, str]:
        """Kept in the package, which is all that a bundle has of it."""
        isa = " ".join(cpu_isa()) if self.device == "cpu" else ""
        known = {"device": self.device, "precision": self.precision, "isa": isa}
        counts = {"batch": str(self.batch or ""), "threads": str(self.threads), "autotune": str(int(self.autotune))}
        return {f"perwatt.{name}": text for name, text in (known | counts).items()}

    @classmethod
    def of(cls, metadata: dict[str, str]) -> Plan:
        """The plan of a package. Raises BackendError where it was not made by perwatt."""
        try:
            known = {
                name: metadata[f"perwatt.{name}"] for name in ("device", "batch", "precision", "threads", "autotune")
            }
        except KeyError as error:
            raise BackendError("this .pt2 file is no package that perwatt compiled") from error
        batch = int(known["batch"]) if known["batch"] else None
        return cls(known["device"], batch, known["precision"], int(known["threads"]), known["autotune"] == "1")

    def settings(self) -> dict[str, Any]:
        """What is said to Inductor."""
        made: dict[str, Any] = {"freezing": True, "aot_inductor.metadata": self.metadata()}
        if self.autotune:
            made["max_autotune"] = True
            made["max_autotune_gemm_backends"] = "CPP,ATEN" if self.device == "cpu" else "ATEN,TRITON"
        return made


def package(artifact: Artifact, plan: Plan, folder: Path) -> tuple[Path, float, bool]:
    """The package of `artifact`, in `folder`; the seconds that compiling it took, and whether it came from the cache.
    Raises BackendError, in one line, where the interpreter, the exporter or Inductor refuses the model."""
    start = time.perf_counter()
    target = folder / "model.pt2"
    kept = cache_folder() / "packages" / f"{_key(artifact, plan)}.pt2"
    if kept.is_file():
        shutil.copyfile(kept, target)
        os.utime(kept)
        return target, time.perf_counter() - start, True
    with _refusals(), _quiet():
        _compile(artifact, plan, target)
    _keep(target, kept)
    return target, time.perf_counter() - start, False


def _key(artifact: Artifact, plan: Plan) -> str:
    import torch

    facts = [FORMAT, artifact.digest(), torch.__version__, plan.settings(), plan.device]
    if plan.device == "cuda":
        facts.append(torch.cuda.get_device_properties(0).name)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _keep(made: Path, kept: Path) -> None:
    """Into the cache, whole or not at all. A disk that is full or not ours is no reason to fail."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (
            made.open("rb") as source,
            tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".new", delete=False) as aside,
        ):
            shutil.copyfileobj(source, aside)
        os.replace(aside.name, kept)
        held = sorted(kept.parent.glob("*.pt2"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in held:
            total += path.stat().st_size
            if total > CACHE_BYTES and path != kept:
                path.unlink(missing_ok=True)
    except OSError:
        return


def _compile(artifact: Artifact, plan: Plan, target: Path) -> None:
    import torch

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    torch.set_num_threads(plan.threads)
    module = network(artifact, plan)
    examples = example_inputs(artifact, plan)
    shapes = _dynamic_shapes(artifact, plan)
    # The casts are put in where the graph is traced, which the compiler does once more.
    with torch.no_grad(), _tensor_cores(plan), _autocast(artifact, plan):
        exported = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(target), inductor_configs=plan.settings())


def network(artifact: Artifact, plan: Plan) -> Any:
    """The interpreter of `artifact` on the plan's device, quantized products rewritten, outputs in their own types and
    in memory of their own."""
    import torch

    from perwatt.interpreter import Interpreter
    from perwatt.targets._inductor_quantized import rewrite

    interpreter = Interpreter(artifact.model).to(plan.device)
    rewrite(interpreter.program, plan.device)
    kinds = [getattr(torch, spec.dtype, None) for spec in artifact.signature.outputs]

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interpreter = interpreter

        def forward(self, *inputs: Any) -> tuple[Any, ...]:
            found = []
            for value, kind in zip(self.interpreter(*inputs), kinds, strict=True):
                made = value if kind is None else value.to(kind)
                found.append(made.clone() if any(made is given for given in inputs) else made)
            return tuple(found)

    return Network().eval()


def example_inputs(artifact: Artifact, plan: Plan) -> tuple[Any, ...]:
    """Tensors of the shapes to trace with. Ones: indices that any table has, and nothing to divide by that is 0."""
    import torch

    batch = artifact.signature.batch

    def shape(spec: TensorSpec) -> list[int]:
        if spec.shape is None:
            raise BackendError(f"Inductor wants inputs of known rank, which {spec.name} is not")
        sizes = [EXAMPLE_SIZE if isinstance(dim, str) else dim for dim in spec.shape]
        if isinstance(batch, str):
            sizes[0] = plan.batch or 1
        return sizes

    kinds = [getattr(torch, spec.dtype, None) for spec in artifact.signature.inputs]
    for spec, kind in zip(artifact.signature.inputs, kinds, strict=True):
        if kind is None:
            raise BackendError(f"torch has no type {spec.dtype}, which the input {spec.name} has")
    return tuple(
        torch.ones(shape(spec), dtype=kind, device=plan.device)
        for spec, kind in zip(artifact.signature.inputs, kinds, strict=True)
    )


def _dynamic_shapes(artifact: Artifact, plan: Plan) -> dict[str, Any]:
    import torch

    dynamic, batch = torch.export.Dim.DYNAMIC, artifact.signature.batch
    return {
        "inputs": tuple(
            {axis: dynamic for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str) and dim != batch}
            for spec in artifact.signature.inputs
        )
    }


def holds_half(artifact: Artifact) -> bool:
    """Whether the graph itself computes in half: then it says where, and nothing is cast besides."""
    from perwatt.artifact import graphs_of

    return any(
        value.dtype is not None and value.dtype.name in ("BFLOAT16", "FLOAT16")
        for graph in graphs_of(artifact.model)
        for value in [*graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    )


@contextmanager
def _autocast(artifact: Artifact, plan: Plan) -> Iterator[None]:
    import torch

    lowered = plan.precision in HALF and not holds_half(artifact)
    dtype = getattr(torch, HALF.get(plan.precision, "bfloat16"))
    with torch.autocast(plan.device, dtype=dtype, enabled=lowered, cache_enabled=False):
        yield


@contextmanager
def _tensor_cores(plan: Plan) -> Iterator[None]:
    """float32 on CUDA is float32 unless the plan says tf32, whatever torch's defaults are."""

    allow_tf32(plan.precision == "tf32")
    yield


def allow_tf32(allowed: bool) -> None:
    """For matrix products and convolutions on CUDA, in this process."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def _refusals() -> Iterator[None]:
    """What is refused on the way, as BackendError in one line."""
    try:
        yield
    except BackendError:
        raise
    except TargetError as error:
        raise BackendError(f"Inductor can't take this model: {error}") from error
    except Exception as error:
        raise BackendError(f"Inductor refused the model: {telling_line(error)}") from error


def telling_line(error: BaseException) -> str:
    """The first telling line of what torch says, without the lines about where to read more."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    idle = (
        r"The above exception|Set TORCH|You can suppress|Use tlparse|Original traceback|File |While executing|"
        r"C\+\+ compile error|Command:"
    )
    telling = [line for line in lines if not re.match(idle, line)]
    failed = [line for line in telling if re.search(r"\b(fatal )?error: ", line)]
    chosen = (failed or telling or lines or [type(error).__name__])[:2]
    return re.sub(r"\s+", " ", " ".join(chosen))[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice to developers on the way."""
    import warnings

    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._export", "torch.export")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def integer_products(path: Path) -> dict[str, int]:
    """How often the code in a package calls kernels for products of integers or float8, by kind: `qlinear`, `qconv`,
    `int_mm`, `scaled_mm`."""
    counts: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".wrapper.cpp"):
                for kind in re.findall(INTEGER_PRODUCTS, archive.read(name).decode(errors="replace")):
                    counts[kind] = counts.get(kind, 0) + 1
    return counts


def plan_for(artifact: Artifact, point: OperatingPoint, device: str, threads: int) -> Plan:
    """What the operating point asks for. `threads` is what None of them means."""
    signature = artifact.signature
    batch = signature.batch if isinstance(signature.batch, int) else point.batch
    return Plan(
        device, None if signature.batch is None else batch, point.floating_precision or "f32",
        point.threads or threads, bool(point.autotune),
    )  # fmt: skip
