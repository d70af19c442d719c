"""What the doctor found, in words for a terminal: a page on all targets and the machine, or one target's own page."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perwatt.bench.probe_threads import QUIET_SHARE

GIB = 2**30
MOST_COLUMNS = 120
TITLE = 18
SAME_CORE, OWN_CORES = 1.3, 1.7
"""Throughput of two CPUs over that of one: below, they share a core's units; above, they are cores of their own."""


def page(found: Mapping[str, Any]) -> str:
    """All that `doctor.examine` found."""
    blocks = [
        ["Targets", *(line for entry in found["targets"] for line in _target(entry))],
        ["", *(_pair(alias, _alias(served)) for alias, served in found["aliases"].items())],
        ["", "Machine", *_machine(found["machine"])],
        ["", "Energy", *_meters(found["meters"])],
        ["", "What the hardware rewards", *probed(found["probe"])],
        ["", "optimize targets NAME shows one target's page: its knobs, its quantization styles, what is missing."],
    ]
    return "\n".join(line for block in blocks for line in block)


def target_page(entry: Mapping[str, Any]) -> str:
    """One target's page, as `doctor.one` found it."""
    lines = [f"{_mark(entry)} {entry['name']}{_by(entry)}", "", entry["documentation"] or entry["summary"], ""]
    lines += [_pair("serves", ", ".join(entry["serves"]) or "no alias")]
    if len(entry["variants"]) > 1:
        lines.append(_pair("variants", ", ".join(entry["variants"])))
    lines += [_pair("missing", reason) for reason in entry["missing"]]
    if entry["missing"]:
        return "\n".join(lines)
    lines += [_pair("versions", _versions(entry)), _pair("device", entry["device"])]
    if entry["formats"]:
        lines.append(_pair("model files", f"runs {', '.join(entry['formats'])} as they are"))
    lines += [_pair(title, text) for title, text in capabilities(entry["capabilities"])]
    lines += ["", "Quantization styles, best liked first:", *_styles(entry["capabilities"])]
    lines += ["", "Knobs that are tuned by measurement (None: the backend's own choice):", *_knobs(entry["knobs"])]
    return "\n".join(lines)


# Targets --------------------------------------------------------------------------------------------------------------


def _target(entry: Mapping[str, Any]) -> Iterator[str]:
    usable = [variant for variant in entry["variants"] if not variant["missing"]]
    serves = {name: alias for alias, name in entry["serves"].items()}
    for variant in usable:
        role = f", serves {serves[variant['name']]}" if variant["name"] in serves else ""
        yield f"{_mark(variant)} {variant['name']}{_by(entry)} ({_versions(variant)}{role})"
        if variant is usable[0]:
            yield from _wrapped("    ", entry["summary"])
        said = [(title, text) for title, text in capabilities(variant["capabilities"]) if title != "instruction sets"]
        words = "; ".join(f"{title}: {text}" for title, text in said)
        yield from _wrapped("    ", words)
    folded = _folded(entry["variants"])
    if usable and folded:
        # What mends it comes last in a reason; the whole of it is on the variant's own page.
        remedies = [f"{', '.join(names)} ({'; '.join(map(_remedy, reasons))})" for reasons, names in folded]
        yield from _wrapped("    ", f"not here: {'; '.join(remedies)}")
    elif not usable:
        yield f"✗ {entry['name']}{_by(entry)}{_serves(entry)}"
        yield from _wrapped("    ", entry["summary"])
        for reasons, names in folded:
            which = "" if len(entry["variants"]) == 1 else f"{', '.join(names)}: "
            yield from _wrapped("    ", f"missing: {which}{'; '.join(reasons)}")


def _remedy(reason: str) -> str:
    return reason.partition(": ")[2] or reason


def _serves(entry: Mapping[str, Any]) -> str:
    return f" (would serve {' and '.join(entry['serves'])})" if entry["serves"] else ""


def _folded(entries: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Names of what is missing by its reasons: those that miss the same share a line."""
    folded: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        if entry["missing"]:
            folded.setdefault(tuple(entry["missing"]), []).append(entry["name"])
    return list(folded.items())


def _mark(entry: Mapping[str, Any]) -> str:
    return "✗" if entry["missing"] else "✓"


def _by(entry: Mapping[str, Any]) -> str:
    return "" if entry.get("package") in (None, "perwatt") else f" by {entry['package']}"


def _versions(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items()) or "no packages of its own"


def _alias(served: Mapping[str, Sequence[str]]) -> str:
    usable, missing = ", ".join(served["usable"]), ", ".join(served["missing"])
    if not usable:
        return f"nothing that can be used here ({missing} would serve it)" if missing else "nothing"
    decides = "; measuring decides on each model" if len(served["usable"]) > 1 else ""
    return usable + decides + (f" (not here: {missing})" if missing else "")


def capabilities(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(what, words) of what a target says that it and the hardware reward."""
    if found is None:
        return []
    default, *others = found["floating_precisions"]
    said = [
        ("floating point", ", ".join([f"{default} (its default)" if others else default, *others])),
        ("half types", ", ".join(found["half_types"])),
        ("sparse types", ", ".join(found["sparse_types"])),
        ("quantization", ", ".join(style["name"] for style in found["quantization_styles"])),
        ("whole operators", ", ".join(found["operators"])),
        ("channel multiples", ", ".join(f"{n} in {kind}" for kind, n in found["channel_multiples"].items())),
        ("instruction sets", ", ".join(found["isa"])),
    ]
    return [(title, text) for title, text in said if text]


def _styles(found: Mapping[str, Any]) -> Iterator[str]:
    for style in found["quantization_styles"]:
        symmetry = "symmetric" if style["activation_symmetric"] else "asymmetric"
        weights = "per channel" if style["weight_per_channel"] else "per tensor"
        data = "float" if style["activation_type"] == "float" else f"{symmetry} {style['activation_type']}"
        types = f"{data} activations, {style['weight_type']} weights {weights}"
        yield f"  {style['name']}: {types}"
    if not found["quantization_styles"]:
        yield "  none"


def _knobs(knobs: Mapping[str, Mapping[str, Sequence[Any]]]) -> Iterator[str]:
    if not any(knobs.values()):
        yield "  none"
        return
    for scenario, fields in knobs.items():
        said = "; ".join(f"{field} {', '.join(map(str, values))}" for field, values in fields.items())
        yield from _wrapped("  ", f"{scenario}: {said or 'none'}")


# The machine ----------------------------------------------------------------------------------------------------------


def _machine(here: Mapping[str, Any]) -> Iterator[str]:
    virtual = " (virtual machine)" if here["virtualised"] else ""
    yield _pair("processor", f"{here['name'] or 'unknown'}{virtual}")
    yield _pair("instruction sets", ", ".join(here["isa"]) or "none of those that decide")
    yield _pair("CPUs", _cpus(here))
    yield _pair("memory", "unknown" if here["memory_gib"] is None else f"{here['memory_gib']} GiB")
    for gpu in here["gpus"]:
        yield _pair("GPU", _gpu(gpu))
    if not here["gpus"]:
        yield _pair("GPUs", "none found (NVIDIA's are looked for with nvidia-smi, which comes with the driver)")


def _cpus(here: Mapping[str, Any]) -> str:
    words = "unknown" if here["cpus"] is None else f"{here['cpus']} online"
    if here["cpus_allowed"] not in (None, here["cpus"]):
        words += f", {here['cpus_allowed']} may be used"
    if here["cpu_limit"] is not None:
        words += f", limited to {here['cpu_limit']:g} by the container"
    if here["threads_per_core"] is not None:
        said = " as the hypervisor tells it, which the probe checks" if here["virtualised"] else ""
        words += f", {here['threads_per_core']} thread{'s' * (here['threads_per_core'] != 1)} a core{said}"
    return words


def _gpu(gpu: Mapping[str, Any]) -> str:
    capability = gpu["compute_capability"]
    memory = f"{gpu['memory_bytes'] / GIB:.0f} GiB" if gpu["memory_bytes"] else "memory unknown"
    compute = f"SM {capability} (compute capability)" if capability else "compute capability unknown"
    return f"{gpu['name']}, {compute}, {memory}, driver {gpu['driver'] or 'unknown'}"


def _meters(found: Mapping[str, Any]) -> Iterator[str]:
    for device in ("cpu", "gpu"):
        meter = found[device]
        words = f"{meter['name']}, {meter['boundary']}: {meter['how']}" if meter["name"] else "none"
        yield _pair(device.upper(), words)
    unusable = [{"name": name, "missing": reasons} for name, reasons in found["missing"].items()]
    for reasons, names in _folded(unusable):
        yield _pair("missing", f"{', '.join(names)}: {'; '.join(reasons)}")
    yield _pair("wall meter", "any that a command can read: docs/wall-meter.md")


def probed(found: Mapping[str, Any] | None) -> Iterator[str]:
    """What a probe found, with its date; how to get one where there is none."""
    if found is None:
        yield "  not measured on this machine yet: optimize targets --probe (about 10 s)"
        return
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"  measured {found['date']} with {versions}; optimize targets --probe measures anew"
    for kind, facts in found["arithmetic"].items():
        every = f", {facts['all_tops']:.2f} on {facts['cpus']} CPUs" if facts["cpus"] > 1 else ""
        kernels = ", ".join(facts["kernels"])
        yield _pair(kind, f"{facts['one_tops']:.2f} tera-operations a CPU second on one thread{every} ({kernels})")
        if facts["pair"]:
            yield _pair("", second_thread(facts["pair"]))
        if facts["share"] < QUIET_SHARE:
            busy = f"the threads ran {100 * facts['share']:.0f} % of the time: measure again on a quiet machine"
            yield _pair("", f"disturbed by other processes: {busy}")
    for shape, kinds in found["channels"].items():
        said = [f"{facts['multiple'] or 'none'} in {kind}" for kind, facts in kinds.items()]
        yield _pair("channel multiples", f"{shape}: {', '.join(said)}")
    if found["gpu"]:
        tops = [f"{kind} {reached:.0f}" for kind, reached in found["gpu"]["tops"].items()]
        yield _pair(found["gpu"]["name"], f"tera-operations/s: {', '.join(tops) or 'none measured'}")
        for kind, reason in found["gpu"]["refused"].items():
            yield _pair("", f"{kind}: refused: {reason}")


def second_thread(pair: Mapping[str, Any]) -> str:
    """Whether a second thread brings anything, from what two CPUs reached beside one."""
    a, b = pair["cpus"]
    low, high = pair["throughput_range"]
    figures = f"CPUs {a} and {b} together: {pair['throughput']:.2f} × one ({low:.2f} to {high:.2f})"
    cost = f"{pair['cpu_s']:.2f} × the CPU time for an operation"
    if pair["throughput"] < SAME_CORE:
        verdict = "a second thread brings little: they share a core's units"
    elif pair["throughput"] > OWN_CORES:
        verdict = "each has units of its own"
    else:
        verdict = "a second thread brings something"
    return f"{figures}, {cost}; {verdict}"


# Lines ----------------------------------------------------------------------------------------------------------------


def _width() -> int:
    return min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns)


def _pair(title: str, text: str) -> str:
    """A title and what it says, beside each other."""
    first, rest = f"  {title:<{TITLE}} ", " " * (TITLE + 3)
    return textwrap.fill(text, _width(), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _wrapped(indent: str, text: str) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
