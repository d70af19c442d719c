"""`perwatt.history_store`: a file that is missing, damaged, a stranger's, older, later, full, shared, or left by a killed
process. Writing a report down never raises for any of it."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perwatt import history_store
from perwatt.errors import InputError
from perwatt.history import record_bench, record_gate, trend
from perwatt.history_store import APPLICATION_ID, MIGRATIONS, history_path

sys.path.insert(0, str(Path(__file__).parent))
from histories import a_bench, a_gate

TESTS = Path(__file__).parent
CPU = "cpu_s_per_inference"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A history with one gate in it."""
    path = tmp_path / "history.sqlite"
    assert record_gate(a_gate(), path) is None
    return path


def entries(path: Path) -> int:
    return sum(len(series.entries) for series in trend(CPU, limit=10_000, path=path))


def run_sql(path: Path, *statements: str) -> None:
    """Change a file behind perwatt's back."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that writes histories."""
    header = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom histories import a_gate\n"
    command = [sys.executable, "-c", header + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# Where it lies ----------------------------------------------------------------------------------------------------


def test_where_the_history_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for name in ("PERWATT_HISTORY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert history_path() == Path("/home/ada/.local/share/perwatt/history.sqlite")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert history_path() == Path("/home/ada/.local/share/perwatt/history.sqlite")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert history_path() == tmp_path / "perwatt" / "history.sqlite"
    monkeypatch.setenv("PERWATT_HISTORY", "~/ours.sqlite")
    assert history_path() == Path("/home/ada/ours.sqlite")
    assert history_path("mine.sqlite") == Path("mine.sqlite")


def test_it_is_written_and_read_at_that_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERWATT_HISTORY", str(tmp_path / "a folder?#%" / "history.sqlite"))
    assert trend(CPU) == []
    assert record_gate(a_gate()) is None
    assert len(trend(CPU)) == 1
    assert [path.name for path in (tmp_path / "a folder?#%").iterdir()] == ["history.sqlite"]


def test_no_home_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERWATT_HISTORY", "~no-such-user-here/history.sqlite")
    note = record_gate(a_gate())
    assert note is not None and "set PERWATT_HISTORY to a file" in note


# Files that are no history ----------------------------------------------------------------------------------------


def no_database(path: Path) -> None:
    path.write_text("name,value\nresnet20,1\n" * 100)


def a_strangers(path: Path) -> None:
    run_sql(path, "CREATE TABLE bookmarks (url TEXT)", "INSERT INTO bookmarks VALUES ('https://example.org')")


def a_strangers_by_its_id(path: Path) -> None:
    run_sql(path, "PRAGMA application_id = 42")
    run_sql(path, "VACUUM")


def a_later_one(path: Path) -> None:
    assert record_gate(a_gate(), path) is None
    run_sql(path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")


def scribbled_over(path: Path) -> None:
    for day in range(1, 28):
        assert record_gate(a_gate(day=day), path) is None
    whole = path.read_bytes()
    assert len(whole) > 3 * 4096
    path.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))


def cut_short(path: Path) -> None:
    assert record_gate(a_gate(), path) is None
    path.write_bytes(path.read_bytes()[:5000])


def without_its_tables(path: Path) -> None:
    assert record_gate(a_gate(), path) is None
    run_sql(path, "DROP TABLE figures")


def with_facts_that_are_no_json(path: Path) -> None:
    assert record_gate(a_gate(), path) is None
    run_sql(path, "UPDATE machines SET fingerprint = '{'")


TROUBLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (no_database, "is no SQLite database"),
    "a stranger's": (a_strangers, "database of another program"),
    "a stranger's by its id": (a_strangers_by_its_id, "database of another program"),
    "a later schema": (a_later_one, "later perwatt .* upgrade perwatt"),
    "scribbled over": (scribbled_over, "is damaged or was altered"),
    "cut short": (cut_short, "is damaged or was altered"),
    "without its tables": (without_its_tables, "is damaged or was altered"),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_a_file_that_can_not_be_used_is_told_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    make, says = TROUBLE[what]
    path = tmp_path / "history.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=says) as raised:
        trend(CPU, path=path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    for note in (record_gate(a_gate(day=30), path), record_bench(a_bench(day=30), path)):
        assert note is not None and note.startswith("not written down in the history: ")
        assert str(path) in note
    assert path.read_bytes() == before


def test_facts_that_are_no_json_are_told(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with_facts_that_are_no_json(path)
    with pytest.raises(InputError, match="is damaged or was altered"):
        trend(CPU, path=path)


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not written down" in (record_gate(a_gate(), tmp_path / "file" / "history.sqlite") or "")
    assert "not written down" in (record_gate(a_gate(), tmp_path) or "")
    with pytest.raises(InputError, match="can't be used: unable to open"):
        trend(CPU, path=tmp_path)


def test_a_named_file_that_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no history at .*typo"):
        trend(CPU, path=tmp_path / "typo.sqlite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_file_can_be_read_and_is_no_failure_to_write(file: Path) -> None:
    file.chmod(0o444)
    file.parent.chmod(0o555)
    try:
        assert entries(file) == 1
        assert "can't be used" in (record_gate(a_gate(day=2), file) or "")
    finally:
        file.parent.chmod(0o755)


FULL_DISK = """
import resource
from perwatt.history import record_gate
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
note = record_gate(a_gate(day=2), sys.argv[1])
print(note)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system has no limit on the size of files")
def test_a_disk_that_takes_no_more_is_no_failure_and_loses_nothing(file: Path) -> None:
    with child(FULL_DISK, file, 4096) as writer:
        said = writer.communicate()[0]
    assert writer.returncode == 0
    assert said.startswith("not written down in the history: ")
    assert entries(file) == 1
    assert record_gate(a_gate(day=2), file) is None
    assert entries(file) == 2


# Schemas ----------------------------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    ((version,),) = connection.execute("PRAGMA user_version")
    connection.close()
    return int(version)


def test_a_new_file_says_whose_it_is(file: Path) -> None:
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    assert version_of(file) == len(MIGRATIONS)


@pytest.mark.parametrize("marked", [True, False])
def test_version_0_by_hand_is_migrated(tmp_path: Path, marked: bool) -> None:
    path = tmp_path / "history.sqlite"
    path.touch()
    if marked:
        run_sql(path, f"PRAGMA application_id = {APPLICATION_ID}")
    before = path.read_bytes()
    assert trend(CPU, path=path) == []
    assert path.read_bytes() == before
    assert record_gate(a_gate(), path) is None
    assert (version_of(path), entries(path)) == (len(MIGRATIONS), 1)


def test_an_older_schema_is_read_as_it_is_and_migrated_by_the_next_writer(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, before = len(MIGRATIONS), file.read_bytes()
    step = ("ALTER TABLE runs ADD COLUMN weather TEXT", "UPDATE runs SET weather = 'fair'")
    monkeypatch.setattr(history_store, "MIGRATIONS", (*MIGRATIONS, step))
    assert entries(file) == 1
    assert (file.read_bytes(), version_of(file)) == (before, older)
    assert record_gate(a_gate(day=2), file) is None
    assert (entries(file), version_of(file)) == (2, older + 1)
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT weather FROM runs ORDER BY id").fetchall() == [("fair",)] * 2 + [(None,)] * 2
    connection.close()
    monkeypatch.undo()
    with pytest.raises(InputError, match="upgrade perwatt"):
        trend(CPU, path=file)


FIRST_RUN = """INSERT INTO runs VALUES (
    1, 'job', 0, '2026-08-01T10:00:00+00:00', 'bench', 'subject', 'resnet20', 'net-cpu', NULL, 0, NULL, 'cpu',
    'single-stream', '{"batch": 1, "scenario": "single-stream", "streams": 1, "threads": null}', NULL, '1a2b3c4d5e6f',
    '0.1.0', NULL, 0
)"""


def test_a_file_of_the_first_schema_is_read_and_its_entries_stay_apart(tmp_path: Path) -> None:
    """Of those nobody knows where they lay: they are a series by name, and found by their labels too."""
    path = tmp_path / "history.sqlite"
    run_sql(
        path, *MIGRATIONS[0], "INSERT INTO machines VALUES ('1a2b3c4d5e6f', '{}')", FIRST_RUN,
        f"INSERT INTO figures VALUES (1, '{CPU}', 's', NULL, 1e-4, NULL, NULL, 9, NULL, NULL, NULL, NULL, NULL, NULL)",
        f"PRAGMA application_id = {APPLICATION_ID}", "PRAGMA user_version = 1",
    )  # fmt: skip
    before = path.read_bytes()
    [old] = trend(CPU, name="net-cpu", path=path)
    assert (old.name, old.subject_kind, old.repository, old.place) == ("resnet20", None, None, None)
    assert path.read_bytes() == before
    assert record_gate(a_gate(), path) is None
    assert version_of(path) == len(MIGRATIONS)
    found = {
        series.place: [entry.previous for entry in series.entries] for series in trend(CPU, name="resnet20", path=path)
    }
    assert found == {None: [None], "/srv/models/resnet20": [None]}


def test_a_date_that_is_none_is_told(file: Path) -> None:
    run_sql(file, "UPDATE runs SET created = 'yesterday'")
    with pytest.raises(InputError, match="is damaged or was altered"):
        trend(CPU, path=file)


def test_a_migration_that_fails_changes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    monkeypatch.setattr(history_store, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE extra (x)", "not SQL at all")))
    assert record_gate(a_gate(day=2), file) is not None
    monkeypatch.undo()
    assert (file.read_bytes(), entries(file)) == (before, 1)


# Several processes, and killed ones -------------------------------------------------------------------------------

MANY = """
from perwatt.history import record_gate
for number in range(int(sys.argv[3])):
    note = record_gate(a_gate(name=sys.argv[2], day=number % 28 + 1, seconds=number), sys.argv[1])
    print("wrote" if note is None else note, flush=True)
"""


def test_processes_that_write_at_once_all_get_through(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    writers = [child(MANY, path, name, 25) for name in ("one", "two", "three")]
    said = [writer.communicate()[0].split("\n") for writer in writers]
    assert said == [["wrote"] * 25 + [""]] * 3
    found = trend(CPU, path=path)
    assert [(series.name, len(series.entries)) for series in found] == [("one", 25), ("three", 25), ("two", 25)]


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_writer_leaves_whole_gates_only(tmp_path: Path, after: int) -> None:
    path = tmp_path / "history.sqlite"
    with child(MANY, path, "resnet20", 10_000) as writer:
        assert writer.stdout is not None
        assert [writer.stdout.readline() for _ in range(after)] == ["wrote\n"] * after
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert entries(path) >= after
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    figures = "SELECT count(*) FROM figures GROUP BY run"
    assert {count for (count,) in connection.execute(figures)} == {4}
    assert {count for (count,) in connection.execute("SELECT count(*) FROM runs GROUP BY job")} == {2}
    connection.close()
    assert record_gate(a_gate(name="later"), path) is None


# Killed between its last insertion and the commit, with part of it in the file already: the cache is too small to wait.
MIDDLE = """
import os, signal
from pathlib import Path
from perwatt.history_store import writing
with writing(Path(sys.argv[1])) as connection:
    connection.execute("PRAGMA cache_size = 1")
    for number in range(3000):
        connection.execute("INSERT INTO machines VALUES (?, ?)", (f"machine {number}", "x" * 500))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_in_the_middle_leaves_what_was_there(file: Path) -> None:
    size = file.stat().st_size
    with child(MIDDLE, file) as writer:
        writer.wait()
    assert writer.returncode == -signal.SIGKILL
    journal = file.with_name("history.sqlite-journal")
    assert file.stat().st_size > size and journal.stat().st_size > 0
    assert entries(file) == 1
    assert (file.stat().st_size, journal.exists()) == (size, False)
    assert record_gate(a_gate(day=2), file) is None
    assert entries(file) == 2


def test_a_history_that_another_process_holds_is_waited_for_and_then_told(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_store, "WAIT_S", 0.05)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    note = record_gate(a_gate(day=2), file)
    assert note is not None and "another process holds it" in note
    with pytest.raises(InputError, match="another process holds it"):
        trend(CPU, path=file)
    holder.execute("ROLLBACK")
    holder.close()
    assert record_gate(a_gate(day=2), file) is None
