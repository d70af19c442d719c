"""One side of a gate, from what was written to a bundle: real repositories, real builds on the scripted target."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from perwatt.building import Built, resolve
from perwatt.building_cache import intact
from perwatt.bundle import Bundle, digest_of
from perwatt.errors import BackendError, InputError, PerwattError, TargetError

sys.path.insert(0, str(Path(__file__).parent))
from repos import commit, everything, git, repository, told
from runs import conv_net, gone, images, until, workers_of

pytestmark = pytest.mark.slow

RECIPE = "model: {path: net.onnx}\ntarget: {name: 'null'}\npasses: []\n"
WITH_DATA = RECIPE + "data: {all: ../data/samples.npz}\nbudget: {max_drop: 100}\n"


def net(seed: int = 0) -> bytes:
    return conv_net(seed).SerializeToString()


def samples(path: Path) -> None:
    """Samples without labels: nothing to judge, so any model will do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=images(40))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's git configuration and nobody's cache; temporary files where a test can count them."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("PERWATT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a subfolder, two versions of its model, data that git ignores, a stash; the working directory is that
    subfolder."""
    folder = repository(tmp_path / "repo")
    commit(folder, {"svc/net.onnx": net(0), "svc/recipe.yaml": WITH_DATA, ".gitignore": "data/\n", "readme": "1"})
    git(folder, "tag", "v1")
    (folder / "readme").write_text("stashed")
    git(folder, "stash")
    commit(folder, {"svc/net.onnx": net(1)})
    samples(folder / "data" / "samples.npz")
    monkeypatch.chdir(folder / "svc")
    return folder


def model_of(built: Built) -> str:
    """SHA-256 of the model that the bundle was made from."""
    return str(Bundle(built.path).lock["model"]["sha256"])


@contextmanager
def scripted(script: str) -> Iterator[None]:
    """The build is a shell script for a while."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        stand_in = Path(folder) / "python"
        stand_in.write_text(f"#!/bin/sh\n{script}\n")
        stand_in.chmod(0o755)
        patch.setattr(sys, "executable", str(stand_in))
        yield


def nothing_left(tmp_path: Path) -> bool:
    """No checkout, no scratch folder, no half bundle."""
    cache = tmp_path / "cache"
    halves = list(cache.glob(".*.partial-*")) if cache.exists() else []
    return not halves and not list((tmp_path / "tmp").glob("perwatt-*"))


def test_a_ref_is_built_from_its_own_files_once_and_the_repository_stays_as_it_was(repo: Path, tmp_path: Path) -> None:
    before, words = everything(repo), told(repo)
    stages: list[tuple[str, float]] = []
    built = resolve("git:v1", Path("recipe.yaml"), progress=lambda stage, share: stages.append((stage, share)))
    assert built.label == "git:v1" and not built.from_cache and not built.dirty and built.seconds > 0
    assert built.commit == git(repo, "rev-parse", "v1^{commit}")
    assert built.path.parent == tmp_path / "cache" and intact(built.path)
    assert Bundle(built.path).lock["recipe"]["data"]["all"] == "../data/samples.npz"
    assert Bundle(built.path).report["data"]["synthetic"] is False
    assert len(built.notes) == 1
    assert "../data/samples.npz is not in v1" in built.notes[0] and "from the working tree" in built.notes[0]

    shares = [share for _, share in stages]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert any("writing the bundle" in stage for stage, _ in stages)

    (tmp_path / "first.onnx").write_bytes(net(0))
    assert model_of(built) == digest_of(tmp_path / "first.onnx")

    stages.clear()
    again = resolve("git:v1", Path("recipe.yaml"), progress=lambda stage, share: stages.append((stage, share)))
    assert again.from_cache and again.path == built.path and again.notes == built.notes
    assert not any("building" in stage for stage, _ in stages)
    assert everything(repo) == before and told(repo) == words
    assert nothing_left(tmp_path)


def test_the_working_tree_and_its_commit_are_one_entry_until_something_changes(repo: Path) -> None:
    ours = resolve(None, Path("recipe.yaml"))
    assert (ours.label, ours.dirty, ours.from_cache, ours.notes) == ("working tree", False, False, ())
    assert ours.commit == git(repo, "rev-parse", "HEAD")
    assert model_of(ours) == digest_of(repo / "svc" / "net.onnx")
    head = resolve("git:HEAD", Path("recipe.yaml"))
    assert head.from_cache and head.path == ours.path
    # What the recipe does not name makes the working tree dirty, and no other bundle.
    (repo / "readme").write_text("2")
    dot = resolve(".", Path("recipe.yaml"))
    assert (dot.label, dot.dirty, dot.from_cache, dot.path) == ("working tree", True, True, ours.path)
    (repo / "svc" / "net.onnx").write_bytes(net(2))
    with scripted("echo 'optimize: asked to build' >&2; exit 5"), pytest.raises(BackendError, match="asked to build"):
        resolve(None, Path("recipe.yaml"))


def test_a_damaged_entry_and_force_build_anew(repo: Path) -> None:
    first = resolve(None, Path("recipe.yaml"))
    with scripted("echo 'optimize: asked to build' >&2; exit 5"):
        with pytest.raises(BackendError, match="asked to build"):
            resolve(None, Path("recipe.yaml"), force=True)
        assert resolve(None, Path("recipe.yaml")).from_cache, "what was there stays until the new one is whole"
    (first.path / "model.onnx").write_bytes(b"cut")
    assert not intact(first.path)
    again = resolve(None, Path("recipe.yaml"))
    assert not again.from_cache and again.path == first.path and intact(again.path)


def test_two_gates_at_once_build_one_bundle(repo: Path, tmp_path: Path) -> None:
    found: list[Built] = []
    stages: list[str] = []

    def side() -> None:
        found.append(resolve("git:v1", Path("recipe.yaml"), progress=lambda stage, share: stages.append(stage)))

    both = [threading.Thread(target=side) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(300)
    assert sorted(each.from_cache for each in found) == [False, True]
    assert found[0].path == found[1].path
    assert stages.count("building git:v1") == 1 and "waiting: git:v1 is being built already" in stages
    assert nothing_left(tmp_path)


def test_the_recipe_is_the_refs_own_and_a_budget_that_it_misses_is_noted(repo: Path) -> None:
    commit(repo, {"svc/recipe.yaml": RECIPE + "budget: {p99_ms: 0.001}\n"})
    git(repo, "tag", "strict")
    commit(repo, {"svc/recipe.yaml": WITH_DATA})
    built = resolve("git:strict", Path("recipe.yaml"))
    assert Bundle(built.path).outcome == "budget_not_met"
    assert built.notes == ("the budget was not met: the bundle holds the best so far",)
    assert resolve("git:strict", Path("recipe.yaml")).notes == built.notes


@pytest.mark.parametrize("ignored", ["*.onnx\n*.bin\n", "*.bin\n"], ids=["model and weights", "weights alone"])
def test_a_model_that_git_ignores_comes_with_its_weights(repo: Path, ignored: str) -> None:
    commit(repo, {"svc/net.onnx": None, "svc/recipe.yaml": RECIPE, ".gitignore": ignored})
    where = repo / "svc" / "net.onnx"
    onnx.save(conv_net(), str(where), save_as_external_data=True, location="net.bin", size_threshold=0)
    commit(repo, {})
    built = resolve("git:HEAD", Path("recipe.yaml"))
    assert not built.from_cache and built.notes and all("working tree" in note for note in built.notes)
    assert resolve(None, Path("recipe.yaml")).from_cache


def test_an_error_of_the_build_is_told_with_its_side_and_leaves_nothing(repo: Path, tmp_path: Path) -> None:
    commit(repo, {"svc/net.onnx": net(0)[:300]})
    before = everything(repo)
    with pytest.raises(InputError, match=r"^git:HEAD: .*net\.onnx") as caught:
        resolve("git:HEAD", Path("recipe.yaml"))
    assert str(tmp_path / "tmp") not in str(caught.value) and "\n" not in str(caught.value)
    assert everything(repo) == before and nothing_left(tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ("target: {name: nowhere}", InputError, "unknown target 'nowhere'"),
        ("budget: {max_dorp: 1}", InputError, "git:HEAD: recipe.yaml: unknown key"),
        ("model: {path: absent.onnx}", InputError, "no file or folder absent.onnx"),
    ],
    ids=["target", "key", "model"],
)
def test_a_recipe_that_is_wrong_at_the_ref_says_so(
    repo: Path, change: str, kind: type[PerwattError], words: str
) -> None:
    section = change.partition(":")[0]
    kept = "\n".join(line for line in RECIPE.split("\n") if not line.startswith(section))
    commit(repo, {"svc/recipe.yaml": f"{kept}{change}\n"})
    (repo / "svc" / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(kind, match=words) as caught:
        resolve("git:HEAD", Path("recipe.yaml"))
    assert str(caught.value).startswith("git:HEAD: ")


def test_a_stop_ends_the_build_and_leaves_nothing(repo: Path, tmp_path: Path) -> None:
    before = everything(repo)

    def stop(stage: str, share: float) -> None:
        if "running the passes" in stage:
            assert workers_of(str(tmp_path / "tmp"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("git:v1", Path("recipe.yaml"), progress=stop)
    assert gone(workers_of(str(tmp_path / "tmp")))
    assert everything(repo) == before
    until(lambda: nothing_left(tmp_path), within_s=20)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_files_that_change_under_the_build_are_noticed(repo: Path, tmp_path: Path) -> None:
    def edit(stage: str, share: float) -> None:
        if "running the passes" in stage:
            samples(repo / "data" / "samples.npz")
            (repo / "svc" / "net.onnx").write_bytes(net(5))

    with pytest.raises(InputError, match="working tree: files changed while they were being built"):
        resolve(None, Path("recipe.yaml"), progress=edit)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch):
    """What a build would see: `prepared(spec, config)` gives the job and looks before anything is built."""
    from perwatt import building

    class Seen(Exception):
        pass

    def made(spec: str, config: str, look) -> object:
        result = []

        def instead(job, cache, force, progress, started):
            result.append((job, look(job)))
            raise Seen

        monkeypatch.setattr(building, "_built", instead)
        with pytest.raises(Seen):
            resolve(spec, Path(config))
        return result[0]

    return made


def test_a_folder_that_git_keeps_in_part_is_filled_up(repo: Path, prepared) -> None:
    recipe = RECIPE + "data: {calibrate: ../pictures}\n"
    commit(repo, {"svc/recipe.yaml": recipe, "pictures/.keep": "", "pictures/a/kept.png": b"1", ".gitignore": "*.jpg"})
    (repo / "pictures" / "a" / "new.jpg").write_bytes(b"2")
    (repo / "pictures" / "b").mkdir()
    (repo / "pictures" / "b" / "other.jpg").write_bytes(b"3")
    (repo / "pictures" / "a" / "kept.png").write_bytes(b"changed")

    def look(job) -> dict[str, bytes]:
        folder = job.here / "../pictures"
        # As what reads folders does: it follows no links inside.
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    job, found = prepared("git:HEAD", "recipe.yaml", look)
    assert found == {".keep": b"", "a/kept.png": b"1", "a/new.jpg": b"2", "b/other.jpg": b"3"}
    assert len(job.notes) == 1 and job.notes[0].startswith("2 files of ../pictures") and job.borrowed


def test_data_outside_the_repository_is_where_the_recipe_says(repo: Path, tmp_path: Path, prepared) -> None:
    samples(tmp_path / "shared" / "x.npz")
    samples(tmp_path / "absolute.npz")
    paths = f"{{calibrate: ../../shared/x.npz, eval: {tmp_path}/absolute.npz, train: {repo}/data/samples.npz}}"
    commit(repo, {"svc/recipe.yaml": RECIPE + f"data: {paths}\n"})

    def look(job) -> list[bool]:
        data = job.recipe.data
        return [(job.here / where).read_bytes() != b"" for where in (data.calibrate, data.eval, data.train)]

    job, found = prepared("git:HEAD", "recipe.yaml", look)
    assert found == [True, True, True]
    assert [note.split(" ")[0] for note in job.notes] == ["../../shared/x.npz", f"{repo}/data/samples.npz"]
    assert "absolute path: it is the working tree's for every ref" in job.notes[1]
    assert not list(tmp_path.glob("tmp/shared")), "nothing is put outside the checkout"


def test_a_path_above_the_root_folder_is_refused(repo: Path) -> None:
    commit(repo, {"svc/recipe.yaml": RECIPE + f"data: {{all: {'../' * 60}x.npz}}\n"})
    with pytest.raises(InputError, match="leads above the root folder"):
        resolve("git:HEAD", Path("recipe.yaml"))


def test_a_link_that_leads_nowhere_at_the_ref_is_replaced(repo: Path, prepared) -> None:
    (repo / "svc" / "net.onnx").unlink()
    (repo / "svc" / "net.onnx").symlink_to("../data/net.onnx")
    (repo / "data" / "net.onnx").write_bytes(net(3))
    commit(repo, {"svc/recipe.yaml": RECIPE})
    job, content = prepared("git:HEAD", "recipe.yaml", lambda job: (job.here / "net.onnx").read_bytes())
    assert content == net(3) and "net.onnx is not in HEAD" in job.notes[0]


def test_the_recipe_may_lie_elsewhere_than_the_working_directory(repo: Path, tmp_path: Path, prepared) -> None:
    commit(repo, {"conf/r.yaml": RECIPE.replace("[]", "[fold-batchnorm]")})
    job, _ = prepared("git:HEAD", "../conf/r.yaml", lambda job: None)
    assert str(job.config) == "../conf/r.yaml" and job.recipe.passes != []
    absolute, _ = prepared("git:HEAD", str(repo / "conf" / "r.yaml"), lambda job: None)
    assert absolute.config == job.config
    (tmp_path / "outside.yaml").write_text(RECIPE)
    outside, _ = prepared("git:v1", str(tmp_path / "outside.yaml"), lambda job: None)
    assert outside.config == tmp_path / "outside.yaml"
    assert any("outside the repository: it is the same for every ref" in note for note in outside.notes)


def test_a_network_from_an_installed_package_is_noted(repo: Path, prepared) -> None:
    commit(repo, {"svc/recipe.yaml": RECIPE.replace("net.onnx}", "net.onnx, arch: onnx_ir.nets:build}")})
    job, _ = prepared("git:HEAD", "recipe.yaml", lambda job: None)
    assert "onnx_ir.nets is imported from the Python environment: it is the same for every ref" in job.notes


def test_code_of_a_clean_working_tree_counts_as_its_commit(repo: Path, prepared) -> None:
    ref, _ = prepared("git:HEAD", "recipe.yaml", lambda job: None)

    def now() -> str:
        return prepared(".", "recipe.yaml", lambda job: job.code())[1]

    clean = now()
    assert clean == ref.code()
    (repo / "svc" / "helper.py").write_text("a = 1\n")
    untracked = now()
    (repo / "svc" / "helper.py").write_text("a = 2\n")
    assert len({clean, untracked, now()}) == 3
    (repo / "svc" / "helper.py").unlink()
    old, _ = prepared("git:v1", "recipe.yaml", lambda job: None)
    assert old.code() != clean == now()
    # What building leaves in the working tree is no change of it.
    for name in ("__pycache__/helper.pyc", "out/perwatt.lock.json", "out/program.json", "out/null/model.onnx"):
        (repo / "svc" / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / "svc" / name).write_text("{}")
    assert now() == clean


def test_a_config_that_the_ref_lacks_suggests_a_bundle(repo: Path) -> None:
    (repo / "svc" / "new.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match=r"new\.yaml does not exist at v1 \([0-9a-f]{10}\) — the change that brings"):
        resolve("git:v1", Path("new.yaml"))


def test_without_a_recipe_nothing_is_built(repo: Path) -> None:
    for spec, words in (
        ("git:v1", "building git:v1 takes a recipe"),
        (None, "without --head the working tree is built"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            resolve(spec, None)
        assert "--config" in str(caught.value)


def test_an_unknown_ref_is_refused_before_anything_is_written(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"git knows no commit 'v11'.*did you mean v1"):
        resolve("git:v11", Path("recipe.yaml"))
    assert not (tmp_path / "cache").exists() and nothing_left(tmp_path)


def test_a_bundle_and_a_model_are_taken_as_they_are(repo: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "main-bundle"
    bundle.mkdir()
    for name in ("perwatt.lock.json", "program.json"):
        (bundle / name).write_text("{}")
    for spec in (str(bundle), "net.onnx"):
        for config in (None, Path("recipe.yaml")):
            built = resolve(spec, config)
            assert built == Built(spec, Path(spec), None, False, False, built.seconds, ())
    assert not (tmp_path / "cache").exists()


def test_what_is_neither_a_bundle_nor_a_model_says_what_it_is(repo: Path) -> None:
    with pytest.raises(InputError, match="there is no bundle v1 — the git ref is written git:v1"):
        resolve("v1", Path("recipe.yaml"))
    with pytest.raises(InputError, match=r"no file or folder nett\.onnx — did you mean net\.onnx"):
        resolve("nett.onnx", None)
    with pytest.raises(InputError, match="text file, no model"):
        resolve("recipe.yaml", None)


def test_outside_a_repository_the_working_tree_is_built_and_refs_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(net())
    (folder / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="is in no git repository"):
        resolve("git:main", Path("recipe.yaml"))
    job, _ = prepared(".", "recipe.yaml", lambda job: None)
    again, _ = prepared(".", "recipe.yaml", lambda job: None)
    assert job.commit is None and not job.dirty
    assert job.code() == job.code() != again.code(), "nobody knows which files code reads there"


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("echo 'optimize: no such thing — try that' >&2; exit 2", InputError, "no such thing — try that"),
        ("echo 'optimize: not here' >&2; exit 4", TargetError, "not here"),
        ("echo 'optimize: a backend failed' >&2; exit 5", BackendError, "a backend failed"),
        ("echo '   1.0 s   30 %  passes' >&2; kill -SEGV $$", BackendError, "was ended by signal 11"),
        ("echo 'Traceback' >&2; echo 'ValueError: x' >&2; exit 1", BackendError, "exit code 1: ValueError: x"),
        ("exit 0", BackendError, "exit code 0: it said nothing"),
    ],
    ids=["input", "target", "backend", "crash", "traceback", "no bundle"],
)
def test_how_a_scripted_build_ends_is_told_by_its_kind(
    repo: Path, script: str, kind: type[PerwattError], words: str
) -> None:
    with scripted(script), pytest.raises(kind, match=words) as caught:
        resolve(None, Path("recipe.yaml"))
    assert type(caught.value) is kind and str(caught.value).startswith("working tree: ")


def test_a_scripted_build_gets_the_checkout_and_nothing_that_a_hook_set(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(repo / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(repo / ".git" / "index"))
    with scripted(f"env > {tmp_path}/env; pwd > {tmp_path}/pwd; exit 5"), pytest.raises(BackendError):
        resolve("git:v1", Path("recipe.yaml"))
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().split("\n")}
    assert "PERWATT_CACHE" in names and not names & {"GIT_DIR", "GIT_INDEX_FILE"}
    where = (tmp_path / "pwd").read_text().strip()
    assert where.startswith(str(tmp_path / "tmp")) and where.endswith(f"{repo}/svc")
    assert not Path(where).exists()
