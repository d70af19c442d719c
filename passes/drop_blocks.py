"""Take whole residual blocks out of a network: those without which its outputs move least for what they cost.

Blocks that add to what they read (in a ResNet, an inverted residual, a transformer's attention and MLP) are trained to be left
out better than anything else in a network is, and one that is gone saves all of its time, on any backend, in any type.
Where layers have 16 to 64 channels, which can't be narrowed so that it pays, this is the pruning that does.

    s ─┬─→ Conv → Relu → Conv ─→ Add ─→ Relu        becomes        s ─→
       └───────────────────────────┘

Which blocks: one after the other, the one that moves the outputs least for its share of the cost, without those that are gone
already. How far outputs move is measured on calibration samples, in one graph with a switch for each block; costs are the
backend's own profile (the median of blocks that do the same), or multiplications where it tells none. Movement is the root of
the mean square, relative to the outputs' own. Kullback-Leibler divergence chooses no better, and needs outputs that are
scores: on ResNet-56 it is as good with scores softened fourfold and worse as they are, since samples that a net knows by heart
leave it nothing to see.

`choose: cosine` drops blocks in order of how little they change what they read, by cosine similarity, found in one run (Men et
al., "ShortGPT: layers in large language models are more redundant than you expect", 2024). It sees neither what comes behind
nor that of two blocks which do alike one is needed: on ResNet-56 it has lost after five blocks what the default has after seven.

Blocks that change the shape stay, as do U-Nets' skips and what isn't in the main graph (`perwatt.passes._residual_blocks`).

Lossy: accuracy decides. Beyond a block or two in twenty it needs `recover`, which learns back what was lost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from perwatt import calibration
from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.errors import BackendError, PassError
from perwatt.passes._block_redundancy import Movement, likeness
from perwatt.passes._layer_costs import by_product
from perwatt.passes._naming import matching, with_names
from perwatt.passes._quantized import quantized_already
from perwatt.passes._residual_blocks import Block, layers, residual_blocks, without
from perwatt.patterns import dims

Unit = tuple[Block, ...]
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AGAIN = 12
"""Candidates that are looked at once more after each block dropped, those that moved the outputs least for their cost before."""
NAMED = 3
"""Additions that the ledger names for each reason."""


@dataclass(frozen=True)
class DropBlocks(Pass):
    """`blocks`: how many go (search: 1 … a third of them); None: as `ratio` says.
    `ratio`: the share of what all blocks cost that goes, as nearly as whole blocks allow (search: 0.05 … 0.5).
    `exclude`: shell patterns of node names; blocks that hold such a node, or end in it, stay.
    `choose`: `output` by how far the outputs move, `cosine` by how little a block changes what it reads (search: both).
    `judged_on`: calibration samples that this is measured on.
    `units`: `single`: attention and MLP each by itself; `layer`: a transformer's layer goes whole; `auto`: either, whichever
    moves the outputs less for what it costs (search: all)."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    measures: ClassVar[bool] = True
    in_search: ClassVar[bool] = True
    searched: ClassVar = {"ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}

    blocks: int | None = None
    ratio: float = 0.3
    exclude: tuple[str, ...] = ()
    choose: Literal["output", "cosine"] = "output"
    judged_on: int = 64
    units: Literal["auto", "single", "layer"] = "auto"

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if reason := quantized_already(artifact):
            yield reason

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        self.check_settings()
        named = with_names(artifact, self.step([]))
        excluded = set(matching(self.exclude, named.model.graph))
        found = residual_blocks(named)
        blocks = [block for block in found.found if not excluded & {block.name, *block.nodes}]
        left = [*found.left, *((b.name, "excluded") for b in found.found if b not in blocks)]
        notes = list(_left(left))
        if not blocks:
            return artifact, ["no residual block to drop", *notes]
        samples = self._samples(named, context)
        movement = Movement(named, blocks, samples, context)
        plan = Plan(blocks, self._units(blocks), _costs(named, blocks, context), self.blocks, self.ratio)
        chosen, how = (self._by_cosine if self.choose == "cosine" else self._by_output)(
            named, plan, movement, samples, context
        )
        if not chosen:
            return artifact, [f"{how}; {len(blocks)} blocks stay", *notes]
        gone = [block for block in blocks if block in chosen]
        moved = next(movement.of([{block.name for block in gone}]))
        if context.made_up:
            notes.insert(0, calibration.MADE_UP)
        changes = [
            f"{len(gone)} of {len(blocks)} residual blocks dropped, {plan.share(chosen):.0%} of what they cost, {how}",
            f"dropped: {', '.join(block.name for block in gone)}",
            f"outputs move by {moved:.1%} on {len(samples)} samples",
            *notes,
        ]
        return artifact.after(without(named, gone, self.step([])).edit(), self.step(changes)), changes

    def check_settings(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise PassError(f"{self.blocks} blocks: it must be 1 or more", fix="blocks: 1")
        if not 0 < self.ratio <= 1:
            raise PassError(f"a ratio of {self.ratio:g}: it must be above 0 and at most 1", fix="ratio: 0.3")
        if self.judged_on < 1:
            raise PassError(f"judged on {self.judged_on} samples: it must be 1 or more", fix="judged_on: 64")

    def _samples(self, artifact: Artifact, context: Context) -> Samples:
        samples = context.samples("calibrate")
        if not len(samples):
            raise PassError("there are no samples to find redundant blocks on")
        return calibration.some(artifact, samples, self.judged_on, context.seed)

    def _units(self, blocks: Sequence[Block]) -> list[Unit]:
        single: list[Unit] = [(block,) for block in blocks]
        if self.units == "single":
            return single
        whole = layers(blocks)
        return whole if self.units == "layer" else [*single, *(unit for unit in whole if len(unit) > 1)]

    def _by_output(
        self, artifact: Artifact, plan: Plan, movement: Movement, samples: Samples, context: Context
    ) -> tuple[frozenset[Block], str]:
        """Greedy: after each unit dropped the most promising are measured again."""
        gone: frozenset[Block] = frozenset()
        moved, scores, runs = 0.0, dict[Unit, float](), 0
        while candidates := plan.candidates(gone):
            if context.deadline is not None and time.monotonic() > context.deadline:
                return gone, f"out of time after {runs} choices were measured"
            if scores:
                candidates = sorted(candidates, key=lambda unit: scores.get(unit, 0.0))[:AGAIN]
            found: dict[Unit, float] = {}
            choices = [{block.name for block in (*gone, *unit)} for unit in candidates]
            for unit, one in zip(candidates, movement.of(choices), strict=True):
                found[unit], runs = one, runs + 1
                # What moves in directions of its own adds up in squares.
                scores[unit] = (one**2 - moved**2) / plan.cost(unit, gone)
                done = f"{len(gone)} of {len(plan.blocks)} blocks dropped"
                context.progress(f"drop-blocks: {done}, {len(found)} of {len(candidates)} choices measured")
            best = min(candidates, key=lambda unit: scores[unit])
            gone, moved = plan.with_nested({*gone, *best}), found[best]
        return gone, f"by how far outputs move, {runs} choices measured"

    def _by_cosine(
        self, artifact: Artifact, plan: Plan, movement: Movement, samples: Samples, context: Context
    ) -> tuple[frozenset[Block], str]:
        """In order of how much they change what they read, for their cost; from one run."""
        context.progress(f"drop-blocks: comparing what {len(plan.blocks)} blocks read and give")
        alike = likeness(artifact, plan.blocks, samples, context)
        gone: frozenset[Block] = frozenset()
        while candidates := plan.candidates(gone):
            changed = {unit: sum(1 - alike[block.name] for block in unit if block not in gone) for unit in candidates}
            best = min(candidates, key=lambda unit: changed[unit] / plan.cost(unit, gone))
            gone = plan.with_nested({*gone, *best})
        return gone, "by how alike they leave what they read (cosine)"


@dataclass
class Plan:
    """What may still go. `costs`: of nodes, by name; `count` blocks go, or a share `ratio` of what all cost."""

    blocks: Sequence[Block]
    units: Sequence[Unit]
    costs: dict[str, float]
    count: int | None
    ratio: float
    total: float = field(init=False)

    def __post_init__(self) -> None:
        self.total = self._cost_of(self.blocks)
        # What nothing is known to cost isn't free: one part in a thousand of an average block.
        self.least = 1e-3 * self.total / len(self.blocks) or 1.0

    def _cost_of(self, blocks: Any) -> float:
        names = {name for block in blocks for name in block.nodes}
        return sum(self.costs.get(name, 0.0) for name in names)

    def cost(self, unit: Unit, gone: frozenset[Block]) -> float:
        """What dropping a unit saves beyond what is gone."""
        return max(self._cost_of({*gone, *unit}) - self._cost_of(gone), self.least)

    def share(self, gone: frozenset[Block]) -> float:
        """Of what all blocks cost."""
        return self._cost_of(gone) / self.total if self.total else len(gone) / len(self.blocks)

    def with_nested(self, gone: set[Block]) -> frozenset[Block]:
        """With the blocks inside them, which go too."""
        return frozenset(block for block in self.blocks if block in gone or any(one.contains(block) for one in gone))

    def candidates(self, gone: frozenset[Block]) -> list[Unit]:
        """Units that may go next; none once enough is gone."""
        return [unit for unit in self.units if not gone.issuperset(unit) and self._fits(unit, gone)]

    def _fits(self, unit: Unit, gone: frozenset[Block]) -> bool:
        after = self.with_nested({*gone, *unit})
        if self.count is not None:
            return len(after) <= self.count
        # Whichever is nearer: with it or without.
        return (self.share(gone) + self.share(after)) / 2 <= self.ratio


def _costs(artifact: Artifact, blocks: Sequence[Block], context: Context) -> dict[str, float]:
    """Seconds of each node on the backend, or its multiplications."""
    graph: Any = artifact.model.graph
    try:
        profile = context.profile(artifact)
    except BackendError:
        profile = []
    if profile:
        return _evened(blocks, graph, by_product(graph, [node.name for node in graph], profile))
    return by_product(graph, [node.name for node in graph if node.op_type in PRODUCTS and node.domain == ""], [])


def _evened(blocks: Sequence[Block], graph: Any, costs: dict[str, float]) -> dict[str, float]:
    """The same with one cost, the median, for all blocks that do the same: what else their costs differ by is noise, which would
    decide which of them goes."""
    nodes = {node.name: node for node in graph}
    alike: dict[Any, list[Block]] = {}
    for block in blocks:
        if not any(block.contains(other) for other in blocks):
            work = sorted(
                (nodes[name].op_type, str([dims(value) for value in nodes[name].inputs])) for name in block.nodes
            )
            alike.setdefault(tuple(work), []).append(block)
    evened = dict(costs)
    for several in alike.values():
        middle = statistics.median(sum(costs[name] for name in block.nodes) for block in several)
        for block in several:
            evened.update(dict.fromkeys(block.nodes, middle / len(block.nodes)))
    return evened


def _left(left: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Additions that stay, by reason; shapes that the reason names are those of the first."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for name, reason in left:
        alike.setdefault(reason.partition("[")[0], []).append((name, reason))
    for several in sorted(alike.values(), key=len, reverse=True):
        names = ", ".join(name for name, _ in several[:NAMED])
        yield f"{len(several)} left: {several[0][1]} ({names}{', …' if len(several) > NAMED else ''})"
