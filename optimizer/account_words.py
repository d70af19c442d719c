"""What an account of a winner's passes and a search say, in sentences: the terminal and the HTML page say the same thing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perwatt.report_units import MISSING, duration, known, number, plain, ratio_words, with_interval
from perwatt.report_words import accuracy_moved

if TYPE_CHECKING:
    from perwatt.report import AccountReport, ChangeReport, RunCostReport, ShareReport

SHARES_SHOWN = 4
WORDS = {"earns its keep": "earn their keep", "for accuracy": "are for accuracy", "brings nothing": "bring nothing",
         "costs": "cost something", "not known": "are not known"}  # fmt: skip
"""Of several passes."""
OBJECTIVES = {"inferences-per-joule": "cost", "throughput": "time per inference"}
"""What a search makes little of, where the objective's own name would be what it makes much of."""


# Account --------------------------------------------------------------------------------------------------------------


def cost_words(account: AccountReport) -> str:
    """`CPU seconds`."""
    return plain(account.cost_is).removesuffix(" per inference") or "cost"


def account_words(account: AccountReport, unit: str = "", every: bool = False) -> list[str]:
    """The whole, the largest shares, how many others there are, what was left out; `every` pass with its reason instead.
    `unit` is that of a drop in accuracy."""
    said = [whole_words(account)]
    if account.point is not None:
        said.append(f"where and how it runs: {change_words(account.point, unit)}, before any pass")
    shown = account.shares if every else largest(account.shares)
    said += [share_words(share, unit, every) for share in shown]
    if len(shown) < len(account.shares):
        said.append(_others(account.shares, shown))
    said += [decision_words(account)] if account.droppable else []
    return [*said, *map(plain, account.notes)]


def whole_words(account: AccountReport) -> str:
    """What all passes bring together."""
    if known(account.whole.cost.value) is None:
        return f"what the passes bring together is not known: {plain(account.whole.reason or 'it was not measured')}"
    return f"all passes together: {with_interval(account.whole.cost)} the {cost_words(account)}, at the same operating point"


def largest(shares: Sequence[ShareReport]) -> list[ShareReport]:
    """Those that change most, in order; none of those that bring nothing."""
    telling = [share for share in shares if share.verdict not in ("brings nothing", "not known")]
    chosen = sorted(telling, key=_weight, reverse=True)[:SHARES_SHOWN]
    return [share for share in shares if share in chosen]


def _weight(share: ShareReport) -> float:
    value = known(share.prefix.cost.value)
    return abs(math.log(value)) if value else 0.0


def share_words(share: ShareReport, unit: str = "", every: bool = False) -> str:
    """`quantize-int8 0.62× [0.60, 0.64], size 0.25×, accuracy 0.1 points worse: earns its keep`."""
    rows = f" ({len(share.settings)} times)" if len(share.settings) > 1 else ""
    why = f" ({plain(share.why)})" if every and share.why else ""
    return f"{plain(share.name)}{rows} {change_words(share.prefix, unit)}: {share.verdict}{why}"


def change_words(change: ChangeReport, unit: str = "") -> str:
    """`0.62× [0.60, 0.64], size 0.25×, accuracy 0.1 points worse`."""
    if known(change.cost.value) is None:
        return f"not measured ({plain(change.reason or 'no reason recorded')})"
    return ", ".join(filter(None, [with_interval(change.cost), besides_words(change, unit)]))


def besides_words(change: ChangeReport, unit: str = "") -> str:
    """`size 0.25×, accuracy 0.1 points worse`: what else changed."""
    size = known(change.size_bytes.value)
    said = [f"size {ratio_words(change.size_bytes)[0]}"] if size is not None and abs(size - 1) >= 0.005 else []
    said += [f"accuracy {accuracy_moved(change.drop.value, unit)}"] if change.drop and change.drop.value else []
    return ", ".join(said)


def _others(shares: Sequence[ShareReport], shown: Sequence[ShareReport]) -> str:
    left = [share for share in shares if share not in shown]
    if len(left) == 1:
        return f"and {plain(left[0].name)}: {left[0].verdict}"
    counts = Counter(share.verdict for share in left)
    return f"and {len(left)} more, of which {', '.join(f'{n} {WORDS[verdict]}' for verdict, n in counts.items())} (-v names them)"


def decision_words(account: AccountReport) -> str:
    """What became of the passes that bring nothing."""
    return f"nothing measurable comes of {', '.join(map(plain, account.droppable))}; {plain(account.decision)}"


def drop_words(change: ChangeReport, unit: str = "") -> tuple[str, str]:
    """The accuracy that is lost, with its interval: ("0.1 points", "[−0.2, 0.4]")."""
    if change.drop is None:
        return MISSING, ""
    low, high = change.drop.low, change.drop.high
    interval = "" if low is None or high is None or low == high else f"[{number(low, 2)}, {number(high, 2)}]"
    return f"{number(change.drop.value, 2)}{unit}", interval


# Search -----------------------------------------------------------------------------------------------------------------


def search_words(search: Mapping[str, Any]) -> str:
    """`64 trials of 7,840 choices in 9 min 02 s; it ended: the time is up`."""
    trials, choices = len(search.get("trials") or ()), search.get("choices") or 0
    took = duration(float(search.get("seconds") or 0.0))
    many = f"{trials:,} trial{'s' * (trials != 1)} of {choices:,} choices in {took}"
    return f"{many}; it ended: {plain(search['ended'])}" if search.get("ended") else many


def run_words(cost: RunCostReport) -> str:
    """`this run took 9 min 02 s, 812 CPU seconds and 6.41 kJ (modelled); 3.2 million inferences win that back`."""
    took = f"this run took {duration(cost.seconds)}, {number(cost.cpu_s)} CPU seconds"
    if cost.energy_j is not None:
        took += f" and {number(cost.energy_j / 1e3)} kJ ({cost.method})"
    if cost.pays_back_after is None:
        return f"{took}; nothing wins that back"
    return f"{took}; {number(cost.pays_back_after, 2)} inferences win that back, in {plain(cost.pays_back_in)}"


def objective_names(search: Mapping[str, Any]) -> list[str]:
    """What each objective of a trial is a ratio of: the less, the better."""
    return [OBJECTIVES.get(str(name), plain(name)) for name in search.get("objectives") or ()]


def front_of(search: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trials that no other one beats in cost and in accuracy, and the one that ships, in the front's own order."""
    trials = {trial.get("number"): trial for trial in search.get("trials") or ()}
    numbers = dict.fromkeys([*(search.get("front") or ()), search.get("shipped")])
    return [trials[number] for number in numbers if number in trials]


def others_words(search: Mapping[str, Any]) -> str:
    """How many trials there are besides, and what became of them; empty where there are none."""
    told = [trial.get("number") for trial in front_of(search)]
    fates = Counter(_fate(trial) for trial in search.get("trials") or () if trial.get("number") not in told)
    if not fates:
        return ""
    said = ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common())
    total = sum(fates.values())
    return f"{total:,} other{'s' * (total != 1)}: {said}. All of them are in report.json."


def _fate(trial: Mapping[str, Any]) -> str:
    if trial.get("status") == "refused":
        return "could not be made or run"
    missed = trial.get("missed")
    return f"missed {' and '.join(map(plain, missed))}" if missed else "within the budget, and beaten"


def trial_words(trial: Mapping[str, Any]) -> str:
    """What a trial misses, and what else it says."""
    missed = [f"{plain(name)} by {100 * float(share):.0f} %" for name, share in (trial.get("missed") or {}).items()]
    return "; ".join(filter(None, [f"misses {', '.join(missed)}" if missed else "", plain(trial.get("reason") or "")]))
