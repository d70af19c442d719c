"""torch eager in float32, as a program: what the model costs where it comes from. Stands beside, is never the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perwatt.contract import OperatingPoint, Program
from perwatt.errors import BackendError
from perwatt.signature import Batch, Signature


class EagerProgram(Program):
    """The exported program, run operator by operator by torch. `call` takes and gives NumPy arrays."""

    def __init__(self, path: Path, signature: Signature, point: OperatingPoint) -> None:
        import torch

        if point.threads:
            torch.set_num_threads(point.threads)
        self.torch = torch
        # Our own file, written a moment ago from a program that was read with all precautions.
        exported: Any = torch.export.load(str(path))
        self.module = exported.module()
        # The second child of the input specification holds the keyword arguments that the program was exported with.
        self.by_name = exported.call_spec.in_spec.child(1).num_children > 0
        self.signature = signature
        self.point = point
        batch = signature.batch
        self.batch_size = batch if isinstance(batch, int) else (point.batch if batch is not None else None)
        self.inputs = [spec.name for spec in signature.inputs]

    def call(self, batch: Batch) -> Batch:
        torch = self.torch
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(batch[name]) for name in self.inputs}
            out = self.module(**tensors) if self.by_name else self.module(*tensors.values())
        leaves = torch.utils._pytree.tree_leaves(out)
        names = [spec.name for spec in self.signature.outputs]
        return {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=False)}

    def save(self, folder: Path) -> list[Path]:
        raise BackendError("torch eager is a comparison, not something that perwatt deploys")

    def facts(self) -> dict[str, Any]:
        return {
            "backend": "torch eager",
            "version": self.torch.__version__,
            "execution_precision": "f32",
            "threads": self.torch.get_num_threads(),
            "operating_point": self.point.to_json(),
        }
