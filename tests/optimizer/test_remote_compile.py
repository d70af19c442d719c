"""`--on ssh://…`, the whole way: read and verified here, lowered, tuned and measured there, written here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import perwatt
from perwatt.errors import InputError, TargetError

sys.path.insert(0, str(Path(__file__).parent))
from far import Far
from runs import images, optimize, outputs, put_net

pytestmark = pytest.mark.slow


def test_a_bundle_is_made_here_of_what_was_measured_there(far: Far, tmp_path: Path) -> None:
    model = put_net(tmp_path)
    bundle = perwatt.optimize(
        model, target="openvino", on=far.address, data=tmp_path / "samples.npz", max_drop=9, time="60s",
        scenario="offline", passes="remove-dead", out=tmp_path / "bundle",
    )  # fmt: skip
    report = bundle.report
    assert report["outcome"] in ("optimized", "unchanged")
    assert report["target"]["on"] == "somebody@127.0.0.1" and bundle.lock["hardware"]["on"] == "somebody@127.0.0.1"
    assert report["original"]["cpu_s_per_inference"] > 0 and report["tuning"]["points"]
    assert report["accuracy"]["n"] > 0, "it was judged on what the programs there answered"
    assert report["torch_eager"] is None
    x = images(5)
    assert np.allclose(perwatt.load(bundle).run(x)["y"], outputs(model, x), atol=0.3), "it runs here as well"
    far.at_rest()


def test_the_command_says_in_a_line_why_the_other_machine_can_t_be_used(far: Far, tmp_path: Path) -> None:
    put_net(tmp_path)
    done = optimize("net.onnx", "--target", "openvino", "--on", far.with_python("/no/such/python"), cwd=tmp_path)
    assert done.returncode == 4 and len(done.stderr.strip().split("\n")) == 1
    assert "/no/such/python" in done.stderr and not (tmp_path / "net-openvino").exists()
    with pytest.raises(InputError, match="ssh://"):
        perwatt.optimize(tmp_path / "net.onnx", on="http://there")
    with pytest.raises(TargetError, match="can't be used"):
        perwatt.optimize(tmp_path / "net.onnx", on=far.address, target="inductor:cuda", out=tmp_path / "never")
    far.at_rest()
