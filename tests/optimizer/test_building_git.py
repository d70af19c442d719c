"""Git as a gate uses it: a commit's files in a folder, the repository exactly as it was, errors that say what to do."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from perwatt import building_git
from perwatt.building_git import changes, check_out, commit_of, find, head, tree_of, untracked_in
from perwatt.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from repos import commit, everything, git, repository, told


@pytest.fixture(autouse=True)
def nobodys_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Two commits, a stash, a change that is not committed, an untracked and an ignored file."""
    folder = repository(tmp_path / "repo")
    commit(folder, {"a.txt": "first", "sub/b.txt": "kept", ".gitignore": "data/\n"})
    git(folder, "tag", "v1")
    (folder / "a.txt").write_text("stashed")
    git(folder, "stash")
    commit(folder, {"a.txt": "second", "sub/c.txt": "new", "run.sh": "#!/bin/sh\n"})
    (folder / "a.txt").write_text("at work")
    (folder / "untracked.txt").write_text("mine")
    (folder / "data").mkdir()
    (folder / "data" / "x.bin").write_bytes(b"\0")
    return folder


def checked_out(folder: Path, ref: str, tmp_path: Path) -> tuple[Path, list[str]]:
    """The files of `ref`, in a new folder, and the notes."""
    found = find(folder)
    there = tmp_path / "out" / ref.replace("/", "-")
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return there, check_out(found, commit_of(found, ref), there, scratch)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_commit_is_put_into_a_folder_as_it_was(repo: Path, tmp_path: Path) -> None:
    (repo / "run.sh").chmod(0o755)
    (repo / "link").symlink_to("sub/b.txt")
    commit(repo, {})
    old, _ = checked_out(repo, "v1", tmp_path)
    assert names(old) == {"a.txt", "sub/b.txt", ".gitignore"}
    assert (old / "a.txt").read_text() == "first"
    new, notes = checked_out(repo, "main", tmp_path)
    assert notes == []
    assert os.readlink(new / "link") == "sub/b.txt"
    assert (new / "run.sh").stat().st_mode & stat.S_IXUSR


def test_not_a_byte_of_the_repository_changes(repo: Path, tmp_path: Path) -> None:
    before = everything(repo)
    found = find(repo / "sub")
    checked_out(repo, "v1", tmp_path)
    head(found), tree_of(found, "HEAD"), untracked_in(repo / "data")
    changes(found, untracked=True)
    assert everything(repo) == before


def test_the_index_is_left_alone_where_git_status_would_refresh_it(repo: Path) -> None:
    os.utime(repo / "sub" / "b.txt", (1, 1))
    before = (repo / ".git" / "index").read_bytes()
    assert changes(find(repo), untracked=False) == ["a.txt"]
    assert (repo / ".git" / "index").read_bytes() == before


def test_hooks_do_not_run(repo: Path, tmp_path: Path) -> None:
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        hook = repo / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        hook.chmod(0o755)
    checked_out(repo, "v1", tmp_path)
    assert not (tmp_path / "ran").exists()


def with_filter(folder: Path, smudge: str) -> None:
    """As Git LFS does: what is kept is not what is checked out."""
    git(folder, "config", "filter.big.clean", "tr A-Z a-z")
    git(folder, "config", "filter.big.smudge", smudge)
    git(folder, "config", "filter.big.required", "true")


def test_filters_run_as_git_lfs_needs(repo: Path, tmp_path: Path) -> None:
    with_filter(repo, "tr a-z A-Z")
    commit(repo, {".gitattributes": "*.big filter=big\n", "w.big": "WEIGHTS"})
    assert git(repo, "show", "HEAD:w.big") == "weights"
    there, _ = checked_out(repo, "HEAD", tmp_path)
    assert (there / "w.big").read_text() == "WEIGHTS"


def test_a_filter_that_fails_is_told_and_leaves_nothing(repo: Path, tmp_path: Path) -> None:
    with_filter(repo, "tr a-z A-Z")
    commit(repo, {".gitattributes": "*.big filter=big\n", "w.big": "WEIGHTS"})
    with_filter(repo, "false")
    before = everything(repo)
    with pytest.raises(InputError, match=r"git read-tree failed .*filter"):
        checked_out(repo, "HEAD", tmp_path)
    assert everything(repo) == before


def test_a_sparse_checkout_of_the_person_does_not_make_ours_sparse(repo: Path, tmp_path: Path) -> None:
    git(repo, "checkout", "--quiet", "--force", "main")
    git(repo, "sparse-checkout", "set", "--no-cone", "/a.txt")
    assert not (repo / "sub").exists()
    there, _ = checked_out(repo, "main", tmp_path)
    assert (there / "sub" / "c.txt").read_text() == "new"


def test_submodules_are_filled_at_the_commit_that_the_ref_pins(repo: Path, tmp_path: Path) -> None:
    other = repository(tmp_path / "other")
    commit(other, {"lib.py": "1"})
    git(repo, "submodule", "--quiet", "add", str(other), "libs/other")
    commit(repo, {})
    git(repo, "tag", "pinned")
    commit(repo / "libs" / "other", {"lib.py": "2"})
    commit(repo, {})
    before = everything(repo)
    there, notes = checked_out(repo, "pinned", tmp_path)
    assert (there / "libs" / "other" / "lib.py").read_text() == "1"
    assert notes == [] and everything(repo) == before
    new, _ = checked_out(repo, "main", tmp_path)
    assert (new / "libs" / "other" / "lib.py").read_text() == "2"


def test_a_submodule_that_is_not_checked_out_is_told(repo: Path, tmp_path: Path) -> None:
    other = repository(tmp_path / "other")
    commit(other, {"lib.py": "1"})
    git(repo, "submodule", "--quiet", "add", str(other), "libs/other")
    commit(repo, {})
    git(repo, "submodule", "--quiet", "deinit", "--force", "libs/other")
    there, notes = checked_out(repo, "main", tmp_path)
    assert names(there / "libs" / "other") == set()
    assert len(notes) == 1 and "libs/other is not checked out here" in notes[0]


def test_it_works_from_a_linked_worktree_with_its_own_head(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "--quiet", "--detach", str(tmp_path / "linked"), "v1")
    before = told(repo)
    found = find(tmp_path / "linked")
    assert found.top == tmp_path / "linked"
    assert head(found) == git(repo, "rev-parse", "v1")
    there, _ = checked_out(tmp_path / "linked", "main", tmp_path)
    assert (there / "a.txt").read_text() == "second"
    assert told(repo) == before


def test_what_a_hook_sets_does_not_mislead_git(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = repository(tmp_path / "other")
    commit(other, {"x.txt": "other"})
    before = everything(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert find(repo).top == repo
    there, _ = checked_out(repo, "v1", tmp_path)
    assert (there / "a.txt").read_text() == "first"
    assert everything(other) == before
    assert not {"GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"} & building_git.environment().keys()


def test_local_variables_are_those_that_git_lists_but_for_its_settings() -> None:
    listed = set(git(Path.cwd(), "rev-parse", "--local-env-vars").split())
    assert listed - {"GIT_CONFIG_PARAMETERS", "GIT_CONFIG_COUNT"} <= set(building_git.LOCAL)


def test_changes_are_those_of_the_work_tree_against_head(repo: Path) -> None:
    assert changes(find(repo), untracked=False) == ["a.txt"]
    assert changes(find(repo / "sub"), untracked=True) == ["a.txt", "untracked.txt"]
    git(repo, "mv", "sub/b.txt", "sub/d.txt")
    assert changes(find(repo), untracked=False) == ["a.txt", "sub/b.txt", "sub/d.txt"]


def test_untracked_files_are_listed_ignored_ones_too(repo: Path) -> None:
    assert untracked_in(repo / "data") == ["x.bin"]
    assert untracked_in(repo / "sub") == []
    assert untracked_in(repo) == ["data/x.bin", "untracked.txt"]


def test_before_the_first_commit_there_is_no_head(tmp_path: Path) -> None:
    found = find(repository(tmp_path / "new"))
    assert head(found) is None
    with pytest.raises(InputError, match="nothing is committed yet"):
        commit_of(found, "main")


def test_every_way_of_naming_a_commit_gives_its_full_hash(repo: Path) -> None:
    found, first = find(repo), git(repo, "rev-parse", "v1")
    for ref in ("v1", "main~1", "HEAD^", first, first[:9], "refs/tags/v1", "@{1}"):
        assert len(commit_of(found, ref)) == 40
    assert commit_of(found, "v1") == commit_of(found, first[:9]) == first


def reason(folder: Path, ref: str) -> str:
    with pytest.raises(InputError) as caught:
        commit_of(find(folder), ref)
    return str(caught.value)


def test_an_unknown_ref_names_the_nearest(repo: Path) -> None:
    git(repo, "branch", "feature/quantize")
    assert "did you mean feature/quantize?" in reason(repo, "feature/quantise")
    assert "known are " in reason(repo, "zzz") and "main" in reason(repo, "zzz")
    for ref in ("", "--all", "HEAD:a.txt", "0" * 40):
        assert "git knows no commit" in reason(repo, ref)


def test_a_shallow_clone_says_how_to_fetch_what_it_lacks(repo: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=main", f"file://{repo}", "clone")
    git(repo, "branch", "release")
    clone = tmp_path / "clone"
    wanted = reason(clone, "origin/release")
    assert "shallow" in wanted and "fetch-depth: 0" in wanted
    assert "git fetch origin release:refs/remotes/origin/release" in wanted
    older = reason(clone, git(repo, "rev-parse", "v1"))
    assert "git fetch --unshallow" in older
    assert "git fetch --unshallow" in reason(clone, "HEAD~1")
    # And what it says to do, helps.
    git(clone, "fetch", "--quiet", "origin", "release:refs/remotes/origin/release")
    assert commit_of(find(clone), "origin/release") == git(repo, "rev-parse", "release")


def test_a_branch_that_only_the_remote_has_is_found_under_its_name(repo: Path, tmp_path: Path) -> None:
    git(repo, "branch", "release")
    git(tmp_path, "clone", "--quiet", str(repo), "clone")
    assert "did you mean origin/release?" in reason(tmp_path / "clone", "release")


def test_no_repository_no_folder_and_a_foreign_owner_are_told_apart(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match=r"plain is in no git repository.*bundle"):
        find(tmp_path / "plain")
    with pytest.raises(InputError, match="there is no folder"):
        find(tmp_path / "nowhere")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(InputError, match=r"another user.*git config --global --add safe.directory"):
        find(repo)


def test_without_git_it_says_so(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="git is not installed"):
        find(repo)
