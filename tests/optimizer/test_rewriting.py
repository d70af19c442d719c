"""A model rewritten by passes, with nothing measured: which passes run, in which form, what is written and told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import perwatt
from perwatt.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from runs import assert_one_line_error, optimize, put_net


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def put_swish(folder: Path) -> Path:
    """swish.onnx: y = x · sigmoid(x), at the opset that has Swish."""
    nodes = [helper.make_node("Sigmoid", ["x"], ["gate"]), helper.make_node("Mul", ["x", "gate"], ["y"])]
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "swish", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, folder / "swish.onnx")
    return folder / "swish.onnx"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    put_net(tmp_path)
    return tmp_path


def test_lossless_default_passes_are_written_whatever_they_bring(here: Path) -> None:
    told: list[float] = []
    made = perwatt.rewrite("net.onnx", data="samples.npz", progress=lambda stage, share: told.append(share))
    assert made.path == Path("net-rewritten.onnx")
    assert "BatchNormalization" in operators(here / "net.onnx")
    assert "BatchNormalization" not in operators(made.path)
    onnx.checker.check_model(str(made.path), full_check=True)
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(made.path, x), run(here / "net.onnx", x), rtol=1e-4, atol=1e-5)
    by_name = {row.name: row for row in made.rows}
    assert made.rows[0].name == "read" and by_name["fold-batchnorm"].status == "applied"
    assert by_name["fold-batchnorm"].drift is not None
    assert "quantize-int8" not in by_name and "cast-half" not in by_name
    assert any(
        note.startswith(
            "left out: cast-half or quantize-fp8 or quantize-int8 or assign-precision, which only measuring"
        )
        for note in made.notes
    )
    assert told == sorted(told) and told[-1] > 0.9
    assert sorted(path.name for path in here.iterdir()) == ["net-rewritten.onnx", "net.onnx", "samples.npz"]


def test_the_form_follows_the_target(here: Path) -> None:
    model = put_swish(here)
    forms = {
        target: operators(perwatt.rewrite(model, target=target, out=f"{target}.onnx").path)
        for target in ("cpu", "openvino", "onnxruntime")
    }
    assert forms == {"cpu": ["Sigmoid", "Mul"], "openvino": ["Swish"], "onnxruntime": ["Sigmoid", "Mul"]}
    alone = perwatt.rewrite(model, target="openvino", out="again.onnx").notes
    assert alone[0] == "no data: each pass was proved on 16 synthetic samples"
    assert not any("no backend was named" in note for note in alone)


def test_lossy_passes_run_where_they_are_listed_and_a_warning_says_so(here: Path) -> None:
    made = perwatt.rewrite("net.onnx", target="null", data="samples.npz", passes="fold-batchnorm,quantize-int8")
    assert [row.status for row in made.rows] == ["applied"] * 3
    assert "QuantizeLinear" in operators(made.path)
    assert "warning: accuracy was not judged after quantize-int8: see its drift, or run optimize MODEL" in made.notes


def test_the_command_tells_nodes_and_passes_and_json_has_them(here: Path) -> None:
    shown = optimize("rewrite", "net.onnx", "--data", "samples.npz", "--out", "out.onnx", cwd=here)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("6 nodes → 5; weights 560 B → 464 B")
    assert "Outputs are off the original's by at most " in shown.stdout
    assert "each pass was proved on 16 samples" in shown.stdout and "no backend was named" in shown.stdout
    assert "✓ fold-batchnorm" in shown.stdout and shown.stdout.endswith("Model: out.onnx\n")
    again = optimize("rewrite", "net.onnx", "--data", "samples.npz", "--out", "out.onnx", "--force", "--json", cwd=here)
    plain = json.loads(again.stdout)
    assert plain["path"] == "out.onnx" and plain["operators"]["before"]["BatchNormalization"] == 1
    assert sum(plain["operators"]["after"].values()) == len(operators(here / "out.onnx")) == 5
    assert plain["digest"] == perwatt.read(here / "out.onnx").artifact.digest()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("net.onnx", "--out", "net.onnx", "--force"), "net.onnx is what is read here — give another file with --out"),
        (("net.onnx", "--out", "there.onnx"), "there.onnx exists — give another file with --out, or --force to replace it"),
        (("net.onnx", "--out", "mine.onnx"), "mine.onnx.data exists"),
        (("net.onnx", "--out", "folder"), "folder is a folder"),
        (("net.onnx", "--out", "none/a.onnx"), "none does not exist"),
        (("net.onnx", "--passes", "fuse-glu"), "fuse-gelu"),
        (("net.onnx", "--target", "opnvino"), "openvino"),
        (("none.onnx",), "none.onnx"),
        ((), "no model was given"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_in_one_line_and_nothing_is_written(here: Path, arguments, said: str) -> None:
    (here / "there.onnx").write_text("mine")
    (here / "mine.onnx.data").write_text("weights of another")
    (here / "folder").mkdir()
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    done: subprocess.CompletedProcess[str] = optimize("rewrite", *arguments, cwd=here)
    assert_one_line_error(done, 2, said)
    assert {path: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_weights_above_the_limit_go_beside_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perwatt.artifact.EXTERNAL_DATA_ABOVE_BYTES", 100)
    made = perwatt.rewrite("net.onnx", data="samples.npz", out="big.onnx")
    assert (here / "big.onnx.data").stat().st_size > 100
    assert made.after.path == made.path and made.before.path is None
    x = np.ones((2, 1, 8, 8), np.float32)
    np.testing.assert_allclose(run(made.path, x), run(here / "net.onnx", x), rtol=1e-4, atol=1e-5)
    # It is read from what is about to be replaced.
    with pytest.raises(InputError, match=r"big.onnx.data is what is read here"):
        (here / "again").mkdir()
        (here / "again" / "big.onnx.data").symlink_to(here / "big.onnx.data")
        perwatt.rewrite("big.onnx", data="samples.npz", out="again/big.onnx", force=True)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    perwatt.rewrite("net.onnx", data="samples.npz", out="big.onnx", force=True)
    assert not (here / "big.onnx.data").exists()


def test_a_lossy_pass_that_was_refused_is_no_reason_to_warn(here: Path) -> None:
    made = perwatt.rewrite("net.onnx", target="null", data="samples.npz", passes="cast-half")
    assert [row.status for row in made.rows] == ["applied", "refused"]
    assert not any(note.startswith("warning") for note in made.notes)


def test_a_target_that_is_elsewhere_decides_the_form_too(here: Path) -> None:
    made = perwatt.rewrite(put_swish(here), target="tensorrt", out="engine.onnx")
    assert operators(made.path) == ["Sigmoid", "Mul"]
    assert perwatt.rewrite(here / "swish.onnx", target="openvino", out="s.onnx", precision="f16").path.exists()


@pytest.mark.slow
def test_a_torch_model_is_compared_with_eager_first(here: Path) -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).eval()
    torch.jit.trace(network, torch.ones(2, 8)).save("net.pt")
    np.savez("given.npz", input=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    made = perwatt.rewrite("net.pt", data="given.npz", input=["input:float32[batch,8]"])
    assert made.rows[0].drift is not None and made.rows[0].drift["max_abs"] < 1e-4
    x = np.ones((3, 8), np.float32)
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, network(torch.ones(3, 8)).detach().numpy(), rtol=1e-4, atol=1e-5)
