"""`optimize history`: what was measured before, as text, a plot or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from perwatt.bench.fingerprint import digest, fingerprint
from perwatt.errors import InputError, nearest
from perwatt.figures import FIGURES
from perwatt.history import Series, of_machine, trend
from perwatt.history import as_json as plain


def run(
    name: str | None, *, figure: str, limit: int, plot: str | None, all_machines: bool, path: str | None, as_json: bool
) -> str | None:
    """Print the trend, or return it as JSON text; `plot` is told on standard error when it is written. Raises InputError
    for an unknown figure or name, a file that is no history, and a `plot` that can't be drawn."""
    if plot is not None:
        from perwatt.history_chart import check_name

        check_name(plot)
    if figure not in FIGURES:
        raise InputError(nearest(figure, FIGURES, "figure"))
    found = trend(figure, name=name, limit=limit, path=Path(path) if path is not None else None)
    here = None if all_machines else digest(fingerprint())
    chosen = found if here is None else of_machine(found, here)[0]
    if plot is not None:
        _draw(chosen, found, plot)
    if as_json:
        return json.dumps(plain(chosen), indent=2) + "\n"
    from perwatt.history_terminal import print_history

    print_history(found, here=here)
    return None


def _draw(chosen: Sequence[Series], found: Sequence[Series], plot: str) -> None:
    """Write the picture and say so: on standard error, because the trend itself goes to standard output."""
    import click

    from perwatt.history_chart import write_chart

    if found and not chosen:
        raise InputError(f"there is nothing to draw into {plot}: no entries of this machine", fix="add --all-machines")
    write_chart(chosen, plot)
    click.echo(f"written {plot}", err=True)
