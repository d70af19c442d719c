"""`bundle`: a folder is written whole or not at all, whatever fails and whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from perwatt import bundle
from perwatt.bundle import LOCK, check_destination, digest_of, open_bundle, write_json, writing
from perwatt.errors import InputError
from perwatt.isolation import Worker

sys.path.insert(0, str(Path(__file__).parent))
from runs import environment, put_net


def fill(folder: Path, text: str = "one", model: str = "net") -> None:
    """A small bundle, with its digests in the lock."""
    (folder / "null").mkdir()
    (folder / "null" / "model.onnx").write_text(text)
    write_json(folder / "program.json", {"target": "null", "text": text})
    outputs = {
        path.relative_to(folder).as_posix(): digest_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_json(folder / LOCK, {"model": {"name": model}, "outputs": outputs})


def written(path: Path, text: str = "one", model: str = "net") -> Path:
    with writing(path) as folder:
        fill(folder, text, model)
    return path


def assert_whole(path: Path) -> str:
    """The bundle holds what its lock says, to the byte; returns its text."""
    outputs = json.loads((path / LOCK).read_text())["outputs"]
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == {*outputs, LOCK}
    assert {name: digest_of(path / name) for name in outputs} == outputs
    return (path / "null" / "model.onnx").read_text()


def test_a_new_bundle_is_in_its_place_and_nothing_else_is_left(tmp_path: Path) -> None:
    written(tmp_path / "out")
    assert assert_whole(tmp_path / "out") == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_an_older_bundle_is_replaced_as_a_whole(tmp_path: Path) -> None:
    written(tmp_path / "out")
    (tmp_path / "out" / "stray").write_text("of the old one")
    written(tmp_path / "out", "two")
    assert assert_whole(tmp_path / "out") == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    written(tmp_path / "out")
    assert assert_whole(tmp_path / "out") == "one"


def test_a_link_to_a_folder_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for text in ("one", "two"):
        written(tmp_path / "out", text)
        assert assert_whole(tmp_path / "disk" / "real") == text
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("name", ["out", "net[1]*", " spaced out "])
def test_odd_names_are_written_and_swept_like_any_other(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.partial-0badcafe").mkdir()
    written(tmp_path / name)
    written(tmp_path / name, "two")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("older", [False, True])
def test_an_exception_while_writing_leaves_what_was_there_before(
    tmp_path: Path, error: BaseException, older: bool
) -> None:
    if older:
        written(tmp_path / "out")
    with pytest.raises(type(error)), writing(tmp_path / "out") as folder:
        fill(folder, "two")
        raise error
    assert os.listdir(tmp_path) == (["out"] if older else [])
    if older:
        assert assert_whole(tmp_path / "out") == "one"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no room on the disk"), (errno.EDQUOT, "no room on the disk"), (errno.EROFS, "can't write")],
)
def test_a_full_or_read_only_disk_is_an_input_error_that_names_the_place(
    tmp_path: Path, number: int, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught, writing(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value) and "--out" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_while_syncing_counts_as_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no room"):
        written(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if not made or made.returncode:
        pytest.skip("no permission to mount a small file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_on_a_disk_that_is_really_full_the_older_bundle_survives(tiny_disk: Path) -> None:
    written(tiny_disk / "out")
    with (
        pytest.raises(InputError, match=f"no room on the disk that holds {tiny_disk}"),
        writing(tiny_disk / "out") as folder,
    ):
        fill(folder, "two")
        (folder / "weights.bin").write_bytes(os.urandom(200_000))
    assert os.listdir(tiny_disk) == ["out"]
    assert assert_whole(tiny_disk / "out") == "one"


@pytest.mark.parametrize("target", ["null", "openvino"])
def test_a_backend_that_finds_the_disk_full_is_the_users_to_mend(tiny_disk: Path, tmp_path: Path, target: str) -> None:
    model = put_net(tmp_path, count=8)
    with contextlib.suppress(OSError):
        (tiny_disk / "full").write_bytes(bytes(100_000))
    with Worker("saving") as worker:
        worker.call("open", target=target, model=str(model), point={})
        with pytest.raises(InputError, match=f"no room on the disk that holds {tiny_disk}"):
            worker.call("save", folder=str(tiny_disk / "out"))


def test_a_parent_that_is_a_file_or_missing_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for parent in ("file", "missing"):
        with pytest.raises(InputError, match="can't write"):
            written(tmp_path / parent / "out")
        with pytest.raises(InputError, match="does not exist"):
            check_destination(tmp_path / parent / "out", "net", force=False)


def test_an_unwritable_parent_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *rest: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        InputError, match=f"can't write into {tmp_path}: Permission denied — give another folder with --out"
    ):
        check_destination(tmp_path / "out", "net", force=False)
    with pytest.raises(InputError, match="Permission denied"):
        written(tmp_path / "out")


def test_what_is_no_bundle_is_refused_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"is no bundle of perwatt's .* --force"):
        check_destination(tmp_path / "out", "net", force=False)
    check_destination(tmp_path / "out", "net", force=True)
    (tmp_path / "note").write_text("x")
    for force in (False, True):
        with pytest.raises(InputError, match="note is a file"):
            check_destination(tmp_path / "note", "net", force)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_holds_the_runs_own_input_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "net.onnx").write_text("the only copy")
    (tmp_path / "link").symlink_to(tmp_path / "project")
    for where in ("project", "link"):
        with pytest.raises(InputError, match="would be replaced"):
            check_destination(tmp_path / where, "net", True, [tmp_path / "project" / "net.onnx"])
    written(tmp_path / "bundle")
    with pytest.raises(InputError, match="would be replaced"):
        check_destination(tmp_path / "bundle", "bundle", True, [tmp_path / "bundle"])
    check_destination(tmp_path / "project" / "out", "net", False, [tmp_path / "project" / "net.onnx"])


def test_a_bundle_of_another_model_is_refused_without_force(tmp_path: Path) -> None:
    written(tmp_path / "out", model="net")
    check_destination(tmp_path / "out", "net", force=False)
    with pytest.raises(InputError, match=r"bundle of another model \(net\)"):
        check_destination(tmp_path / "out", "other", force=False)
    check_destination(tmp_path / "out", "other", force=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("text", ["", "{", "[]", '"lock"'])
def test_a_damaged_bundle_is_an_input_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    written(tmp_path / "out")
    (tmp_path / "out" / LOCK).write_text(text)
    with pytest.raises(InputError, match=f"damaged: {LOCK}"):
        check_destination(tmp_path / "out", "net", force=False)
    with pytest.raises(InputError, match="no perwatt bundle"):
        open_bundle(tmp_path)


SLEEPER = """
import sys
from pathlib import Path
from perwatt.bundle import writing
with writing(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    sys.stdin.read()
    raise SystemExit("stopped")
"""


def test_leftovers_of_killed_runs_are_swept_and_those_of_living_ones_are_left_alone(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[bytes], str]:
        run = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, tmp_path / "out"], env=environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert run.stdout is not None
        return run, run.stdout.readline().decode().strip()

    (killed, dead), (living, alive) = start(), start()
    with killed, living:
        killed.kill()
        killed.wait()
        assert {dead, alive} == set(os.listdir(tmp_path))
        written(tmp_path / "out")
        assert {"out", alive} == set(os.listdir(tmp_path))
        living.communicate()
    assert os.listdir(tmp_path) == ["out"]


def test_without_exchange_the_older_bundle_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "_exchange", lambda a, b: False)
    written(tmp_path / "out")
    written(tmp_path / "out", "two")
    assert assert_whole(tmp_path / "out") == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_a_bundle_that_was_moved_aside_by_a_killed_run_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.partial-old")
    with pytest.raises(RuntimeError), writing(tmp_path / "out"):
        assert assert_whole(tmp_path / "out") == "one"
        raise RuntimeError
    assert assert_whole(tmp_path / "out") == "one"


LOOP = textwrap.dedent(
    """
    import itertools, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_bundle import fill, writing
    for number in itertools.count():
        with writing(Path(sys.argv[1])) as folder:
            fill(folder, str(number) * 50_000)
        print(number, flush=True)
    """
)


def test_killed_at_any_moment_the_bundle_is_whole(tmp_path: Path) -> None:
    """Twelve runs that rewrite a bundle as fast as they can, each killed at a random moment."""
    out, chance = tmp_path / "out", random.Random(0)
    for _ in range(12):
        looping = [sys.executable, "-c", LOOP, str(out), str(Path(__file__).parent)]
        run = subprocess.Popen(looping, env=environment(), stdout=subprocess.PIPE)
        with run:
            assert run.stdout is not None and run.stdout.readline() == b"0\n"
            time.sleep(chance.uniform(0, 0.05))
            run.send_signal(signal.SIGKILL)
            run.wait()
        assert_whole(out)
    written(out)
    assert os.listdir(tmp_path) == ["out"]


def test_json_is_written_with_a_newline_and_without_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"a": float("nan")})


def test_the_digest_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")
    os.rename(tmp_path / "b" / "x", tmp_path / "b" / "y")
    assert digest_of(tmp_path / "a") != digest_of(tmp_path / "b")
