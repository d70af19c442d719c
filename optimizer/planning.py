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
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from perwatt import choices
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.bundle import write_text
from perwatt.candidates import Candidate, cost_of
from perwatt.choices import BACKEND, Space
from perwatt.cost_model import typical_shapes
from perwatt.data import Samples
from perwatt.pipeline import Pipeline
from perwatt.plan import Factors, Limits, Place, Plan
from perwatt.planning_backend import PROFILE_S, WINDOW_S, Steps, There
from perwatt.planning_time import Timetable, not_possible
from perwatt.preparation import Prepared
from perwatt.recipe import OneOf, PassStep
from perwatt.screening import Screening
from perwatt.trials import walk

SHARE, MOST_S = 0.05, 60.0
"""Of the time budget, and at most, what planning takes."""


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
    steps = Steps(MOST_S if limits.whole is None else min(MOST_S, SHARE * limits.whole), progress, clock)
    made = Plan(Factors(space), left_out=steps.left_out)
    shapes = typical_shapes(source.signature, timing, batch)
    theres: list[There] = []
    for number, (name, pipeline) in enumerate(pipelines.items()):
        home = space.at_home({**space.usual(), BACKEND: list(space.places).index(name)})
        lossless = walk(pipeline, source, space.steps(home)).artifact
        there = There(space, name, source, lossless, pipeline.context, shapes, steps, name in slow)
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
    timetable = Timetable(made, limits, theres, judged, max(0.0, steps.seen.get("profile", PROFILE_S) - WINDOW_S))
    timetable.fill_in()
    made.without = list(not_possible(made, timetable, judged, learns))
    return made
