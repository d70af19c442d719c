"""OpenVINO's own `benchmark_app`, run as a process of its own, with a stopwatch around its measuring loop.

`benchmark_app` prints its figures rounded (a median to 0.01 ms: 4 % of a ResNet-20's) and no CPU time at all. So its own
`main` is started here in a fresh process, with its own settings and its own loop; all that is added is a reading of the
process's user + system time (getrusage, all threads) right before and right after `Benchmark.main_loop`, and the loop's own
results written down before they are rounded. That covers exactly what our side's `drive` covers: generating load and
inferring, but not starting, compiling, or the first inference.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "measured by the stopwatch: "
STARTING_S = 300
"""What loading and compiling may take, besides the window itself."""


def app_window(model: Path, hint: str, feeding: list[str], seconds: int) -> dict[str, float]:
    """One window of `benchmark_app -hint HINT`, its defaults otherwise: {cpu_s_per_inference, throughput_per_s,
    latency_p50_ms, inferences}. `feeding` are the options that say which shapes and types. Ends the program with its last
    words where it does not measure."""
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "-m", str(model), "-d", "CPU", "-hint", hint]
    done = subprocess.run(
        [*command, "-t", str(seconds), *feeding], capture_output=True, text=True, timeout=seconds + STARTING_S
    )
    found = re.search(rf"{MARK}(.*)", done.stdout)
    if not found:
        sys.exit(f"benchmark_app did not measure {model}:\n{(done.stdout + done.stderr)[-2000:]}")
    told = json.loads(found[1])
    return {
        "cpu_s_per_inference": told["cpu_s"] / told["iterations"],
        "throughput_per_s": told["iterations"] / told["wall_s"],
        "latency_p50_ms": told["latency_p50_ms"],
        "inferences": told["iterations"],
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """`benchmark_app` itself, with the stopwatch."""
    from openvino.tools.benchmark import benchmark
    from openvino.tools.benchmark.main import main as app

    loop = benchmark.Benchmark.main_loop

    def timed(self: Any, *arguments: Any, **named: Any) -> Any:
        before = _cpu_s()
        result = loop(self, *arguments, **named)
        cpu_s = _cpu_s() - before
        _, median_ms, *_, wall_s, iterations = result
        told = {"cpu_s": cpu_s, "wall_s": wall_s, "iterations": iterations, "latency_p50_ms": median_ms}
        print(MARK + json.dumps(told), flush=True)
        return result

    benchmark.Benchmark.main_loop = timed
    sys.exit(app())


if __name__ == "__main__":
    main()
