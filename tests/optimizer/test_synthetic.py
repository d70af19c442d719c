"""Made-up inputs: inside the tables they look up, ones and zeros where the graph wants them, sizes that agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perwatt.artifact import Artifact
from perwatt.errors import InputError
from perwatt.signature import Batch, rows
from perwatt.synthetic import synthetic

ir = pytest.importorskip("onnx_ir")


def artifact(text: str) -> Artifact:
    import onnx.parser

    return Artifact(model=ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')))


def made(text: str, count: int = 8, seed: int = 0) -> Batch:
    (batch,) = synthetic(artifact(text), count, seed).chunks
    return batch


BERT = """
bert (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask, int64[batch, sequence] token_type_ids,
      int64[batch, sequence] position_ids)
  => (float[batch, sequence, 4] y)
<float[7, 4] words, float[2, 4] types, float[40, 4] places, int64[1] last = {-1}>
{
  ids = Unsqueeze (input_ids, last)
  small = Cast <to = 6> (ids)
  flat = Squeeze (small, last)
  copy = Identity (words)
  a = Gather (copy, flat)
  b = Gather (types, token_type_ids)
  c = Gather (places, position_ids)
  mask = Cast <to = 1> (attention_mask)
  wide = Unsqueeze (mask, last)
  ab = Add (a, b)
  abc = Add (ab, c)
  y = Mul (abc, wide)
}
"""


def test_a_text_model() -> None:
    batch = made(BERT)
    assert {array.shape for array in batch.values()} == {(8, 32)}
    assert {str(array.dtype) for array in batch.values()} == {"int64"}
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < 7 and len(np.unique(batch["input_ids"])) == 7
    assert batch["attention_mask"].all() and not batch["token_type_ids"].any()
    assert list(batch["position_ids"][0]) == list(range(32))


def test_the_smallest_table_decides_and_axes_are_honoured() -> None:
    batch = made("""
g (int64[n, 3] a) => (float[n, 3, 4] y)
<float[9, 4] big, float[4, 5] turned>
{
  one = Gather (big, a)
  other = Gather <axis = 1> (turned, a)
  y = Identity (one)
}""", 64)  # fmt: skip
    assert batch["a"].max() == 4


def test_integers_that_are_no_indices_are_ones() -> None:
    batch = made("""
g (int64[n, 3] a, bool[n, 3] b, uint8[n, 2, 2, 3] c) => (bool[n, 3] y)
<int64 zero = {0}>
{
  d = Greater (a, zero)
  y = And (d, b)
}""")  # fmt: skip
    assert (batch["a"] == 1).all() and batch["b"].all()
    assert batch["c"].dtype == np.uint8 and batch["c"].max() > 200


def test_pictures_with_open_sizes() -> None:
    batch = made("g (float[n, 3, h, w] x) => (float[n, 3, h, w] y) { y = Relu (x) }", 3)
    assert batch["x"].shape == (3, 3, 224, 224)
    assert batch["x"].mean() == pytest.approx(0, abs=0.01) and batch["x"].std() == pytest.approx(1, abs=0.01)
    assert made("g (float[n, h, w, 3] x) => (float[n, h, w, 3] y) { y = Relu (x) }", 1)["x"].shape == (1, 224, 224, 3)


def test_types_of_floats() -> None:
    assert made("g (float16[n, 3] x) => (float16[n, 3] y) { y = Relu (x) }")["x"].dtype == np.float16
    assert str(made("g (bfloat16[n, 3] x) => (bfloat16[n, 3] y) { y = Relu (x) }")["x"].dtype) == "bfloat16"


@pytest.mark.parametrize(("count", "wanted"), [(1, 4), (4, 4), (9, 12)])
def test_a_fixed_batch_is_filled(count: int, wanted: int) -> None:
    assert made("g (float[4, 3] x) => (float[4, 3] y) { y = Relu (x) }", count)["x"].shape == (wanted, 3)


def test_without_a_batch_axis_each_chunk_is_one_call() -> None:
    samples = synthetic(artifact("""
g (float[50, 3] x, float[3, seq] w) => (float[50, seq] y) { y = MatMul (x, w) }"""), 5)  # fmt: skip
    calls = list(samples)
    assert len(calls) == 5
    assert all(call["x"].shape == (50, 3) and call["w"].shape == (3, 32) for call in calls)


def test_sums_of_symbols_add_up() -> None:
    model = artifact("g (int64[n, past] mask, float[n, past, 4] keys) => (float[n, past, 4] y) { y = Relu (keys) }")
    model.model.graph.inputs[0].shape = ir.Shape(["n", "past + 1"])
    (batch,) = synthetic(Artifact(model=model.model), 2).chunks
    assert batch["mask"].shape == (2, 33) and batch["keys"].shape == (2, 32, 4)


def test_the_seed_decides() -> None:
    model = artifact(BERT)
    assert synthetic(model, 4, 1).digest() == synthetic(model, 4, 1).digest() != synthetic(model, 4, 2).digest()
    assert rows(synthetic(model, 5).chunks[0]) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (string[n] x) => (string[n] y) { y = Identity (x) }", "takes text"),
        ("g (seq(float[n]) x) => (seq(float[n]) y) { y = Identity (x) }", "is a sequence"),
        ("g (float x) => (float y) { y = Relu (x) }", "single number"),
    ],
)
def test_inputs_that_cannot_be_made_up(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthetic(artifact(text))


def test_inputs_of_unknown_rank_cannot_be_made_up() -> None:
    model: Any = artifact("g (float[n] x) => (float[n] y) { y = Relu (x) }").model
    model.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="no known type or shape"):
        synthetic(Artifact(model=model))
