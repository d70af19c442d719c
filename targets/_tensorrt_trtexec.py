"""A plain shell script that builds and times engines with `trtexec`, for a machine with TensorRT and without perwatt.

Version 11 has strong typing and CUDA graphs on by default and leaves the copies between host and GPU out of what it
times; 10 has it the other way round. The script asks `trtexec --help` which one it has, so that both time the same:
strongly typed, in a CUDA graph, copies included. It says nothing of joules: `optimize BUNDLE --target tensorrt` does.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from perwatt.signature import Signature
from perwatt.targets._tensorrt_build import Bounds, profile_shapes

HEAD = """\
#!/bin/sh
# Build a TensorRT engine for each model beside this script, and time it: sh {name}
# Wants trtexec, which comes with TensorRT 10 or 11 (TRTEXEC names another place), and the GPU that is to be used.
# Engines, kernel timings, measured times (*.times.json) and logs are written beside the models.
set -eu
cd "$(dirname "$0")"

TRTEXEC=${{TRTEXEC:-trtexec}}
SECONDS_EACH=${{SECONDS_EACH:-10}}
if ! command -v "$TRTEXEC" >/dev/null 2>&1; then
    echo "$0: $TRTEXEC is not here: install TensorRT, or name the program with TRTEXEC=/path/to/trtexec" >&2
    exit 4
fi
if "$TRTEXEC" --help 2>&1 | grep -q -e --includeDataTransfers; then
    generation=11
else
    generation=10
fi
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader 2>/dev/null || true

failed=''
# model.onnx and further options
build_and_time() {{
    onnx=$1
    shift
    if [ "$generation" = 10 ]; then
        set -- --stronglyTyped --useCudaGraph "$@"
    else
        set -- --includeDataTransfers "$@"
    fi
    echo "$onnx"
    if "$TRTEXEC" "--onnx=$onnx" "--saveEngine=${{onnx%.onnx}}.engine" --timingCacheFile=tensorrt.timing \\
        --sparsity=enable --duration="$SECONDS_EACH" "--exportTimes=${{onnx%.onnx}}.times.json" "$@" \\
        >"${{onnx%.onnx}}.log" 2>&1; then
        grep -E 'Throughput:|Latency: min|GPU Compute Time: min' "${{onnx%.onnx}}.log" || true
    else
        grep -E '\\[E\\]' "${{onnx%.onnx}}.log" | tail -n 5 >&2 || true
        failed="$failed $onnx"
    fi
}}

"""

TAIL = """
if [ -n "$failed" ]; then
    echo "$0: TensorRT failed on$failed: the logs beside them say why" >&2
    exit 1
fi
"""


def trtexec_script(
    onnx_files: Sequence[str],
    signature: Signature,
    *,
    batch: int = 1,
    bounds: Bounds | None = None,
    name: str = "trtexec.sh",
) -> str:
    """The text of the script. `onnx_files` are paths relative to where the script will lie; all have `signature`.
    `batch` is the number of items in a call where the model leaves that open, `bounds` the ranges of other dynamic
    dimensions; they are timed at their usual size. Raises BackendError where an input's rank is unknown."""
    shapes = profile_shapes(signature, batch, bounds or Bounds())
    options = []
    if shapes and any(low != high for low, _, high in shapes.values()):
        for flag, which in (("--minShapes", 0), ("--optShapes", 1), ("--maxShapes", 2)):
            options.append(f"{flag}={_spec({tensor: sizes[which] for tensor, sizes in shapes.items()})}")
    if shapes:
        options.append(f"--shapes={_spec({tensor: sizes[1] for tensor, sizes in shapes.items()})}")
    quoted = " ".join(shlex.quote(option) for option in options)
    calls = [f"build_and_time {shlex.quote(_plain(file))} {quoted}".rstrip() for file in onnx_files]
    # A dollar in a name is meant as one.
    calm = ["# shellcheck disable=SC2016"] if any(set(call) & set("$`") for call in calls) else []
    lines = [line for call in calls for line in (*calm, call)]
    return HEAD.format(name=shlex.quote(name)) + "\n".join(lines) + "\n" + TAIL


def _plain(file: str) -> str:
    """The path so that no program takes it for an option."""
    path = str(PurePosixPath(file))
    return f"./{path}" if path.startswith("-") else path


def _spec(shapes: dict[str, list[int]]) -> str:
    """As trtexec wants it: `ids:1x128,mask:1x128`, names with a colon or comma between single quotes."""
    names = {name: f"'{name}'" if set(name) & set(":,") else name for name in shapes}
    return ",".join(f"{names[name]}:{'x'.join(map(str, dims)) or 'scalar'}" for name, dims in shapes.items())


__all__ = ["trtexec_script"]
