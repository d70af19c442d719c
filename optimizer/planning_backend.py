"""What planning finds out on one backend: costs of the lossless graph and its forms in int8, measured beside each other, a cost
model fitted to its operations, and how far rounding a layer moves the outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from perwatt import choices, registry
from perwatt.artifact import Artifact, Step
from perwatt.choices import Space
from perwatt.contract import Capabilities, Context, QuantizationStyle
from perwatt.cost_model import CostModel, Estimate, Sample, Shapes
from perwatt.errors import PerwattError
from perwatt.measuring import SCREENING
from perwatt.patterns import is_stored
from perwatt.plan import Factors, Layer, Place, product
from perwatt.recipe import PassStep

T = TypeVar("T")
PROFILE_S, ROUNDING_S, DAMAGES_S = 4.0, 3.0, 3.0
"""What a profile, rounding to int8 and getting damages ready take, before one of them was seen."""
ROUNDED_ON, DAMAGED_ON = 8, 8
"""Samples. Ranges make no difference to the cost, and hardly any to which layer is the most sensitive."""
PASSES = 25
"""How many inferences of the backend a sample's damage takes in torch, about: forward with every layer twice, backward four
times."""
WINDOW_S = 1.0
"""What a profile, or a graph among others, is measured for; the rest is starting and compiling."""
ALIKE = 0.15
"""Relative standard deviation of what was not measured, but something much like it."""
IN_INT8, ALL_IN_INT8, CHEAPEST = "products in int8", "all in int8", "the cheapest of each"
NO_INT8 = Capabilities(quantization_styles=(QuantizationStyle("symmetric", "int8", "int8", True, True),))
"""How layers are rounded where the backend has no int8: how sensitive they are is still of interest."""


def form_of(step: PassStep) -> str | None:
    """Which of the forms in int8 an alternative comes to; None for what is something else."""
    if step.name == "assign-precision":
        return CHEAPEST
    if step.name != "quantize-int8":
        return None
    # NNCF quantizes additions and poolings, too.
    everything = step.settings.get("operators") == "all" or step.settings.get("quantizer") == "nncf"
    return ALL_IN_INT8 if everything else IN_INT8


class Steps:
    """Takes the steps of planning while there is time. `spent`: seconds so far; `seen`: the most that a unit of a kind took."""

    def __init__(self, most_s: float, progress: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.most_s, self.progress, self.clock = most_s, progress, clock
        self.spent = 0.0
        self.seen: dict[str, float] = {}
        self.left_out: list[str] = []

    def take(self, what: str, kind: str, guess_s: float, work: Callable[[], T], units: int = 1) -> T | None:
        """What `work` gives; None where there is no time for it or it fails. A unit of that kind is taken to need `guess_s`, as
        long as none was seen; what is begun is not broken off."""
        expected = self.seen.get(kind, guess_s) * units
        if expected and self.spent + expected > self.most_s:
            left = max(0.0, self.most_s - self.spent)
            self.left_out.append(
                f"{what}: about {expected:.0f} s, and {left:.0f} s of {self.most_s:.0f} s are left for it"
            )
            return None
        self.progress(what)
        start = self.clock()
        try:
            return work()
        except PerwattError as error:
            self.left_out.append(f"{what}: {error}")
        except Exception as error:
            # A model may be one that nobody thought of: that costs the step, not the search.
            self.left_out.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        finally:
            took = self.clock() - start
            self.spent += took
            self.seen[kind] = max(self.seen.get(kind, 0.0), took / units)
        return None


class There:
    """What is found out on one backend. `refused`: alternatives that it, or the model, has no use for; `forms` in int8;
    `measured`: seconds of an inference by graph; `profiled`: of the lossless one, by its operations; `seconds`: by its nodes, of
    which shares are taken."""

    def __init__(
        self,
        space: Space,
        name: str,
        source: Artifact,
        lossless: Artifact,
        context: Context,
        shapes: Shapes,
        steps: Steps,
        slow: bool = False,
    ) -> None:
        from perwatt.passes._naming import with_names

        self.space, self.name, self.source, self.context = space, name, source, context
        self.lossless = with_names(lossless, Step("plan"))
        self.shapes, self.steps, self.slow = shapes, steps, slow
        self.refused = {
            index: "; ".join(reasons)
            for index, step in enumerate(space.alternatives)
            if step is not None and (reasons := list(registry.bind(step).requires(self.lossless, context)))
        }
        self.forms: dict[str, Artifact] = {}
        self.rounded: Any = None
        self.damages: dict[str, float] = {}
        self.unmoved = "layers were not rounded"
        self.measured: dict[str, float] = {}
        self.model: CostModel | None = None
        self.profiled = 0.0
        self.seconds: dict[str, float] = {}
        self.off = ALIKE
        """What a share of the cost is off by, relatively."""

    # Looking --------------------------------------------------------------------------------------------------------------

    def look(self, sensitive: bool) -> None:
        """Everything that there is time for, what says most first; `sensitive`: how sensitive layers are, too."""
        if self.slow:
            self.steps.left_out.append(f"{self.name} compiles for long: nothing is measured there before the search")
        profile = [] if self.slow else self._profiled("the lossless graph", self.lossless)
        if sensitive or not self.slow:
            self.steps.take(f"rounding to int8 for {self.name}", "rounding", ROUNDING_S, self._round)
        self.profiled = sum(cost.seconds for cost in profile)
        if sensitive and self.rounded is not None:
            self._damage()
        if not self.slow:
            self._measure()
        samples = [Sample(self.lossless, profile, self.measured.get("lossless"))]
        form = min(self.measured.keys() & self.forms.keys(), key=lambda form: self.measured[form], default=None)
        if form is not None and profile:
            theirs = self._profiled(form, self.forms[form])
            samples += [Sample(self.forms[form], theirs, self.measured[form])] if theirs else []
        self.steps.take(f"fitting the cost model of {self.name}", self.name, 0.0, lambda: self._fit(samples))

    def _profiled(self, what: str, artifact: Artifact) -> Any:
        work = functools.partial(self.context.profile, artifact)
        return self.steps.take(f"profiling {what} on {self.name}", "profile", PROFILE_S, work) or []

    def _fit(self, samples: Sequence[Sample]) -> None:
        self.model = CostModel.fit(samples, self.shapes)
        # Shares of the cost go by multiplications where nothing was measured.
        shares = self.model or CostModel.fit([Sample(self.lossless, (), 1.0)], self.shapes)
        found = None if shares is None else shares.seconds(self.lossless)
        if shares is not None and found is not None and found.value:
            self.seconds = shares.per_node(self.lossless) or {}
            self.off = max(found.spread / found.value, SCREENING.tight)

    def _round(self) -> None:
        """The forms in int8 that alternatives come to: quickly, since what they cost goes by the graph."""
        from perwatt.passes._quantized import quantized_already
        from perwatt.passes._quantizer import STRENGTHS, Wish, integer_styles, quantize

        if reason := quantized_already(self.lossless):
            self.unmoved = reason
            return
        style = (integer_styles(self.context.capabilities) or integer_styles(NO_INT8))[0]
        used = {
            form_of(step)
            for i, step in enumerate(self.space.alternatives)
            if step is not None and i not in self.refused
        }
        wanted = {IN_INT8: (), **({ALL_IN_INT8: style.operators} if style.operators and ALL_IN_INT8 in used else {})}
        for form, operators in wanted.items():
            # As whoever takes the time to compare would do it: without outliers in the activations of matrix products.
            wish = Wish(style, (), operators, "minmax", STRENGTHS[-1], False, ROUNDED_ON)
            found = quantize(self.lossless, self.context, wish)
            if found is None:
                self.unmoved = "there is no product to round"
                return
            self.rounded = self.rounded or (found, wish)
            if used & {IN_INT8, ALL_IN_INT8, CHEAPEST}:
                self.forms[form] = found.artifact

    def _damage(self) -> None:
        """How far rounding each layer moves the outputs."""
        about = DAMAGES_S + DAMAGED_ON * PASSES * self.profiled
        found = self.steps.take("finding out how sensitive layers are", "damages", about, self._damages)
        self.damages = found or {}
        self.unmoved = "" if found else self.steps.left_out.pop().partition(": ")[2]

    def _damages(self) -> dict[str, float]:
        from perwatt import calibration, sensitivity
        from perwatt.passes._quantizer import layers_twice

        found, wish = self.rounded
        samples = calibration.some(found.base, self.context.samples("calibrate"), DAMAGED_ON, self.context.seed)
        twice, pairs = layers_twice(found, wish)
        outputs = [str(value.name) for value in found.base.model.graph.outputs]
        return sensitivity.damages(twice, pairs, outputs, calibration.calls(found.base, samples)[:1], self.context.seed)

    def _measure(self) -> None:
        """The lossless graph beside its forms in int8 and beside what it was made from, interleaved."""
        first, *others = [*self.forms, "original"]
        for several in ([first], others):
            graphs = [*several, "lossless"] if several else []
            named = {**self.forms, "original": self.source, "lossless": self.lossless}
            work = functools.partial(self.context.measure, [named[one] for one in graphs])
            # Each is started and compiled as for a profile.
            guess = self.steps.seen.get("profile", PROFILE_S) + WINDOW_S
            what = f"measuring {', '.join(several)} beside the lossless graph on {self.name}"
            found = self.steps.take(what, "graph", guess, work, len(graphs)) if graphs else None
            for one, seconds in zip(graphs, found or (), strict=False):
                # On the scale of the first time.
                scale = self.measured.get("lossless", found[-1]) / found[-1] if found else 1.0
                self.measured.setdefault(one, seconds * scale)

    # Telling --------------------------------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """Every product with stored weights, the most sensitive first, else the most costly."""
        from perwatt.passes._placement import products

        total = sum(self.seconds.values())
        found = []
        for one in products(self.lossless.model.graph):
            name = str(one.node.name)
            damage = self.damages.get(name)
            share = self.seconds.get(name, 0.0) / total if total else None
            if is_stored(one.weight):
                found.append(Layer(name, one.kind, None if damage is None else math.sqrt(damage), share))
        return sorted(found, key=lambda layer: (-(layer.movement or 0.0), -(layer.share or 0.0)))

    def tell(self, factors: Factors, originals: Mapping[Place, float]) -> None:
        """What was found, as factors."""
        cleaned = self._to("lossless", "original") or Estimate(1.0, SCREENING.tight)
        for floating in self.space.places[self.name]:
            if math.isfinite(ratio := originals.get((self.name, floating), math.inf)):
                factors.places[self.name, floating] = product(Estimate(ratio, 0.0), cleaned)
        for index, step in enumerate(self.space.alternatives):
            if step is not None:
                factors.alternatives[self.name, index] = self.refused.get(index) or self._alternative(step, originals)
                if form_of(step) is not None:
                    factors.rounded.add((self.name, index))
        usual = self.space.usual()
        for one in self.space.removals:
            name = one.step.name
            for index in range(1, len(one.options) + 1):
                steps = [step for step in self.space.steps({**usual, name: index}) if step.name == name]
                factors.removals[self.name, name, index] = self._left(name, steps)

    def _to(self, graph: str, other: str) -> Estimate | None:
        """What one graph costs ÷ another; the original is the lossless graph where there was nothing to clean."""
        costs = {"original": self.measured.get("lossless"), **self.measured}
        one, two = costs.get(graph), costs.get(other)
        return Estimate(one / two, SCREENING.tight * one / two) if one and two else None

    def _alternative(self, step: PassStep, originals: Mapping[Place, float]) -> Estimate | str:
        form = form_of(step)
        if form is None:
            return self._in_half(step, originals)
        known = {one: found for one in self.forms if (found := self._to(one, "lossless")) is not None}
        if not known:
            return f"int8 was not measured on {self.name}"
        if form == CHEAPEST:
            # Both, and floating point, are among what it chooses from; mixtures may cost less.
            least = min(1.0, *(one.value for one in known.values()))
            return Estimate(least, ALIKE * least)
        found = known.get(form) or known[IN_INT8]
        same = form in known and step.settings.get("quantizer", "own") == "own"
        return found if same else Estimate(found.value, ALIKE * found.value)

    def _in_half(self, step: PassStep, originals: Mapping[Place, float]) -> Estimate | str:
        """Casts in the graph cost about what the backend does where it is told to use half."""
        home = originals.get((self.name, self.space.places[self.name][0]), math.inf)
        half = [
            originals.get((self.name, one), math.inf) for one in self.space.places[self.name] if one in ("bf16", "f16")
        ]
        if step.name != "cast-half" or not half or not math.isfinite(half[0] / home):
            return f"nothing was measured that is like {choices.PRECISION} {step.name}"
        return Estimate(half[0] / home, ALIKE * half[0] / home)

    def _left(self, name: str, steps: Sequence[PassStep]) -> Estimate | str:
        """What is left of the cost once so much has been removed; of several rounds the last says how much in all."""
        saved = {"drop-blocks": self._blocks, "prune-channels": self._channels}.get(name)
        ratio = steps[-1].settings.get("ratio")
        if saved is None or ratio is None:
            return f"nobody knows beforehand what {name} saves"
        if not self.seconds:
            return f"operations on {self.name} were not measured"
        found = saved(float(ratio))
        return found if isinstance(found, str) else Estimate(1 - found.value, found.spread)

    def _blocks(self, ratio: float) -> Estimate | str:
        """A share of what all residual blocks cost, as nearly as whole ones allow."""
        count, share = self._found_blocks
        if not count:
            return "there is no residual block that could go"
        # As if all cost the same: one more goes where that is no further off than to leave it.
        going = math.floor(ratio * count + 0.5)
        uneven = share / count / math.sqrt(12) if going else 0.0
        return Estimate(share * going / count, math.hypot(uneven, self.off * share * going / count))

    @functools.cached_property
    def _found_blocks(self) -> tuple[int, float]:
        """How many, and their share of the cost."""
        from perwatt.passes._residual_blocks import residual_blocks

        blocks = residual_blocks(self.lossless).found
        inside = {name for block in blocks for name in block.nodes}
        return len(blocks), sum(self.seconds.get(name, 0.0) for name in inside) / sum(self.seconds.values())

    def _channels(self, ratio: float) -> Estimate | str:
        """A share of those that may go: in all that makes and reads them, and what passes them on."""
        coupling, groups, multiple = self._found_channels
        if not groups:
            return f"no layer has so many channels that may go that a multiple of {multiple} stays"
        lengths = coupling.lengths()

        def left(value: str, axis: int) -> float:
            going = [at.size for group in groups if (at := group.positions(value, axis)) is not None]
            return 1 - ratio * sum(going) / lengths[value, axis] if going else 1.0

        kept = {p.node: left(*p.made) * left(*p.read) for p in coupling.products}
        for node in self.lossless.model.graph:
            out = node.outputs[0]
            axes = range(coupling.rank(out) or 0)
            kept.setdefault(node.name, math.prod(left(str(out.name), axis) for axis in axes))
        saved = sum(seconds * (1 - kept.get(name, 1.0)) for name, seconds in self.seconds.items())
        share = saved / sum(self.seconds.values())
        return Estimate(share, math.hypot(ALIKE, self.off) * share)

    @functools.cached_property
    def _found_channels(self) -> tuple[Any, list[Any], int]:
        """All couplings, those that may be narrowed so that it pays, and to a multiple of how many."""
        from perwatt.coupling import couple
        from perwatt.passes._channel_allocation import sizes
        from perwatt.passes.prune_channels import PruneChannels

        coupling, multiple = couple(self.lossless), PruneChannels()._multiple(self.context)
        return coupling, [group for group in coupling.groups if len(sizes(group, multiple)) > 1], multiple

    def an_inference(self) -> float:
        """Seconds of the lossless graph; 0 where nobody knows."""
        return self.measured.get("lossless") or self.profiled
