"""Whole networks are cut: eleven architectures, as exported and as fused, lose 30 % of every group that can be cut, and give what
the same network gives when nobody reads those units."""

import pytest
from couplings import proven

pytest.importorskip("torch")
pytest.importorskip("transformers")

import small_networks as small

from perwatt.artifact import Step
from perwatt.passes._naming import with_names

SHARE = 0.3
CUT = {
    small.bert: 2, small.minilm: 3, small.vit: 2, small.llama: 2, small.gpt2: 2, small.whisper: 2, small.resnet50: 4,
    small.mobilenetv2: 10, small.efficientnet: 10, small.convnext: 4, small.swin: 4,
}  # fmt: skip
"""Groups that there are at least once it is fused: MLPs of transformers, inner convolutions of the others."""


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", CUT)
def test_every_architecture_is_cut_by_a_third_without_a_broken_shape(make, fused):
    artifact = small.exported(make, "sdpa", "dynamo")
    batch = small.inputs(make, 2)
    if fused:
        artifact = small.fused(artifact, small.allowing(*small.OPERATORS), batch)
    coupling, after = proven(with_names(artifact, Step("test")), share=SHARE, tolerance=1e-4, fed=batch)
    if fused:
        assert len(coupling.groups) >= CUT[make] and after.size_bytes() < artifact.size_bytes()
    else:
        # Sizes that are calculated from shapes leave more of it whole, by name.
        assert coupling.groups or coupling.left
