"""The log of a search: every trial that was asked for, and what it found, in an SQLite file that a killed search goes on from.

Optuna keeps it, and its sampler (a tree-structured Parzen estimator) proposes from it. A proposal depends on nothing but the
seed, the draw and the trials that it is shown: the sampler is made anew for each, so that a search which was killed at any
moment proposes what it would have proposed.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perwatt.choices import Space, Values
from perwatt.errors import InputError
from perwatt.measurement import Ratio

if TYPE_CHECKING:
    import optuna

SCHEMA = 2
"""Of what is kept with each trial; a log of another one is begun anew."""
NAME, GIVEN_UP = "search", "given up"
UNKNOWN_COST = 4.0
"""Told to the sampler for what couldn't be measured: as if it cost so many times the original."""

Status = Literal["measured", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What a trial found, as plain data. `measured`: its figures are there; `refused`: it could not be made or run, and
    `reason` says why.

    `ratios`: figures ÷ the original's. `objectives`: what is to be as little as possible, ÷ the original's. `drop` is in points
    for accuracies, in metric units otherwise, on `n` samples. `missed`: constraint → by which share of it it is missed; only
    those that are. `digest` is of the graph; `seconds` of wall time that the trial took. `partly`: a lossy pass in it changed
    nothing, so that it is another choice than it says. `drop_low`: what it loses at least, where too much was clear before all
    samples were judged."""

    status: Status
    reason: str = ""
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    objectives: tuple[float, ...] = ()
    drop: float | None = None
    drop_low: float | None = None
    n: int | None = None
    p99_ms: float | None = None
    memory_bytes: int | None = None
    size_bytes: int | None = None
    missed: Mapping[str, float] = field(default_factory=dict)
    digest: str | None = None
    seconds: float = 0.0
    partly: bool = False

    @property
    def cost(self) -> float:
        """The first objective; infinite where it was not measured."""
        return self.objectives[0] if self.status == "measured" and self.objectives else math.inf

    @property
    def permitted(self) -> bool:
        """Whether it was measured and misses no constraint."""
        return self.status == "measured" and not self.missed

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(replace(self, ratios={}))
        plain["ratios"] = {name: [ratio.value, ratio.low, ratio.high] for name, ratio in self.ratios.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Outcome:
        """What `to_json` made."""
        ratios = {name: Ratio(*three) for name, three in plain["ratios"].items()}
        return cls(**{**plain, "ratios": ratios, "objectives": tuple(plain["objectives"])})


@dataclass(frozen=True)
class Trial:
    """One trial of a search: which choice, why it was proposed, and what it found (None: not yet)."""

    number: int
    values: Values
    why: str = ""
    round: int = 0
    outcome: Outcome | None = None


class Log:
    """Trials on disk. One process writes it."""

    def __init__(self, path: Path, space: Space, *, seed: int = 0, objectives: int = 1) -> None:
        """`path`: the SQLite file; where it holds a search over another space, or is damaged, it is begun anew. Raises
        InputError where it can't be written, or where another process has it open."""
        self.path, self.space, self.seed = path, space, seed
        self._lock = _locked(path)
        self._directions: list[Literal["minimize", "maximize"]] = ["minimize"] * objectives
        self._study = self._opened()

    # What is known ----------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials that were asked for, by number."""
        return [_plain(frozen) for frozen in self._study.get_trials(deepcopy=False) if "values" in frozen.user_attrs]

    def told(self) -> list[Trial]:
        """Those that are over. The others were in flight when the search was killed."""
        return [trial for trial in self.trials() if trial.outcome is not None]

    def given_up(self) -> set[int]:
        """Numbers of trials that turned out not to hold when they were measured again."""
        return set(self._study.user_attrs.get(GIVEN_UP, []))

    def settled(self, name: str, value: Any) -> Any:
        """What was decided when the search began: `value`, plain data, for the first who asks, and the same ever after."""
        known = self._study.user_attrs
        if name not in known:
            self._study.set_user_attr(name, value)
            return value
        return known[name]

    # Asking and telling -----------------------------------------------------------------------------------------------

    def proposals(self, before: Sequence[Trial], draw: str) -> Iterator[dict[str, int]]:
        """What the sampler would try next, knowing these trials, in canonical form, and what after that, without end. Another
        `draw` is another story. Nothing is written."""
        import optuna

        # A copy in memory: what is asked for there and not taken leaves no trace.
        beside = optuna.create_study(directions=self._directions, sampler=self._sampler(draw))
        known = {trial.number for trial in before}
        over = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        beside.add_trials([frozen for frozen in over if frozen.number in known])
        while True:
            yield self.space.canonical(beside.ask(self._distributions()).params)

    def ask(self, values: Values, why: str, round: int = 0) -> Trial:
        """Write down that this choice is being tried."""
        import optuna

        # In one transaction, so that there is never half of it.
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=dict(values), distributions=self._distributions(),
                user_attrs={"values": dict(values), "why": why, "round": round},
            )
        )  # fmt: skip
        return Trial(self._study.get_trials(deepcopy=False)[-1].number, dict(values), why, round)

    def tell(self, trial: Trial, outcome: Outcome) -> Trial:
        """Write down what a trial found."""
        import optuna

        asked = self._asked(trial.number)
        asked.set_user_attr("outcome", outcome.to_json())
        costs = outcome.objectives if outcome.objectives else (UNKNOWN_COST,) * len(self._directions)
        # One figure, so that there is none or all of it; one that was killed right here has it already.
        if not asked.constraints:
            refused = 1.0 if outcome.status == "refused" else -1.0
            asked.set_constraint("missed", max(outcome.missed.values(), default=refused))
        # Ratios: half as much and twice as much are as far from one.
        self._study.tell(
            trial.number, [math.log(max(cost, 1e-9)) for cost in costs], state=optuna.trial.TrialState.COMPLETE
        )
        return replace(trial, outcome=outcome)

    def give_up(self, trial: Trial) -> None:
        """Write down that a trial does not hold."""
        self._study.set_user_attr(GIVEN_UP, sorted({*self.given_up(), trial.number}))

    def close(self) -> None:
        """Let go of the file."""
        self._lock.close()
        storage: Any = self._study._storage
        backend = getattr(storage, "_backend", storage)
        backend.remove_session()
        backend.engine.dispose()

    # Optuna -----------------------------------------------------------------------------------------------------------

    def _asked(self, number: int) -> optuna.trial.Trial:
        import optuna

        frozen = self._study.get_trials(deepcopy=False)[number]
        return optuna.trial.Trial(self._study, frozen._trial_id)

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            decision.name: IntDistribution(0, len(decision.values) - 1)
            if decision.kind == "ordered"
            else CategoricalDistribution(tuple(range(len(decision.values))))
            for decision in self.space.decisions
        }

    def _sampler(self, draw: str = "") -> Any:
        from optuna.samplers import TPESampler

        mixed = hashlib.sha256(f"{self.seed}:{draw}".encode()).digest()
        return TPESampler(seed=int.from_bytes(mixed[:4], "big"), n_startup_trials=1)

    def _opened(self) -> Any:
        facts = {"schema": SCHEMA, "space": repr(self.space), "seed": self.seed, "objectives": len(self._directions)}
        try:
            study = self._load(facts)
        except _Other:
            aside(self.path)
            study = self._load(facts)
        return study

    def _load(self, facts: dict[str, Any]) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.RDBStorage(f"sqlite:///{self.path}")
            study = optuna.create_study(
                study_name=NAME,
                storage=storage,
                directions=self._directions,
                load_if_exists=True,
                sampler=self._sampler(),
            )
            if not study.user_attrs:
                study.set_user_attr("facts", facts)
        except OSError as error:
            raise InputError(f"the log of the search {self.path} can't be written: {error.strerror}") from None
        except Exception as error:
            # Whatever SQLAlchemy makes of a file that is no database of Optuna's.
            if not self.path.exists() or _is_database(self.path) is None:
                raise InputError(f"the log of the search {self.path} can't be written: {error}") from None
            raise _Other from error
        if study.user_attrs.get("facts") != facts:
            raise _Other
        return study


def _locked(path: Path) -> Any:
    """The log's lock, which the system takes back when this process ends. Raises InputError where another one has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise InputError(f"the log of the search {path} can't be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(
            "another run of this very search is going on", fix="wait until it is over, or give another --seed"
        ) from None
    return lock


class _Other(Exception):
    """The file is of another search, or damaged."""


def _is_database(path: Path) -> bool | None:
    """Whether SQLite can read it; None where nobody may write there."""
    try:
        with path.open("r+b"):
            pass
    except OSError:
        return None
    try:
        connection = sqlite3.connect(path)
        try:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return False


def aside(path: Path) -> None:
    """Keep a log, or a file beside one, that is of no use here under another name: somebody may want to look at it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        left = path.with_name(path.name + suffix)
        if left.exists():
            left.replace(path.with_name(f"{path.stem}-old{path.suffix}{suffix}"))


def _plain(frozen: Any) -> Trial:
    found = frozen.user_attrs.get("outcome")
    over = found is not None and frozen.state.name == "COMPLETE"
    asked = frozen.user_attrs
    outcome = Outcome.from_json(found) if over else None
    return Trial(frozen.number, asked["values"], asked.get("why", ""), asked.get("round", 0), outcome)


def front(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Of the trials that were measured, those that no other one beats in cost and in accuracy at once, cheapest first."""
    known = [
        t for t in trials if t.outcome is not None and t.outcome.status == "measured" and t.outcome.drop is not None
    ]
    least = math.inf
    for trial in sorted(known, key=lambda t: (t.outcome.cost, t.outcome.drop)):  # type: ignore[union-attr]
        drop = trial.outcome.drop  # type: ignore[union-attr]
        if drop is not None and drop < least:
            least = drop
            yield trial
