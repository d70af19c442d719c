"""Workers on another machine: a real SSH server, the real ssh client, a real backend at the other end.

The server's commands see an empty folder where ours has its temporary files (where the system allows mount namespaces):
what comes back right was brought there and back."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from models import build, conv_net, feed, node

from perwatt.artifact import Artifact
from perwatt.bench.modelled import Modelled
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError, InputError, PerwattError, TargetError
from perwatt.isolation import Worker
from perwatt.measurement import Window
from perwatt.measuring import Conductor, Effort, figures, interleave
from perwatt.place import Place, open_place
from perwatt.sides import Side
from perwatt.worker import load_outputs

sys.path.insert(0, str(Path(__file__).parent))
from runs import files_in, until

POINT = asdict(OperatingPoint(floating_precision="f32", threads=1, streams=1))


@pytest.fixture
def worker(place: Place) -> Worker:
    return place.worker("a backend")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small model and samples for it."""
    folder = tmp_path_factory.mktemp("ours")
    artifact = conv_net()
    artifact.save(folder / "net.onnx")
    Samples([feed(artifact, 10)], batch_size=4).save(folder / "samples")
    return {"model": str(folder / "net.onnx"), "samples": str(folder / "samples")}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 50 MB, its weights in a file beside it."""
    import onnx_ir as ir

    folder = tmp_path_factory.mktemp("large")
    weights = np.random.default_rng(0).standard_normal((3600, 3600)).astype(np.float32)
    artifact = build([node("MatMul", "x w", "y")], "x:float32[batch,3600]", "y:float32[batch,3600]", {"w": weights})
    (folder / "weights").mkdir()
    ir.save(artifact.model, str(folder / "large.onnx"), external_data="weights/large.bin")
    return folder / "large.onnx"


def use(worker: Worker, files: dict[str, str], out: Path) -> dict[str, object]:
    """Everything that a program is asked for, the times left out."""
    facts = worker.call("open", target="openvino", model=files["model"], point=POINT)
    worker.call("prepare", samples=files["samples"], warm_up_s=0.0)
    held = worker.call("drive", seconds=0.02, hold=True)
    kept = worker.call("latencies")["latencies_ms"]
    window = worker.call("drive", seconds=0.02)
    served = worker.call("serve", arrivals_s=[0.0, 0.001])
    worker.call("settle")
    batches = worker.call("predict", samples=files["samples"], out=str(out / "predicted"))
    saved = worker.call("save", folder=str(out / "saved"))
    assert window["inferences"] == len(window["latencies_ms"]) > 0
    assert held["latencies_ms"] == [] and len(kept) == held["inferences"]
    assert window["wall_s"] >= 0.02 and window["cpu_s"] > 0
    assert worker.call("memory")["peak_memory_bytes"] > 10_000_000
    return {
        "backend": facts["backend"], "settings": facts["settings"], "point": facts["operating_point"],
        "served": served["inferences"], "batches": batches,
        "files": [str(Path(file).relative_to(out)) for file in saved["files"]],
    }  # fmt: skip


def test_a_program_there_does_all_that_a_program_here_does_with_equal_results(
    far,
    worker: Worker,
    files,
    tmp_path,
) -> None:
    with Worker("here") as ours:
        here = use(ours, files, tmp_path / "here")
    there = use(worker, files, tmp_path / "there")
    assert there == here
    assert there["files"] == ["saved/model.xml", "saved/model.bin"]
    assert files_in(tmp_path / "there") == files_in(tmp_path / "here")
    expected, found = (load_outputs(tmp_path / side / "predicted") for side in ("here", "there"))
    assert len(found) == 3
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])
    for name in ("model.xml", "model.bin"):
        assert (tmp_path / "there/saved" / name).read_bytes() == (tmp_path / "here/saved" / name).read_bytes()


def test_what_was_saved_here_can_be_opened_there(worker: Worker, files, tmp_path) -> None:
    worker.call("open", target="openvino", model=files["model"], point=POINT)
    worker.call("save", folder=str(tmp_path / "saved"))
    (tmp_path / "saved/unrelated.txt").write_text("goes along with a folder, not with a file")
    # The weights go along with the file.
    path = str(tmp_path / "saved/model.xml")
    signature = worker.call("file_signature", target="openvino", path=path)["signature"]
    assert [spec["name"] for spec in signature["inputs"]] == ["x"]
    worker.call("open_file", target="openvino", path=path, signature=signature, point=POINT)
    worker.call("predict", samples=files["samples"], out=str(tmp_path / "from-file"))
    folder = str(tmp_path / "saved")
    worker.call("load", target="openvino", folder=folder, signature=signature, point=POINT)
    worker.call("predict", samples=files["samples"], out=str(tmp_path / "from-bundle"))
    for a, b in zip(load_outputs(tmp_path / "from-file"), load_outputs(tmp_path / "from-bundle"), strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])


def test_nothing_there_sees_our_folders_and_all_of_its_own_are_in_one(far, worker, files, tmp_path) -> None:
    use(worker, files, tmp_path)
    scratch = far.scratch()
    assert len(scratch) == 1
    assert files_in(scratch[0] / "out") == set()
    [process] = [p for p in far.processes("perwatt.worker") if p.environ()["PERWATT_WORKER"].startswith("a backend")]
    assert process.environ()["TMPDIR"].endswith(f"{scratch[0].name}/tmp")
    temporary = [f.path for f in process.open_files() if f.path.startswith(tempfile.gettempdir())]
    assert all(Path(path).is_relative_to(Path(tempfile.gettempdir()) / scratch[0].name) for path in temporary)
    if not far.isolated:
        pytest.skip("this system allows no mount namespace: the other machine sees our files")
    assert Path(files["model"]).exists()
    assert not Path(f"/proc/{process.pid}/root{files['model']}").exists()


def test_contents_are_sent_once_for_all_workers_of_a_run(far, place: Place, large: Path, tmp_path) -> None:
    said: list[str] = []
    workers = [place.worker(f"side {number}", on_progress=said.append) for number in range(2)]

    def open_it(worker: Worker) -> None:
        worker.call("open", target="openvino", model=str(large), point=POINT)

    threads = [threading.Thread(target=open_it, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text.split(" to ")[0] for text in said] == ["sending 52 MB"]
    [scratch] = far.scratch()
    contents = list((scratch / "contents").iterdir())
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in contents} == {path.name for path in contents}
    assert {(large.parent / name).stat().st_size for name in ("large.onnx", "weights/large.bin")} == {
        path.stat().st_size for path in contents
    }
    # A worker that comes later finds them there.
    later = place.worker("later", on_progress=said.append)
    open_it(later)
    assert len(said) == 1
    with Worker("here") as ours:
        open_it(ours)
        ours.call("save", folder=str(tmp_path / "here"))
    later.call("save", folder=str(tmp_path / "there"))
    assert (tmp_path / "there/model.bin").stat().st_size > 50_000_000
    for name in ("model.xml", "model.bin"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_file_that_changed_is_sent_anew(worker: Worker, files, tmp_path) -> None:
    mine = {**files, "model": str(tmp_path / "net.onnx")}
    outputs = []
    for number, seed in enumerate((0, 1)):
        conv_net(seed=seed).save(mine["model"])
        worker.call("open", target="openvino", model=mine["model"], point=POINT)
        worker.call("predict", samples=files["samples"], out=str(tmp_path / str(number)))
        outputs.append(load_outputs(tmp_path / str(number)))
    assert not np.array_equal(outputs[0][0]["y"], outputs[1][0]["y"])


def test_errors_name_our_files_and_the_machine_where_something_is_to_be_done(worker: Worker, files, tmp_path) -> None:
    bad = tmp_path / "bad.xml"
    bad.write_text("<net")
    with pytest.raises(InputError) as caught:
        worker.call("file_signature", target="openvino", path=str(bad))
    assert str(bad) in caught.value.message and "perwatt-on-" not in caught.value.message
    assert caught.value.message.startswith("on somebody@127.0.0.1: ")
    with pytest.raises(InputError, match="no file"):
        worker.call("file_signature", target="openvino", path=str(tmp_path / "not-there.xml"))
    with pytest.raises(InputError, match="no folder"):
        worker.call("prepare", samples=str(tmp_path / "not-there"), warm_up_s=0.0)
    # None of that cost the connection.
    assert worker.running


def test_an_operation_that_the_table_does_not_name_stays_here(worker: Worker, files) -> None:
    with pytest.raises(PerwattError, match="check is no operation for another machine"):
        worker.call("check", model=files["model"])


def test_what_the_machine_is_comes_from_there(place: Place) -> None:
    # The same processor, and a process of its own: what differs from moment to moment is left out.
    there, here = place.machine(), Place().machine()
    assert there["fingerprint"] == here["fingerprint"]
    assert (there["cpus"], there["probe_pays"]) == (here["cpus"], here["probe_pays"])
    assert there["facts"].keys() == here["facts"].keys()
    assert place.words == "somebody@127.0.0.1"


def test_sides_there_are_measured_as_sides_here_are(place: Place, files, tmp_path) -> None:
    """The conductor, the sides and the meter of a compilation; only the workers and the meter come from another place."""
    artifact = Artifact.load(files["model"])
    meter, _ = place.meter()
    conductor = Conductor(meter)
    sides = [
        Side.lowered(label, "openvino", artifact, OperatingPoint(**POINT), tmp_path, place.worker(label))
        for label in ("optimized", "original")
    ]
    interleave(sides, Path(files["samples"]), Effort(0.01, 0.02, min_blocks=2, max_s=1.0), conductor=conductor)
    for side in sides:
        assert len(side.windows) == len(sides[0].windows) >= 4
        assert all(window.wall_s >= 0.01 and window.latencies_ms for window in side.windows)
        found = figures(side.windows)
        if meter.method == "modelled":
            assert side.windows[0].energy_j == meter.stop(side.windows[0]).energy_j
        assert found["cpu_s_per_inference"] is not None and found["cpu_s_per_inference"] > 0
        side.note_memory()
        assert side.saved_bytes(tmp_path / side.label) > 0
        side.close()


WINDOW = Window(inferences=100, wall_s=2.0, cpu_s=1.5, latencies_ms=[20.0] * 100)


def test_a_modelled_meter_there_reads_what_it_reads_beside_the_load(place: Place) -> None:
    if Modelled().missing():
        with pytest.raises(TargetError, match=r"on somebody@127.0.0.1: the meter 'modelled' can't be used"):
            place.meter("modelled")
        return
    meter, notes = place.meter("modelled")
    meter.start()
    assert meter.stop(WINDOW) == Modelled().stop(WINDOW)
    assert (meter.method, meter.boundary, meter.refresh_s) == (Modelled().method, Modelled().boundary, None)
    assert meter.describe() == Modelled().describe()
    assert notes == []


def test_the_model_is_made_from_what_that_machine_is_and_not_from_this_one(place: Place, monkeypatch) -> None:
    """Here we are made to look like a larger machine; the other one isn't asked by the same process."""
    from perwatt.bench import modelled

    if Modelled().missing():
        pytest.skip("this processor is in no power table")
    expected = Modelled().stop(WINDOW)
    there, _ = place.meter("modelled")
    monkeypatch.setattr(modelled, "this_size", lambda: modelled.Size(64.0, 512.0))
    assert Modelled().stop(WINDOW) != expected
    again, _ = place.meter("modelled")
    assert there.stop(WINDOW) == again.stop(WINDOW) == expected


@pytest.fixture
def external(far) -> str:
    """The name of an external meter that is a program on the other machine."""
    program = "import os, time\nwhile True: print('{\"power_w\": 50.0}', flush=True); time.sleep(0.02)"
    script = far.temporary / "meter.py"
    script.write_text(program)
    return (
        f"wall:{sys.executable} {tempfile.gettempdir()}/meter.py" if far.isolated else f"wall:{sys.executable} {script}"
    )


def test_an_external_meter_is_read_on_the_other_machine(place: Place, external: str) -> None:
    meter, _ = place.meter(external)
    assert meter.method == "metered" and meter.boundary == "wall"
    meter.start()
    reading = meter.stop(WINDOW)
    assert reading.energy_j is not None and reading.energy_j > 0
    assert reading.refreshes is not None and meter.refresh_s is not None
    described = meter.describe()
    assert described["method"] == "metered" and described["link_ms"] > 0
    meter.close()
    meter.start()
    assert meter.stop(WINDOW).reason == "the meter was closed"


def test_a_meter_never_raises_in_a_window_whatever_becomes_of_its_machine(far, place: Place, external: str) -> None:
    meter, _ = place.meter(external)
    meter.start()
    for process in far.processes("perwatt.worker"):
        if process.environ()["PERWATT_WORKER"].startswith("the meter"):
            process.kill()
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None
    assert reading.reason is not None and "SIGKILL" in reading.reason
    # The next window has a meter again.
    meter.start()
    assert (meter.stop(WINDOW).energy_j or 0) > 0
    meter.close()


def test_no_meter_is_none_there_too(far, place: Place) -> None:
    meter, _ = place.meter("none")
    assert meter.stop(WINDOW).reason == "no meter was asked for"
    # Nothing is kept running for it.
    until(lambda: len(far.processes()) == 1)


def test_a_meter_that_can_not_be_used_there_is_an_error_that_names_the_machine(place: Place) -> None:
    with pytest.raises(TargetError, match=r"on somebody@127.0.0.1: the meter 'wall:/not/there' can't be used"):
        place.meter("wall:/not/there")


def test_here_is_a_place_too(files, tmp_path) -> None:
    with open_place(None) as here:
        assert here.words is None
        worker = here.worker("local")
        assert type(worker) is Worker
        meter, _ = here.meter("none")
        assert meter.stop(WINDOW).energy_j is None
        worker.close()


def test_the_environment_that_decides_there_is_its_own(far, place: Place, monkeypatch) -> None:
    monkeypatch.setenv("PERWATT_METER", "wall:/not/here")
    meter, _ = place.meter("auto")
    assert meter.method in ("modelled", "counter", "unavailable")
    meter.close()
    assert json.dumps(os.environ["PERWATT_METER"]) not in json.dumps(meter_environment(far))


def meter_environment(far) -> list[dict[str, str]]:
    """Of the processes there."""
    return [process.environ() for process in far.processes("perwatt.worker")]


def test_an_answer_is_waited_for_as_long_as_was_said_and_no_longer(place: Place, files) -> None:
    worker = place.worker("slow")
    worker.call("open", target="openvino", model=files["model"], point=POINT)
    worker.call("prepare", samples=files["samples"], warm_up_s=0.0)
    with pytest.raises(BackendError, match="drive did not end within 1 s and was stopped"):
        worker.call("drive", seconds=60.0, timeout_s=1.0)
    assert not worker.running
