"""What measured figures rest on, in words, for every written form of a gate and of a benchmark: how the joules were come
by, whether the run was disturbed, the machine, the warm-up, the protocol.

The facts come as plain mappings whose keys differ by meter and system: known ones get a sentence, all others are named
as they are. What is missing is left out, or says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perwatt.figure_words import by_method, percent, values
from perwatt.report_units import compact, duration, number, plain
from perwatt.report_words import facts, value_words

NEVER_DECIDE = "modelled joules never decide by themselves: CPU seconds per inference do"
SUFFIXES = (("_per_s", "1/s"), ("_ms", "ms"), ("_s", "s"), ("_w", "W"), ("_j", "J"), ("_bytes", "B"))


def run_words(version: str, seconds: float, created: str) -> str:
    """Which perwatt, how long, when."""
    return f"perwatt {plain(version)}, {duration(seconds)}, {plain(created)}"


def condition_words(disturbed: Sequence[str]) -> list[str]:
    """Whether this counts as a disturbed run, and why."""
    if not disturbed:
        return ["quiet: nothing was seen that disturbed this run"]
    return [f"disturbed: {plain(why)}" for why in disturbed]


def point_words(point: Mapping[str, Any], precision: str | None) -> str:
    """How a side was run; what was left to the backend says so."""
    said = [
        f"{plain(name).replace('_', ' ')} {'the default' if value is None else value_words(value)}"
        for name, value in point.items()
    ]
    return ", ".join([*said, *([f"precision as run {plain(precision)}"] if precision else [])])


def named_facts(found: Mapping[str, Any]) -> list[str]:
    """Plain facts as "name: value"; a unit in a name goes with the value: window_s 0.15 is "window: 150 ms"."""
    return [_named_fact(str(name), value) for name, value in _known(found).items()]


def _known(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is missing or empty, at any depth."""
    kept = {name: _known(value) if isinstance(value, Mapping) else value for name, value in found.items()}
    return {name: value for name, value in kept.items() if value is not None and value not in ("", [], {}, ())}


def _named_fact(name: str, value: Any) -> str:
    if _is_number(value):
        for suffix, unit in SUFFIXES:
            if name.endswith(suffix):
                return f"{plain(name.removesuffix(suffix)).replace('_', ' ')}: {values(unit, [float(value)])[0]}"
        if name == "seconds":
            return f"took: {duration(float(value))}"
    [(said, text)] = facts({name: value})
    return f"{said}: {text}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Joules -----------------------------------------------------------------------------------------------------------


def uncertainty_words(energy: Mapping[str, Any]) -> str:
    """How far a model of the machine's power may be off, in brief: the widest factor that it names of any of its parts.
    Empty where joules are measured."""
    if energy.get("method") != "modelled":
        return ""
    factor = energy.get("uncertainty_factor")
    return f"uncertain by about a factor of {compact(factor)}" if _is_number(factor) else "how uncertain is not stated"


def energy_words(energy: Mapping[str, Any], gross: str = "", above_idle: str = "", *, brief: bool = False) -> list[str]:
    """How the joules were come by: method and boundary; gross with the idle-subtracted beside it; idle state and policy;
    windows, refresh period, n; what the meter itself cost. `gross` and `above_idle` are joules per inference, as words;
    `brief` leaves out sources and what only this kind of meter tells."""
    method, how = energy.get("method") or "unavailable", plain(energy.get("how") or "no reason recorded")
    if method == "unavailable":
        return [f"unavailable: {how}"]
    label = f"{plain(method)}, boundary {plain(energy.get('boundary') or 'not stated')}"
    said = [f"{label} ({uncertainty_words(energy)}): {how}" if method == "modelled" else f"{label}: {how}"]
    if gross:
        beside = above_idle or "not measured"
        said.append(f"gross (idle power included, the headline): {gross} per inference; above idle: {beside}")
    said += [words for words in (_idle_words(energy), _window_words(energy)) if words]
    overhead = energy.get("meter_overhead")
    if overhead is not None:
        said.append(f"the meter itself: {_overhead_words(overhead)}")
    for key in ("uncertainty",) if brief else ("uncertainty", "source"):
        if energy.get(key):
            # One line for each clause: a model names the uncertainty and the source of each of its parts.
            said += [f"{key}: {part}" for part in value_words(energy[key]).split("; ")]
    told = _SAID | {name for name in energy if brief and name not in ("missing", "rules")}
    said += named_facts({name: value for name, value in energy.items() if name not in told})
    return [*said, *([NEVER_DECIDE] if method == "modelled" else [])]


_SAID = {
    "method", "boundary", "how", "source", "uncertainty", "uncertainty_factor", "window_s", "refresh_s", "least_refreshes",
    "n", "idle_policy", "idle_state", "idle_power_w", "meter_overhead",
}  # fmt: skip


def _idle_words(energy: Mapping[str, Any]) -> str:
    """The idle state with its power, and what is done about it."""
    power, state, policy = (energy.get(key) for key in ("idle_power_w", "idle_state", "idle_policy"))
    said = []
    if state is not None or power is not None:
        [shown] = by_method("W", [(power, energy.get("method"))]) if _is_number(power) else ["power not measured"]
        said.append(f"idle: {shown}" + (f", {value_words(state)}" if state is not None else ""))
    if policy is not None:
        said.append(f"idle policy: {value_words(policy)}")
    return "; ".join(said)


def _window_words(energy: Mapping[str, Any]) -> str:
    window, refresh, least, n = (energy.get(key) for key in ("window_s", "refresh_s", "least_refreshes", "n"))
    said = []
    if window is not None:
        said.append(f"windows of {_seconds(window)}")
    if n is not None:
        said.append(f"n = {value_words(n)}")
    if refresh is not None:
        said.append(f"the counter refreshes every {_seconds(refresh)}")
    if least is not None:
        said.append(f"at least {value_words(least)} refreshes a window")
    return ", ".join(said)


def _seconds(value: Any) -> str:
    return values("s", [float(value)])[0] if _is_number(value) else value_words(value)


def _overhead_words(overhead: Any) -> str:
    if isinstance(overhead, Mapping) and _is_number(overhead.get("share_of_one_cpu")):
        return f"{percent(overhead['share_of_one_cpu'])} of one CPU while measuring"
    return "nothing worth telling" if isinstance(overhead, Mapping) and not _known(overhead) else value_words(overhead)


# The machine and the protocol -------------------------------------------------------------------------------------


def machine_words(machine: Mapping[str, Any]) -> list[str]:
    """The machine in a line, then its other facts as far as they could be read, each in words."""
    found = _known(machine)
    print_, before, after = (_mapping(found.pop(key, None)) for key in ("fingerprint", "facts", "facts_after"))
    digest = found.pop("digest", None)
    line = [value_words(print_.pop("name"))] if "name" in print_ else []
    line += [f"{value_words(print_.pop('cpus'))} CPUs"] if "cpus" in print_ else []
    line += [f"{value_words(print_.pop('memory_gib'))} GiB"] if "memory_gib" in print_ else []
    line += [value_words(print_.pop("gpus"))] if "gpus" in print_ else []
    line += [f"fingerprint {value_words(digest)}"] if digest is not None else []
    shares = [
        f"{who} {percent(found.pop(key))} of the machine's CPU time in the windows"
        for key, who in (("others_share", "other processes used"), ("steal_share", "the hypervisor took"))
        if _is_number(found.get(key))
    ]
    if "isa" in print_:
        print_["instruction_sets"] = print_.pop("isa")
    # What the line says already is not said again.
    again = {"processor", "cpus_online", "memory_bytes", *print_}
    conditions = _condition_facts(
        *({name: v for name, v in one.items() if name not in again} for one in (before, after))
    )
    rest = [*named_facts(print_), *conditions, *shares, *named_facts(found)]
    return [*([", ".join(line)] if line else []), *rest]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _condition_facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The machine's conditions before the windows, and what was different after them."""
    said = []
    for name, value in before.items():
        later = after.get(name, value)
        text = _condition_fact(name, value)
        said.append(text if later == value else f"{text} before, {_condition_value(name, later)} after")
    new = {name: value for name, value in after.items() if name not in before and name in _CONDITIONS}
    return [*said, *(f"{_condition_fact(name, value)} after" for name, value in new.items())]


_CONDITIONS = {
    "governor": "frequency governor", "scaling_driver": "frequency driver", "frequency_mhz": "frequency",
    "turbo": "turbo", "temperatures_c": "temperature", "throttle_count": "times throttled",
    "cgroup_throttled": "throttled by the container's limit", "virtualised": "virtual machine",
    "cpu_limit": "CPU limit of the container", "cpus_allowed": "CPUs allowed", "load_average": "load average",
}  # fmt: skip


def _condition_fact(name: str, value: Any) -> str:
    return f"{_CONDITIONS.get(name, plain(name).replace('_', ' '))}: {_condition_value(name, value)}"


def _condition_value(name: str, value: Any) -> str:
    if name == "frequency_mhz" and isinstance(value, Mapping):
        return _frequency_words(value)
    if name == "temperatures_c" and isinstance(value, Mapping):
        return ", ".join(f"{plain(what)} {value_words(one)} °C" for what, one in value.items())
    return value_words(value)


def _frequency_words(found: Mapping[str, Any]) -> str:
    """The lowest and highest of all CPUs, what they may reach, and who says so."""
    ends = [found[key] for key in ("lowest", "highest") if _is_number(found.get(key))]
    said = [" to ".join(dict.fromkeys(f"{number(one)}" for one in ends)) + " MHz"] if ends else []
    most = found.get("allowed_max") or found.get("max")
    said += [f"at most {number(most)} MHz"] if _is_number(most) else []
    source = f" ({plain(found['from'])})" if found.get("from") else ""
    return ", ".join(said) + source if said else value_words(found)


def flat_machine(machine: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The machine's facts as names with dots and values, for readers that know nothing deeper."""
    flat: dict[str, str] = {}
    for name, value in _known(machine).items():
        if isinstance(value, Mapping):
            flat |= flat_machine(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value_words(value)
    return flat


def warm_up_words(found: Mapping[str, Any]) -> str:
    """How long it took until the cost of a call was steady, and whether it became so."""
    if not found:
        return "not recorded"
    said = [fact.removeprefix("took: ") for fact in named_facts({k: v for k, v in found.items() if k != "steady"})]
    if "steady" in found:
        steady = found["steady"]
        said.append("too short to tell whether steady" if steady is None else "steady" if steady else "NOT steady")
    return ", ".join(said)


BRIEF_ENERGY = 4
"""Of the energy's lines, those that nobody should miss: method and boundary, gross and above idle, idle, windows."""


def brief_measuring(measuring: Mapping[str, Any]) -> dict[str, Any]:
    """The few facts of measuring that nobody should miss."""
    return {
        name: measuring[name] for name in ("scenario", "blocks", "window_s", "seconds", "inputs") if name in measuring
    }


def measuring_words(measuring: Mapping[str, Any], *, brief: bool = False) -> list[str]:
    """How it was measured; the warm-up of each, and what the probe reached of its peak."""
    said = named_facts({name: value for name, value in measuring.items() if name not in ("probe", "warm_up")})
    warm = measuring.get("warm_up")
    if isinstance(warm, Mapping):
        said += [
            f"warm-up of {plain(who)}: {warm_up_words(one)}" for who, one in warm.items() if isinstance(one, Mapping)
        ]
    probe = probe_words(measuring.get("probe"), brief=brief)
    return [*said, probe] if probe else said


def probe_words(probe: Any, *, brief: bool = False) -> str:
    """What the processor's arithmetic units reached of their peak while measuring; empty where there was no probe, or none
    that says so."""
    shares = probe.get("fraction_of_peak") if isinstance(probe, Mapping) else None
    if not isinstance(probe, Mapping) or not isinstance(shares, Mapping):
        return ""
    said = [_share_words(str(kind), share, probe.get("peak_tops")) for kind, share in shares.items()]
    if probe.get("n") is not None:
        said.append(f"n = {value_words(probe['n'])}")
    if probe.get("blocks_discarded") is not None:
        said.append(f"blocks discarded {value_words(probe['blocks_discarded'])}")
    if probe.get("rule") and not brief:
        said.append(f"rule: {value_words(probe['rule'])}")
    return f"probe: {', '.join(said)}"


def _share_words(kind: str, share: Any, peaks: Any) -> str:
    peak = peaks.get(kind) if isinstance(peaks, Mapping) else None
    of = f"its peak of {number(peak)} TOPS" if _is_number(peak) else "its peak"
    if not isinstance(share, Mapping):
        return f"{plain(kind)} {percent(share)} of {of}"
    low = f" (5th percentile {percent(share['p5'])})" if share.get("p5") is not None else ""
    return f"{plain(kind)} {percent(share.get('median'))} of {of}{low}"
