"""GPUs: what the driver says of them, and what torch's own kernels reach on one in each type that they run.

Types are tried, not looked up: a matrix product of 4096 rows and columns either runs in float32 (TF32 allowed), float16,
bfloat16, int8 (`torch._int_mm`), float8 (`torch._scaled_mm`) or with 2:4 sparse float16 weights, or its own words say why
not. What is not tried is unknown, which is None and not "no". Best of some repeats, timed by CUDA events, so that what
Python takes is not counted.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

SIZE = 4096
REPEATS = 10
QUERY = ("index", "name", "compute_cap", "memory.total", "driver_version")


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs as the driver's own tool lists them: {"index", "name", "compute_capability", "memory_bytes", "driver"};
    what it does not say is None. Empty where the tool is not there or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    ask = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [_gpu(line) for line in done.stdout.split("\n") if line.count(",") == len(QUERY) - 1]


def _gpu(line: str) -> dict[str, Any]:
    index, name, capability, mebibytes, driver = (field.strip() for field in line.split(","))
    return {
        "index": int(index) if index.isdigit() else None,
        "name": name,
        "compute_capability": capability if capability.replace(".", "").isdigit() else None,
        "memory_bytes": int(mebibytes) * 2**20 if mebibytes.isdigit() else None,
        "driver": driver if driver[:1].isdigit() else None,
    }


def measure(progress: Callable[[str], None] = lambda text: None) -> dict[str, Any] | None:
    """{"name", "tops": {type: tera-operations a second}, "refused": {type: why}} of torch's current GPU; 2:4 sparsity
    counts the operations of the dense product. None where torch has no GPU here."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.backends.cuda.matmul.allow_tf32 = True
    tops, refused = {}, {}
    for kind, prepare in PRODUCTS.items():
        progress(f"GPU: {kind}")
        try:
            seconds = _best_s(torch, prepare(torch, SIZE, "cuda"))
        except Exception as error:
            # Each kernel refuses in a way of its own; its words are the answer.
            refused[kind] = " ".join(str(error).split())[:200]
            continue
        tops[kind] = 2 * SIZE**3 / seconds / 1e12
    return {"name": torch.cuda.get_device_name(), "tops": tops, "refused": refused}


def _best_s(torch: Any, product: Callable[[], Any]) -> float:
    product()
    best = math.inf
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        product()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


# Products: each gives a call that multiplies two square matrices of `size` on `device` ---------------------------------


def _float(kind: str) -> Callable[[Any, int, str], Callable[[], Any]]:
    def prepare(torch: Any, size: int, device: str) -> Callable[[], Any]:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, kind)) for _ in range(2))
        return lambda: a @ b

    return prepare


def _int8(torch: Any, size: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def _float8(torch: Any, size: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _sparse(torch: Any, size: int, device: str) -> Callable[[], Any]:
    dense = torch.randn(size, size, device=device, dtype=torch.float16)
    kept = torch.tensor([1, 1, 0, 0], device=device, dtype=torch.float16).repeat(size, size // 4)
    weight = torch.sparse.to_sparse_semi_structured(dense * kept)
    x = torch.randn(size, size, device=device, dtype=torch.float16)
    return lambda: weight @ x


PRODUCTS: dict[str, Callable[[Any, int, str], Callable[[], Any]]] = {
    "float32": _float("float32"),
    "float16": _float("float16"),
    "bfloat16": _float("bfloat16"),
    "int8": _int8,
    "float8": _float8,
    "float16 2:4 sparse": _sparse,
}
