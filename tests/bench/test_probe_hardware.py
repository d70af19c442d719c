"""The whole probe: what a child process says is heard, kept under the right key, and told as an error where it fails."""

import json
import sys

import pytest

from perwatt.bench import probe_hardware
from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.probe_hardware import FORMAT, kept, path, run, versions, write
from perwatt.errors import BackendError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A scripted child instead of the real measurement."""

    def scripted(code):
        program = tmp_path / "python"
        (tmp_path / "child.py").write_text(f"import json, os, sys\n{code}\n")
        program.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'child.py'}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return scripted


def result():
    return {"format": FORMAT, "fingerprint": fingerprint(), "versions": versions(), "arithmetic": {}}


def test_a_scripted_probe_is_followed_and_kept(child):
    child(
        f"print(json.dumps({{'progress': 'one'}}))\nprint(json.dumps({{'result': json.loads('''{json.dumps(result())}''')}}))"
    )
    said = []
    assert kept() is None
    assert run(said.append) == result() and said == ["one"]
    assert kept() == result()


@pytest.mark.parametrize(("code", "words"), [
    ("sys.stderr.write('last words\\n'); sys.exit(3)", "ended with exit code 3: last words"),
    ("os.kill(os.getpid(), 11)", "ended by signal 11"),
    ("print(json.dumps({'error': 'no backend'}))", "no backend"),
])  # fmt: skip
def test_a_scripted_probe_that_fails_says_how_and_keeps_nothing(child, code, words):
    child(code)
    with pytest.raises(BackendError, match=words):
        run()
    assert kept() is None


def test_a_scripted_probe_that_hangs_is_stopped(child, monkeypatch):
    monkeypatch.setattr(probe_hardware, "TIMEOUT_S", 0.2)
    child("import time; time.sleep(60)")
    with pytest.raises(BackendError, match="ended by signal 9"):
        run()


def test_results_are_kept_by_machine_and_versions(monkeypatch, cache):
    here = path()
    assert here.parent == cache / "perwatt" / "probe"
    assert path({**fingerprint(), "cpus": 999}) != here
    monkeypatch.setattr(probe_hardware, "versions", lambda: {"openvino": "1.0"})
    assert path() != here


def test_a_relative_cache_folder_is_ignored_as_xdg_wants(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path().parent == tmp_path / ".cache" / "perwatt" / "probe"


def test_what_is_damaged_or_of_another_format_is_not_used():
    where = write(result())
    assert where == path() and kept() == result()
    where.write_text("{")
    assert kept() is None
    where.write_text(json.dumps({**result(), "format": FORMAT + 1}))
    assert kept() is None


def test_a_cache_that_cannot_be_written_costs_only_the_next_probe(cache):
    cache.write_text("a file where the folder would be")
    assert write(result()) is None and kept() is None


@pytest.mark.slow
def test_the_real_probe_measures_this_machine_and_is_remembered():
    said = []
    found = run(said.append)
    assert kept() == found and found["versions"] == versions() and found["fingerprint"] == fingerprint()
    assert "f32" in found["arithmetic"] and set(found["channels"]) == {"convolution", "matmul"}
    assert any(text.startswith("channels") for text in said) and any(text.startswith("arithmetic") for text in said)
