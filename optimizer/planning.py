"""What a search will try, what that should bring and how long it takes, found out before it starts.

On each backend the lossless graph and its forms in int8 are measured against each other and profiled. From that a cost model is
fitted (`cost_model`), and every choice gets an estimate: the product of what its backend, its alternative and its removals make
of the cost, each by itself. Blocks that go take their share of the cost with them; channels that go take it from all that makes,
carries and reads them (`coupling`). How far rounding a layer moves the outputs is found as `assign-precision` finds it.

    found = plan(space, source, pipelines, originals=…, timing=…, limits=Limits(whole=600, search=420, minutes=1.5))
    found.words()                 # for a person, a screenful at most
    found.estimate(values)        # cost ÷ the original's; None where part of it is not known

Planning takes a twentieth of the time budget and a minute at most; passes that the search runs anyway don't count. A step that
would take longer is left out, and named. Estimates say what to try first and decide nothing: what is fused, and what a layer
takes once its neighbours are others, no product of factors tells.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from perwatt import choices, plan_words, registry
from perwatt.artifact import Artifact, Step
from perwatt.backends import Backend
from perwatt.bundle import write_text
from perwatt.candidates import Candidate, cost_of
from perwatt.choices import BACKEND, FLOATING, PRECISION, Space, Values
from perwatt.contract import Capabilities, Context, QuantizationStyle, Stage
from perwatt.cost_model import CostModel, Estimate, Sample, Shapes, typical_shapes
from perwatt.data import Samples
from perwatt.errors import PerwattError
from perwatt.measuring import SCREENING
from perwatt.patterns import is_stored
from perwatt.pipeline import Pipeline
from perwatt.preparation import Prepared
from perwatt.recipe import OneOf, PassStep
from perwatt.screening import Screening
from perwatt.trials import walk

T = TypeVar("T")
Place = tuple[str, str]
"""Backend and floating precision."""

SHARE, MOST_S = 0.05, 60.0
"""Of the time budget, and at most, what planning takes."""
PROFILE_S, ROUNDING_S, DAMAGES_S = 4.0, 3.0, 3.0
"""What a profile, rounding to int8 and getting damages ready take, before one of them was seen."""
ROUNDED_ON, DAMAGED_ON = 8, 8
"""Samples. Ranges make no difference to the cost, and hardly any to which layer is the most sensitive."""
PASSES = 25
"""How many inferences of the backend a sample's damage takes in torch, about: forward with every layer twice, backward four
times."""
WINDOW_S = 1.0
"""What a profile, or a graph among others, is measured for; the rest is starting and compiling."""
RUNS, RUNS_COMPARING = 3, 12
"""Programs that a lossy pass has run, about: to calibrate and to be verified; one that compares graphs on the backend."""
TRIALS_IN_ROUND = 4
"""Of a search, one of which learns."""
ALIKE = 0.15
"""Relative standard deviation of what was not measured, but something much like it."""
IN_INT8, ALL_IN_INT8, CHEAPEST = "products in int8", "all in int8", "the cheapest of each"
NO_INT8 = Capabilities(quantization_styles=(QuantizationStyle("symmetric", "int8", "int8", True, True),))
"""How layers are rounded where the backend has no int8: how sensitive they are is still of interest."""


@dataclass(frozen=True)
class Limits:
    """What a search may take, in seconds from now on; None: nothing limits it. `whole`: the run's budget; `search`: until no
    further trial is begun; `behind`: what follows that, in order. `minutes`: the usual time of a round of learning, None as the
    passes have it; `trials`: at most so many."""

    whole: float | None = None
    search: float | None = None
    behind: Mapping[str, float | None] = field(default_factory=dict)
    minutes: float | None = None
    trials: int | None = None


@dataclass(frozen=True)
class Layer:
    """A product with stored weights. `movement`: how far rounding it to int8 moves the outputs, relative to them; `share`: of
    the cost where the original runs best."""

    name: str
    kind: str
    movement: float | None
    share: float | None


@dataclass(frozen=True)
class Foreseen:
    """A choice before it is tried. `ratio`: its cost ÷ the original's; where that is not known, `why` says why. `seconds` to try
    it. `removal`: what is taken away in it, and `amount` how much, in words."""

    values: Values
    choice: str
    ratio: Estimate | None
    seconds: float
    why: str = ""
    removal: str = ""
    amount: str = ""


@dataclass(frozen=True)
class Part:
    """A stage of the search, and the seconds that it takes; None where nothing limits it."""

    name: str
    seconds: float | None


@dataclass
class Factors:
    """What the parts of a choice make of the cost, each by itself; where that is not known, why. `places`: the lossless graph
    there ÷ the original where it runs best; `alternatives` (backend, index) ÷ the lossless graph; `removals` (backend, pass,
    index) ÷ the graph before. `rounded`: alternatives that leave too little in floating point for its precision to matter."""

    space: Space
    places: dict[Place, Estimate] = field(default_factory=dict)
    alternatives: dict[tuple[str, int], Estimate | str] = field(default_factory=dict)
    removals: dict[tuple[str, str, int], Estimate | str] = field(default_factory=dict)
    rounded: set[tuple[str, int]] = field(default_factory=set)

    def of(self, values: Values) -> Estimate | str:
        """The cost of a choice ÷ the original's, or why nobody knows."""
        parts = list(self._parts(self.space.canonical(values)))
        unknown = [part for part in parts if isinstance(part, str)]
        return "; ".join(dict.fromkeys(unknown)) or product(*(part for part in parts if isinstance(part, Estimate)))

    def _parts(self, values: Values) -> Iterator[Estimate | str]:
        backend, floating = self.space.where(values)
        index = values.get(PRECISION, 0)
        place = backend, self.space.places[backend][0] if (backend, index) in self.rounded else floating
        yield self.places.get(place, f"the original was not measured on {backend} in {place[1]}")
        if index:
            yield self.alternatives.get((backend, index), "it was not looked at")
        for one in self.space.removals:
            if values[one.step.name]:
                key = backend, one.step.name, values[one.step.name]
                yield self.removals.get(key, f"{one.step.name} was not looked at")

    def to_json(self) -> dict[str, Any]:
        """Plain data: each key's parts, then what is known."""
        kept = {name: getattr(self, name) for name in ("places", "alternatives", "removals")}
        told = {name: [[*key, _plain(found)] for key, found in several.items()] for name, several in kept.items()}
        return {**told, "rounded": sorted(self.rounded)}

    @classmethod
    def from_json(cls, space: Space, plain: Mapping[str, Any]) -> Factors:
        """What `to_json` made."""
        kept = {
            name: {tuple(key): _estimate(found) for *key, found in plain[name]}
            for name in ("places", "alternatives", "removals")
        }
        return cls(space, **kept, rounded={(backend, index) for backend, index in plain["rounded"]})


@dataclass
class Plan:
    """A search that has not begun. `layers`: the most sensitive first; `unmoved`: why nothing is known of how sensitive they are;
    `estimates`: every choice by itself, the cheapest first, then each removal on top of the best of them, which is `base`;
    `trials`: about how many fit; `without`: what is not possible, and why; `left_out`: steps of planning that there was no time
    for, or that failed; `models`: what each backend's cost model rests on; `seconds` it took."""

    factors: Factors
    layers: list[Layer] = field(default_factory=list)
    unmoved: str = ""
    estimates: list[Foreseen] = field(default_factory=list)
    base: str = ""
    parts: list[Part] = field(default_factory=list)
    trials: int | None = None
    without: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def estimate(self, values: Values) -> float | None:
        """The cost of a choice ÷ the original's; None where part of it is not known."""
        found = self.factors.of(values)
        return None if isinstance(found, str) else found.value

    def words(self) -> list[str]:
        """For a person: what is worth most first."""
        return plan_words.words(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        listed = {name: [asdict(one) for one in getattr(self, name)] for name in ("layers", "estimates", "parts")}
        told = {name: getattr(self, name) for name in ("unmoved", "base", "trials", "without", "left_out", "models")}
        return {**listed, **told, "factors": self.factors.to_json(), "seconds": round(self.seconds, 1)}

    @classmethod
    def from_json(cls, space: Space, plain: Mapping[str, Any]) -> Plan:
        """What `to_json` made of a plan for the same space."""
        listed: dict[str, Any] = {
            "layers": [Layer(**one) for one in plain["layers"]],
            "estimates": [Foreseen(**{**one, "ratio": _estimate(one["ratio"])}) for one in plain["estimates"]],
            "parts": [Part(**one) for one in plain["parts"]],
        }
        names = ("unmoved", "base", "trials", "without", "left_out", "models", "seconds")
        told: dict[str, Any] = {name: plain[name] for name in names}
        return cls(Factors.from_json(space, plain["factors"]), **listed, **told)


def product(*parts: Estimate) -> Estimate:
    """Of what is off independently."""
    value = math.prod(part.value for part in parts)
    return Estimate(value, value * math.sqrt(sum((part.spread / part.value) ** 2 for part in parts if part.value)))


def _plain(found: Estimate | str) -> dict[str, float] | str:
    return found if isinstance(found, str) else asdict(found)


def _estimate(plain: Any) -> Any:
    """What was an estimate is one again; the rest stays as it is."""
    return Estimate(**plain) if isinstance(plain, dict) else plain


def _form(step: PassStep) -> str | None:
    """Which of the forms in int8 an alternative comes to; None for what is something else."""
    if step.name == "assign-precision":
        return CHEAPEST
    if step.name != "quantize-int8":
        return None
    # NNCF quantizes additions and poolings, too.
    everything = step.settings.get("operators") == "all" or step.settings.get("quantizer") == "nncf"
    return ALL_IN_INT8 if everything else IN_INT8


# A run's plan -------------------------------------------------------------------------------------------------------------


def kept(
    path: Path, space: Space, prepared: Prepared, pipelines: Mapping[str, Pipeline], baseline: Candidate,
    originals: Sequence[Candidate], limits: Limits, progress: Callable[[str], None] = lambda text: None,
) -> Plan:  # fmt: skip
    """The plan in `path`; made anew, and put there, where there is none for this space. A search that goes on, goes on by the
    estimates that it began with."""
    try:
        return Plan.from_json(space, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = of_run(space, prepared, pipelines, baseline, originals, limits, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(made.to_json(), allow_nan=False) + "\n")
    return made


def without_searching(
    steps: Sequence[PassStep | OneOf], prepared: Prepared, screening: Screening, pipeline_for: Callable[[Backend], Pipeline],
    limits: Limits, progress: Callable[[str], None] = lambda text: None,
) -> Plan:  # fmt: skip
    """The plan of a search that will not begin: measures the original, plans, and ends the processes of `screening`."""
    progress("the original")
    try:
        baseline, side, originals = screening.choose_baseline()
        try:
            backends = screening.worth_it(baseline, originals)
            space = choices.space(steps, {backend.name: screening.precisions(backend) for backend in backends})
            pipelines = {backend.name: pipeline_for(backend) for backend in backends}
            return of_run(space, prepared, pipelines, baseline, originals, limits, progress)
        finally:
            side.close()
    finally:
        screening.close()


def of_run(
    space: Space, prepared: Prepared, pipelines: Mapping[str, Pipeline], baseline: Candidate, originals: Sequence[Candidate],
    limits: Limits, progress: Callable[[str], None] = lambda text: None,
) -> Plan:  # fmt: skip
    """The plan of a run's search; `baseline` and `originals` as `Screening.choose_baseline` gives them."""
    known = {
        (one.backend.name, str(one.point.floating_precision)): 1.0 if one is baseline else cost_of(one)
        for one in (*originals, baseline)
    }
    select, roles = prepared.select, prepared.roles
    return plan(
        space, prepared.source, pipelines, originals=known, timing=prepared.samples["timing"], batch=baseline.point.batch,
        judged=0 if select is None else len(select.samples),
        learns=roles.learn is not None or roles.calibrate is not None,
        slow={one.backend.name for one in (*originals, baseline) if one.backend.slow_to_lower}, limits=limits, progress=progress,
    )  # fmt: skip


def plan(
    space: Space, source: Artifact, pipelines: Mapping[str, Pipeline], *, originals: Mapping[Place, float], timing: Samples,
    batch: int = 1, judged: int = 0, learns: bool = False, slow: Collection[str] = (), limits: Limits | None = None,
    progress: Callable[[str], None] = lambda text: None, clock: Callable[[], float] = time.monotonic,
) -> Plan:  # fmt: skip
    """Look at the model on the backends of `pipelines`, first the one that the original runs best on.

    `originals`: place → what the original costs there ÷ where it runs best. `timing`: samples that load is made of, `batch` of
    them in a call; `judged`: how many there are to judge accuracy by; `learns`: there are some to learn from. `slow`: backends
    that compile for so long that planning leaves them alone."""
    limits = limits or Limits()
    steps = _Steps(MOST_S if limits.whole is None else min(MOST_S, SHARE * limits.whole), progress, clock)
    made = Plan(Factors(space), left_out=steps.left_out)
    shapes = typical_shapes(source.signature, timing, batch)
    theres: list[_There] = []
    for number, (name, pipeline) in enumerate(pipelines.items()):
        home = space.at_home({**space.usual(), BACKEND: list(space.places).index(name)})
        lossless = walk(pipeline, source, space.steps(home)).artifact
        there = _There(space, name, source, lossless, pipeline.context, shapes, steps, name in slow)
        there.look(sensitive=number == 0)
        steps.take(
            f"what choices will cost on {name}",
            f"{name}, told",
            0.0,
            functools.partial(there.tell, made.factors, originals),
        )
        theres.append(there)
        if there.model is not None:
            made.models[name] = there.model.to_json()
    made.layers, made.unmoved = theres[0].layers(), theres[0].unmoved
    made.seconds = steps.spent
    timetable = _Timetable(made, limits, theres, judged, max(0.0, steps.seen.get("profile", PROFILE_S) - WINDOW_S))
    timetable.fill_in()
    made.without = list(_not_possible(made, timetable, judged, learns))
    return made


class _Steps:
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


# One backend ----------------------------------------------------------------------------------------------------------------


class _There:
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
        steps: _Steps,
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
            _form(step) for i, step in enumerate(self.space.alternatives) if step is not None and i not in self.refused
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
                if _form(step) is not None:
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
        form = _form(step)
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


# Time -----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Timetable:
    """What every choice by itself will cost and take, and how long all stages. `open_s`: to start and compile a program."""

    made: Plan
    limits: Limits
    theres: Sequence[_There]
    judged: int
    open_s: float

    def __post_init__(self) -> None:
        self.space = self.made.factors.space

    def fill_in(self) -> None:
        """Estimates, then stages."""
        alone = [self._foreseen(values) for values in self._alone()]
        known = [one for one in alone if one.ratio is not None]
        best = min(known, key=_value, default=alone[0]) if self.judged else alone[0]
        self.made.base = best.choice
        self.made.estimates = [*sorted(alone, key=_value), *self._removals(best.values)]
        self._stages(alone)

    def _there(self, values: Values) -> _There:
        backend, _ = self.space.where(values)
        return next(one for one in self.theres if one.name == backend)

    def _foreseen(self, values: Values, removal: str = "", amount: str = "") -> Foreseen:
        found = self.made.factors.of(values)
        ratio, why = (None, found) if isinstance(found, str) else (found, "")
        return Foreseen(values, self.space.words(values), ratio, round(self.trial_s(values), 1), why, removal, amount)

    def _alone(self) -> list[dict[str, int]]:
        """Each backend with each alternative that it has a use for; then each other floating precision."""
        space, count = self.space, {one.name: len(one.values) for one in self.space.decisions}
        plain = [{**space.usual(), BACKEND: backend} for backend in range(count.get(BACKEND, 1))]
        found = [
            space.at_home({**one, PRECISION: index})
            for index in range(count.get(PRECISION, 1))
            for one in plain
            if index not in self._there(one).refused
        ]
        found += [space.canonical({**one, FLOATING: i}) for i in range(count.get(FLOATING, 1)) for one in plain]
        return list({tuple(sorted(values.items())): values for values in found}.values())

    def _removals(self, best: Values) -> Iterator[Foreseen]:
        """Each amount of each removal, the rest being as in `best`."""
        amounts = {decision.name: decision.values for decision in self.space.decisions}
        for one in self.space.removals:
            name = one.step.name
            for index in range(1, len(one.options) + 1):
                yield self._foreseen(self.space.canonical({**best, name: index}), name, amounts[name][index])

    # How long ---------------------------------------------------------------------------------------------------------------

    def trial_s(self, values: Values) -> float:
        """About how long a choice takes to try where nothing of it was made before."""
        there = self._there(values)
        judging = self.judged * there.an_inference()
        passes = sum(self._pass_s(step, judging) for step in self.space.steps(values, self.limits.minutes))
        return self.open_s + judging + SCREENING.max_s + passes

    def _pass_s(self, step: PassStep, judging: float) -> float:
        cls = registry.pass_class(step.name)
        if cls.tolerance is not None:
            return 0.0
        if cls.mends:
            usual = self.limits.minutes or getattr(registry.bind(step), "minutes", None) or 0.0
            return 60 * float(step.settings.get("minutes", usual))
        comparing = cls.measures and cls.stage is Stage.PRECISION
        return RUNS_COMPARING * (self.open_s + WINDOW_S) if comparing else RUNS * (self.open_s + judging)

    def learning_s(self) -> float:
        """One round of learning; 0 where nothing learns."""
        return max(
            (self._pass_s(step, 0.0) for step in (self.space.mending, self.space.tuning) if step is not None),
            default=0.0,
        )

    def _stages(self, alone: Sequence[Foreseen]) -> None:
        """Every choice by itself, then rounds, of which one trial learns: as many as time and trials allow."""
        search, most = self.limits.search, self.limits.trials
        if search is not None:
            search = max(0.0, search - self.made.seconds)
        first = [one.seconds for one in alone[:most]]
        ends = list(itertools.accumulate(first))
        done = len(first) if search is None else sum(end <= search for end in ends)
        spent = ends[-1] if search is None else min(ends[-1], search)
        a_trial = min(first)
        rounds = math.inf if search is None else (search - spent) / (TRIALS_IN_ROUND * a_trial + self.learning_s())
        if most is not None:
            rounds = min(rounds, (most - done) / TRIALS_IN_ROUND)
        endless = math.isinf(rounds)
        self.made.trials = None if endless else done + math.floor(TRIALS_IN_ROUND * rounds)
        self.made.parts = [
            Part("planning", self.made.seconds),
            Part("every choice by itself", spent),
            Part("around the best", None if endless else rounds * TRIALS_IN_ROUND * a_trial),
            *([Part("learning", None if endless else rounds * self.learning_s())] if self.learning_s() else []),
            *(Part(name, seconds) for name, seconds in self.limits.behind.items()),
        ]


def _value(one: Foreseen) -> float:
    return math.inf if one.ratio is None else one.ratio.value


def _not_possible(made: Plan, timetable: _Timetable, judged: int, learns: bool) -> Iterator[str]:
    """What will not be tried, or not be shipped, and why."""
    space, limits = made.factors.space, timetable.limits
    lossy = bool(space.removals) or any(space.alternatives)
    mends = [step.name for step in (space.mending, space.tuning) if step is not None]
    if lossy and not judged:
        yield "nothing that loses accuracy can be shipped: there are no labelled samples to judge it by (--eval, --data)"
    if lossy and judged and not mends:
        yield "nothing is taught back" + ("" if learns else ": there are no samples to learn from (--train, --data)")
    if mends and importlib.util.find_spec("torch") is None:
        yield f"{' and '.join(mends)}: learning needs torch (pip install 'perwatt[torch]')"
    elif mends and limits.search is not None and timetable.learning_s() > limits.search:
        yield (
            f"{' and '.join(mends)}: a round of learning takes {timetable.learning_s():.0f} s, and the search has "
            f"{limits.search:.0f} s (--time)"
        )
    reasons: dict[str, list[str]] = {}
    for there in timetable.theres:
        for index, reason in there.refused.items():
            name = getattr(space.alternatives[index], "name", "")
            reasons.setdefault(f"{name}: {reason}", []).append(there.name)
    for (backend, name, _), found in made.factors.removals.items():
        if isinstance(found, str):
            reasons.setdefault(f"{name}: {found}", []).append(backend)
    for reason, backends in reasons.items():
        where = "" if len(set(backends)) == len(timetable.theres) else f" ({', '.join(dict.fromkeys(backends))})"
        yield f"{reason}{where}"
