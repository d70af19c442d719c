"""`run.py`: the script in a bundle that runs the saved program with the backend and NumPy only.

All that is common to backends (splitting into calls, filling up, files, the command line) is in `_run.py.txt`. A backend
gives the few lines that are its own, as the text of Python code that goes right below `import numpy as np`: its imports
and a class of this form, by convention in `<target>_run.py.txt` beside the target:

    import openvino


    class Backend:
        def __init__(self, folder: Path, program: dict) -> None:
            # `folder` is what `Program.save` wrote; `program` is `program.json`: "target" (full name, `openvino:gpu`),
            # "batch_is_dynamic", "call_batch" (None without a batch axis), "operating_point", "settings", "signature".

        def call(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
            # One call: the inputs by position, C-contiguous, of the types in the signature, exactly "call_batch" items
            # where that is set. Returns the outputs by position, in memory of their own.

A target's `script()` is then `run_script("openvino", "openvino_run.py.txt")`. `json`, `sys`, `time`, `Path` and `np` are
imported already.
"""

from __future__ import annotations

from importlib.resources import files
from string import Template


def run_script(requires: str, backend_file: str) -> str:
    """The text of `run.py`. `requires` is what has to be installed besides NumPy, as `pip install` takes it;
    `backend_file` is the file in this folder with the backend's imports and its class `Backend`."""
    here = files("perwatt.targets")
    backend = (here / backend_file).read_text(encoding="utf-8").strip()
    return Template((here / "_run.py.txt").read_text(encoding="utf-8")).substitute(requires=requires, backend=backend)
