"""Keys of kept results: whatever may decide a result is in its key, and nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from models import conv_net

from perwatt import cache_keys
from perwatt.artifact import Artifact, Step
from perwatt.cache_keys import StepKeys, digest, environment, file_digest, own_source, what_is_seen
from perwatt.contract import Capabilities, Context, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.options import build_recipe

sys.path.insert(0, str(Path(__file__).parent))
from runs import package

MACHINE = {"name": "a processor", "cpus": 2}


@dataclass(frozen=True)
class Plain(Pass):
    """A pass that is never run: only what it is counts."""

    stage: ClassVar[Stage] = Stage.CLEAN

    strength: float = 1.0
    layers: tuple[str, ...] = ()

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        raise AssertionError

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()


class Lossy(Plain):
    """The same, where accuracy decides."""

    tolerance: ClassVar[Tolerance | None] = None


class Measuring(Plain):
    """The same, that asks the backend."""

    measures: ClassVar[bool] = True


def samples(value: float = 0.0, batch_size: int = 32) -> Samples:
    return Samples([{"x": np.full((4, 3), value, np.float32)}], np.arange(4), batch_size)


@dataclass
class Asking:
    """A question with everything that is usual; `key(change=…)` changes one thing."""

    artifact: Artifact
    original: Artifact
    folder: Path

    def key(self, made_by: Pass | None = None, **changes: Any) -> str | None:
        options = changes.pop("options", {})
        recipe = build_recipe(None, **{"model": "net.onnx", "target": "null", **options})
        machine, made_up = changes.pop("machine", MACHINE), changes.pop("made_up", False)
        roles = {"calibrate": samples(), "check": samples(1.0), **changes.pop("samples", {})}
        keys = StepKeys(recipe, changes.pop("original", self.original), roles, machine, made_up)
        asked = {"artifact": self.artifact, "capabilities": Capabilities(), "target": "", **changes}
        return keys.key(asked["artifact"], made_by or Plain(), asked["capabilities"], asked["target"])


@pytest.fixture
def asking(tmp_path: Path) -> Asking:
    return Asking(conv_net(), conv_net(), tmp_path)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    yield
    environment.cache_clear()
    cache_keys._source_of.cache_clear()


def noted(artifact: Artifact) -> Artifact:
    model = artifact.edit()
    out = model.graph[0].outputs[0]
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4, 6, 6])
    return Artifact(model=model, steps=artifact.steps)


def renamed(artifact: Artifact) -> Artifact:
    model = artifact.edit()
    model.graph[0].name = "another"
    return Artifact(model=model, steps=artifact.steps)


def test_the_same_question_has_the_same_key_in_another_process(asking: Asking) -> None:
    first = asking.key()
    environment.cache_clear()
    assert asking.key(artifact=conv_net(), original=conv_net()) == first
    assert len(str(first)) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"made_by": Plain(strength=2.0)},
        {"made_by": Plain(layers=("a",))},
        {"made_by": Lossy()},
        {"artifact": conv_net(seed=1)},
        {"artifact": conv_net().with_steps((Step("prune-channels", {"ratio": 0.5}),))},
        {"artifact": noted(conv_net())},
        {"artifact": renamed(conv_net())},
        {"original": conv_net(seed=1)},
        {"samples": {"calibrate": samples(2.0)}},
        {"samples": {"calibrate": samples().without_labels()}},
        {"samples": {"calibrate": samples(batch_size=2)}},
        {"samples": {"check": samples(2.0)}},
        {"samples": {"learn": samples()}},
        {"made_up": True},
        {"options": {"seed": 1}},
        {"capabilities": Capabilities(isa=("avx2",))},
    ],
)
def test_what_any_pass_may_depend_on_is_in_its_key(asking: Asking, changes: dict[str, Any]) -> None:
    assert asking.key(**changes) != asking.key()


def test_settings_of_the_history_count_and_words_about_it_do_not(asking: Asking) -> None:
    def after(ratio: float, words: str) -> str | None:
        step = Step("prune-channels", {"ratio": ratio, "exclude": ("a",)}, (words,))
        return asking.key(artifact=conv_net().with_steps((step,)))

    assert after(0.5, "in 2 minutes") == after(0.5, "in 3 minutes") != after(0.4, "in 2 minutes")


def test_a_history_that_was_read_from_json_is_the_same_history(asking: Asking) -> None:
    tuples, lists = ({"exclude": ("a", "b")}, {"exclude": ["a", "b"]})
    seen = [what_is_seen(conv_net().with_steps((Step("x", settings),))) for settings in (tuples, lists)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"max_drop": 1.0}, {Lossy}),
        ({"prove_accuracy": True}, {Lossy}),
        ({"time": "10m"}, set()),
        ({"threads": 3}, {Measuring}),
        ({"scenario": "offline"}, {Measuring}),
        ({"metric": "top5"}, {Measuring}),
    ],
)
def test_budget_counts_for_lossy_passes_and_how_it_runs_for_those_that_measure(
    asking: Asking, options: dict[str, Any], kinds: set[type]
) -> None:
    moved = {kind for kind in (Plain, Lossy, Measuring) if asking.key(kind(), options=options) != asking.key(kind())}
    assert moved == kinds


@pytest.mark.parametrize(
    "changes",
    [{"machine": {"name": "another"}}, {"target": "openvino"}, {"samples": {"confirm": samples(3.0)}}],
)
def test_machine_target_and_what_judges_count_for_passes_that_measure(asking: Asking, changes: dict[str, Any]) -> None:
    assert asking.key(Measuring(), **changes) != asking.key(Measuring())
    if "target" not in changes:
        assert asking.key(**changes) == asking.key()
        assert asking.key(Lossy(), **changes) == asking.key(Lossy())


def test_the_source_of_ones_own_metric_counts(asking: Asking) -> None:
    file = asking.folder / "mine.py"
    options = {"metric": f"{file}:score"}
    file.write_text("def score(): return 1\n")
    first = asking.key(Measuring(), options=options)
    file.write_text("def score(): return 2\n")
    assert asking.key(Measuring(), options=options) != first


def test_a_pass_with_settings_that_are_no_plain_data_has_no_key(asking: Asking) -> None:
    class Odd(Plain):
        def settings(self) -> dict[str, Any]:
            return {"act": object()}

    assert asking.key(Odd()) is None


# Code and packages ----------------------------------------------------------------------------------------------------


def test_versions_of_packages_count_and_absent_ones_are_known_as_such(asking: Asking, monkeypatch) -> None:
    packages = environment()["packages"]
    assert packages["numpy"] == np.__version__
    first = asking.key()
    monkeypatch.setattr(cache_keys, "PACKAGES", (*cache_keys.PACKAGES, "no-such-package"))
    environment.cache_clear()
    assert environment()["packages"]["no-such-package"] is None
    assert asking.key() != first


@pytest.mark.parametrize("name", ["own_source", "_version", "_text"])
def test_perwatts_source_the_packages_and_the_driver_count(asking: Asking, monkeypatch, name: str) -> None:
    first = asking.key()
    monkeypatch.setattr(cache_keys, name, lambda *_: "another")
    environment.cache_clear()
    assert asking.key() != first


def test_perwatts_source_is_all_files_of_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_keys, "OWN", ("mine",))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    found = [own_source()]
    (tmp_path / "mine" / "_helper.py").write_text("A = 1\n")
    found.append(own_source())
    (tmp_path / "mine" / "_helper.py").write_text("A = 2\n")
    found.append(own_source())
    assert len(set(found)) == 3


def test_a_third_partys_pass_counts_by_its_own_file_and_version(asking: Asking, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(package(asking.folder, "passes", "tidy-up", "class TidyUp():\n    pass\n")))
    assert "tidy-up=tidy_up:TidyUp 1.0" in environment()["third parties"]
    first = asking.key()
    monkeypatch.setattr(cache_keys, "file_digest", lambda path: "another" if path.name == Path(__file__).name else "")
    cache_keys._source_of.cache_clear()
    assert asking.key() != first


def test_a_digest_knows_no_order_of_keys_and_takes_plain_data_only(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1}) != digest({"a": 1, "b": [3, 2]})
    with pytest.raises(TypeError):
        digest({"a": object()})
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
