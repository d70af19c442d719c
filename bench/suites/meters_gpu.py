"""Do the GPU's two sources of energy agree? A known load, read by the energy counter and by integrated power at once.

    python meters_gpu.py [--seconds 20] [--size 8192]

Matrix products keep the GPU busy in a thread before, in and after the window, so that both meters begin and end under
steady load, and the second over which the driver averages power does no harm. Prints both energies and how far they are
apart, and writes bench/results/meters_gpu.json. Exit codes: 1 when they are more than 5 % apart, 2 when it can't be run.

Wants an NVIDIA GPU of Volta or later, its driver, torch with CUDA and nvidia-ml-py. The GPU is the first that
CUDA_VISIBLE_DEVICES names, else number 0; leave it otherwise alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Before torch is imported: from here on CUDA and NVML give the GPUs the same numbers.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

from perwatt.bench.nvml import Nvml
from perwatt.measurement import Reading, Window

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 0.05
"""How far the two may be apart, as a share of the counter's figure."""

SETTLE_S = 3.0
"""Load before the window: longer than the driver averages, so that it shows the load's power when the window begins."""


class Load:
    """Matrix products of `size` in half precision, one after the other, in a thread, until it is closed."""

    def __init__(self, torch: Any, size: int) -> None:
        self._torch = torch
        self._size = size
        self._over = threading.Event()
        self.products = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        torch = self._torch
        try:
            left, right = (torch.randn(self._size, self._size, device="cuda", dtype=torch.float16) for _ in range(2))
            out = torch.empty_like(left)
            while not self._over.is_set():
                for _ in range(10):
                    torch.mm(left, right, out=out)
                torch.cuda.synchronize()
                self.products += 10
        except Exception as error:
            self.error = error


def give_up(reason: str) -> None:
    print(reason, file=sys.stderr)
    raise SystemExit(2)


def measure(torch: Any, counter: Nvml, power: Nvml, seconds: float, size: int) -> tuple[Window, Reading, Reading]:
    """The same window of steady load, read by both meters."""
    load = Load(torch, size)
    try:
        time.sleep(SETTLE_S)
        # The counter's meter waits for a tick when it begins and when it ends: so it begins first and ends last.
        counter.start()
        power.start()
        cpu, start, done = time.process_time(), time.perf_counter(), load.products
        time.sleep(seconds)
        window = Window(load.products - done, time.perf_counter() - start, time.process_time() - cpu)
        by_power = power.stop(window)
        by_counter = counter.stop(window)
    finally:
        load.close()
    if load.error is not None:
        give_up(f"the load failed: {load.error}")
    return window, by_counter, by_power


def side(meter: Nvml, reading: Reading) -> dict[str, Any]:
    return {
        "energy_j": reading.energy_j, "reason": reading.reason, "refreshes": reading.refreshes,
        "meter_cpu_s": reading.meter_cpu_s, "described": meter.describe(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--size", type=int, default=8192)
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        give_up("torch is not installed")
    if not torch.cuda.is_available():
        give_up("torch sees no CUDA device")
    counter, power = Nvml(source="counter"), Nvml(source="power")
    if reasons := [*counter.missing(), *power.missing()]:
        give_up("; ".join(reasons))

    window, by_counter, by_power = measure(torch, counter, power, options.seconds, options.size)
    apart = None
    if by_counter.energy_j is not None and by_power.energy_j is not None:
        apart = abs(by_power.energy_j - by_counter.energy_j) / by_counter.energy_j
    result = {
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__,
        "load": f"products of {options.size} × {options.size} float16 matrices",
        "products": window.inferences, "window_s": window.wall_s,
        "counter": side(counter, by_counter), "power": side(power, by_power),
        "disagreement_percent": None if apart is None else round(apart * 100, 3), "limit_percent": LIMIT * 100,
    }  # fmt: skip
    counter.close()
    power.close()
    where = ROOT / "bench" / "results" / "meters_gpu.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{result['gpu']}, {window.wall_s:.1f} s, {window.inferences} products")
    for name, reading in (("energy counter", by_counter), ("integrated power", by_power)):
        print(f"{name:17} {reading.reason if reading.energy_j is None else f'{reading.energy_j:.1f} J'}")
    if apart is None:
        raise SystemExit(1)
    print(f"apart by {apart:.2%}, limit {LIMIT:.0%}")
    raise SystemExit(0 if apart <= LIMIT else 1)


if __name__ == "__main__":
    main()
