"""Set single weights to zero, anywhere, and let the others make up for them where that can be had.

The graph keeps its shape and every product its size: it pays only where the backend skips zeros, or stores weights packed.
Most do neither, and this pass then refuses: matrix units calculate zeros as fast as anything else. `prune-n-of-m` is for those
that want zeros in a pattern, `prune-channels` for all others.

    W = | 0.9 −0.1  0.4 |        becomes        | 0.9  0    0.5 |        (ratio 0.5, the first row's 0.4 moved by SparseGPT)
        | 0.2  0.7 −0.3 |                       | 0    0.7  0   |

- `magnitude`: the smallest weights go. Needs no data.
- `wanda`: those with the smallest |w|·√(mean x²), x being the input channel that they multiply (Sun et al., "A simple and
  effective pruning approach for large language models", ICLR 2024).
- `sparsegpt`: column after column those go that cost the outputs least, and columns not yet done make up for them, as far as
  inputs are correlated (Frantar and Alistarh: "SparseGPT: massive language models can be accurately pruned in one-shot", ICML
  2023). For matrix products and 1 × 1 convolutions, of strided ones as if they read every place; other convolutions go by Wanda.

MatMul, Gemm and Conv with stored float32 weights; not convolutions in groups, nor weights that others read, too (a tied
embedding). What the last two see of activations is taken from the model as it was, not behind layers already pruned.

Lossy: accuracy decides. `quantize-int8` and `quantize-weights` keep zeros, but for GPTQ, which moves weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.kernels.sparse_gpt import Pattern
from perwatt.passes import _sparsity as sparsity
from perwatt.passes._quantized import quantized_already
from perwatt.passes._sparse_layers import has_products


@dataclass(frozen=True)
class PruneWeights(Pass):
    """`ratio`: the share of weights that become zero (search: 0.3 … 0.95).
    `algorithm`: `magnitude`, `wanda` or `sparsegpt` (search: all).
    `per`: of what magnitude and Wanda take that share: of each `row` (output channel), of each `layer`, or of `all` weights
    together (search: all). SparseGPT takes it of 128 columns of a layer at a time.
    `exclude`: shell patterns of node names that stay dense, as `/head`.
    `subset_size`: calibration samples used at most; `magnitude` needs none (search: 32 … 512).
    `damping`: of SparseGPT: what is added to the diagonal of XᵀX, relative to its mean (search: 0.001 … 0.1).
    `anyway`: prune where the backend wouldn't gain, for a file that goes elsewhere."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("prune-channels",)

    ratio: float = 0.5
    algorithm: sparsity.Algorithm = "sparsegpt"
    per: sparsity.Scope = "row"
    exclude: tuple[str, ...] = ()
    subset_size: int = 128
    damping: float = 0.01
    anyway: bool = False

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if not self.anyway and (reason := sparsity.unrewarded(context.capabilities, "unstructured")):
            yield reason
        if reason := quantized_already(artifact):
            yield reason
        elif not has_products(artifact.model.graph):
            yield "no product with stored weights"

    def check_settings(self) -> None:
        if not 0 < self.ratio < 1:
            raise PassError(f"a ratio of {self.ratio:g}: it must lie between 0 and 1", fix="ratio: 0.5")

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        self.check_settings()
        plan = sparsity.Plan(self.algorithm, Pattern(ratio=self.ratio), self.per, self.damping)
        return sparsity.run(self, artifact, plan, self.exclude, self.subset_size, context)
