"""Does our code use TensorRT, CUDA's bindings and torch as they really are? A small type checker over our own source.

    PYTHONPATH=<bindings> LD_LIBRARY_PATH=<empty stand-ins> python tensorrt_contract.py '{"files": [...], ...}'

Names are followed from annotations (`builder: trt.Builder`), calls (what a method's docstring says it returns) and our
own classes and functions. Every attribute of what is followed has to exist, every call has to fit a signature in the
docstring (names of arguments, how many, and which of TensorRT's classes), every property that is set has to be settable,
and every method that overrides one has its arguments. What can't be followed but bears a name of TensorRT's is an error
too: so each use is checked, which `mutations` proves by misspelling them one after the other.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tensorrt_checker import Checker, signatures


def misspelt(text, line, column, name):
    """The source with `name`, which ends at that place, misspelt."""
    lines = text.split("\n")
    encoded = lines[line - 1].encode()
    lines[line - 1] = (encoded[: column - len(name.encode())] + name.encode() + b"_x" + encoded[column:]).decode()
    return "\n".join(lines)


def mutations(sources, aliases, main):
    """Uses whose misspelling goes unnoticed, and how many were tried."""
    checker = Checker(sources, aliases, main)
    before = set(checker.run())
    unnoticed, uses = [], sorted(set(checker.uses))
    for file, line, column, name in uses:
        changed = {**sources, file: misspelt(sources[file], line, column, name)}
        if not set(Checker(changed, aliases, main).run()) - before:
            unnoticed.append(f"{file}:{line}: {name}")
    return unnoticed, len(uses)


def stand_in_problems(stand_in, real):
    """What a stand-in's classes have that the real ones have not, or with other arguments."""
    found = []
    for name, cls in vars(stand_in).items():
        if name.startswith("_"):
            continue
        if not hasattr(real, name):
            found.append(f"there is no {name}")
            continue
        if inspect.isfunction(cls):
            ours, theirs = (list(inspect.signature(one).parameters) for one in (cls, getattr(real, name)))
            found += [f"{name} takes {theirs}, the stand-in {ours}"] if ours != theirs else []
        if not isinstance(cls, type):
            continue
        for method, function in vars(cls).items():
            if method.startswith("_") and method != "__init__":
                continue
            there = getattr(getattr(real, name), method, None)
            if there is None:
                found.append(f"{name} has no {method}")
            elif inspect.isfunction(function):
                known = signatures(there, method)
                ours = list(inspect.signature(function).parameters)
                if known and not any(ours == names for names, *_ in known):
                    found.append(f"{name}.{method} takes {[names for names, *_ in known]}, the stand-in {ours}")
    return found


def main():
    """Answers one request in JSON: {"library", "alias", "files", "mutate", "stand_in", "changes"} → {"problems", …}.
    `changes` are [file, text in it, text instead]: each is tried by itself."""
    request = json.loads(sys.argv[1])
    library = importlib.import_module(request["library"])
    sources = {Path(file).name: Path(file).read_text() for file in request["files"]}
    aliases = {request["alias"]: library}
    main_library = library if request["alias"] == "trt" else None
    checker = Checker(sources, aliases, main_library)
    answer = {"problems": checker.run(), "uses": len(set(checker.uses)), "names": sorted({u[3] for u in checker.uses})}
    if request.get("mutate"):
        answer["unnoticed"], answer["mutated"] = mutations(sources, aliases, main_library)
    for file, right, wrong in request.get("changes", []):
        assert right in sources[file], f"{file} has no {right!r} any more"
        changed = {**sources, file: sources[file].replace(right, wrong)}
        answer.setdefault("changes", []).append(Checker(changed, aliases, main_library).run())
    if request.get("stand_in"):
        import tensorrt_standin

        made = tensorrt_standin.cuda_module(None)
        if main_library:
            made = tensorrt_standin.tensorrt_module(library.__version__)
        answer["stand_in"] = stand_in_problems(made, library)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
