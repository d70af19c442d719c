"""The plan of a search in sentences: what it will try first, which layers are sensitive, how long it takes, what it can't do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perwatt.report_units import duration, plain

ESTIMATES, LAYERS, COSTLY = 8, 3, 3
"""How many are told; of estimates, the others are counted."""


def words(plan: Mapping[str, Any]) -> list[str]:
    """A screenful at most. `plan`: as `planning.Plan.to_json` gives it."""
    return [*_alone(plan), *_removals(plan), *_layers(plan), *_time(plan), *_models(plan), *_missing(plan)]


def _alone(plan: Mapping[str, Any]) -> Iterator[str]:
    alone = [one for one in plan["estimates"] if not one["removal"]]
    known = [one for one in alone if one["ratio"] is not None]
    if known:
        yield "cost ÷ the original's, estimated, each by itself:"
    for one in known[:ESTIMATES]:
        off = f"{one['ratio']['value']:.2f}× ± {one['ratio']['spread']:.2f}"
        yield f"  {off}  {plain(one['choice'])}, about {duration(one['seconds'])} to try"
    if len(known) > ESTIMATES:
        yield f"  and {len(known) - ESTIMATES} more, up to {known[-1]['ratio']['value']:.2f}×"
    unknown: dict[str, list[str]] = {}
    for one in alone:
        if one["ratio"] is None:
            unknown.setdefault(one["why"], []).append(one["choice"])
    for why, several in unknown.items():
        more = f" and {len(several) - 1} more" if len(several) > 1 else ""
        yield f"  not estimated: {plain(several[0])}{more}: {plain(why)}"


def _removals(plan: Mapping[str, Any]) -> Iterator[str]:
    known: dict[str, list[Mapping[str, Any]]] = {}
    for one in plan["estimates"]:
        if one["removal"] and one["ratio"] is not None:
            known.setdefault(one["removal"], []).append(one)
    if known:
        yield f"and so much removed from {plain(plan['base'])}:"
    for name, several in known.items():
        amounts = ", ".join(f"{plain(one['amount'])} {one['ratio']['value']:.2f}×" for one in several)
        times = [one["seconds"] for one in several]
        span = duration(min(times)) if min(times) == max(times) else f"{duration(min(times))} to {duration(max(times))}"
        yield f"  {plain(name)} {amounts}, about {span} to try"


def _layers(plan: Mapping[str, Any]) -> Iterator[str]:
    layers = plan["layers"]
    if plan["unmoved"]:
        yield f"how sensitive layers are is not known: {plain(plan['unmoved'])}"
    told = [layer for layer in layers if layer["movement"]][:LAYERS]
    if told:
        yield f"most sensitive of {len(layers)} layers, by how far rounding them to int8 moves the outputs:"
    for layer in told:
        share = "" if layer["share"] is None else f", {layer['share']:.1%} of the cost"
        yield f"  {layer['movement']:.1%}  {plain(layer['name'])}{share}"
    costly = sorted((layer for layer in layers if layer["share"]), key=lambda layer: -layer["share"])[:COSTLY]
    if costly:
        yield "most costly: " + ", ".join(f"{plain(layer['name'])} ({layer['share']:.1%})" for layer in costly)


def _time(plan: Mapping[str, Any]) -> Iterator[str]:
    known = [part for part in plan["parts"] if part["seconds"] is not None]
    trials = "" if plan["trials"] is None else f", {plan['trials']} trials or so"
    yield f"time: about {duration(sum(part['seconds'] for part in known))}{trials}"
    yield "  " + ", ".join(f"{part['name']} {duration(part['seconds'])}" for part in known)
    endless = [part["name"] for part in plan["parts"] if part["seconds"] is None]
    if endless:
        yield f"  nothing limits {', '.join(endless)} (--time does)"


def _models(plan: Mapping[str, Any]) -> Iterator[str]:
    for backend, model in plan["models"].items():
        if model["basis"] == "multiplications":
            yield f"{backend} tells no operation's time: multiplications count"
        elif model["error"] is not None:
            off = f"{model['error']:.0%} off where an operation was not measured"
            yield f"the cost model of {backend} rests on {model['operations']} operations: {off}"


def _missing(plan: Mapping[str, Any]) -> Iterator[str]:
    for title, several in (("not possible", plan["without"]), ("left out of planning", plan["left_out"])):
        yield from (f"{title}: {plain(one)}" for one in several)
