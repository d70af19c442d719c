"""A search on many machines: the same trials as without, whoever is lost. Scripted time on the null target."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from perwatt import cluster as clusters
from perwatt import compilation
from perwatt.bundle import Bundle
from perwatt.cluster import LOSSES, Cluster, SharedSteps, from_plain, misfit, plain
from perwatt.cluster_worker import TrialWorker
from perwatt.errors import InputError, TargetError
from perwatt.measurement import Ratio
from perwatt.options import build_recipe
from perwatt.pipeline import Pipeline
from perwatt.search_log import Outcome, Trial

sys.path.insert(0, str(Path(__file__).parent))
from runs import assert_one_line_error, command, optimize
from searches import FLAGS, cache, here, searched

__all__ = ["cache", "here"]

PASSES = "fold-batchnorm,prune-channels,quantize-int8,assign-precision"
VARYING = {"seconds": 0.0, "memory_bytes": 0}
"""Of an outcome, what is another one each time."""
ENOUGH = "enough was seen"


def told(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What must be the same whoever made the trials."""
    return [
        (t["number"], t["round"], t["choice"], t["why"], t["status"], tuple(t["objectives"]), t["drop"], t["digest"])
        for t in report["search"]["trials"]
    ]


# What may be asked for ------------------------------------------------------------------------------------------------


def recipe(**options: Any) -> Any:
    return build_recipe(model="net.onnx", **{"target": "null", "trials": 4, **options})


@pytest.mark.parametrize(
    ("address", "options", "searches", "words"),
    [
        ("auto", {}, False, "--cluster is for searches — give --time 2m or more, or --trials"),
        ("auto", {"on": "ssh://me@there"}, True, "--cluster and --on"),
        ("auto", {"allow_power_control": True}, True, "--cluster and --allow-power-control"),
        ("there", {}, True, "--cluster there: write auto, a number of workers"),
        ("0", {}, True, "--cluster 0: write auto"),
    ],
)
def test_what_can_not_be_spread_is_refused(address: str, options: Any, searches: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        clusters.check(address, recipe(**options), searches)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(TargetError, match=r"nothing answers at 127\.0\.0\.1:1"):
        clusters.check("127.0.0.1:1", recipe(), True)


def test_without_ray_the_command_says_what_to_install(here: Path, tmp_path: Path) -> None:
    # As if it were not installed: its finder is asked first, and finds nothing.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'ray' else found(name, *more)\n"
    )
    done = optimize("net.onnx", *FLAGS, "--passes", PASSES, "--trials", 2, "--cluster", "auto", cwd=here, path=tmp_path)
    assert_one_line_error(done, 2, "--cluster needs Ray", "pip install")


# Who may take part ----------------------------------------------------------------------------------------------------


def test_another_machine_and_other_software_do_not_fit() -> None:
    ours = clusters.facts()
    assert misfit(ours, copy.deepcopy(ours)) is None
    assert misfit(ours, {**copy.deepcopy(ours), "host": "another one"}) is None
    other = copy.deepcopy(ours)
    other["machine"]["name"] = "another processor"
    found = misfit(ours, other)
    assert found is not None and found.startswith("it is another kind of machine") and "another processor" in found
    other = copy.deepcopy(ours)
    other["environment"]["packages"]["numpy"] = "1.0"
    found = misfit(ours, other)
    assert found is not None and "other software (numpy 1.0 for" in found
    other = copy.deepcopy(ours)
    other["environment"]["source"] = "0"
    found = misfit(ours, other)
    assert found is not None and "other software (source)" in found


# Plain data -----------------------------------------------------------------------------------------------------------


def test_trials_come_back_as_they_were() -> None:
    outcome = Outcome("measured", "", {"cpu": Ratio(0.5, 0.4, 0.6)}, (0.5,), 0.1, 75, digest="d")
    for trial in (Trial(1, {"a": 2}, "why", 3, outcome), Trial(0, {})):
        assert from_plain(plain(trial)) == trial


def test_a_store_tells_what_was_of_use_and_takes_it_from_another_one(tmp_path: Path) -> None:
    ours, theirs = SharedSteps(tmp_path / "ours"), SharedSteps(tmp_path / "theirs")
    theirs.take("weight.tensor", b"weight")
    theirs.take("entry.step", b"entry")
    theirs._mark_used(theirs.folder / "entry.step", ["weight"])
    names = theirs.used()
    assert names == ["weight.tensor", "entry.step"] and theirs.used() == []
    for name in filter(ours.lacks, names):
        content = theirs.content(name)
        assert content is not None
        ours.take(name, content)
    assert not any(map(ours.lacks, names)) and ours.content("entry.step") == b"entry"
    assert ours.content("nothing.step") is None


# Scripted workers -----------------------------------------------------------------------------------------------------


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class ScriptedRay:
    """Ray as far as a driver sees it: answers come in any order, and each of `fates` befalls one question: "lost", "refused" or
    nothing."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, seed: int, fates: Sequence[str | None]) -> None:
        self.draw, self.fates, self.asked = random.Random(seed), list(fates), list[int]()

    def wait(self, refs: list[Any], **how: Any) -> tuple[list[Any], list[Any]]:
        one = self.draw.choice(refs)
        return [one], [ref for ref in refs if ref is not one]

    def get(self, ref: Any) -> Any:
        number, fate = ref
        if fate == "lost":
            raise RayError("it died")
        if fate == "refused":
            return {"refused": "it can't"}
        return {"outcome": Outcome("measured", objectives=(number / 10,)).to_json(), "files": [], "cpu_s": 1.0}

    def kill(self, actor: Any) -> None:
        pass

    def ask(self, values: dict[str, int], known: Any) -> Any:
        self.asked.append(values["x"])
        return (values["x"], self.fates.pop(0) if self.fates else None)


class ScriptedTrials:
    """Trials that are made here where no worker is left."""

    space = SimpleNamespace(words=lambda values: "a choice")

    def __init__(self, most: int = 100) -> None:
        self.most, self.made = most, list[int]()

    def progress(self, text: str) -> None:
        pass

    def affords(self, values: dict[str, int]) -> bool:
        return values["x"] < self.most

    def evaluate(self, trials: Sequence[Trial], before: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        for trial in trials:
            self.made.append(trial.number)
            yield trial, Outcome("measured", objectives=(trial.number / 10,))


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def begin(seed: int, fates: Sequence[str | None], workers: int = 4, most: int = 100) -> tuple[Cluster, ScriptedRay]:
        ray = ScriptedRay(seed, fates)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cluster = Cluster("4", recipe(), None, {}, 0.0, tmp_path)  # type: ignore[arg-type]
        cluster.trials = ScriptedTrials(most)  # type: ignore[assignment]

        def hire(slot: Any) -> None:
            slot.actor = SimpleNamespace(outcome=SimpleNamespace(remote=ray.ask))

        monkeypatch.setattr(cluster, "_hire", hire)
        cluster.slots = [clusters._Slot(None, f"machine {number}", 1.0) for number in range(workers)]
        for slot in cluster.slots:
            hire(slot)
        return cluster, ray

    return begin


def round_of(count: int) -> list[Trial]:
    return [Trial(number, {"x": number}) for number in range(count)]


def test_each_trial_is_told_once_whoever_is_lost(scripted: Any) -> None:
    for seed in range(200):
        draw = random.Random(seed)
        fates = [draw.choice([None, None, "lost", "refused"]) for _ in range(12)]
        cluster, _ = scripted(seed, fates, workers=draw.randint(0, 4))
        found = list(cluster.evaluate(round_of(6), []))
        assert sorted(trial.number for trial, _ in found) == list(range(6)), seed
        for trial, outcome in found:
            if outcome.status == "measured":
                assert outcome.cost == trial.number / 10
            else:
                assert outcome.reason == f"its worker was lost {LOSSES + 1} times: it died"


def test_a_trial_is_given_up_only_after_its_worker_was_lost_again_and_again(scripted: Any) -> None:
    cluster, ray = scripted(0, ["lost"] * LOSSES, workers=1)
    found = list(cluster.evaluate(round_of(2), []))
    assert [outcome.status for _, outcome in found] == ["measured", "measured"] and ray.asked == [0, 0, 0, 1]
    cluster, ray = scripted(0, ["lost"] * (LOSSES + 1), workers=1)
    found = list(cluster.evaluate(round_of(2), []))
    assert [outcome.status for _, outcome in found] == ["refused", "measured"]
    assert cluster.trials.made == [1] and any("no worker was left" in note for note in cluster._notes)


def test_who_can_not_take_part_is_named_and_its_trial_made_by_another_one(scripted: Any) -> None:
    cluster, _ = scripted(0, ["refused"], workers=2)
    found = list(cluster.evaluate(round_of(3), []))
    assert len(found) == 3 and len(cluster.slots) == 1 and not cluster.trials.made
    assert cluster._notes == ["warning: the worker on machine 0 took no part: it can't"]


def test_what_there_is_no_time_for_is_left_out(scripted: Any) -> None:
    cluster, ray = scripted(0, [], most=2)
    assert sorted(trial.number for trial, _ in cluster.evaluate(round_of(4), [])) == [0, 1] == sorted(ray.asked)


def test_what_a_worker_took_is_charged_once(scripted: Any) -> None:
    cluster, _ = scripted(0, [None, "lost"], workers=1)
    charged: list[float] = []
    cluster.charged = charged.append
    assert len(list(cluster.evaluate(round_of(3), []))) == 3
    # Each tells the CPU seconds of its process so far, and the one that was made anew begins at none.
    assert charged == [1.0, 1.0, 0.0]


# Without Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_finds_what_the_driver_finds(
    here: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[Outcome, Outcome]] = []
    taken: list[str] = []
    really = Pipeline._taken

    def noted(self: Pipeline, asked: Any) -> Any:
        taken.append(asked.made_by.name())
        return really(self, asked)

    class Beside(Cluster):
        """A worker in this process whose outcomes are compared with the driver's."""

        def over(self, trials: Any, notes: list[str]) -> Any:
            self.trials = trials
            order = self._order()
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
            self.worker = TrialWorker(order)
            assert misfit(self.facts, self.worker.hello()) is None
            return self.evaluate

        def evaluate(self, trials: Sequence[Trial], before: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
            for trial in trials:
                answer = self.worker.outcome(trial.values, [plain(one) for one in before])
                assert answer["files"] and answer["cpu_s"] > 0
                for name in filter(self.store.lacks, answer["files"]):
                    content = self.worker.file(name)
                    assert content is not None
                    self.store.take(name, content)
                theirs = Outcome.from_json(answer["outcome"])
                taken.clear()
                assert self.trials.branch(trial.values).rows and not taken, "nothing is made again"
                pairs.append((self.trials.outcome(trial.values, before), theirs))
                yield trial, theirs
            if len(pairs) >= 3:
                raise TargetError(ENOUGH)

        def close(self) -> None:
            self.worker.close()

    monkeypatch.setattr(Pipeline, "_taken", noted)
    monkeypatch.setattr(compilation, "Cluster", Beside)
    monkeypatch.setattr(clusters, "check", lambda *about: None)
    with pytest.raises(TargetError, match=ENOUGH):
        searched(here, tmp_path / "out", 3, cluster="auto", passes=PASSES)
    assert len(pairs) >= 3
    for ours, theirs in pairs:
        assert ours.to_json() | VARYING == theirs.to_json() | VARYING
    assert any(ours.status == "measured" for ours, _ in pairs)


@pytest.mark.slow
def test_files_that_are_others_there_are_named(
    here: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Cluster):
        """Workers that see other files."""

        def over(self, trials: Any, notes: list[str]) -> Any:
            self.trials = trials
            order, data = self._order(), next(iter(self.prepared.roles.sources))
            with pytest.raises(InputError, match="the model is another one there"):
                TrialWorker({**order, "model": "0"})._compare(self.prepared)
            with pytest.raises(InputError, match=r"samples\.npz is another one there"):
                TrialWorker({**order, "data": {data: "0"}})._compare(self.prepared)
            away = TrialWorker({**order, "folder": str(tmp_path / "nowhere")})
            assert "nowhere: No such file" in away.outcome(trials.space.usual(), [])["refused"]
            raise TargetError(ENOUGH)

    monkeypatch.setattr(compilation, "Cluster", Elsewhere)
    monkeypatch.setattr(clusters, "check", lambda *about: None)
    with pytest.raises(TargetError, match=ENOUGH):
        searched(here, tmp_path / "out", 1, cluster="auto", passes=PASSES)


# With Ray -------------------------------------------------------------------------------------------------------------


def trying() -> list[psutil.Process]:
    """Workers of Ray under this process that are trying something."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::TrialWorker.outcome"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_one(draw: random.Random, killed: list[int], until: threading.Event) -> None:
    """A worker, twice, at random moments while it tries something."""
    while len(killed) < 2 and not until.is_set():
        busy = [process for process in trying() if process.pid not in killed]
        if not busy:
            time.sleep(0.05)
            continue
        time.sleep(draw.uniform(0.0, 3.0))
        victim = draw.choice(busy)
        if victim in trying():
            killed.append(victim.pid)
            victim.kill()


@pytest.mark.slow
def test_four_workers_of_which_one_is_killed_twice_find_what_is_found_without_them(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    count = 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-alone"))
    alone = searched(here, tmp_path / "alone", count, passes=PASSES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-together"))
    killed: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=kill_one, args=(random.Random(1), killed, over))
    killer.start()
    capfd.readouterr()
    try:
        together = searched(here, tmp_path / "together", count, cluster="4", passes=PASSES)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2, together["notes"]
    assert told(together) == told(alone) and len(told(alone)) == count
    assert together["search"]["shipped"] == alone["search"]["shipped"]
    assert together["outcome"] == alone["outcome"] == "optimized"
    assert together["ratio"]["cpu_s_per_inference"]["value"] == alone["ratio"]["cpu_s_per_inference"]["value"]
    assert "the trials were shared by 4 workers on this machine" in together["notes"]
    # Each of the four opened the model for itself.
    assert together["run_cost"]["cpu_s"] > alone["run_cost"]["cpu_s"]
    assert not trying() and "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_a_worker_on_another_kind_of_machine_is_left_out(
    here: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    asked = 0

    def one_is_another(ours: Any, theirs: Any) -> str | None:
        nonlocal asked
        asked += 1
        return misfit(ours, {**theirs, "machine": {**theirs["machine"], "cpus": -1}} if asked == 1 else theirs)

    monkeypatch.setattr(clusters, "misfit", one_is_another)
    report = searched(here, tmp_path / "out", 2, cluster="2", passes=PASSES)
    assert len(report["search"]["trials"]) == 2 and asked == 2
    assert any("took no part: it is another kind of machine (CPUs online" in note for note in report["notes"])
    assert "the trials were shared by 1 worker on this machine" in report["notes"]


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_ships_the_best_so_far(here: Path, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("ray")
    line = command(
        "net.onnx", *FLAGS, "--passes", PASSES, "--trials", 40, "--out", tmp_path / "out", "-v", "--cluster", "2"
    )
    process = subprocess.Popen(
        line, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert process.stdout is not None
    assert any("trial 5" in text for text in process.stdout)
    began = psutil.Process(process.pid).children(recursive=True)
    # As a terminal does: to all that belong to the command.
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    report = Bundle(tmp_path / "out").report
    assert report["search"]["ended"] == "stopped by Ctrl-C" and report["outcome"] == "optimized"
    _, alive = psutil.wait_procs(began, timeout=20)
    assert not alive
