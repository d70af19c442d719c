"""The report as one self-contained HTML page, for people who would rather look than read.

No script, no network, no font to fetch: a policy in the page forbids them, and every name that comes from a model or a
recipe is escaped. It says what the terminal says (`report_words`), and adds a chart, drift, operators and candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from perwatt import account_words, report_chart, report_table, report_waterfall
from perwatt import report_words as words
from perwatt.report import (
    AccountReport,
    AccuracyReport,
    CandidateReport,
    ChangeReport,
    PassReport,
    RatioFigure,
    Report,
    RunCostReport,
    ShareReport,
)
from perwatt.report_units import (
    MISSING,
    SIZES,
    compact,
    duration,
    in_units,
    number,
    plain,
    ratio_words,
    with_interval,
)

CHANGES_SHOWN = 12
CANDIDATES_SHOWN = 40
PASSES_SHOWN = 100
CLASSES = {"better": "better", "worse": "worse", "over budget": "worse", "same": "same", "≈ same": "same", "": "same"}
SYMBOL_CLASSES = {"✓": "better", "✗": "worse", "–": "same"}


def render(report: Report) -> str:
    """The whole page."""
    folder = files("perwatt")
    basis = words.basis(report)
    last_word = _element("p", _text(report.last_word), "last-word") if report.last_word else ""
    return Template((folder / "report_template.html").read_text(encoding="utf-8")).substitute(
        version=_text(report.perwatt_version),
        title=_text(f"{report.model.get('name', 'model')}: {words.headline(report)}"),
        style=(folder / "report.css").read_text(encoding="utf-8"),
        outcome=report.outcome,
        subject=_text(words.subject(report)),
        headline=_text(words.title(report)),
        basis=_element("p", _text(basis), "basis") if basis else "",
        reason=_text(report.reason),
        last_word=last_word,
        figures=_figures(report),
        chart=report_chart.chart(report),
        accuracy=_accuracy(report.accuracy) + _account(report.account, words.drop_unit(report)),
        passes=_passes(report.passes, words.drop_unit(report)),
        candidates=_search(report.search, report.run_cost, words.drop_unit(report))
        + _candidates(report.candidates, words.drop_unit(report)),
        evidence=_evidence(report),
        points=_points(report),
        deploy=_deploy(report),
        notes=_notes(report.notes),
        footer=_footer(report),
    )


# Small helpers ----------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Escaped, and free of control characters."""
    return escape(plain(value))


def _element(tag: str, inner: str, css: str = "") -> str:
    """An element around what is already HTML."""
    return f'<{tag} class="{css}">{inner}</{tag}>' if css else f"<{tag}>{inner}</{tag}>"


def _section(key: str, title: str, inner: str) -> str:
    heading = f'<h2 id="{key}-title">{escape(title)}</h2>'
    return f'<section aria-labelledby="{key}-title">\n{heading}\n{inner}\n</section>'


def _bullets(said: Iterable[str]) -> str:
    return _element("ul", "".join(_element("li", _text(line)) for line in said), "plain")


def _pairs(pairs: Iterable[tuple[str, str]], css: str) -> str:
    """A description list of plain text."""
    rows = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs)
    return _element("dl", "".join(rows), css)


def _definitions(pairs: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A description list with a paragraph for each sentence; what has none is left out."""
    rows = (
        f"<dt>{_text(name)}</dt><dd>{''.join(_element('p', _text(line)) for line in said)}</dd>"
        for name, said in pairs
        if said
    )
    return _element("dl", "\n".join(rows), "list")


def _head(titles: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f'<th scope="col" class="{css}">{escape(title)}</th>' for title, css in titles)
    return f"<thead><tr>{cells}</tr></thead>"


# Sections ---------------------------------------------------------------------------------------------------------


def _figures(report: Report) -> str:
    rows = []
    for line in report_table.lines(report):
        note = f' <span class="note">{_text(line.note)}</span>' if line.note else ""
        interval = f' <span class="interval">{_text(line.interval)}</span>' if line.interval else ""
        verdict = f' <span class="verdict {CLASSES[line.verdict]}">{line.verdict}</span>' if line.verdict else ""
        rows.append(
            f'<tr><th scope="row">{_text(line.label)}{note}</th><td class="number">{_text(line.before)}</td>'
            f'<td class="number">{_text(line.after)}</td>'
            f'<td class="number ratio"><span>{_text(line.ratio)}</span>{interval}{verdict}</td></tr>'
        )
    titles = (("", ""), ("before", "number"), ("after", "number"), ("after ÷ before, 95 % interval", "number ratio"))
    return _element("table", f"{_head(titles)}<tbody>\n" + "\n".join(rows) + "\n</tbody>", "figures")


def _accuracy(found: AccuracyReport | None) -> str:
    if found is None:
        return _section("accuracy", "Accuracy", "<p>Not measured: there were no samples to judge it on.</p>")
    first, *rest = words.accuracy_words(found)
    inner = f"<p>{_text(first)}</p>" + report_chart.flips(found) + _bullets(rest)
    return _section("accuracy", "Accuracy", inner)


def _passes(passes: Sequence[PassReport], unit: str) -> str:
    if not passes:
        return "<p>No passes were run.</p>"
    rows = [_pass(row, unit) for row in passes[:PASSES_SHOWN]]
    more = len(passes) - len(rows)
    tail = f"<p>{more} more in report.json.</p>" if more else ""
    return _element("ol", "\n".join(rows), "passes") + tail


def _pass(row: PassReport, unit: str) -> str:
    symbol = words.SYMBOLS[row.status]
    status = words.STATUS_WORDS.get(row.status, row.status)
    mark = f'<span class="symbol {SYMBOL_CLASSES[symbol]}" aria-hidden="true">{symbol}</span>'
    reason = f"<p>{_text(row.reason)}</p>" if row.reason else ""
    shown = [*row.changes[:CHANGES_SHOWN]]
    if len(row.changes) > CHANGES_SHOWN:
        shown.append(f"and {len(row.changes) - CHANGES_SHOWN} more in report.json")
    changes = _bullets(shown) if shown and row.status != "unchanged" else ""
    title = f'<h3>{_text(row.name)}</h3> <span class="status">{_text(status)}</span>'
    return f"<li>{mark}<div>{title}{reason}{changes}{_pairs(_pass_facts(row, unit), 'facts')}</div></li>"


def _pass_facts(row: PassReport, unit: str) -> list[tuple[str, str]]:
    said = [("took", duration(row.seconds))] if row.seconds else []
    if row.drift is not None:
        said.append(("drift", f"{number(row.drift.max_abs, 2)} (relative {number(row.drift.relative, 2)})"))
    if row.drift_from_original is not None:
        said.append(("drift from the original", number(row.drift_from_original.max_abs, 2)))
    if row.size_bytes:
        weights = in_units([row.size_bytes.get(when) for when in ("before", "after")], SIZES)
        said.append(("weights", " → ".join(dict.fromkeys(weights))))
    if row.operators:
        said.append(("operators", operator_changes(row.operators.get("before", {}), row.operators.get("after", {}))))
    if row.measured:
        said.append(("measured", words.measured_words(row.measured, unit)))
    if row.settings:
        said.append(("settings", words.value_words(row.settings)))
    return said


def operator_changes(before: dict[str, int], after: dict[str, int]) -> str:
    """Which operator counts moved: "BatchNormalization 19 → 0"."""
    changed = [name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0)]
    return ", ".join(f"{name} {before.get(name, 0):,} → {after.get(name, 0):,}" for name in changed) or "unchanged"


def _account(account: AccountReport | None, unit: str) -> str:
    """What each pass brings: as a picture, and in full in a table."""
    if account is None or not (account.shares or account.notes):
        return ""
    said = [account_words.whole_words(account)]
    said += [account_words.decision_words(account)] if account.droppable else []
    titles = (("pass", ""), ("in its turn", "number"), ("with ÷ without it", "number"), ("latency p50", "number"),
              ("size", "number"), ("accuracy lost", "number"))  # fmt: skip
    rows = "\n".join(_share(share, unit) for share in account.shares)
    table = _element("table", f"{_head(titles)}<tbody>\n{rows}\n</tbody>")
    caption = (
        f'<p class="quiet">In its turn: {_text(account.cost_is or "the cost")} after the pass ÷ before it, 95 % interval; '
        "latency, size and accuracy likewise. With ÷ without it: the winner beside the same pipeline without this one "
        "pass.</p>"
    )
    scroll = f'<div class="scroll" role="region" aria-label="What each pass brings" tabindex="0">{table}</div>'
    inner = _bullets([*said, *account.notes]) + report_waterfall.waterfall(account, unit)
    return _section("account", "What each pass brings", inner + (caption + scroll if account.shares else ""))


def _share(share: ShareReport, unit: str) -> str:
    rows = f' <span class="note">{len(share.settings)} times</span>' if len(share.settings) > 1 else ""
    why = _element("p", _text(f"{share.verdict}: {share.why}" if share.why else share.verdict), "why")
    turn = share.prefix
    cells = [ratio_words(ratio) for ratio in (turn.cost, share.alone_out.cost, turn.latency_p50_ms, turn.size_bytes)]
    cells.append(account_words.drop_words(turn, unit))
    return (
        f'<tr><th scope="row">{_text(share.name)}{rows}{why}{_unknown(share)}</th>'
        + "".join(map(_cell, cells))
        + "</tr>"
    )


def _unknown(share: ShareReport) -> str:
    """Why there are figures missing."""
    both: tuple[tuple[str, ChangeReport], ...] = (("in its turn", share.prefix), ("without it", share.alone_out))
    said = [f"{name}: {change.reason}" for name, change in both if change.reason and change.reason not in share.why]
    return _element("p", _text("; ".join(said)), "why note") if said else ""


def _cell(words_and_interval: tuple[str, str]) -> str:
    """A figure over its interval."""
    value, interval = words_and_interval
    under = f'<br><span class="interval">{_text(interval)}</span>' if interval else ""
    return f'<td class="number">{_text(value)}{under}</td>'


def _search(search: Mapping[str, Any] | None, cost: RunCostReport | None, unit: str) -> str:
    """What a search tried: the trials on the front, and how many others there were."""
    if not search:
        return ""
    names = account_words.objective_names(search)
    titles = (("trial", "number"), ("choice", ""), *((f"{name} ÷ original", "number") for name in names),
              ("accuracy lost", "number"), ("size", "number"))  # fmt: skip
    trials = account_words.front_of(search)[:CANDIDATES_SHOWN]
    rows = "\n".join(_trial(trial, search.get("shipped"), len(names), unit) for trial in trials)
    table = _element("table", f"{_head(titles)}<tbody>\n{rows}\n</tbody>")
    scroll = f'<div class="scroll" role="region" aria-label="Trials on the front" tabindex="0">{table}</div>'
    caption = '<p class="quiet">Trials that no other one beats in cost and in accuracy at once, as the search measured them.</p>'
    others = account_words.others_words(search)
    inner = f"<p>{_text(account_words.search_words(search))}</p>" + (caption + scroll if trials else "")
    if cost is not None:
        inner += f"<p>{_text(account_words.run_words(cost))}</p>"
    return _section("search", "The search", inner + (f"<p>{_text(others)}</p>" if others else ""))


def _trial(trial: Mapping[str, Any], shipped: object, objectives: int, unit: str) -> str:
    number_shown = int(trial.get("number") or 0) + 1
    mark = ' <span class="better">shipped</span>' if trial.get("number") == shipped else ""
    said = account_words.trial_words(trial)
    why = _element("p", _text(said), "why note") if said else ""
    found = [*(trial.get("objectives") or ())][:objectives]
    costs = [with_interval(RatioFigure(value=value)) for value in [*found, *[None] * (objectives - len(found))]]
    drop = trial.get("drop")
    lost = MISSING if drop is None else f"{number(drop, 2)}{unit}"
    cells = [*costs, lost, in_units([trial.get("size_bytes")], SIZES)[0]]
    return (
        f'<tr><td class="number">{number_shown}</td><th scope="row">{_text(trial.get("choice", ""))}{mark}{why}</th>'
        + "".join(f'<td class="number">{_text(cell)}</td>' for cell in cells)
        + "</tr>"
    )


def _candidates(candidates: Sequence[CandidateReport], unit: str) -> str:
    if not candidates:
        return ""
    titles = (("candidate", ""), ("verdict", ""), ("CPU time", "number"), ("throughput", "number"),
              ("accuracy", "number"))  # fmt: skip
    rows = "\n".join(_candidate(row, unit) for row in candidates[:CANDIDATES_SHOWN])
    table = _element("table", f"{_head(titles)}<tbody>\n{rows}\n</tbody>")
    more = len(candidates) - CANDIDATES_SHOWN
    tail = f"<p>{more} more in report.json.</p>" if more > 0 else ""
    scroll = f'<div class="scroll" role="region" aria-label="Candidates considered" tabindex="0">{table}</div>{tail}'
    caption = '<p class="quiet">CPU time and throughput are ratios to the original, from the screening.</p>'
    return _section("candidates", "Candidates considered", caption + scroll)


def _candidate(row: CandidateReport, unit: str) -> str:
    mark = {"shipped": "✓", "runner-up": "–", "rejected": "✗"}[row.verdict]
    made_of = "; ".join(filter(None, [", ".join(row.passes) or "no passes", row.floating_precision]))
    ratios = [ratio_words(ratio) if ratio else (MISSING, "") for ratio in (row.cpu_s_ratio, row.throughput_ratio)]
    cells = [f'{_text(value)}<br><span class="interval">{_text(interval)}</span>' for value, interval in ratios]
    reason = f'<p class="why">{_text(row.reason)}</p>' if row.reason else ""
    drop = MISSING if row.drop is None else words.accuracy_moved(row.drop, unit)
    return (
        f'<tr><th scope="row">{_text(row.name)}<br><span class="note">{_text(made_of)}</span>{reason}</th>'
        f'<td class="mark"><span class="{SYMBOL_CLASSES[mark]}" aria-hidden="true">{mark}</span> {row.verdict}</td>'
        + "".join(f'<td class="number">{cell}</td>' for cell in (*cells, _text(drop)))
        + "</tr>"
    )


def _evidence(report: Report) -> str:
    eager = words.eager_words(report)
    source = report.energy.get("source")
    return _definitions(
        [
            ("Joules", [*words.joules_words(report), *([f"source: {plain(source)}"] if source else [])]),
            ("Ratios", words.point_words(report)),
            ("Operating points", words.tuning_words(report)),
            ("torch eager", [eager] if eager else []),
            ("Measuring", [f"{name}: {said}" for name, said in words.facts(report.measuring)]),
            ("Data", [f"{name}: {said}" for name, said in words.facts(report.data)]),
        ]
    )


def _points(report: Report) -> str:
    sides = [dict(words.operating_point_words(side)) for side in (report.original, report.optimized)]
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(f"<td>{_text(side.get(name, MISSING))}</td>" for side in sides)
        + "</tr>"
        for name in {**sides[0], **sides[1]}
    )
    return _element("table", f"{_head((('', ''), ('before', ''), ('after', '')))}<tbody>{rows}</tbody>")


def _deploy(report: Report) -> str:
    in_python, alone = words.deploy_words(None)
    inputs = [plain(spec) for spec in report.model.get("inputs") or []]
    takes = f"<p>It takes <code>{escape(', '.join(inputs))}</code>, with any number of items.</p>" if inputs else ""
    return (
        f"<p>In Python:</p><pre><code>import perwatt\n{escape(in_python)}</code></pre>"
        f"<p>Without perwatt, in this folder:</p><pre><code>{escape(alone)}</code></pre>{takes}"
    )


def _notes(notes: Sequence[str]) -> str:
    return _section("notes", "Notes", _bullets(notes)) if notes else ""


def _footer(report: Report) -> str:
    digest = plain(report.model.get("digest") or "not known")
    versions = report.target.get("versions")
    backend = f", {words.value_words(versions)}" if versions else ""
    said = f"perwatt {report.perwatt_version}{backend}. The run took {duration(report.seconds)}, {report.created}."
    budget = f" Largest drop allowed: {compact(report.accuracy.max_drop)}." if report.accuracy else ""
    return f"<p>{_text(said + budget)}</p><p>Model digest <code>{_text(digest)}</code></p>"
