"""What an account tells: of each pass its share and a verdict on it, of all of them what they bring together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from perwatt import metrics
from perwatt.accounting_sides import UNKNOWN, product
from perwatt.candidates import Branch, ratio_text
from perwatt.measurement import Ratio

SMALLER, LARGER = 0.99, 1.01
"""Weights that change by less are as large as before."""
Verdict = Literal["earns its keep", "for accuracy", "brings nothing", "costs", "not known"]


@dataclass(frozen=True)
class Change:
    """After ÷ before. What is not known is None, and `reason` says why. `drop`: accuracy that is lost, in points for
    fractions, in metric units otherwise; positive is worse."""

    cost: Ratio = UNKNOWN
    latency: Ratio = UNKNOWN
    size: float | None = None
    drop: metrics.Comparison | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "cost": _plain(self.cost),
            "latency_p50_ms": _plain(self.latency),
            "size_bytes": _plain(Ratio(self.size, self.size, self.size)),
            "drop": _plain_drop(self.drop),
            "reason": self.reason,
        }


@dataclass
class Share:
    """One pass's part, all rows that bear its name together; `settings` are those of each row. `prefix`: the model after it
    ÷ before it; `alone_out`: the winner ÷ the pipeline without it. `needed_by`: passes that nothing comes of where it is
    left out. `droppable`: the winner may do without it."""

    name: str
    settings: list[dict[str, Any]]
    prefix: Change
    alone_out: Change = Change(reason="not measured")
    verdict: Verdict = "not known"
    why: str = ""
    needed_by: list[str] = field(default_factory=list)
    droppable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "name": self.name,
            "settings": self.settings,
            "prefix": self.prefix.to_json(),
            "alone_out": self.alone_out.to_json(),
            "verdict": self.verdict,
            "why": self.why,
            "needed_by": self.needed_by,
        }


@dataclass
class Account:
    """What each pass of a winner brings. `cost_is`: what a cost is, in words. `whole`: the winner ÷ the original's graph at the
    winner's operating point; `point`: that ÷ the original as it runs best (None: it runs best there).

    `droppable`: passes that bring nothing and were left out together; `without_them`: the winner without them ÷ the winner.
    `reduced` is what should ship in the winner's place, None where the winner should; `decision` says why."""

    cost_is: str = ""
    whole: Change = Change()
    point: Change | None = None
    shares: list[Share] = field(default_factory=list)
    droppable: list[str] = field(default_factory=list)
    without_them: Change | None = None
    reduced: Branch | None = None
    decision: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def keep(self, reason: str) -> None:
        """The winner ships after all: what should have taken its place did not hold when it was measured again."""
        self.reduced = None
        self.decision = f"kept: {reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "cost_is": self.cost_is,
            "whole": self.whole.to_json(),
            "point": None if self.point is None else self.point.to_json(),
            "shares": [share.to_json() for share in self.shares],
            "droppable": self.droppable,
            "without_them": None if self.without_them is None else self.without_them.to_json(),
            "dropped": self.reduced is not None,
            "decision": self.decision,
            "notes": self.notes,
            "seconds": round(self.seconds, 2),
        }


def together(changes: Sequence[Change]) -> Change:
    """Several changes one after another, those that are known: what is not known by itself is part of the next."""
    if len(changes) == 1:
        return changes[0]
    reasons = dict.fromkeys(change.reason for change in changes if change.reason)
    return Change(
        product(*(change.cost for change in changes if change.cost.value)),
        product(*(change.latency for change in changes if change.latency.value)),
        math.prod(change.size for change in changes if change.size is not None),
        _added([change.drop for change in changes if change.drop is not None]),
        "; ".join(reasons) or None,
    )


def _added(drops: Sequence[metrics.Comparison]) -> metrics.Comparison | None:
    """Several drops as one; the widths of their intervals add up in squares."""
    if not drops:
        return None
    total = math.fsum(one.drop for one in drops)
    down = math.hypot(*(one.drop - one.low for one in drops))
    up = math.hypot(*(one.high - one.drop for one in drops))
    return metrics.Comparison(total, total - down, total + up, None, None, drops[0].n)


def less(ratio: Ratio) -> bool:
    """Whether a ratio is below 1 beyond the noise."""
    return ratio.high is not None and ratio.high < 1


def verdict(share: Share, mends: bool, cost_is: str, unit: str) -> tuple[Verdict, str]:
    """On a pass, with the reason in words: by the winner without it where that was measured, else by its place in the order.
    A pass that `mends` is there for accuracy; `unit` is that of a drop."""
    told, how = (share.alone_out, "with it") if share.alone_out.cost.value else (share.prefix, "in its turn")
    drop = share.alone_out.drop or share.prefix.drop
    if mends:
        return _verdict_on_mending(drop, told, unit)
    if told.cost.value is None or told.cost.low is None:
        return "not known", told.reason or "too few windows to tell"
    words = f"{how} an inference takes {ratio_text(told.cost)} the {short(cost_is)}"
    if less(told.cost):
        return "earns its keep", words
    if drop is not None and drop.high < 0:
        return "for accuracy", f"{-drop.drop:.3g}{unit} more accurate; {words}"
    if told.cost.low > 1:
        return "costs", words
    if told.size is not None and told.size < SMALLER:
        return "earns its keep", f"weights take {told.size:.2f}× the bytes; {words}"
    if less(told.latency):
        return "earns its keep", f"{how} a call takes {ratio_text(told.latency)} the time"
    return "brings nothing", f"no difference beyond the noise: {words}"


def _verdict_on_mending(drop: metrics.Comparison | None, told: Change, unit: str) -> tuple[Verdict, str]:
    if drop is None:
        return "not known", told.reason or "its accuracy was not judged"
    if drop.drop >= 0:
        return "brings nothing", f"no more accurate with it, on {drop.n} samples"
    sure = "" if drop.high < 0 else f", which {drop.n} samples do not tell from chance"
    return "for accuracy", f"{-drop.drop:.3g}{unit} more accurate with it{sure}"


def short(cost_is: str) -> str:
    """`CPU seconds`: what a cost is, where it is clear that it is that of an inference."""
    return cost_is.removesuffix(" per inference")


def _plain(ratio: Ratio) -> dict[str, float | None]:
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def _plain_drop(drop: metrics.Comparison | None) -> dict[str, Any] | None:
    if drop is None or not math.isfinite(drop.drop):
        return None
    bounded = math.isfinite(drop.low) and math.isfinite(drop.high)
    low, high = (drop.low, drop.high) if bounded else (None, None)
    return {"value": drop.drop, "low": low, "high": high, "n": drop.n}
