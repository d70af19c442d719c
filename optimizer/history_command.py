"""`optimize history`: what was measured before, as text, a plot or JSON."""

from __future__ import annotations

import json
from pathlib import Path

from perwatt.bench.fingerprint import digest, fingerprint
from perwatt.errors import InputError, nearest
from perwatt.figures import FIGURES
from perwatt.history import as_json as plain
from perwatt.history import of_machine, trend


def run(
    name: str | None, *, figure: str, limit: int, plot: str | None, all_machines: bool, path: str | None, as_json: bool
) -> str | None:
    """Print the trend, or return it as JSON text. Raises InputError for an unknown figure or a file that is no history."""
    if figure not in FIGURES:
        raise InputError(nearest(figure, FIGURES, "figure"))
    found = trend(figure, name=name, limit=limit, path=Path(path) if path is not None else None)
    here = None if all_machines else digest(fingerprint())
    chosen = found if here is None else of_machine(found, here)[0]
    if plot is not None:
        from perwatt.history_chart import write_chart

        write_chart(chosen, Path(plot))
    if as_json:
        return json.dumps(plain(chosen), indent=2) + "\n"
    from perwatt.history_terminal import print_history

    print_history(found, here=here)
    return None
