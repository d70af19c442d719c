"""Fusion on whole networks: tiny configurations of eleven architectures, as torch's two exporters write them.

What is asserted: one operator for each place that the architecture has, nothing left of the pieces, every pass within its
tolerance on padded inputs, and the same answers at any batch. `bench/suites/fusion.py` does the same at full size.
"""

from __future__ import annotations

import numpy as np
import pytest
from models import outputs
from small_networks import (
    OPERATORS,
    allowing,
    bert,
    convnext,
    efficientnet,
    exported,
    fused,
    gpt2,
    inputs,
    llama,
    minilm,
    mobilenetv2,
    resnet50,
    swin,
    vit,
    whisper,
)  # fmt: skip

ARCHITECTURES = {
    bert: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 14, "Softmax|Erf|ReduceMean": 0},
    minilm: {"LayerNormalization": 7, "Gelu": 3, "Attention": 3, "MatMul|Gemm": 18, "Softmax|Erf|ReduceMean": 0},
    vit: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 13, "Softmax|Erf|ReduceMean": 0},
    llama: {"RMSNormalization": 5, "Swish": 2, "Attention": 2, "RotaryEmbedding": 4, "MatMul|Gemm": 15, "Softmax|Sigmoid": 0},
    gpt2: {"LayerNormalization": 5, "Gelu": 2, "Attention": 2, "MatMul|Gemm": 9, "Softmax|Tanh|ReduceMean": 0},
    whisper: {"LayerNormalization": 5, "Gelu": 4, "Attention": 2, "MatMul|Gemm": 12, "Conv": 2, "Softmax|Erf|ReduceMean": 0},
    resnet50: {"Conv": 15, "Relu": 13, "BatchNormalization": 0, "MatMul|Gemm": 1},
    mobilenetv2: {"Conv": 52, "Clip": 35, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
    efficientnet: {"Conv": 51, "Swish": 31, "Sigmoid": 10, "BatchNormalization|Pad": 0, "MatMul|Gemm": 1},
    convnext: {"LayerNormalization": 7, "Gelu": 4, "Conv": 6, "MatMul|Gemm": 9, "Erf": 0},
    swin: {"LayerNormalization": 11, "Gelu": 4, "Attention": 4, "Conv": 1, "MatMul|Gemm": 26, "Softmax|Erf": 0},
}  # fmt: skip
"""Network → its operators (those with `|` between them added up) once everything is fused, from the architecture."""
WRITTEN_OUT = (bert, minilm, vit, llama, gpt2, whisper)
"""Those that transformers has without a fused attention too."""
MERGED = {bert: 10, llama: 9, whisper: 8, swin: 18}
"""Products that are left where projections are merged: one for the three of an attention, one for gate and up."""

CASES = [
    *((make, "sdpa", "dynamo") for make in ARCHITECTURES),
    *(pytest.param(make, "sdpa", "script", marks=pytest.mark.slow) for make in ARCHITECTURES),
    *(
        pytest.param(make, "eager", kind, marks=pytest.mark.slow)
        # The older exporter writes the same pieces: two of them will do.
        for make, kind in [*((make, "dynamo") for make in WRITTEN_OUT), (bert, "script"), (llama, "script")]
    ),
]


# Fusion ---------------------------------------------------------------------------------------------------------------


def count(artifact, named):
    found = artifact.operator_counts()
    return sum(found.get(kind, 0) for kind in named.split("|"))


@pytest.mark.parametrize(("make", "attention", "kind"), CASES)
def test_every_place_of_the_architecture_is_one_operator(make, attention, kind):
    source = exported(make, attention, kind)
    made = fused(source, allowing(*OPERATORS), inputs(make, 2))
    wanted = ARCHITECTURES[make]
    assert {named: count(made, named) for named in wanted} == wanted
    fixed = isinstance(source.signature.batch, int)
    for items in () if fixed else (1, 5):
        batch = inputs(make, items, seed=items)
        expected, found = outputs(source, batch), outputs(made, batch)
        for name, array in expected.items():
            assert np.abs(found[name] - array).max() < 1e-3 * max(1.0, np.abs(array).max())


@pytest.mark.parametrize(("make", "products"), MERGED.items())
def test_projections_are_merged_where_that_is_asked_for(make, products):
    source = exported(make, "sdpa", "dynamo")
    made = fused(source, allowing(*OPERATORS), inputs(make, 2), "+merge-projections")
    assert count(made, "MatMul|Gemm") == products


def test_a_shortcut_and_its_main_path_are_not_merged_across_their_activations():
    source = exported(resnet50, "sdpa", "dynamo")
    made = fused(source, allowing(), inputs(resnet50, 2), "+merge-convolutions")
    assert count(made, "Conv") == ARCHITECTURES[resnet50]["Conv"]


@pytest.mark.parametrize("make", [llama, efficientnet])
def test_operators_that_a_target_does_not_name_are_not_put_in(make):
    source = exported(make, "sdpa", "dynamo")
    there = set(source.operator_counts())
    made = fused(source, allowing(), inputs(make, 2))
    assert not (set(made.operator_counts()) - there) & set(OPERATORS)
