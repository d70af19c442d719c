"""What is one series by where it lay, on real repositories, and how a person finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perwatt import building
from perwatt.bench_report import BenchReport
from perwatt.errors import InputError
from perwatt.gate_report import GateReport
from perwatt.history import Series, record_bench, record_gate, trend
from perwatt.history_record import GIT, WORKING_TREE, whereabouts

sys.path.insert(0, str(Path(__file__).parent))
from histories import a_bench, a_gate, a_side, a_subject

CPU = "cpu_s_per_inference"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a history may be begun."""
    return tmp_path / "history.sqlite"


def record(file: Path, *reports: GateReport | BenchReport) -> None:
    """Write all down; nothing may go wrong."""
    for report in reports:
        note = record_gate(report, file) if isinstance(report, GateReport) else record_bench(report, file)
        assert note is None


def only(series: list[Series]) -> Series:
    [one] = series
    return one


def git(folder: Path, *arguments: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)


def a_checkout(folder: Path, remote: str | None = None, name: str = "origin") -> Path:
    """A repository with the folder `out` in it."""
    git(folder, "init")
    if remote is not None:
        git(folder, "remote", "add", name, remote)
    (folder / "out").mkdir()
    return folder


def at(path: Path | str, kind: str = "bundle", day: int = 1, **changes: Any) -> BenchReport:
    """A bench of the model "net" that lies at `path`."""
    return a_bench([a_subject(Path(path).name, name="net", path=str(path), kind=kind, **changes)], day=day)


def test_a_bundle_and_its_model_in_one_job_are_two_series(file: Path) -> None:
    for day in (1, 2):
        sides = [
            a_subject("net-cpu", 80e-6 * day, name="net", path="/srv/net-cpu", kind="bundle"),
            a_subject("net.onnx", 160e-6 * day, name="net", path="/srv/net.onnx", kind="onnx"),
        ]
        record(file, a_bench(sides, day=day))
    found = {
        series.subject_kind: [(one.value, one.previous) for one in series.entries] for series in trend(CPU, path=file)
    }
    assert found == {"bundle": [(80e-6, None), (160e-6, 80e-6)], "onnx": [(160e-6, None), (320e-6, 160e-6)]}


def test_entries_of_one_job_are_compared_with_an_earlier_one_never_with_each_other(file: Path) -> None:
    record(file, a_bench([a_subject("a", 100e-6, name="net"), a_subject("b", 50e-6, name="net")], day=1))
    record(file, a_bench([a_subject("a", 110e-6, name="net"), a_subject("b", 55e-6, name="net")], day=2))
    entries = only(trend(CPU, path=file)).entries
    assert [entry.previous for entry in entries] == [None, None, 50e-6, 50e-6]
    assert [entry.job == entries[0].job for entry in entries] == [True, True, False, False]


def test_two_projects_with_a_model_of_the_same_name_are_two_series(file: Path, tmp_path: Path) -> None:
    record(file, at(tmp_path / "one" / "net.onnx", "onnx"), at(tmp_path / "two" / "net.onnx", "onnx", day=2))
    record(file, at(tmp_path / "one" / ".." / "one" / "net.onnx", "onnx", day=3))
    places = {series.place: len(series.entries) for series in trend(CPU, path=file)}
    assert places == {f"{tmp_path}/one/net.onnx": 2, f"{tmp_path}/two/net.onnx": 1}


def test_a_bundle_built_again_at_its_path_stays_one_series(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(file, at("net-cpu"), at("./net-cpu/", day=2), at(tmp_path / "net-cpu", day=3))
    (tmp_path / "v4").mkdir()
    # A link to the newest stands for itself.
    (tmp_path / "net-cpu").symlink_to("v4")
    record(file, at("net-cpu", day=4))
    assert len(only(trend(CPU, path=file)).entries) == 4


def test_the_same_repository_checked_out_elsewhere_stays_one_series(file: Path, tmp_path: Path) -> None:
    ways = [
        "https://gitlab-ci-token:s3cr3t@Example.org/acme/vision.git", "git@example.org:acme/vision.git",
        "ssh://git@example.org:2222/acme/vision", "https://example.org/acme/vision/?private_token=s3cr3t",
    ]  # fmt: skip
    for day, remote in enumerate(ways, 1):
        record(file, at(a_checkout(tmp_path / str(day), remote) / "out" / "net-cpu", day=day))
    series = only(trend(CPU, path=file))
    assert (series.repository, series.place, len(series.entries)) == ("example.org/acme/vision", "out/net-cpu", 4)
    assert b"s3cr3t" not in file.read_bytes() and b"gitlab-ci-token" not in file.read_bytes()


@pytest.mark.parametrize(
    "remote",
    ["helper::https://ada:s3cr3t@example.org/x", "https://ada:s3/cr3t@example.org/x", "../x", "https://[::1]/x"],
)
def test_a_remote_that_is_not_understood_is_not_kept(tmp_path: Path, remote: str) -> None:
    folder = a_checkout(tmp_path / "a", remote)
    assert whereabouts(folder / "net.onnx") == (str(folder), "net.onnx")


def test_other_repositories_are_other_series(file: Path, tmp_path: Path) -> None:
    repositories = {
        "example.org/acme/vision": a_checkout(tmp_path / "a", "https://example.org/acme/vision"),
        "example.org/acme/sound": a_checkout(tmp_path / "b", "https://example.org/acme/sound", name="upstream"),
        str(tmp_path / "c"): a_checkout(tmp_path / "c"),
        str(tmp_path / "d"): a_checkout(tmp_path / "d"),
    }
    for folder in repositories.values():
        record(file, at(folder / "out" / "net-cpu"))
    assert {series.repository for series in trend(CPU, path=file)} == set(repositories)


def test_work_trees_and_clones_of_a_repository_without_remote_are_one(file: Path, tmp_path: Path) -> None:
    first = a_checkout(tmp_path / "first")
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    git(first, *identity, "commit", "--allow-empty", "-m", "first")
    git(first, "worktree", "add", str(tmp_path / "second"))
    git(tmp_path, "clone", str(first), str(tmp_path / "third"))
    for day, name in enumerate(("first", "second", "third"), 1):
        record(file, at(tmp_path / name / "net.onnx", "onnx", day=day))
    series = only(trend(CPU, path=file))
    assert (series.repository, series.place, len(series.entries)) == (str(first), "net.onnx", 3)


def test_a_model_that_is_a_repository_of_its_own(tmp_path: Path) -> None:
    model = a_checkout(tmp_path / "bert", "https://huggingface.co/acme/bert")
    assert whereabouts(model) == ("huggingface.co/acme/bert", ".")


@pytest.mark.parametrize("trouble", ["no git", "refused", "a hook's variables", "gone"])
def test_where_git_does_not_answer_the_path_is_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    folder = a_checkout(tmp_path / "a", "https://example.org/acme/vision")
    found = ("example.org/acme/vision", "net.onnx")
    if trouble == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
        found = (None, str(folder / "net.onnx"))
    elif trouble == "refused":
        (folder / ".git" / "HEAD").unlink()
        found = (None, str(folder / "net.onnx"))
    elif trouble == "a hook's variables":
        other = a_checkout(tmp_path / "b", "https://example.org/acme/sound")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert whereabouts(folder / "net.onnx") == found
    if trouble == "gone":
        assert whereabouts(folder / "deleted" / "since" / "net") == (found[0], "deleted/since/net")
        assert whereabouts("nul\x00")[1].endswith("nul\x00")


def test_what_gates_build_is_one_series_for_all_refs_in_one_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_checkout(tmp_path / "a", "https://example.org/acme/vision")
    monkeypatch.chdir(folder)
    for day, label in enumerate((GIT + "feature", WORKING_TREE, GIT + "other"), 1):
        built = a_side(label, path=f"/home/ada/.cache/perwatt/bundles/net-{day}")
        record(file, a_gate(GIT + "main", built, day=day))
    monkeypatch.chdir(folder / "out")
    record(file, a_gate(GIT + "main", WORKING_TREE, day=9))
    found = {(series.subject_kind, series.place): len(series.entries) for series in trend(CPU, path=file)}
    assert found == {("build", "."): 3, ("build", "out"): 1}
    assert {series.repository for series in trend(CPU, path=file)} == {"example.org/acme/vision"}


def test_labels_of_what_gates_build_are_those_that_building_gives() -> None:
    assert (WORKING_TREE, GIT) == (building.WORKING_TREE, building.GIT)


def test_a_chain_follows_the_files_wherever_they_lay(file: Path) -> None:
    v1, v2, v3 = (a_side(name, path=f"/srv/{name}") for name in ("v1", "v2", "v3"))
    record(file, a_gate(v1, v2, (1.0, 0.9)), a_gate(v2, v3, (0.95, 0.76), day=2))
    of = {series.place: series.entries[-1] for series in trend(CPU, path=file)}
    assert set(of) == {"/srv/v2", "/srv/v3"} and of["/srv/v3"].previous is None
    chain = of["/srv/v3"].chain
    assert chain is not None and (chain.jobs, chain.since[:2]) == (2, "v1")
    assert chain.ratio.value == pytest.approx(0.9 * 0.8)
    [asked] = trend(CPU, name="/srv/v3", path=file)
    assert asked.entries[-1].chain == chain


# Asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two projects: a bundle and its model in one, that model's namesake in the other. Seen from the first."""
    monkeypatch.chdir(a_checkout(tmp_path / "one", "https://example.org/acme/vision"))
    record(file, at("net-cpu"), at("net.onnx", "onnx"), at(tmp_path / "two" / "net.onnx", "onnx"), a_gate(name="other"))
    return file


ONE = {("bundle", "net-cpu"), ("onnx", "net.onnx")}


@pytest.mark.parametrize(
    ("name", "where", "found"),
    [
        ("net-cpu", ".", {("bundle", "net-cpu")}),
        ("./net-cpu/", ".", {("bundle", "net-cpu")}),
        ("../net-cpu", "out", {("bundle", "net-cpu")}),
        ("net-cpu/", "..", {("bundle", "net-cpu")}),
        ("net.onnx", ".", {("onnx", "net.onnx")}),
        ("net.onnx", "../two", {("onnx", "TWO/net.onnx")}),
        ("net.onnx", "..", {("onnx", "net.onnx"), ("onnx", "TWO/net.onnx")}),
        ("net", ".", ONE | {("onnx", "TWO/net.onnx")}),
        ("change", ".", {("bundle", "/srv/models/resnet20")}),
    ],
)
def test_a_series_is_found_by_name_by_path_and_by_label(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str, found: set[tuple[str, str]]
) -> None:
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(where)
    expected = {(kind, place.replace("TWO", str(tmp_path / "two"))) for kind, place in found}
    assert {(series.subject_kind, series.place) for series in trend(CPU, name=name, path=two)} == expected


def test_an_unknown_path_says_the_nearest(two: Path) -> None:
    with pytest.raises(InputError, match=r"unknown name in the history 'net.onx': did you mean net.onnx"):
        trend(CPU, name="net.onx", path=two)
    # What only ever was a base has no line.
    with pytest.raises(InputError, match=r"unknown name in the history 'main': "):
        trend(CPU, name="main", path=two)
