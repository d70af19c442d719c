"""Set all but N of every M neighbouring weights to zero: 2:4 is what NVIDIA's sparse tensor cores do in half the time.

    W = | 0.9 −0.1  0.4  0.2 |        becomes        | 0.9  0  0.5  0 |        (2:4, the 0.4 moved by SparseGPT)

Neighbours are weights of one output channel along the inputs that are summed up: of a matrix product its inputs, of a
convolution the input channels at one place of the kernel. Products whose input channels aren't a multiple of M stay dense (a
network's first convolution, of three channels). It pays where the backend has the pattern in its hardware and uses it:
TensorRT since Ampere, for 2:4 in float16, bfloat16 and int8; so let `cast-half` or `quantize-int8` follow, which keep zeros. A
layer gains where it is large and bound by arithmetic, at most a factor of two. Elsewhere this pass refuses.

- `magnitude`: the smallest of each group go. Needs no data.
- `wanda`: those with the smallest |w|·√(mean x²), x being the input channel that they multiply.
- `sparsegpt`: group after group those go that cost the outputs least, and columns not yet done make up for them. For matrix
  products and 1 × 1 convolutions, of strided ones as if they read every place; other convolutions go by Wanda.

`prune-weights` names the papers, and says which products can be pruned and what is seen of activations: all that is the same.

Lossy: accuracy decides. `quantize-weights` by GPTQ moves weights, and so undoes the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.kernels.n_of_m import LARGEST_M
from perwatt.kernels.sparse_gpt import Pattern
from perwatt.passes import _sparsity as sparsity
from perwatt.passes._quantized import quantized_already
from perwatt.passes._sparse_layers import has_products


@dataclass(frozen=True)
class PruneNOfM(Pass):
    """`n`, `m`: n weights of every m stay (search: 2 of 4, which is what hardware has).
    `algorithm`: `magnitude`, `wanda` or `sparsegpt` (search: all).
    `exclude`: shell patterns of node names that stay dense, as `/head`.
    `subset_size`: calibration samples used at most; `magnitude` needs none (search: 32 … 512).
    `damping`: of SparseGPT: what is added to the diagonal of XᵀX, relative to its mean (search: 0.001 … 0.1).
    `anyway`: prune where the backend wouldn't gain, for a file that goes elsewhere."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("prune-channels",)

    n: int = 2
    m: int = 4
    algorithm: sparsity.Algorithm = "sparsegpt"
    exclude: tuple[str, ...] = ()
    subset_size: int = 128
    damping: float = 0.01
    anyway: bool = False

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if not self.anyway and (reason := sparsity.unrewarded(context.capabilities, f"{self.n}:{self.m}")):
            yield reason
        if reason := quantized_already(artifact):
            yield reason
        elif not has_products(artifact.model.graph):
            yield "no product with stored weights"

    def check_settings(self) -> None:
        if not 1 <= self.n < self.m <= LARGEST_M:
            raise PassError(
                f"{self.n} of every {self.m}: n must be at least 1 and below m, m at most {LARGEST_M}", fix="n: 2, m: 4"
            )

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        self.check_settings()
        plan = sparsity.Plan(self.algorithm, Pattern(n=self.n, m=self.m), damping=self.damping)
        return sparsity.run(self, artifact, plan, self.exclude, self.subset_size, context)
