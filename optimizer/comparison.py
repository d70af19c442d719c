"""From the windows of two subjects to ratios with intervals and a noise floor, and from those to a verdict.

Everything is taken within blocks: the logarithm of a figure is averaged over a subject's two windows of a block, and
head − base of that is one observation. Two processes of one and the same model, compared in the same blocks, give the
noise floor: a subject's two halves differ by √2 as much as two subjects' means do, so their difference is divided by √2,
and the farther end of its interval counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from perwatt.bench.decision import Decision, decide, decide_accuracy, log_ratio
from perwatt.bench.statistics import (
    bootstrap_interval,
    figure_interval,
    paired_figures,
    percentile_ratio,
    quantile_interval,
)
from perwatt.figures import FIGURES, MEASURED
from perwatt.gate_report import SAME_FILES, Check, ComparedAccuracy, ComparedFigure, Verdict
from perwatt.limits import Limit, amount
from perwatt.measurement import Boundary, Method, Ratio, Window
from perwatt.measuring import PERCENTILES, figures
from perwatt.report import RatioFigure
from perwatt.sides import Side

Block = list[Window]
Key = Literal["max_increase", "max_decrease", "max", "min", "max_drop"]
RELATIVE: tuple[Key, ...] = ("max_increase", "max_decrease")
KEYS: tuple[Key, ...] = ("max_increase", "max_decrease", "max", "min", "max_drop")


@dataclass(frozen=True)
class Blocks:
    """One subject's windows, two a block: of different processes where it has two. `idle_w`: power without load."""

    short: list[Block]
    energy: list[Block]
    idle_w: float | None = None

    @classmethod
    def of(cls, replicas: Sequence[Side], idle_w: float | None = None, kept: Sequence[bool] | None = None) -> Blocks:
        """Pair the windows of a subject's processes by block; `kept` says which blocks of short windows count."""
        short = _by_block([side.windows for side in replicas])
        energy = _by_block([side.energy_windows for side in replicas])
        if kept is not None:
            short = [block for block, keep in zip(short, kept, strict=True) if keep]
        return cls(short, energy or short, idle_w)

    def logs(self, name: str, which: Callable[[Block], Sequence[Window]]) -> list[float | None]:
        """The mean logarithm of a figure over the windows that `which` takes of each block; None where unknown."""
        blocks = self.energy if FIGURES[name].of_energy else self.short
        return [_mean_log([window_figure(name, window, self.idle_w) for window in which(block)]) for block in blocks]

    def calls(self, windows: Callable[[Block], Sequence[Window]] = list) -> list[list[float]]:
        """The latencies of each block's calls in ms."""
        return [[latency for window in windows(block) for latency in window.latencies_ms] for block in self.short]


def _by_block(replicas: Sequence[Sequence[Window]]) -> list[Block]:
    """Two windows a block: one of each process, or two of the only one."""
    if len(replicas) == 1:
        return [list(pair) for pair in zip(replicas[0][::2], replicas[0][1::2], strict=True)]
    return [list(pair) for pair in zip(*replicas, strict=True)]


def window_figure(name: str, window: Window, idle_w: float | None = None) -> float | None:
    """One figure of one window; None where it is not known."""
    if name == "energy_above_idle_j_per_inference":
        if window.energy_j is None or idle_w is None:
            return None
        return max(0.0, window.energy_j - idle_w * window.wall_s) / window.inferences
    return figures([window])[name]


def _mean_log(values: Sequence[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value and value > 0]
    return sum(logs) / len(logs) if logs and len(logs) == len(values) else None


def subject_figure(name: str, blocks: Blocks) -> tuple[float | None, float | None, float | None, int]:
    """One figure of one subject: (value, low, high, n windows or blocks)."""
    if name in PERCENTILES:
        value, low, high = quantile_interval(blocks.calls(), PERCENTILES[name])
        return value, low, high, len(blocks.short)
    logs = blocks.logs(name, list)
    known = [math.exp(value) for value in logs if value is not None]
    if not known or len(known) < len(logs):
        return None, None, None, 0
    centre, low, high = figure_interval(known)
    return centre, *((low, high) if len(known) > 1 else (None, None)), len(known)


def noise_floor(name: str, blocks: Blocks) -> float | None:
    """How far apart two processes of one subject may be taken to be, on the log scale; None where too little is known.
    The subject must have had two: two windows of one process would look the same."""
    if name in PERCENTILES:
        ratio = percentile_ratio(
            blocks.calls(lambda block: block[:1]), blocks.calls(lambda block: block[1:]), PERCENTILES[name]
        )
        if ratio.low is None or ratio.high is None:
            return None
        return max(abs(log_ratio(ratio.low)), abs(log_ratio(ratio.high))) / math.sqrt(2)
    ours, theirs = blocks.logs(name, lambda block: block[:1]), blocks.logs(name, lambda block: block[1:])
    differences = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len(differences) < 2:
        return None
    _, low, high = bootstrap_interval(differences)
    return max(abs(low), abs(high)) / math.sqrt(2)


def compare_figure(name: str, base: Blocks, head: Blocks) -> tuple[Ratio, float | None, float | None, int]:
    """(head ÷ base with its interval, base, head, n blocks); base and head are of the same blocks, so they divide."""
    if name in PERCENTILES:
        share = PERCENTILES[name]
        ratio = percentile_ratio(head.calls(), base.calls(), share)
        ours, theirs = quantile_interval(head.calls(), share)[0], quantile_interval(base.calls(), share)[0]
        return ratio, theirs, ours, len(base.short)
    pairs = [
        (a, b) for a, b in zip(base.logs(name, list), head.logs(name, list), strict=True)
        if a is not None and b is not None
    ]  # fmt: skip
    if not pairs:
        return Ratio(None), None, None, 0
    centre, low, high = bootstrap_interval([b - a for a, b in pairs])
    ours, theirs = paired_figures([math.exp(b) for _, b in pairs], [math.exp(a) for a, _ in pairs])
    if len(pairs) < 2:
        return Ratio(math.exp(centre)), theirs, ours, 1
    return Ratio(math.exp(centre), math.exp(low), math.exp(high)), theirs, ours, len(pairs)


def compare(
    base: Blocks, head: Blocks, method: Method, boundary: Boundary | None, two_processes: bool
) -> dict[str, ComparedFigure]:
    """Every measured figure of both subjects, their ratio and the job's noise floor."""
    found = {}
    for name in MEASURED:
        ratio, theirs, ours, n = compare_figure(name, base, head)
        floors = [noise_floor(name, blocks) for blocks in (base, head)] if two_processes else []
        known = [floor for floor in floors if floor is not None]
        energy = FIGURES[name].of_energy
        found[name] = ComparedFigure(
            unit=FIGURES[name].unit,
            base=theirs,
            head=ours,
            ratio=RatioFigure(value=ratio.value, low=ratio.low, high=ratio.high),
            base_interval=_interval(name, base),
            head_interval=_interval(name, head),
            floor=math.expm1(max(known)) if known else None,
            n=n,
            method=method if energy else None,
            boundary=boundary if energy else None,
        )
    return found


def _interval(name: str, blocks: Blocks) -> tuple[float, float] | None:
    _, low, high, _ = subject_figure(name, blocks)
    return None if low is None or high is None else (low, high)


def exact_figure(name: str, base: float | None, head: float | None, floor: float | None = None) -> ComparedFigure:
    """A figure that is counted: its ratio is exact."""
    value = head / base if base and head is not None else None
    ratio = RatioFigure(value=value, low=value, high=value)
    return ComparedFigure(unit=FIGURES[name].unit, base=base, head=head, ratio=ratio, floor=floor, n=1)


# Judging --------------------------------------------------------------------------------------------------------


def judge(
    limits: Mapping[str, Limit],
    found: Mapping[str, ComparedFigure],
    accuracy: ComparedAccuracy | None,
    why_none: str,
    without: Verdict = "inconclusive",
    identical: bool = False,
) -> list[Check]:
    """One check for each limit. `why_none`: why there is no accuracy, where there is none, and `without` is then the
    verdict. `identical`: both sides are the same files, so that only noise can set them apart."""
    checks = []
    for name, limit in limits.items():
        for key in KEYS:
            if getattr(limit, key) is None:
                continue
            if name == "accuracy":
                checks.append(_accuracy_check(key, limit, accuracy, why_none, without))
            else:
                checks.append(_check(name, key, limit, found))
    return [_same_files(check) if identical and check.key in RELATIVE else check for check in checks]


def _same_files(check: Check) -> Check:
    """What cannot differ holds, whatever the noise of this run says."""
    return check.model_copy(update={"verdict": "pass", "reason": SAME_FILES, "decided_by": None})


def verdict_of(checks: Sequence[Check]) -> Verdict:
    """The worst verdict: fail, then inconclusive, then pass."""
    verdicts = {check.verdict for check in checks}
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"


def _check(name: str, key: Key, limit: Limit, found: Mapping[str, ComparedFigure]) -> Check:
    relative = key in ("max_increase", "max_decrease")
    asked = getattr(limit, key)
    words = limit_words(name, key, asked)
    figure = found[name]
    kind = FIGURES[name]
    if kind.of_energy and figure.method not in ("counter", "metered"):
        return _without_joules(name, key, float(asked) if relative else None, words, found)
    if relative:
        bound = 1 + asked if key == "max_increase" else 1 - asked
        value, effect = _ratio(figure), log_ratio(figure.ratio.value)
    else:
        bound = amount(name, asked)
        low, high = figure.head_interval or (None, None)
        value = Ratio(figure.head, low, high)
        effect = log_ratio(figure.head / bound) if figure.head is not None and bound else 0.0
    side: str = "at most" if key in ("max_increase", "max") else "at least"
    decision = decide(value, bound, side, _floor(name, figure), effect, kind.exact)  # type: ignore[arg-type]
    return Check(
        figure=name, key=key, limit=words, verdict=decision.verdict, reason=_reason(decision, name, figure, relative)
    )


def _floor(name: str, figure: ComparedFigure) -> float:
    """The noise floor on the log scale; infinite where it is not known, for then nothing is known to be beyond it."""
    if figure.floor is None:
        return 0.0 if FIGURES[name].exact else math.inf
    return math.log1p(figure.floor)


def _without_joules(name: str, key: Key, share: float | None, words: str, found: Mapping[str, ComparedFigure]) -> Check:
    """Modelled joules never decide: CPU seconds per inference do, where the limit can be put in their terms."""
    if share is None or name == "power_w":
        reason = "joules are not measured here, and CPU seconds can't stand in for this limit: it wants a meter"
        return Check(figure=name, key=key, limit=words, verdict="inconclusive", reason=reason)
    figure = found["cpu_s_per_inference"]
    better_is_more = FIGURES[name].better == "higher"
    ratio = _ratio(figure).inverse() if better_is_more else _ratio(figure)
    bound = 1 + share if key == "max_increase" else 1 - share
    side = "at most" if key == "max_increase" else "at least"
    floor = _floor("cpu_s_per_inference", figure)
    decision = decide(ratio, bound, side, floor, log_ratio(ratio.value))  # type: ignore[arg-type]
    reason = _reason(decision, "cpu_s_per_inference", figure, True)
    return Check(
        figure=name, key=key, limit=words, verdict=decision.verdict, reason=reason, decided_by="cpu_s_per_inference"
    )  # fmt: skip


def _ratio(figure: ComparedFigure) -> Ratio:
    return Ratio(figure.ratio.value, figure.ratio.low, figure.ratio.high)


def _accuracy_check(
    key: Key, limit: Limit, accuracy: ComparedAccuracy | None, why_none: str, without: Verdict
) -> Check:
    asked = getattr(limit, key)
    unit = "points" if accuracy is None or accuracy.unit == "fraction" else ""
    words = limit_words("accuracy", key, asked, unit)
    if accuracy is None:
        return Check(figure="accuracy", key=key, limit=words, verdict=without, reason=why_none)
    if key == "max_drop" and accuracy.chance is not None:
        # Two models that guess lose nothing against each other.
        return Check(figure="accuracy", key=key, limit=words, verdict="inconclusive", reason=f"base {accuracy.chance}")
    if key == "max_drop":
        decision = decide_accuracy(accuracy.drop, asked, accuracy.p_value, accuracy.low)
        return Check(
            figure="accuracy", key=key, limit=words, verdict=decision.verdict, reason=_drop_reason(accuracy, decision)
        )
    bound = amount("accuracy", asked)
    met = accuracy.head <= bound if key == "max" else accuracy.head >= bound
    reason = f"head has {accuracy.head:.4g} on {accuracy.n} samples" + (
        f"; base {accuracy.chance}" if accuracy.chance is not None else ""
    )
    return Check(figure="accuracy", key=key, limit=words, verdict="pass" if met else "fail", reason=reason)


def _drop_reason(accuracy: ComparedAccuracy, decision: Decision) -> str:
    unit = " points" if accuracy.unit == "fraction" else ""
    moved = "loses nothing" if accuracy.drop == 0 else f"loses {accuracy.drop:.2f}{unit}"
    moved = f"gains {-accuracy.drop:.2f}{unit}" if accuracy.drop < 0 else moved
    text = f"{moved} on {accuracy.n} samples"
    if accuracy.flips_lost is not None and accuracy.p_value is not None:
        text += f" ({accuracy.flips_lost} lost, {accuracy.flips_gained} gained, p = {accuracy.p_value:.2g})"
    return text + (": so many flips may be chance" if decision.ground == "unsure" else "")


def limit_words(name: str, key: Key, value: float | str, unit: str = "") -> str:
    """A limit as a person would say it."""
    if key in ("max_increase", "max_decrease"):
        return f"at most {float(value) * 100:g} % {'more' if key == 'max_increase' else 'less'}"
    if key == "max_drop":
        return f"loses at most {float(value):g} {unit}".rstrip()
    shown = value if isinstance(value, str) else f"{value:g} {FIGURES[name].unit}".rstrip()
    return f"{'at most' if key == 'max' else 'at least'} {shown}"


def _reason(decision: Decision, name: str, figure: ComparedFigure, relative: bool) -> str:
    title = FIGURES[name].title
    if decision.ground == "unknown":
        return f"{title} was not measured on both sides"
    ratio = figure.ratio
    if relative:
        interval = f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low is not None and ratio.high != ratio.low else ""
        text = f"{title} is {ratio.value:.3f}× the base's{interval}"
    else:
        low, high = figure.head_interval or (None, None)
        interval = f" [{low:.4g}, {high:.4g}]" if low is not None else ""
        text = f"{title} is {figure.head:.4g} {figure.unit}{interval}".rstrip()
    if decision.ground == "alone":
        return f"{text}, from too few blocks to know how sure that is: measure longer with --time"
    if decision.ground == "noise" and figure.floor is None:
        return f"{text}, but there was room for one process of each side only, so this machine's noise is not known"
    if decision.ground == "noise":
        floor = (figure.floor or 0.0) * 100
        return f"{text}, but two processes of the same model differ by up to {floor:.1f} % here"
    return text + (": the interval holds the limit" if decision.ground == "unsure" else "")
