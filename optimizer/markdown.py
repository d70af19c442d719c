"""Parts of GitHub-flavoured Markdown: text that can't become markup, tables, folds, and a size that a comment may have.

Whatever comes from a person, a file or a path goes through `safe`; what is not, is written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from perwatt.report_units import plain

MAX_BYTES = 60_000
"""GitHub refuses a comment of more than 65,536 characters; a step summary may be larger."""
LONGEST = 400
LONGEST_WORD = 40
MOST_ITEMS = 20
CUT = "<sub>Something here was too long for a comment: all of it is in the JSON.</sub>"

_SPECIAL = re.compile(r"[\\`*_\[\]<>|~#&$]")
_LIKE_AN_INTERVAL = re.compile(r"\\\[([−+0-9., %]+)\\\](?![(\\])(:?)")
_BEGINS_A_BLOCK = re.compile(r"^(?:[-+=/:]|\d+(?=[.)](?:\s|$)))")


def safe(text: object, most: int = LONGEST) -> str:
    """`text` in one line, as it is and nothing else: no markup, HTML, table cell, mention or quick action; at most
    `most` characters of it."""
    said = plain(text)
    if len(said) > most:
        kept = said[: most - 1]
        # At the end of a word, unless there is none for long.
        space = kept.rfind(" ") if said[most - 1] != " " else -1
        said = (kept[:space] if space > max(0, most - LONGEST_WORD) else kept) + "…"
    said = _SPECIAL.sub(r"\\\g<0>", said)
    # Intervals stay readable in the source; a bracket that a link could begin with is none.
    said = _LIKE_AN_INTERVAL.sub(
        lambda found: found[0] if found[2] and not found.start() else f"[{found[1]}]{found[2]}", said
    )
    said = _BEGINS_A_BLOCK.sub(lambda found: found[0] + "\\" if found[0].isdigit() else f"\\{found[0]}", said)
    # An empty comment between them keeps people whose names stand in a path from being notified.
    return said.replace("@", "@<!-- -->")


def comment(text: str) -> str:
    """A hidden comment; `text` can't end it."""
    return f"<!-- {re.sub(r'-{2,}', '-', plain(text)).replace('<', '_').replace('>', '_').strip('-')[:120]} -->"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table; the columns in `left` are text, all others numbers. Cells are safe already."""
    rule = ["---" if index in left else "--:" for index in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def bullets(items: Iterable[str], most: int = MOST_ITEMS) -> str:
    """A list of whatever is given, made safe; what is beyond `most` is counted."""
    found = list(items)
    more = [f"and {len(found) - most:,} more"] if len(found) > most else []
    return "\n".join(f"- {safe(item)}" for item in [*found[:most], *more])


def details(summary: str, body: str) -> str:
    """Folded until it is clicked; nothing where there is no body. `summary` is never anyone's text."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>" if body else ""


def fitted(blocks: Iterable[str], most: int = MAX_BYTES) -> str:
    """The blocks in a row, at most `most` bytes: the largest are left out until it fits, never the first."""
    kept = [block for block in blocks if block]
    joined = _joined(kept)
    while len(joined.encode()) > most and len(kept) > 1:
        largest = max(range(1, len(kept)), key=lambda index: len(kept[index].encode()))
        del kept[largest]
        joined = _joined([*kept, CUT])
    return joined


def _joined(blocks: Sequence[str]) -> str:
    return "\n\n".join(blocks) + "\n"
