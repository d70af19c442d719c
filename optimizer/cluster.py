"""The trials of a search on many machines, or in several processes of this one: a driver, and workers that Ray looks after.

    cluster = Cluster("auto", …)
    evaluate = cluster.over(trials, notes)      # instead of trials.evaluate, for a Search
    …
    cluster.close()

Here is the driver: it hands the trials of a round to workers (`cluster_worker`) and gives their outcomes as they come, each
once. It alone writes the log of the search. What a round tries follows from the rounds before it, so that the number of
workers changes how long a search takes and not what it tries.

A worker is asked who it is first. One on another kind of machine, or with other versions, is left out: its figures are not
comparable, and what it makes would not be found again. A worker that is lost is made anew and its trial tried again. Graphs that
workers made are found in the store of steps: the same one on one machine, copied from other machines.

Limits: the recipe's files lie under the same path on every machine. What a worker took for a trial that it was lost over is not
part of what the run cost.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perwatt.bench.fingerprint import difference, fingerprint
from perwatt.bundle import cache_folder
from perwatt.cache_keys import environment
from perwatt.errors import InputError, TargetError, install_words
from perwatt.preparation import Prepared
from perwatt.recipe import Recipe
from perwatt.run_cache import VARIABLES
from perwatt.search import Evaluate
from perwatt.search_log import Outcome, Trial
from perwatt.search_proposals import ROUND
from perwatt.step_store import TENSOR, StepStore
from perwatt.trials import Trials

AUTO = "auto"
LOSSES = 2
"""How many times a trial whose worker was lost is handed out again, and how many times in a row a worker is made anew."""
HELLO_S = 60.0
"""A worker that did not start by then is left out: its machine is busy with something else."""
GOODBYE_S = 5.0
REACH_S = 5.0
STORE_BYTES = 80 << 20
"""For what Ray passes around on this machine: plain data, no models."""
ADDRESS = re.compile(r"(?:ray://)?([^\s:/]+):(\d+)")


def check(address: str, recipe: Recipe, searches: bool) -> None:
    """Whether a run of this recipe, which `searches` or not, may be spread over the cluster at `address`. Raises InputError, and
    TargetError where nothing answers there."""
    if not searches:
        raise InputError("--cluster is for searches", fix="give --time 2m or more, or --trials")
    if recipe.target.on is not None:
        raise InputError("--cluster and --on don't go together", fix="leave one of them out")
    if recipe.target.allow_power_control:
        raise InputError("--cluster and --allow-power-control don't go together", fix="leave one of them out")
    found = ADDRESS.fullmatch(address)
    if address != AUTO and not (address.isdecimal() and int(address)) and found is None:
        raise InputError(
            f"--cluster {address}: write auto, a number of workers on this machine, or HOST:PORT of a cluster"
        )
    if importlib.util.find_spec("ray") is None:
        raise InputError("--cluster needs Ray", fix=install_words("distributed"))
    if found is not None:
        try:
            socket.create_connection((found[1], int(found[2])), REACH_S).close()
        except (OSError, OverflowError) as error:
            raise TargetError(
                f"nothing answers at {address}: {error}", fix="ray start --head, or --cluster auto"
            ) from None


def facts() -> dict[str, Any]:
    """What decides whether figures and graphs of this process and another one belong together."""
    return {
        "host": platform.node() or "a machine without a name",
        "machine": fingerprint(),
        "environment": environment(),
    }


def misfit(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why the figures of a worker don't belong to those of this search; None where they do. Both are `facts`."""
    other = difference(ours["machine"], theirs["machine"])
    if other:
        return f"it is another kind of machine ({'; '.join(other)})"
    here, there = ours["environment"], theirs["environment"]
    packages = [
        f"{name} {there['packages'].get(name) or 'missing'} for {version or 'none'}"
        for name, version in here["packages"].items()
        if there["packages"].get(name) != version
    ]
    rest = [name for name in here if name != "packages" and here[name] != there.get(name)]
    if packages or rest:
        return f"it has other software ({', '.join([*packages, *rest])})"
    return None


class SharedSteps(StepStore):
    """A store of steps that knows which of its files were of use since it was asked last, and takes those of another one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._used: dict[str, None] = {}

    def used(self) -> list[str]:
        """Names of the files that hold what was kept or found since the last call: the weights of a step before it."""
        names = list(self._used)
        self._used.clear()
        return names

    def lacks(self, name: str) -> bool:
        """Whether a file is not there."""
        return not (self.folder / name).is_file()

    def content(self, name: str) -> bytes | None:
        """What a file holds; None where it is not there any more."""
        try:
            return (self.folder / Path(name).name).read_bytes()
        except OSError:
            return None

    def take(self, name: str, content: bytes) -> None:
        """Keep a file of another store. Where it can't be written, the step is made again when it is needed."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(Path(name).name, content)

    def _mark_used(self, entry: Path, tensors: Sequence[str]) -> None:
        super()._mark_used(entry, tensors)
        self._used.update(dict.fromkeys([*(f"{name}{TENSOR}" for name in tensors), entry.name]))


def open_shared_steps(otherwise: Path) -> SharedSteps:
    """The user's store; one in the folder `otherwise` where there is no home."""
    return SharedSteps(cache_folder("steps") or otherwise / "steps")


@dataclass
class _Slot:
    """A worker and its place: the cluster's node, or None for this machine. `losses`: in a row."""

    node: str | None
    host: str
    cpus: float
    actor: Any = None
    losses: int = 0
    cpu_s: float = 0.0
    """Of the process that is there now, as far as it was told."""


class Cluster:
    """Workers for the trials of one search. `started`: when the run did, in `time.perf_counter()` seconds; `machine`: the
    fingerprint that the figures of this search belong to."""

    def __init__(
        self, address: str, recipe: Recipe, prepared: Prepared, machine: Mapping[str, Any], started: float, folder: Path,
        charged: Callable[[float], None] = lambda cpu_s: None,
    ) -> None:  # fmt: skip
        """Nothing is started yet. `folder`: for scratch files; `charged` is told the CPU seconds that workers took."""
        self.address, self.recipe, self.prepared, self.started = address, recipe, prepared, started
        self.facts = {**facts(), "machine": dict(machine)}
        self.store = open_shared_steps(folder)
        self.slots: list[_Slot] = []
        self._lost: Counter[int] = Counter()
        self._ours = False
        self.charged = charged
        self._notes: list[str] = []

    def over(self, trials: Trials, notes: list[str]) -> Evaluate:
        """Start the workers; what evaluates rounds of trials by them. `trials` is what it takes to try a choice here, where no
        worker is left; `notes` takes what the report should tell. Raises TargetError where the cluster can't be used."""
        self.trials, self._notes = trials, notes
        self.slots = self._started()
        self._greet()
        if self.slots:
            where = ", ".join(dict.fromkeys(slot.host for slot in self.slots))
            self._notes.append(f"the trials were shared by {_counted(len(self.slots))} on {where}")
        return self.evaluate

    def evaluate(self, trials: Sequence[Trial], before: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Each trial with its outcome, as they come; those that there is no time for are left out. Where no worker is left they
        are tried here."""
        import ray

        waiting, running = deque(trials), dict[Any, tuple[_Slot, Trial]]()
        known = [plain(trial) for trial in before]
        while True:
            self._hand_out(waiting, running, known)
            if not running:
                break
            done, _ = ray.wait(list(running), num_returns=1)
            slot, trial = running.pop(done[0])
            answer = self._answer(slot, done[0])
            if "outcome" in answer:
                self.charged(answer["cpu_s"] - slot.cpu_s)
                slot.losses, slot.cpu_s = 0, answer["cpu_s"]
                self._fetch(slot, answer["files"])
                yield trial, Outcome.from_json(answer["outcome"])
            elif "refused" in answer:
                self._leave(slot, answer["refused"])
                waiting.appendleft(trial)
            elif self._again(trial):
                waiting.appendleft(trial)
            else:
                times = self._lost[trial.number]
                yield trial, Outcome("refused", f"its worker was lost {times} times: {answer['lost']}")
        if waiting:
            self._notes.append("the search went on without the cluster: no worker was left")
            yield from self.trials.evaluate(list(waiting), before)

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        if not self.slots and not self._ours:
            return
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ending = [slot.actor.close.remote() for slot in self.slots]
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=GOODBYE_S)
        for slot in self.slots:
            self._end(slot)
        self.slots = []
        if self._ours:
            ray.shutdown()
            self._ours = False

    # Trials -----------------------------------------------------------------------------------------------------------

    def _hand_out(
        self, waiting: deque[Trial], running: dict[Any, tuple[_Slot, Trial]], known: list[dict[str, Any]]
    ) -> None:
        """Give whoever has nothing to do a trial that there is time for."""
        busy = [id(slot) for slot, _ in running.values()]
        free = deque(slot for slot in self.slots if id(slot) not in busy)
        while waiting and free:
            trial = waiting.popleft()
            if self.trials.affords(trial.values):
                self.trials.progress(f"trial {trial.number + 1}: {self.trials.space.words(trial.values)}")
                slot = free.popleft()
                running[slot.actor.outcome.remote(dict(trial.values), known)] = slot, trial

    def _answer(self, slot: _Slot, asked: Any) -> dict[str, Any]:
        """What a worker says of a trial; {"lost": why} where it was lost, and it is made anew."""
        import ray

        try:
            answer: dict[str, Any] = ray.get(asked)
            return answer
        except ray.exceptions.RayTaskError:
            # An error of ours, which would end a search that runs here, too.
            raise
        except ray.exceptions.RayError as error:
            why = str(error).strip().split("\n")[0][:200]
        slot.losses += 1
        if slot.losses > LOSSES:
            self._leave(slot, f"it was lost {slot.losses} times in a row: {why}")
        else:
            self._end(slot)
            self._hire(slot)
        return {"lost": why}

    def _again(self, trial: Trial) -> bool:
        """Whether a trial whose worker was lost is tried again."""
        self._lost[trial.number] += 1
        return self._lost[trial.number] <= LOSSES

    def _fetch(self, slot: _Slot, names: Sequence[str]) -> None:
        """Bring here what a worker made, where it is not here."""
        import ray

        # Where the worker is lost meanwhile, the graph is made here if it is needed.
        with contextlib.suppress(ray.exceptions.RayError):
            for name in filter(self.store.lacks, names):
                content = ray.get(slot.actor.file.remote(name))
                if content is not None:
                    self.store.take(name, content)

    # Workers ----------------------------------------------------------------------------------------------------------

    def _started(self) -> list[_Slot]:
        """Ray, and where its workers may be."""
        import ray

        local = ADDRESS.fullmatch(self.address) is None
        count = int(self.address) if self.address.isdecimal() else _fitting(self.recipe.target.threads)
        if not ray.is_initialized():
            self._connect(count if local else None)
        if local and self._ours:
            return [_Slot(None, "this machine", 1.0) for _ in range(count)]
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0.0) >= 1]
        # All of a machine for one worker: nothing else of the cluster is to run beside a measurement.
        return [_Slot(node["NodeID"], node["NodeManagerHostname"], node["Resources"]["CPU"]) for node in nodes]

    def _connect(self, cpus: int | None) -> None:
        """Start a Ray on this machine with so many `cpus`, or connect to the one at the address. It says nothing on the terminal
        and reports to nobody."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # What it hides from processes that ask for no GPU is what they measure on.
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        import ray

        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            if cpus is None:
                ray.init(address=self.address, **quiet)
            else:
                ray.init(
                    address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet
                )
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            raise TargetError(f"Ray can't be used ({self.address}): {words}") from None
        self._ours = True
        # That a worker died is ours to tell, and it would go to standard output.
        ray._private.worker._worker_logs_enabled = False

    def _greet(self) -> None:
        """Ask all workers who they are; leave out whose figures would not belong to ours."""
        import ray

        for slot in self.slots:
            self._hire(slot)
        asked = {slot.actor.hello.remote(): slot for slot in self.slots}
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=HELLO_S) if asked else ([], [])
        for one in late:
            self._leave(asked[one], f"it did not start within {HELLO_S:.0f} s")
        for one in done:
            try:
                why = misfit(self.facts, ray.get(one))
            except ray.exceptions.RayError as error:
                why = str(error).strip().split("\n")[-1][:300]
            if why is not None:
                self._leave(asked[one], why)

    def _hire(self, slot: _Slot) -> None:
        """A new process for a worker; it does not begin before it is asked for something."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from perwatt.cluster_worker import TrialWorker

        options: dict[str, Any] = {"num_cpus": slot.cpus, "max_restarts": 0, "max_task_retries": 0}
        if slot.node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(slot.node, soft=False)
        slot.actor = ray.remote(TrialWorker).options(**options).remote(self._order())

    def _order(self) -> dict[str, Any]:
        """All that a worker has to know, as plain data."""
        trials, prepared = self.trials, self.prepared
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "folder": os.getcwd(),
            "variables": {name: os.environ.get(name) for name in VARIABLES},
            "elapsed_s": time.perf_counter() - self.started,
            "model": prepared.source.digest(),
            "data": dict(prepared.roles.sources),
            "space": repr(trials.space),
            "places": [[name, list(offered)] for name, offered in trials.space.places.items()],
            "baseline": [trials.baseline.backend.name, trials.baseline.point.floating_precision],
            "minutes": trials.minutes,
        }

    def _leave(self, slot: _Slot, why: str) -> None:
        """Go on without a worker."""
        self._end(slot)
        self.slots.remove(slot)
        self._notes.append(f"warning: the worker on {slot.host} took no part: {why}")

    def _end(self, slot: _Slot) -> None:
        import ray

        slot.cpu_s = 0.0
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(slot.actor)


def plain(trial: Trial) -> dict[str, Any]:
    """A trial as plain data."""
    outcome = None if trial.outcome is None else trial.outcome.to_json()
    return {**asdict(Trial(trial.number, dict(trial.values), trial.why, trial.round)), "outcome": outcome}


def from_plain(told: Mapping[str, Any]) -> Trial:
    """What `plain` made."""
    outcome = None if told["outcome"] is None else Outcome.from_json(told["outcome"])
    return Trial(**{**told, "outcome": outcome})


def _fitting(threads: int | None) -> int:
    """How many workers this machine has room for; more than the trials of a round would have nothing to do."""
    return max(1, min(ROUND, len(os.sched_getaffinity(0)) // (threads or 1)))


def _counted(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
