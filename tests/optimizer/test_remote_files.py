"""Addresses, and files on their way: what goes along, what is laid out, what is swept. No network."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, node, weight

from perwatt.errors import InputError
from perwatt.remote_address import Address, parse, quoted
from perwatt.remote_end import Scratch, sweep
from perwatt.remote_files import CARRIED, Forest, file_digest, inside
from perwatt.worker import Session

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


# Addresses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://board", Address("board")),
        ("ssh://me@Board.local:2222/", Address("Board.local", "me", 2222)),
        ("ssh://me@[fe80::1%eth0]:22", Address("fe80::1%eth0", "me", 22)),
        ("ssh://me@gpu?python=~/c++/bin/python", Address("gpu", "me", python="~/c++/bin/python")),
        ("ssh://gpu?python=/a%20b/python&folder=/data/x", Address("gpu", python="/a b/python", folder="/data/x")),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    assert parse(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "me@board", "http://board", "ssh://", "ssh://me:secret@board", "ssh://board/some/where", "ssh://board:ssh",
        "ssh://-oProxyCommand=x", "ssh://-x@board", "ssh://me@bo ard", "ssh://board#x", "ssh://board?python=",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert caught.value.fix is not None and "ssh://me@board.local" in caught.value.fix


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown setting 'pyton': did you mean python"):
        parse("ssh://board?pyton=/x")


def test_the_command_asks_no_question_and_ends_with_a_dead_link(monkeypatch) -> None:
    monkeypatch.setenv("PERWATT_SSH", "myssh -F 'a file'")
    command = parse("ssh://me@board:7?python=/a b/python").command()
    assert command[:3] == ["myssh", "-F", "a file"]
    assert {"-oBatchMode=yes", "-oServerAliveInterval=10", "-oServerAliveCountMax=3"} < set(command)
    assert command[-6:-1] == ["-T", "-p", "7", "--", "me@board"]
    assert command[-1] == "exec '/a b/python' -P -m perwatt.remote_end"
    monkeypatch.setenv("PERWATT_SSH", "'")
    with pytest.raises(InputError, match="PERWATT_SSH can't be read"):
        parse("ssh://board").command()


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_a_path_means_itself_to_the_shell_there(path: str) -> None:
    said = subprocess.run(["/bin/sh", "-c", f"printf %s {quoted(path)}"], capture_output=True, env={"HOME": "/home/me"})
    home = path != "~/" and path.startswith("~/")
    assert said.stdout.decode() == (f"/home/me/{path[2:]}" if home else path)


# What goes along --------------------------------------------------------------------------------------------------------


def test_a_model_goes_with_its_weights_and_perwatts_note_and_nothing_else(tmp_path: Path) -> None:
    import onnx_ir as ir

    (tmp_path / "deep").mkdir()
    made = build([node("MatMul", "x w", "y")], "x:float32[b,40]", "y:float32[b,40]", {"w": weight(40, 40)})
    ir.save(made.model, str(tmp_path / "m.onnx"), external_data="deep/w.bin")
    for name in ("m.onnx.json", "other.onnx", "deep/other.bin", "m.bin"):
        (tmp_path / name).write_text("x")
    tree = Forest().of_file(tmp_path / "m.onnx")
    assert [entry[0] for entry in tree.entries] == ["deep/w.bin", "m.onnx", "m.onnx.json"]
    for (_, digest, size), source in zip(tree.entries, tree.sources, strict=True):
        assert (digest, size) == (file_digest(source), source.stat().st_size)
    (tmp_path / "m.xml").write_text("x")
    assert [entry[0] for entry in Forest().of_file(tmp_path / "m.xml").entries] == ["m.bin", "m.xml"]
    (tmp_path / "bad.onnx").write_text("no protobuf")
    assert [entry[0] for entry in Forest().of_file(tmp_path / "bad.onnx").entries] == ["bad.onnx"]


def test_a_folder_goes_whole_and_contents_decide_its_digest(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side / "in").mkdir(parents=True)
        (tmp_path / side / "in" / "x").write_text("1")
        (tmp_path / side / "y").write_text("")
    forest = Forest()
    assert forest.of_folder(tmp_path / "a").digest() == forest.of_folder(tmp_path / "b").digest()
    (tmp_path / "b/in/x").write_text("2")
    os.utime(tmp_path / "b/in/x", ns=(1, 1))
    assert forest.of_folder(tmp_path / "a").digest() != forest.of_folder(tmp_path / "b").digest()


def test_every_operation_in_the_table_is_one_and_names_parameters_that_it_has() -> None:
    for operation, carried in CARRIED.items():
        code = getattr(Session, operation).__code__
        parameters = set(code.co_varnames[1 : code.co_argcount])
        assert set((*carried.files, *carried.folders, *carried.outputs)) <= parameters
        named = {"model", "exported", "path", "folder", "samples", "out"} & parameters
        assert named == {*carried.files, *carried.folders, *carried.outputs}, operation


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a\0b"])
def test_a_name_that_leaves_its_folder_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="leaves its folder"):
        inside(name)


# The other end's folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path):
    made = Scratch(RUN, tmp_path)
    yield made
    made.leave()


def brought(scratch: Scratch, root: Path, step: int = 7) -> Path:
    """The folder of `root`'s files there, sent in small chunks."""
    tree = Forest().of_folder(root)
    entries = [list(entry) for entry in tree.entries]
    missing = scratch.stage([entries])["missing"]
    sources = {entry[1]: source for entry, source in zip(tree.entries, tree.sources, strict=True)}
    contents = [[digest, sources[digest].stat().st_size] for digest in missing]

    def chunks():
        for digest in missing:
            data = sources[digest].read_bytes()
            yield from (data[start : start + step] for start in range(0, len(data), step))

    scratch.put(contents, chunks())
    found = scratch.stage([entries])
    assert found["missing"] == []
    return Path(found["folders"][0])


NAMES = st.text("ab.-_ é", min_size=1, max_size=6).filter(lambda name: name.strip(".") != "")


@given(st.dictionaries(NAMES, st.binary(max_size=40), max_size=5))
def test_whatever_a_folder_holds_is_laid_out_there(tmp_path_factory, files: dict[str, bytes]) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    (tmp_path / "ours/in").mkdir(parents=True)
    for number, (name, data) in enumerate(files.items()):
        (tmp_path / "ours" / ("in" if number % 2 else ".") / name).write_bytes(data)
    scratch = Scratch(RUN, tmp_path)
    ours = tmp_path / "ours"
    there = brought(scratch, ours)
    assert there.is_relative_to(scratch.folder)
    told = {path.relative_to(ours): path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    assert {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()} == told
    assert brought(scratch, ours) == there
    scratch.leave()
    assert not scratch.folder.exists()


def test_contents_of_several_places_are_files_of_their_own_and_sent_once(scratch: Scratch, tmp_path: Path) -> None:
    """onnx refuses weights in a file that has a second link."""
    for side, names in (("a", ("1", "2")), ("b", ("1", "other"))):
        (tmp_path / side).mkdir()
        for name in names:
            (tmp_path / side / name).write_bytes(b"the same")
    first = brought(scratch, tmp_path / "a")
    [entry] = [list(e) for e in Forest().of_folder(tmp_path / "b").entries if e[0] == "other"]
    assert scratch.stage([[entry]])["missing"] == []
    second = brought(scratch, tmp_path / "b")
    laid_out = [first / "1", first / "2", second / "1", second / "other"]
    assert [path.read_bytes() for path in laid_out] == [b"the same"] * 4
    assert [(path.is_symlink(), path.stat().st_nlink) for path in laid_out] == [(False, 1)] * 4


def test_contents_that_are_not_what_was_said_are_not_kept(scratch: Scratch) -> None:
    digest = "0" * 64
    with pytest.raises(OSError, match="did not arrive as it was sent"):
        scratch.put([[digest, 4]], iter([b"else"]))
    assert list((scratch.folder / "contents").iterdir()) == []
    with pytest.raises(ValueError, match="SHA-256"):
        scratch.put([["../../x", 1]], iter([b"x"]))


def test_a_full_disk_takes_all_chunks_before_it_says_so(scratch: Scratch, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").write_bytes(b"first")
    good = file_digest(tmp_path / "a")
    chunks = iter([b"12", b"34", b"fir", b"st", b"the next question"])
    real, full = os.fdopen, []

    def fdopen(handle: int, mode: str):
        if not full:
            # The first file lies on a device that is always full.
            full.append(os.close(handle))
            return open("/dev/full", mode, buffering=0)
        return real(handle, mode)

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(OSError, match="No space left"):
        scratch.put([["1" * 64, 4], [good, 5]], chunks)
    assert next(chunks) == b"the next question"
    assert [path.name for path in (scratch.folder / "contents").iterdir()] == [good]


def test_only_a_folder_of_outputs_is_given_back(scratch: Scratch, tmp_path: Path) -> None:
    assert scratch.outputs(f"{scratch.folder}/out/1") == scratch.folder / "out" / "1"
    for path in (tmp_path, scratch.folder / "out", "/etc"):
        with pytest.raises(ValueError, match="is no folder of outputs"):
            scratch.outputs(str(path))


def test_the_folder_is_ours_alone_and_goes_with_the_last_who_holds_it(tmp_path: Path) -> None:
    first, second = Scratch(RUN, tmp_path), Scratch(RUN, tmp_path)
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    first.leave()
    assert second.folder.exists()
    second.leave()
    assert not second.folder.exists()


def test_sweeping_takes_what_nobody_holds_and_leaves_the_rest(tmp_path: Path) -> None:
    held = Scratch(RUN, tmp_path)
    killed = "import os, sys; from pathlib import Path; from perwatt.remote_end import Scratch\n"
    killed += f"Scratch('{OTHER}', Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)])
    left = tmp_path / f"perwatt-on-{OTHER}"
    young, old, others = (tmp_path / f"perwatt-on-{name}" for name in ("young", "old", "link"))
    (tmp_path / "target").mkdir()
    others.symlink_to(tmp_path / "target")
    young.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    assert left.exists()
    sweep(tmp_path)
    assert not left.exists() and not old.exists()
    assert held.folder.exists() and young.exists() and (tmp_path / "target").exists()
    held.leave()


def test_somebody_elses_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"perwatt-on-{RUN}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="somebody else's"):
        Scratch(RUN, tmp_path)
    with pytest.raises(ValueError, match="hexadecimal"):
        Scratch("../../etc", tmp_path)


def test_an_artifact_above_the_size_of_one_file_keeps_its_weights(tmp_path: Path, monkeypatch) -> None:
    import perwatt.artifact as artifact

    monkeypatch.setattr(artifact, "EXTERNAL_DATA_ABOVE_BYTES", 0)
    made = build([node("MatMul", "x w1", "y")], "x:float32[b,40]", "y:float32[b,40]", {"w1": weight(40, 40)})
    (tmp_path / "ours").mkdir()
    path = made.file(tmp_path / "ours")
    scratch = Scratch(RUN, tmp_path)
    there = brought(scratch, tmp_path / "ours") / path.name
    assert [entry[0] for entry in Forest().of_file(path).entries] == [
        path.name, f"{path.name}.data", f"{path.name}.json"
    ]  # fmt: skip
    loaded = artifact.Artifact.load(there)
    np.testing.assert_array_equal(
        loaded.model.graph.initializers["w1"].const_value.numpy(),
        made.model.graph.initializers["w1"].const_value.numpy(),
    )
    scratch.leave()
