"""Which operators each target runs rightly: onnx's node tests on every backend here, `python bench/suites/operators.py`.

    operators.py [--targets openvino,onnxruntime,inductor,tensorrt,interpreter] [--cases FOLDER] [--most-s N] [--table]

Every case is read as perwatt reads any model, lowered with `floating_precision="f32"`, run, and compared with the outputs
that come with it, within its own tolerance (integers equal). Results go to `bench/results/operators.json`, where targets
that were not asked for keep theirs, and the table to `docs/operators.md`; `--table` only writes the table anew.

A backend may crash or hang on a case, which is a result: each target works in a process of its own, that is started anew
after it died, one process at a time. Cases cost milliseconds in most backends and 5 to 10 s in those that are slow to
lower: of these, one case an operator is run, in float32 where there is one. `--cases` keeps the cases for the next run;
making them takes onnx 20 s.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TABLE = ROOT / "bench/results/operators.json", ROOT / "docs/operators.md"
TARGETS = ("openvino", "onnxruntime", "inductor", "tensorrt", "interpreter")
FAST_TIMEOUT_S, SLOW_TIMEOUT_S = 60.0, 180.0
DRAWN_AT_RANDOM = ("test_bernoulli", "test_training_dropout")
"""Their outputs are those of NumPy's generator."""
CANCELLING, CANCELLED = ("test_dft", "test_stft"), 1e-6
"""Their zeros are what is left of sums of larger numbers: off by up to this share of the largest output is zero there."""
STATUSES = ("passed", "wrong", "refused", "crashed", "hung")


# Cases ----------------------------------------------------------------------------------------------------------------


def write_cases(folder: Path) -> None:
    """Every node test as a folder: `model.onnx`, `in_N.pb`, `out_N.pb` of its first data set, and `case.json`."""
    import onnx
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    for case in cases:
        if case.name.startswith(DRAWN_AT_RANDOM):
            continue
        where = folder / case.name
        where.mkdir(parents=True, exist_ok=True)
        onnx.save(case.model, str(where / "model.onnx"))
        nodes = case.model.graph.node
        facts = {
            "operator": ".".join(filter(None, (nodes[0].domain, nodes[0].op_type))) if len(nodes) == 1 else None,
            "expanded": "_expanded" in case.name,
            "float32": _of_float32(case.model),
            "size": sum(_size(value) for data in case.data_sets[:1] for side in data for value in side),
            "rtol": case.rtol,
            "atol": case.atol,
        }
        for side, values in zip(("in", "out"), case.data_sets[0], strict=True):
            facts[side] = len(values)
            for number, value in enumerate(values):
                data = _proto(value)
                if data is not None:
                    (where / f"{side}_{number}.pb").write_bytes(data)
        (where / "case.json").write_text(json.dumps(facts))


def _of_float32(model: Any) -> bool:
    types = [value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]]
    return 1 in types and not set(types) & {10, 11, 16}


def _size(value: Any) -> int:
    return value.ByteSize() if hasattr(value, "ByteSize") else int(np.asarray(value, dtype=object).size)


def _proto(value: Any) -> bytes | None:
    """A tensor's bytes; None for sequences and optionals, which no target is fed."""
    import onnx

    if isinstance(value, onnx.TensorProto):
        return value.SerializeToString()
    if isinstance(value, np.ndarray | np.generic):
        return onnx.numpy_helper.from_array(np.asarray(value)).SerializeToString()
    return None


def _arrays(folder: Path, side: str, count: int) -> list[Any]:
    import onnx
    from onnx import numpy_helper

    found = []
    for number in range(count):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((folder / f"{side}_{number}.pb").read_bytes())
        # A copy: some views into the protobuf can't be written to, which not every backend bears.
        found.append(np.array(numpy_helper.to_array(tensor)))
    return found


# The process that runs them ---------------------------------------------------------------------------------------------


def serve(what: str) -> None:
    """Answer one line of JSON for each folder named on standard input."""
    answers = os.dup(1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        folder = Path(line.strip())
        status, words = read(folder) if what == "read" else tried(*what.split("+"), folder=folder)
        os.write(answers, (json.dumps([status, words]) + "\n").encode())


def read(folder: Path) -> tuple[str, str]:
    """`model.onnx` as perwatt reads it, into `artifact.onnx`."""
    # Not `perwatt.read`, which starts a worker for onnx's converter each time: this process may crash as well.
    from perwatt.reading import read as read_model

    try:
        read_model(folder / "model.onnx").artifact.save(folder / "artifact.onnx")
    except Exception as error:
        return "refused", _words(error, folder)
    return "passed", ""


def tried(target: str, operands: str = "", *, folder: Path) -> tuple[str, str]:
    """What `target` makes of a case; `operands` is "constants" where integer operands are to be such."""
    case = json.loads((folder / "case.json").read_text())
    inputs, expected = (_arrays(folder, side, case[side]) for side in ("in", "out"))
    try:
        if target == "interpreter":
            found = _interpreted(folder, inputs)
        elif operands == "constants":
            found = _run(target, *with_constants(folder, inputs))
        else:
            found = _run(target, folder / "artifact.onnx", inputs)
    except Exception as error:
        return "refused", _words(error, folder)
    try:
        for ours, theirs in zip(found, expected, strict=True):
            largest = np.abs(theirs).max() if folder.name.startswith(CANCELLING) else 0.0
            compare(ours, theirs, case["rtol"], max(case["atol"], CANCELLED * largest))
    except Exception as error:
        return "wrong", _words(error, folder)
    return "passed", ""


def with_constants(folder: Path, inputs: Sequence[Any]) -> tuple[Path, list[Any]]:
    """The case with its int64 inputs after the first as constants: the model's file, and the inputs that are left."""
    import onnx

    model = onnx.load(str(folder / "artifact.onnx"))
    values = list(zip(model.graph.input, inputs, strict=True))
    fixed = [n > 0 and array.dtype == np.int64 for n, (_, array) in enumerate(values)]
    for (value, array), constant in zip(values, fixed, strict=True):
        if constant:
            model.graph.input.remove(value)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    path = folder / "constants.onnx"
    onnx.save(model, str(path))
    return path, [array for array, constant in zip(inputs, fixed, strict=True) if not constant]


def _run(target: str, path: Path, inputs: Sequence[Any]) -> list[Any]:
    from perwatt import registry
    from perwatt.artifact import Artifact
    from perwatt.contract import OperatingPoint

    artifact = Artifact.load(path)
    batch = artifact.signature.batch
    point = OperatingPoint(floating_precision="f32", batch=batch if isinstance(batch, int) else 1)
    program = registry.target(target).lower(artifact, point)
    feeds = {spec.name: value for spec, value in zip(artifact.signature.inputs, inputs, strict=True)}
    found = program.call(feeds)
    return [found[spec.name] for spec in artifact.signature.outputs]


def _interpreted(folder: Path, inputs: Sequence[Any]) -> list[Any]:
    from perwatt.artifact import Artifact
    from perwatt.interpreter import Interpreter
    from perwatt.interpreter_values import from_numpy, to_numpy

    network = Interpreter(Artifact.load(folder / "artifact.onnx").model)
    return [to_numpy(value) for value in network(*(from_numpy(value, "cpu") for value in inputs))]


def compare(ours: Any, theirs: Any, rtol: float, atol: float) -> None:
    """Raises AssertionError where an output is not what it should be: shape, type, integers equal, floats within the
    tolerance, which is that of float32; types of 16 bits can't tell neighbours apart by it, whatever order sums go in."""
    ours, kind = np.asarray(ours), theirs.dtype.name
    assert ours.shape == theirs.shape, f"shape {ours.shape}, not {theirs.shape}"
    narrow = kind in ("int4", "uint4", "int2", "uint2")  # one byte an element holds the same numbers
    assert ours.dtype.name == kind or narrow, f"type {ours.dtype}, not {kind}"
    if theirs.dtype.kind in "iub" or narrow:
        np.testing.assert_array_equal(ours.astype(np.int64), theirs.astype(np.int64))
        return
    wide = np.complex128 if theirs.dtype.kind == "c" else np.float64
    step = {"bfloat16": 2**-7, "float16": 2**-10}.get(kind, 0.0)
    np.testing.assert_allclose(
        ours.astype(wide), theirs.astype(wide), rtol=max(rtol, 2 * step), atol=max(atol, step / 2)
    )


def _words(error: Exception, folder: Path) -> str:
    """In one line, without the place where the cases happened to lie."""
    words = " ".join(str(error).split()).replace(f"{folder}/", "").replace(str(folder), "it")
    return f"{type(error).__name__}: {words}"[:240]


# The process that asks ------------------------------------------------------------------------------------------------


class Child:
    """One process that tries cases, started anew after it died."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self.what, self.timeout_s = what, timeout_s
        self.process: subprocess.Popen[str] | None = None
        self.log: Any = None

    def ask(self, folder: Path) -> tuple[str, str]:
        """(status, words) of one case."""
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.timeout_s)
        if not ready:
            self.close()
            return "hung", f"no answer within {self.timeout_s:.0f} s"
        line = process.stdout.readline()
        if line:
            status, words = json.loads(line)
            return status, words
        code = process.wait()
        self.log.seek(0)
        last = self.log.read().strip().split("\n")[-1][:200]
        self.process = None
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "crashed", f"{how}: {last}"

    def _start(self) -> subprocess.Popen[str]:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        command = [sys.executable, "-P", __file__, "--serve", self.what]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        return self.process

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def measure(targets: Sequence[str], folder: Path, most_s: float) -> dict[str, Any]:
    """Results of `targets` on the cases in `folder`, by target, and what perwatt could read."""
    import onnx

    cases = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/case.json"))}
    reading = _all("read", FAST_TIMEOUT_S, folder, [n for n in cases if not (folder / n / "artifact.onnx").exists()])
    readable = [name for name in cases if (folder / name / "artifact.onnx").exists()]
    known = set(operators(cases))
    found: dict[str, Any] = {
        "onnx": onnx.__version__,
        "cases": len(cases),
        "operators": len(known),
        "not_read": {name: words for name, (status, words) in reading.items() if status != "passed"},
        "targets": {},
    }
    for target in targets:
        reason, slow, versions = _about(target)
        if reason:
            found["targets"][target] = {"missing": reason}
            continue
        if slow:
            chosen, earlier = one_each(cases, readable), tried_before(target, versions)
            todo = [name for name in chosen if name not in earlier]
            tried_cases = {**earlier, **_all(f"{target}+constants", SLOW_TIMEOUT_S, folder, todo, most_s)}
            facts = {"one_case_each": True, "left": len(chosen) - len(tried_cases), "tried": sorted(tried_cases)}
        else:
            tried_cases = _all(target, FAST_TIMEOUT_S, folder, readable)
            facts = {"one_case_each": False}
        found["targets"][target] = {"versions": versions, **facts, **summary(cases, tried_cases)}
    return found


def tried_before(target: str, versions: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Results of an earlier run that was cut short, with the same versions."""
    facts = json.loads(RESULTS.read_text())["targets"].get(target, {}) if RESULTS.exists() else {}
    if facts.get("versions") != versions:
        return {}
    return {name: tuple(facts["not_passed"].get(name, ("passed", ""))) for name in facts.get("tried", [])}


def _about(target: str) -> tuple[str, bool, dict[str, str]]:
    """Why a target can't be used here (empty: it can), whether it is slow to lower, and its versions."""
    if target == "interpreter":
        from importlib.metadata import version

        return "", False, {"torch": version("torch")}
    from perwatt import registry

    if target.partition(":")[0] not in registry.names("targets"):
        return "there is no such target", False, {}
    found = registry.target(target)
    missing = "; ".join(found.missing())
    return missing, found.slow_to_lower, {} if missing else found.versions()


def _all(
    what: str, timeout_s: float, folder: Path, names: Sequence[str], most_s: float = float("inf")
) -> dict[str, tuple[str, str]]:
    child, found = Child(what, timeout_s), {}
    begun = said = time.monotonic()
    for number, name in enumerate(names, 1):
        if time.monotonic() - begun > most_s:
            break
        found[name] = child.ask(folder / name)
        if time.monotonic() - said > 10 or number == len(names):
            said = time.monotonic()
            print(f"{what}: {number} of {len(names)} in {said - begun:.0f} s", file=sys.stderr)
    child.close()
    return found


def operators(cases: dict[str, Any]) -> Iterator[str]:
    """The operator of every case that is one node and no expansion into others."""
    yield from (case["operator"] for case in cases.values() if case["operator"] and not case["expanded"])


def one_each(cases: dict[str, Any], readable: Sequence[str]) -> list[str]:
    """For each operator one case: in float32 where there is one, and the smallest of these."""
    best: dict[str, tuple[bool, int, str]] = {}
    for name in readable:
        case = cases[name]
        if case["operator"] and not case["expanded"]:
            rank = (not case["float32"], case["size"], name)
            best[case["operator"]] = min(best.get(case["operator"], rank), rank)
    return sorted(name for _, _, name in best.values())


def summary(cases: dict[str, Any], tried_cases: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Counts over all cases, by operator, and what was wrong with those that did not pass."""
    by_operator: dict[str, Counter[str]] = {}
    for name, (status, _) in tried_cases.items():
        case = cases[name]
        if case["operator"] and not case["expanded"]:
            by_operator.setdefault(case["operator"], Counter())[status] += 1
    return {
        "counts": dict(Counter(status for status, _ in tried_cases.values())),
        "by_operator": {name: dict(counts) for name, counts in sorted(by_operator.items())},
        "not_passed": {name: list(said) for name, said in sorted(tried_cases.items()) if said[0] != "passed"},
    }


# The table ------------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """`docs/operators.md`."""
    ran = {name: facts for name, facts in found["targets"].items() if "counts" in facts}
    names = sorted({operator for facts in ran.values() for operator in facts["by_operator"]}, key=str.lower)
    versions = [f"{n} ({', '.join(f'{k} {v}' for k, v in facts['versions'].items())})" for n, facts in ran.items()]
    sampled = [name for name, facts in ran.items() if facts["one_case_each"]]
    lines = [
        "# Operators by target",
        "",
        f"Generated by `bench/suites/operators.py` from onnx {found['onnx']}'s node tests, as perwatt reads them (brought "
        f"to opsets 23 to 26); {len(found['not_read'])} of {found['cases']} can't be read: sequences, optionals, strings, "
        "and what onnx's converter does not bring over. Each is compared with its recorded outputs within its own "
        "tolerance, integers exactly, with float32 arithmetic where the graph says float32. Expansions of operators into "
        "others count in the totals and not in the table.",
        "",
        f"Ran: {'; '.join(versions)}.",
        *(
            f"Of {name}, which takes seconds to compile, one case an operator is run, in float32 where there is one, "
            "with its integer operands (axes, shapes) as constants, as models have them"
            f"{f'; of {left} not yet (–)' if (left := ran[name]['left']) else ''}."
            for name in sampled
        ),
        *(f"{name} was not run yet." for name in TARGETS if name not in found["targets"]),
        *(f"{name} can't run here: {facts['missing']}." for name, facts in found["targets"].items() if "missing" in facts),
        "",
        "`✓ 12`: all 12 cases passed. `10 of 12 (1 wrong, 1 refused)`: *wrong* differs from the recorded output, *refused* "
        "said so when it was compiled or run, *crashed* took its process down, *hung* gave no answer. Why is in "
        "`bench/results/operators.json`.",
        "",
        f"| operator | {' | '.join(ran)} |",
        f"| --- |{' --- |' * len(ran)}",
        _row("**all cases**", [facts["counts"] for facts in ran.values()]),
        *(_row(name, [facts["by_operator"].get(name, {}) for facts in ran.values()]) for name in names),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(name: str, columns: Sequence[dict[str, int]]) -> str:
    return f"| {name} | {' | '.join(map(_cell, columns))} |"


def _cell(counts: dict[str, int]) -> str:
    total, passed = sum(counts.values()), counts.get("passed", 0)
    if not total:
        return "–"
    if passed == total:
        return f"✓ {total}"
    rest = [(status, counts[status]) for status in STATUSES[1:] if status in counts]
    if not passed and len(rest) == 1:
        return f"{rest[0][0]}" if total == 1 else f"{rest[0][0]} {total}"
    return f"{passed} of {total} ({', '.join(f'{count} {status}' for status, count in rest)})"


def main() -> None:
    """Run what the command line asks for."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--targets", default=",".join(TARGETS))
    options.add_argument("--cases", type=Path)
    options.add_argument("--most-s", type=float, default=3600.0)
    options.add_argument("--table", action="store_true")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.serve:
        serve(asked.serve)
        return
    if not asked.table:
        with tempfile.TemporaryDirectory(prefix="perwatt-operators-") as scratch:
            folder = asked.cases or Path(scratch)
            if not any(folder.glob("*/case.json")):
                write_cases(folder)
            new = measure(asked.targets.split(","), folder, asked.most_s)
        # Read as late as this: another run may have ended meanwhile.
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"targets": {}}
        merged = {**before["targets"], **new["targets"]}
        found = {**new, "targets": {name: merged[name] for name in sorted(merged, key=_place)}}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(table(json.loads(RESULTS.read_text())))


def _place(name: str) -> tuple[int, str]:
    return (TARGETS.index(name) if name in TARGETS else len(TARGETS), name)


if __name__ == "__main__":
    main()
