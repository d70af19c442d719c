"""Take channels out of a network: of convolutions, of what is between two matrix products, heads of attention.

Weights get smaller, so everything runs faster, in any type, on any backend. What lives and dies together is found in the graph
itself (`perwatt.coupling`): no source code is needed, and residual additions, concatenations, grouped convolutions and shared
heads are cut through consistently. What can't be cut is left, with its reason.

    Conv(64 → 256) → Relu → Conv(256 → 64)      becomes      Conv(64 → 192) → Relu → Conv(192 → 64)

Numbers of channels decide the speed: matrix units calculate in tiles, and what is left of a tile costs a whole one. So only
sizes that are multiples of what pays on this backend are left over (64 in int8 with AMX, 16 without), and layers too narrow for
that stay as they are; for those, drop-blocks is the better pass. `multiple: finer` cuts them, too, where that is measured to pay
in the type that the model has now: in int8 it seldom does.

Which channels go is decided by what the model's outputs lose without them (first-order Taylor, on calibration samples, without
labels), and how many go from which layer by that and by what the layer costs on the backend, from its own profile. What is left
makes up for what went by least squares. The result is measured against the model as it was; where it isn't faster, nothing is
cut.

Lossy: accuracy decides. Follow it with `recover`, which learns back what was lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perwatt import calibration
from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.coupling import couple
from perwatt.coupling_places import Coupling, Group, Product
from perwatt.data import Samples
from perwatt.errors import BackendError, PassError
from perwatt.passes import _channel_importance as importance
from perwatt.passes._channel_allocation import Costs, cheapest, sizes, uniform
from perwatt.passes._channel_compensation import biased, compensated, lost_positions
from perwatt.passes._channel_importance import Importance, Scores
from perwatt.passes._channel_moments import Moments, channel_moments
from perwatt.passes._layer_costs import by_product
from perwatt.passes._naming import matching, with_names
from perwatt.passes._quantized import quantized_already
from perwatt.passes._weights import product_from
from perwatt.patterns import is_stored, stored
from perwatt.slicing import cut

FASTER = 0.99
"""What isn't measured to cost less than this share of before isn't faster."""
LEAST = 0.25
"""The share of a layer that stays, at the least: what one channel is worth is told by what the others still do."""
TOLD = 6
"""Groups that the ledger names."""
FINEST = 4
"""What is left of a narrow layer is a multiple of this many channels at least."""
WORTH = 0.3
"""A narrow layer has to save this share of what its weights would let expect."""
APART = 6
"""So many groups at most are measured one by one."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """`ratio`: the share of channels that go (search: 0.05 … 0.6). Sizes are multiples of what pays, so it is met about.
    `allocation`: `uniform` takes that share of every layer; `global` saves as much time as that would, where it does least
    damage (search: both).
    `importance`: `taylor`, `reconstruction`, `activation` or `magnitude` (search: all).
    `multiple`: sizes are multiples of this many channels; `auto`: what the backend names for the type it is quickest in;
    `finer`: that, and less for layers too narrow for it, where it pays (search: auto, finer, 8, 16, 32, 64).
    `compensate`: adapt the weights behind by least squares.
    `exclude`: shell patterns of node names: what these products make stays whole.
    `subset_size`: calibration samples used at most. `judged_on`: samples that Taylor's importance is found on."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("drop-blocks",)
    in_search: ClassVar[bool] = True
    searched: ClassVar = {"ratio": (0.07, 0.15, 0.3, 0.45, 0.6), "multiple": ("auto", "finer")}

    ratio: float = 0.3
    allocation: Literal["global", "uniform"] = "global"
    importance: Importance = "taylor"
    multiple: int | Literal["auto", "finer"] = "auto"
    compensate: bool = True
    exclude: tuple[str, ...] = ()
    subset_size: int = 128
    judged_on: int = 32

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if reason := quantized_already(artifact):
            yield reason

    def check_settings(self) -> None:
        if not 0 < self.ratio < 1:
            raise PassError(f"a ratio of {self.ratio:g}: it must lie between 0 and 1", fix="ratio: 0.3")
        if isinstance(self.multiple, int) and self.multiple < 1:
            raise PassError(f"a multiple of {self.multiple}: it must be 1 or more", fix="multiple: 8")

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        self.check_settings()
        named = with_names(artifact, self.step([]))
        excluded = set(matching(self.exclude, named.model.graph))
        coupling = couple(named)
        multiple = self._multiple(context)
        groups = [group for group in coupling.groups if not excluded & {product.node for product in group.makers}]
        work = _Work(
            named, coupling, context, calibration.some(named, self._samples(context), self.subset_size, context.seed)
        )
        found = [(group, sizes(group, self._multiple_for(group, multiple))) for group in groups]
        wide = {group: steps for group, steps in found if len(steps) > 1}
        narrow = {group: steps for group, steps in wide.items() if len(sizes(group, multiple)) < 2}
        # Where a layer is finer than hardware likes, its neighbours are too, so what a cut saves is not proportional to it.
        useless = work.useless(wide if narrow and len(wide) <= APART else narrow)
        wide = {group: steps for group, steps in wide.items() if group not in useless}
        left = Counter(one.reason for one in coupling.left)
        left["excluded"] = len(coupling.groups) - len(groups)
        finer = " (multiple: finer)" if self.multiple == "auto" else ""
        left["cutting it finer saves next to nothing"] = len(useless)
        left[f"too narrow to be cut to a multiple of {multiple} channels{finer}"] = (
            len(groups) - len(wide) - len(useless)
        )
        notes = [f"{times} left: {reason}" for reason, times in left.most_common() if times]
        if not wide:
            return artifact, ["no channels can be taken out so that it pays", *notes]
        scores, how = self._scores(work, list(wide))
        kept = self._allocated(work, wide, scores)
        units = {
            group: scores[group].argsort(kind="stable")[: group.size - kept[group]].tolist()
            for group in wide
            if kept[group] < group.size
        }
        if not units:
            least = min(self._multiple_for(group, multiple) for group in wide)
            return artifact, [f"a share of {self.ratio:g} is less than a step of {least} channels anywhere", *notes]
        after, before = work.cut(units, self.compensate), named
        faster = _faster(before, after, context)
        if faster is not None and faster > FASTER:
            return artifact, [f"not cut: measured {faster:.2f} × the cost of the model as it is", *notes]
        if context.made_up:
            notes.insert(0, calibration.MADE_UP)
        changes = [*_words(units, how), *([f"measured {faster:.2f} × the cost"] if faster is not None else []), *notes]
        return artifact.after(after.edit(), self.step(changes)), changes

    def _samples(self, context: Context) -> Samples:
        samples = context.samples("calibrate")
        if not len(samples):
            raise PassError("there are no samples to find unimportant channels on")
        return samples

    def _multiple(self, context: Context) -> int:
        if isinstance(self.multiple, int):
            return self.multiple
        # Precision comes behind: sizes have to suit the narrowest type that the model may get.
        known = context.capabilities.channel_multiples
        quantized = [
            style.weight_type for style in context.capabilities.quantization_styles if style.activation_type != "float"
        ]
        wanted = [kind for kind in (*quantized, *context.capabilities.half_types, "float32") if kind in known]
        return known[wanted[0]] if wanted else 8

    def _multiple_for(self, group: Group, multiple: int) -> int:
        """What the sizes of a group are multiples of: less than usual where it has no two such sizes."""
        while self.multiple == "finer" and multiple > FINEST and len(sizes(group, multiple)) < 2:
            multiple //= 2
        return multiple

    def _scores(self, work: _Work, groups: Sequence[Group]) -> tuple[Scores, str]:
        if self.importance == "magnitude":
            return importance.by_magnitude(groups, work.weights), "by magnitude"
        if self.importance == "taylor":
            try:
                return importance.by_taylor(
                    groups, work.contributions(groups, self.judged_on)
                ), "by what the outputs lose"
            except BackendError as error:
                return self._by_moments(work, groups), f"by reconstruction, as {error}"
        return self._by_moments(work, groups), f"by {self.importance}"

    def _by_moments(self, work: _Work, groups: Sequence[Group]) -> Scores:
        moments = work.moments([product for group in groups for product in group.readers])
        found = importance.by_activation if self.importance == "activation" else importance.by_reconstruction
        return found(groups, work.weights, moments)

    def _allocated(self, work: _Work, groups: Mapping[Group, list[int]], scores: Scores) -> dict[Group, int]:
        if self.allocation == "uniform":
            return uniform(groups, self.ratio)
        costs = Costs(work.coupling, work.coupling.products, work.costs())
        wanted = Costs(work.coupling, work.coupling.products, costs.seconds)
        for group in groups:
            # As if every size were as good as any.
            wanted.without(group, self.ratio * group.size, take=True)
        return cheapest(groups, scores, costs, wanted.total(), min(LEAST, 1 - self.ratio))


@dataclass
class _Work:
    """A model that is being pruned: what is measured and calculated of it, once."""

    artifact: Artifact
    coupling: Coupling
    context: Context
    samples: Samples

    def __post_init__(self) -> None:
        graph = self.artifact.model.graph
        self.nodes = {node.name: node for node in graph}
        named = {product.weight for product in self.coupling.products}
        self.weights = {v.name: stored(v) for node in graph for v in node.inputs if v is not None and v.name in named}
        self._moments: dict[str, Moments] = {}

    def contributions(self, groups: Sequence[Group], count: int) -> dict[str, Any]:
        """By the first order of Taylor: see `perwatt.sensitivity`."""
        from perwatt import sensitivity

        places = dict(product.data for group in groups for product in group.readers)
        few = calibration.some(self.artifact, self.samples, count, self.context.seed)
        self.context.progress(f"prune-channels: looking for channels that matter least, in {len(groups)} groups")
        return sensitivity.contributions(
            self.artifact, places, calibration.calls(self.artifact, few, 8), self.context.seed
        )

    def moments(self, products: Sequence[Product]) -> dict[str, Moments]:
        """Second moments of what these products read."""
        wanted = dict(product.data for product in products)
        shapes = self.coupling.shapes()
        missing = {name: (axis, len(shapes[name])) for name, axis in wanted.items() if name not in self._moments}
        if missing:
            self.context.progress(f"prune-channels: correlations of the channels of {len(missing)} values")
            self._moments |= channel_moments(self.artifact, missing, self.samples, self.context)
        return self._moments

    def costs(self) -> dict[str, float]:
        """Seconds of each product on the backend, or its multiplications."""
        names = [product.node for product in self.coupling.products]
        try:
            profile = self.context.profile(self.artifact)
        except BackendError:
            profile = []
        return by_product(self.artifact.model.graph, names, profile)

    def useless(self, groups: Mapping[Group, list[int]]) -> set[Group]:
        """Those that save next to nothing when they are cut by one step: each by itself or, where there are many, all at once."""
        several = [[group] for group in groups] if len(groups) <= APART else [list(groups)]
        if not groups:
            return set()
        self.context.progress(f"prune-channels: measuring what {len(groups)} layers would save")
        units = [{group: range(groups[group][1], group.size) for group in one} for one in several]
        try:
            whole, *costs = self.context.measure([self.artifact, *(self.cut(one, compensate=False) for one in units)])
        except BackendError:
            # Nobody knows, so it is left to what the backend names.
            return set(groups)
        seconds, found = self.costs(), set[Group]()
        for one, cost in zip(units, costs, strict=True):
            expected = Costs(self.coupling, self.coupling.products, seconds)
            before = expected.total()
            for group, gone in one.items():
                expected.without(group, len(gone), take=True)
            if 1 - cost / whole < WORTH * (1 - expected.total() / before):
                found |= set(one)
        return found

    def cut(self, units: Mapping[Group, Sequence[int]], compensate: bool) -> Artifact:
        """The model without these units."""
        source = self._compensated(units) if compensate else self.artifact
        return source.after(cut(source, self.coupling, units), source.steps[-1])

    def _compensated(self, units: Mapping[Group, Sequence[int]]) -> Artifact:
        import onnx_ir as ir

        readers = list(dict.fromkeys(product for group in units for product in group.readers))
        alone = [product for product in readers if self._plain(product)]
        moments = self.moments(alone)
        model = self.artifact.edit()
        values = {v.name: v for node in model.graph for v in node.inputs if v is not None and is_stored(v)}
        nodes = {node.name: node for node in model.graph}
        for product in alone:
            found = product_from(nodes[product.node])
            centred = found.bias is not None and is_stored(found.bias) and len(list(found.bias.uses())) == 1
            made = compensated(
                product, self.weights[product.weight], moments[product.data[0]], lost_positions(product, units), centred
            )
            if made is None:
                continue
            weight, shift = made
            values[product.weight].const_value = ir.Tensor(weight, name=product.weight)
            if centred:
                bias = values[found.bias.name]
                bias.const_value = ir.Tensor(biased(stored(bias), shift), name=bias.name)
        return self.artifact.after(model, self.artifact.steps[-1])

    def _plain(self, product: Product) -> bool:
        """Whether a product reads each channel with weights of its own, which are nobody else's."""
        node = self.nodes[product.node]
        weight: Any = node.inputs[1]
        if weight.producer() is not None or len(list(weight.uses())) != 1:
            return False
        lengths = self.coupling.lengths()
        return lengths.get(product.read) == lengths.get(product.data)


def _faster(before: Artifact, after: Artifact, context: Context) -> float | None:
    """What the cut model costs of the whole one; None where nothing can be measured."""
    try:
        whole, pruned = context.measure([before, after])
    except BackendError:
        return None
    return pruned / whole


def _words(units: Mapping[Group, Sequence[int]], how: str) -> list[str]:
    gone, of = sum(map(len, units.values())), sum(group.size for group in units)
    largest = sorted(units, key=lambda group: -len(units[group]) / group.size)[:TOLD]
    named = [f"{group.name} {group.size} → {group.size - len(units[group])}" for group in largest]
    more = f" and {len(units) - TOLD} more" if len(units) > TOLD else ""
    return [f"{gone} of {of} channels and heads in {len(units)} groups, {how}: {', '.join(named)}{more}"]
