"""What tests of unstructured and N:M sparsity share: one product, inputs that are correlated, a backend that gains from zeros."""

from dataclasses import replace

import numpy as np
from models import build, context, executed, node, outputs, weight

from perwatt.contract import Capabilities
from perwatt.data import Samples

ALGORITHMS = ("magnitude", "wanda", "sparsegpt")


def correlated(items, width=32, seed=0, loud=()):
    """Inputs that lie near a quarter of their dimensions; channels `loud` are 30 × as large."""
    basis = np.random.default_rng(99).standard_normal((width // 4, width))
    random = np.random.default_rng(seed)
    found = random.standard_normal((items, 8, width // 4)) @ basis + 0.1 * random.standard_normal((items, 8, width))
    found[..., list(loud)] *= 30
    return found.astype(np.float32)


def given_by(*batches, patterns=(), types=("int8",)):
    """A backend that gains from these patterns, and samples."""
    plain = context(Samples(list(batches)), execute=executed)
    return replace(plain, capabilities=Capabilities(sparse_types=types, sparse_patterns=patterns))


def product(rows=32, columns=24, op="MatMul", **attributes):
    """x · w, on three axes for a MatMul."""
    shape = (columns, rows) if attributes.get("transB") else (rows, columns)
    data = "batch,8,32" if op == "MatMul" else f"{rows},batch" if attributes.get("transA") else f"batch,{rows}"
    result = f"batch,8,{columns}" if op == "MatMul" else f"batch,{columns}"
    return build(
        [node(op, "x w", "y", name="/product", **attributes)], f"x:float32[{data}]", f"y:float32[{result}]",
        {"w": weight(*shape)},
    )  # fmt: skip


def kernel_of(artifact, name="/product"):
    """What the product of that name reads, through a Transpose."""
    (value,) = (n.inputs[1] for n in artifact.model.graph if n.name == name)
    while value.const_value is None:
        value = value.producer().inputs[0]
    return value.const_value.numpy()


def off(before, after, batch):
    """How far outputs moved, relatively."""
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))
