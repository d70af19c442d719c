"""Which operators stay in float32 when a model is carried in a half type, from what was measured on samples.

An operator stays where

- ONNX has no half type for it;
- a value that it reads or gives is too large for the type, with a margin, or so small that rounding takes it away;
- what it adds up inside is too large;
- rounding what it reads moves what it gives by more than is bearable, and float32 would help: its inputs then have to come
  in float32 too, from as far back as rounding still matters. Where that leads back to a product, nothing is won,
  for a product in half has rounded already, and the operator goes along.

Masks are no large values. What only says "never" in front of a Softmax, −3.4e38 or −1e9, says so as the lowest number of the
half type too. `masks` names those values, which are cut to that before they are cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from perwatt.passes._half_measuring import (
    EXACT,
    MOVING,
    PRODUCTS,
    HalfType,
    Measured,
    floats_stored,
    is_float,
    stored_extremes,
)
from perwatt.patterns import is_stored

END = (2 - 2**-7) * 2.0**127
"""Nobody calculates with stored numbers beyond this. It is the end of float32, and says "never" wherever it stands."""
THROUGH = ("Add", "Where", "Mul", "Cast", "Min", "Max", "Clip", *MOVING)
"""On its way to the Softmax a mask passes through these."""
MASKING = ("Softmax", "Attention")


@dataclass
class Decided:
    """`kept`: nodes that stay, each with the kind of reason. `masks`: names of values cut to the lowest half. `hopeless`:
    those that rounding moves too far, where float32 would not help. `figures`: the worst of each kind."""

    kept: dict[Any, str] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)
    hopeless: dict[Any, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def keep(self, node: Any, kind: str, figure: float = 0.0) -> None:
        """Note that `node` stays. What only moves values about is not told of a value twice."""
        self.kept.setdefault(node, kind)
        self.figures[kind] = max(self.figures.get(kind, 0.0), figure)

    def words(self, half: HalfType) -> Iterator[str]:
        """Lines for the ledger."""
        for kind, say in _WORDS.items():
            nodes = [node for node, why in self.kept.items() if why == kind]
            if nodes:
                count = len(nodes)
                stay = "operator stays" if count == 1 else "operators stay"
                reason = say.format(figure=self.figures[kind], half=half.name)
                yield f"{count} {stay} in float32 ({_listed(nodes)}): {reason}"
        if self.hopeless:
            worst = max(self.hopeless.values())
            yield (
                f"{len(self.hopeless)} in {half.name} though rounding moves {'it' if len(self.hopeless) == 1 else 'them'} "
                f"by up to {_percent(worst)} ({_listed(self.hopeless)}): what it reads comes rounded from products"
            )
        if self.masks and half.lowest > -half.largest:
            yield f"masks end at {half.lowest:.5g}"


_WORDS = {
    "undefined": "ONNX has no {half} for it",
    "large": "values up to {figure:.2g}",
    "small": "values too small for {half}",
    "sums": "sums up to {figure:.2g}",
    "rounding": "rounding what they read would move what they give",
}


def _listed(nodes: Any) -> str:
    counts = Counter(node.op_type for node in nodes)
    return ", ".join(op if count == 1 else f"{count} {op}" for op, count in sorted(counts.items()))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share < 10 else "more than it is"


def decide(graph: Any, half: HalfType, measured: Measured, undefined: Callable[[Any], bool], margin: float,
           bearable: float) -> Decided:  # fmt: skip
    """`undefined`: whether ONNX has no such type for a node. `margin`: how much less than the largest half is trusted.
    `bearable`: the share that rounding may move a value by."""
    decided = Decided()
    for node in graph:
        if undefined(node):
            decided.keep(node, "undefined")
    limit = half.largest / margin
    looking = _Masks(measured, limit)
    for value in _computed_floats(graph):
        _fit(value, measured, looking, decided, half, limit, bearable)
    for value in floats_stored(graph):
        _fit_stored(value, looking, decided, half, limit)
    for node in graph:
        added_up = measured.sums.get(str(node.outputs[0].name), 0.0) if node.outputs else 0.0
        if added_up > limit:
            decided.keep(node, "sums", added_up)
    for node in graph:
        if node.outputs and node not in decided.kept:
            _spare(node, measured, decided, half, bearable)
    return decided


def _computed_floats(graph: Any) -> Iterator[Any]:
    yield from (value for value in graph.inputs if is_float(value))
    yield from (v for node in graph if node.op_type != "Constant" for v in node.outputs if is_float(v))


def _fit(value: Any, measured: Measured, masks: _Masks, decided: Decided, half: HalfType, limit: float,
         bearable: float) -> None:  # fmt: skip
    """Whether a computed value has a place in the half type; who gives and reads it stays where it hasn't."""
    low, high = measured.extremes.get(value.name, (0.0, 0.0))
    if low < -limit and high <= limit and masks.is_mask(value):
        decided.masks.add(value.name)
        return
    peak = max(abs(low), abs(high))
    if peak > limit:
        _keep_around(value, decided, "large", peak)
    elif measured.lost.get(value.name, 0.0) > bearable:
        _keep_around(value, decided, "small", 0.0)


def _fit_stored(value: Any, masks: _Masks, decided: Decided, half: HalfType, limit: float) -> None:
    """The same for a stored one: its numbers are known, so there is no margin."""
    low, high = stored_extremes(value)
    peak = max(abs(low), abs(high))
    if low < -limit and high <= limit and masks.is_mask(value):
        decided.masks.add(value.name)
    elif half.largest < peak <= END:
        for use in value.uses():
            decided.keep(use.node, "large", peak)


def _keep_around(value: Any, decided: Decided, kind: str, figure: float) -> None:
    """Keep whoever gives and reads `value`, and what it looks like at other places."""
    producer = value.producer()
    for node in ([producer] if producer is not None else []) + [use.node for use in value.uses()]:
        known = node in decided.kept
        decided.keep(node, kind, figure)
        if not known and node.op_type in MOVING and node is not producer:
            for output in node.outputs:
                _keep_around(output, decided, kind, figure)


# Rounding -------------------------------------------------------------------------------------------------------------


def _spare(node: Any, measured: Measured, decided: Decided, half: HalfType, bearable: float) -> None:
    """Keep an operator that rounded inputs move too far, with what has to feed it in float32 for that to help."""
    name = node.outputs[0].name
    whole = not is_float(node.outputs[0])
    moved, most = measured.moved.get(name, 0.0), 0.0 if whole else bearable
    if moved <= most:
        return
    chain: dict[Any, None] = {node: None}
    # With its weights in float32, it may be that nothing else is needed.
    left = measured.moved_by_inputs.get(name, moved)
    if left <= most or _feedable(node, most * half.rounding / left, measured, half, chain):
        for each in chain:
            decided.keep(each, "rounding", moved)
    else:
        decided.hopeless[node] = moved


def _feedable(node: Any, wanted: float, measured: Measured, half: HalfType, chain: dict[Any, None]) -> bool:
    """Whether the inputs of `node` can come with an error of at most `wanted`, and who has to be in float32 for that:
    those are added to `chain`."""
    return all(_precise(value, wanted, measured, half, chain) for value in node.inputs if is_float(value))


def _precise(value: Any, wanted: float, measured: Measured, half: HalfType, chain: dict[Any, None]) -> bool:
    producer = value.producer()
    if is_stored(value) or producer is None or measured.lost.get(value.name) == 0.0 or producer in chain:
        return True
    if producer.op_type in PRODUCTS:
        return False
    chain[producer] = None
    moved = measured.moved_by_inputs.get(value.name, measured.moved.get(value.name, 0.0))
    if producer.op_type in EXACT:
        return _feedable(producer, wanted, measured, half, chain)
    return moved <= wanted or _feedable(producer, wanted * half.rounding / moved, measured, half, chain)


# Masks ----------------------------------------------------------------------------------------------------------------


class _Masks:
    """Tells values that only say "never" in front of a Softmax from large ones."""

    def __init__(self, measured: Measured, limit: float) -> None:
        self.measured, self.limit = measured, limit
        self._known: dict[str, bool] = {}

    def is_mask(self, value: Any) -> bool:
        """Whether all that read `value` lead to a Softmax and nothing is calculated on the way, nor before: scores that a
        product gives are numbers."""
        producer = value.producer()
        if producer is not None and producer.op_type not in ("Constant", "ConstantOfShape", "Sub", "Neg", *THROUGH):
            return False
        return self._leads(value)

    def _leads(self, value: Any) -> bool:
        if value.name not in self._known:
            uses = [] if value.is_graph_output() else list(value.uses())
            self._known[value.name] = bool(uses) and all(self._passes(use.node, use.idx) for use in uses)
        return self._known[value.name]

    def _passes(self, node: Any, position: int) -> bool:
        if node.op_type in MASKING:
            return node.op_type == "Softmax" or position == 3
        if node.op_type not in THROUGH or not is_float(node.outputs[0]):
            return False
        if node.op_type == "Mul" and not self._is_share(node.inputs[1 - position]):
            return False
        return self._leads(node.outputs[0])

    def _is_share(self, value: Any) -> bool:
        """Whether a factor lies between 0 and 1: it turns "never" into nothing else."""
        known = self.measured.extremes.get(value.name)
        low, high = known if known is not None else stored_extremes(value) if is_stored(value) else (-1.0, 1.0)
        return bool(low >= 0.0 and high <= 1.0)
