"""What requests that come by themselves cost and get, in rows and sentences: a benchmark's traffic and its capacity.

A request is a call, of one item or a batch. Nothing here knows colours, columns or tags. Missing figures read "–", never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from perwatt.bench.traffic import LEAST_REQUESTS
from perwatt.bench_words import Cell, Row, labelled, labels, sure
from perwatt.figure_words import by_method, percent, rate_words, values
from perwatt.report_units import MISSING, compact, duration, known, plain

if TYPE_CHECKING:
    from perwatt.bench_report import BenchReport, Capacity, Figure, Traffic

FORMULA = "energy per request = its own above idle + its share of idle power at this rate"


def closed_loop_words(report: BenchReport) -> str:
    """What load stands behind the figures of all subjects; empty where no requests came by themselves."""
    if not any(subject.traffic or subject.capacity for subject in report.subjects):
        return ""
    if all(subject.scenario == "single-stream" for subject in report.subjects):
        said = "Closed loop, one call after another"
    else:
        said = "Closed loop, a new call whenever one has ended"
    served = [one for subject in report.subjects for one in (subject.traffic, subject.capacity) if one is not None]
    items = max(one.items_per_request for one in served)
    said += f"; throughput counts items, {items:,} a call" if items > 1 else ""
    return said + "; requests at random times: below"


# Traffic ----------------------------------------------------------------------------------------------------------


def traffic_rows(report: BenchReport) -> list[Row]:
    """What the traffic that was asked about costs, idle time included; nothing where none was asked about."""
    found = [subject.traffic for subject in report.subjects]
    if not any(found):
        return []

    def measured(name: str, label: str, read: Callable[[Traffic], Figure]) -> Row:
        return _measured(name, label, [None if traffic is None else read(traffic) for traffic in found])

    def plainly(name: str, label: str, read: Callable[[Traffic], str]) -> Row:
        return Row(name, label, "", [Cell(MISSING if traffic is None else read(traffic)) for traffic in found])

    energy = measured("energy_j_per_request", "energy per request", lambda t: t.energy_j_per_request)
    rows = [
        plainly("rate", "requests asked for", lambda t: rate_words(t.rate_per_s) + _of_items(t.items_per_request)),
        plainly("requests", "served", lambda t: f"{t.requests:,} in {duration(t.seconds)}"),
        energy,
        measured("above_idle_j_per_request", "  its own, above idle", lambda t: t.above_idle_j_per_request),
        measured("idle_j_per_request", "  its share of idle", lambda t: t.idle_j_per_request),
        measured("power_w", "power", lambda t: t.power_w),
        measured("idle_power_w", "idle power", lambda t: t.idle_power_w),
        _latencies("latency_p50_ms", "latency p50", found, 0.5),
        _latencies("latency_p99_ms", "latency p99", found, 0.99),
        plainly("utilisation", "utilisation", lambda t: percent(t.utilisation)),
        Row("sustained", "sustained", "", [_sustained(traffic) for traffic in found]),
        # Both are the energy of a request in other units, and as certain as that.
        replace(plainly("kwh_per_million", "kWh per million requests", _kwh_words), note=energy.note),
    ]
    if any(traffic is not None and traffic.price_per_kwh is not None for traffic in found):
        rows.append(replace(plainly("cost_per_million", "cost per million requests", _cost_words), note=energy.note))
    return rows


def _measured(name: str, label: str, figures: list[Figure | None]) -> Row:
    shown, note, notes = labelled(figures)
    cells = []
    for figure, value, own in zip(figures, shown, notes, strict=True):
        cells.append(Cell(value if note or not own else f"{value} ({own})", "" if figure is None else sure(figure)))
    return Row(name, label, note, cells)


def _latencies(name: str, label: str, found: list[Traffic | None], share: float) -> Row:
    """A percentile; where requests were too few for it, how many there were."""
    shown = values("ms", [None if traffic is None else getattr(traffic, name) for traffic in found])
    cells, few = [], False
    for traffic, value in zip(found, shown, strict=True):
        if traffic is not None and value == MISSING and traffic.requests < LEAST_REQUESTS[share]:
            value, few = f"{MISSING}, from too few requests ({traffic.requests:,})", True
        cells.append(Cell(value))
    return Row(name, label, "", cells, prose=few)


def _of_items(items: int) -> str:
    return f" of {items:,} items each" if items > 1 else ""


def _sustained(traffic: Traffic | None) -> Cell:
    if traffic is None:
        return Cell(MISSING)
    return Cell("yes") if traffic.sustained else Cell("no: the backlog grew", alarm=True)


def _kwh_words(traffic: Traffic) -> str:
    return by_method("", [(traffic.kwh_per_million, traffic.energy_j_per_request.method)])[0]


def _cost_words(traffic: Traffic) -> str:
    if known(traffic.cost_per_million) is None:
        return MISSING
    [cost] = by_method("", [(traffic.cost_per_million, traffic.energy_j_per_request.method)])
    return f"{cost} {plain(traffic.currency or '')}".strip()


def price_words(report: BenchReport) -> str:
    """What a kilowatt hour was taken to cost; empty where no price was given."""
    for subject in report.subjects:
        traffic = subject.traffic
        if traffic is not None and traffic.price_per_kwh is not None:
            return f"at {compact(traffic.price_per_kwh)} {plain(traffic.currency or '')}".strip() + " per kWh"
    return ""


# Capacity ---------------------------------------------------------------------------------------------------------


def capacity_rows(report: BenchReport) -> list[Row]:
    """The highest rate whose latency stays within the bound, and what was reached there; nothing where it was not looked
    for."""
    found = [subject.capacity for subject in report.subjects]
    if not any(found):
        return []

    def plainly(name: str, label: str, read: Callable[[Capacity], str]) -> Row:
        return Row(name, label, "", [Cell(MISSING if capacity is None else read(capacity)) for capacity in found])

    reached = values("ms", [None if capacity is None else capacity.latency_ms for capacity in found])
    share = next(f"p{compact(capacity.percentile)}" for capacity in found if capacity is not None)
    joules = [None if capacity is None else capacity.energy_j_per_request for capacity in found]
    return [
        plainly("rate", "capacity", _rate_words),
        plainly("failed_rate", "did not hold", lambda c: rate_words(c.failed_rate_per_s)),
        plainly("bound", "latency bound", bound_words),
        Row("latency_ms", f"latency {share} at that rate", "", [Cell(value) for value in reached]),
        plainly("utilisation", "utilisation there", lambda c: percent(c.utilisation)),
        _measured("energy_j_per_request", "energy per request there", joules),
        plainly("tries", "rates tried", lambda c: f"{len(c.tries):,}"),
        replace(plainly("ended", "ended because", lambda c: plain(c.ended)), prose=True),
    ]


def _rate_words(capacity: Capacity) -> str:
    """ "412 requests/s", of how many items where they are several."""
    if known(capacity.rate_per_s) is None:
        return "none"
    rate, _, unit = rate_words(capacity.rate_per_s).partition(" ")
    return f"{rate} requests{unit}{_of_items(capacity.items_per_request)}"


def bound_words(capacity: Capacity) -> str:
    """ "p99 ≤ 20 ms"."""
    return f"p{compact(capacity.percentile)} ≤ {compact(capacity.bound_ms)} ms"


def capacity_headline(report: BenchReport) -> str:
    """The capacity of each subject; of a single one also what a request takes there, or why there is none. Empty where it
    was not looked for."""
    found = [(name, s.capacity) for name, s in zip(labels(report), report.subjects, strict=True) if s.capacity]
    if not found:
        return ""
    if len(found) > 1:
        said = ", ".join(f"{name} {_rate_words(capacity)}" for name, capacity in found)
        return f"within {bound_words(found[0][1])}: {said}"
    name, capacity = found[0]
    if known(capacity.rate_per_s) is None:
        return f"{name}: no rate of requests within {bound_words(capacity)}: {plain(capacity.ended)}"
    return f"{name}: {_rate_words(capacity)} within {bound_words(capacity)}"


def traffic_headline(report: BenchReport) -> str:
    """What a request takes at the traffic that was asked about, and what a million cost; of a single subject only."""
    traffic = report.subjects[0].traffic if len(report.subjects) == 1 else None
    if traffic is None or known(traffic.energy_j_per_request.value) is None:
        return ""
    said = f"{labelled([traffic.energy_j_per_request])[0][0]} per request at {rate_words(traffic.rate_per_s)}, idle included"
    cost = _cost_words(traffic)
    return said if cost == MISSING else f"{said}, {cost} per million"


def joules_at_capacity(report: BenchReport) -> str:
    """What a request takes at the capacity of the only subject; empty where it is not known, or they are several."""
    capacity = report.subjects[0].capacity if len(report.subjects) == 1 else None
    figure = capacity.energy_j_per_request if capacity is not None else None
    if capacity is None or known(capacity.rate_per_s) is None or figure is None or known(figure.value) is None:
        return ""
    return f"{labelled([figure])[0][0]} per request"
