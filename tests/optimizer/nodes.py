"""onnx's node tests, and what the interpreter makes of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from perwatt.interpreter import Interpreter, missing_operators
from perwatt.interpreter_values import from_numpy, to_numpy

CANCELLED = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}
"""Zeros that the recorded outputs miss by more than the tolerance of zero: what is left of sums of numbers around 1."""
FOUR_BITS = ("int4", "uint4", "int2", "uint2")
"""torch has no such types: one byte an element holds the same numbers."""


NO_TYPE_IN_TORCH = {onnx.TensorProto.STRING, onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E8M0}
DRAWN_AT_RANDOM = ("test_bernoulli", "test_training_dropout")
"""Their outputs are those of NumPy's generator."""


def all_cases() -> list[Any]:
    """onnx's node tests; making them takes seconds."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in load_model_tests(kind="node") if not case.name.startswith(DRAWN_AT_RANDOM)]


def of_numbers(model: onnx.ModelProto) -> bool:
    """Whether every input and output is a tensor of numbers."""
    found = [value.type for value in [*model.graph.input, *model.graph.output]]
    kinds = {kind.WhichOneof("value") for kind in found}
    types = {kind.tensor_type.elem_type for kind in found}
    return kinds == {"tensor_type"} and not types & NO_TYPE_IN_TORCH


def missing(case: Any) -> list[str]:
    """Operators that the interpreter lacks for this case."""
    return missing_operators(ir.serde.deserialize_model(case.model))


def claimed_cases() -> list[Any]:
    """Those that the interpreter claims to run."""
    return [case for case in all_cases() if of_numbers(case.model) and not missing(case)]


def problem(case: Any) -> str | None:
    """What is wrong with the interpreter's outputs; None where nothing is."""
    try:
        network = Interpreter(ir.serde.deserialize_model(case.model))
        for inputs, outputs in case.data_sets:
            feeds = [from_numpy(_array(value), "cpu") for value in inputs]
            found = [to_numpy(value) for value in network(*feeds)]
            for ours, value in zip(found, outputs, strict=True):
                _compare(ours, _array(value), case)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _compare(ours: Any, theirs: Any, case: Any) -> None:
    assert ours.shape == theirs.shape, f"shape {ours.shape}, not {theirs.shape}"
    kind = theirs.dtype.name
    assert ours.dtype.name == kind or kind in FOUR_BITS, f"type {ours.dtype}, not {kind}"
    if theirs.dtype.kind in "iub" or kind in FOUR_BITS:
        np.testing.assert_array_equal(ours.astype(np.int64), theirs.astype(np.int64))
        return
    wide = np.complex128 if theirs.dtype.kind == "c" else np.float64
    # The tolerance is that of float32: types of 16 bits can't tell neighbours apart by it, whatever order sums go in.
    steps = {"bfloat16": 2**-7, "float16": 2**-10}.get(kind, 0.0)
    rtol, atol = max(case.rtol, 2 * steps), CANCELLED.get(case.name, max(case.atol, steps / 2))
    np.testing.assert_allclose(ours.astype(wide), theirs.astype(wide), rtol=rtol, atol=atol)
