"""torch eager and torch.compile as sides of a comparison: inputs and outputs in pinned memory, copies counted."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from perwatt.contract import cpu_seconds
from perwatt.measurement import Window


@dataclass
class Side:
    """One way to run the model. `drive(seconds)` is a window of load, `predict()` the first output for all samples."""

    label: str
    drive: Callable[[float], Window]
    predict: Callable[[], np.ndarray]
    close: Callable[[], None]
    facts: dict[str, Any] = field(default_factory=dict)


def torch_side(label: str, net: Any, arrays: dict[str, np.ndarray], device: str, batch: int) -> Side:
    """torch eager or torch.compile, as `label` says, with inputs and outputs in pinned memory on the host."""
    half = "bf16" in label
    # A copy each: one network can't be in two precisions, nor on two devices.
    made = copy.deepcopy(net).to(device, torch.bfloat16 if half else torch.float32)
    run = torch.compile(made) if "compile" in label else made
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    tensors = [one.bfloat16() if half and one.is_floating_point() else one for one in tensors]
    feeds = [[_pinned(one[i : i + batch], device) for one in tensors] for i in range(0, len(tensors[0]), batch)]
    host = None

    def call(feed: list[Any]) -> Any:
        nonlocal host
        with torch.inference_mode():
            out = run(*(one.to(device, non_blocking=True) for one in feed))
            host = _pinned(torch.empty(out.shape, dtype=out.dtype), device) if host is None else host
            host.copy_(out, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return host

    def drive(seconds: float) -> Window:
        latencies: list[float] = []
        cpu, start = cpu_seconds(), time.perf_counter()
        now = start
        while now - start < seconds or not latencies:
            call(feeds[len(latencies) % len(feeds)])
            then, now = now, time.perf_counter()
            latencies.append((now - then) * 1e3)
        return Window(batch * len(latencies), now - start, cpu_seconds() - cpu, latencies)

    begun = time.perf_counter()
    call(feeds[0])
    facts = {"first_call_s": round(time.perf_counter() - begun, 2), "execution_precision": "bf16" if half else "f32"}
    predict = lambda: np.concatenate([call(feed).float().numpy().copy() for feed in feeds])  # noqa: E731
    return Side(label, drive, predict, lambda: None, facts)


def _pinned(tensor: Any, device: str) -> Any:
    return tensor.pin_memory() if device == "cuda" else tensor
