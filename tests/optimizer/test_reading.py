"""`perwatt.reading.read` on every format that torch writes: same predictions, names, shapes, and clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from perwatt.errors import InputError, UntrustedCodeError  # noqa: E402
from perwatt.reading import read  # noqa: E402
from perwatt.reading_arch import load_callable  # noqa: E402
from perwatt.reading_shapes import parse_input, without_raw  # noqa: E402
from perwatt.recipe import RawInput  # noqa: E402
from perwatt.signature import TensorSpec  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NETS = Path(__file__).resolve().parents[1] / "nets.py"
SMALL = f"{NETS}:small"
IMAGE = "x:float32[batch,1,8,8]"
DATA = Path(os.environ.get("PERWATT_DATA", ROOT.parent / "shared" / "data"))


def predict(artifact, folder, *arrays):
    """First output of `artifact` in ONNX Runtime without any optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(artifact.file(folder)), options)
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))[0]


def small():
    return load_callable(SMALL, "--arch")().eval()


def images(n=5):
    return np.random.default_rng(0).standard_normal((n, 1, 8, 8)).astype(np.float32)


def saved(kind, folder):
    """The small network, written in one of the formats; returns path and further arguments of `read`."""
    net, path = small(), folder / "model.bin"
    example = torch.randn(2, 1, 8, 8)
    if kind == "torchscript":
        torch.jit.save(torch.jit.trace(net, example), str(path))
        return path, {}
    if kind == "scripted":
        torch.jit.save(torch.jit.script(net), str(path))
        return path, {"inputs": [IMAGE]}
    if kind == "torch-export":
        shapes = ({0: torch.export.Dim("n")},)
        path = folder / "model.pt2"
        torch.export.save(torch.export.export(net, (example,), dynamic_shapes=shapes), str(path))
        return path.rename(folder / "model.bin"), {}
    if kind == "pickled-module":
        tail = (torch.nn.ReLU(), torch.nn.AvgPool2d(8), torch.nn.Flatten(), net.linear)
        torch.save(torch.nn.Sequential(net.conv, net.bn, *tail), path)
        return path, {"inputs": ["input:float32[batch,1,8,8]"], "trust": True}
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(net.state_dict(), str(path))
    elif kind == "legacy":
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        state = {f"module.{key}": value for key, value in net.state_dict().items()}
        torch.save({"state_dict": state, "best_prec1": 90.0} if kind == "checkpoint" else net.state_dict(), path)
    return path, {"inputs": [IMAGE], "arch": SMALL}


@pytest.mark.parametrize(
    ("kind", "format_"),
    [
        ("torchscript", "torchscript"),
        ("scripted", "torchscript"),
        ("torch-export", "torch-export"),
        ("pickled-module", "pickled-module"),
        ("checkpoint", "checkpoint"),
        ("state", "checkpoint"),
        ("legacy", "checkpoint"),
        ("safetensors", "safetensors"),
    ],
)
def test_a_format_gives_the_networks_own_predictions(kind, format_, tmp_path):
    path, arguments = saved(kind, tmp_path)
    reading = read(path, **arguments)
    assert reading.format == format_
    assert reading.artifact.signature.batch == "batch"
    assert [spec.shape for spec in reading.artifact.signature.inputs] == [("batch", 1, 8, 8)]
    assert [str(spec) for spec in reading.artifact.signature.outputs] == ["output:float32[batch,10]"]
    expected = small()(torch.from_numpy(images())).detach().numpy()
    np.testing.assert_allclose(predict(reading.artifact, tmp_path, images()), expected, atol=1e-5)
    assert reading.artifact.steps[0].name == "read"
    assert reading.artifact.model.opset_imports[""] >= 23
    assert reading.artifact.model.ir_version <= 10
    assert reading.artifact.operator_counts()["Conv"] == 1
    assert reading.exported is not None
    assert reading.exported.module()(torch.from_numpy(images(1))).shape == (1, 10)
    assert not any(node.metadata_props for node in reading.artifact.model.graph)


def test_reading_twice_gives_the_same_digest_and_names_come_from_forward(tmp_path):
    path, arguments = saved("checkpoint", tmp_path)
    first, second = read(path, **arguments), read(path, **arguments)
    assert first.artifact.digest() == second.artifact.digest()
    assert first.artifact.signature.inputs[0].name == "x"
    assert any("batch" in note for note in first.notes)


def test_training_mode_is_left(tmp_path):
    net = small().train()
    torch.jit.save(torch.jit.script(net), str(tmp_path / "m.pt"))
    reading = read(tmp_path / "m.pt", inputs=[IMAGE])
    np.testing.assert_allclose(
        predict(reading.artifact, tmp_path, images()), small()(torch.from_numpy(images())).detach().numpy(), atol=1e-5
    )


def test_a_static_program_stays_static(tmp_path):
    torch.export.save(torch.export.export(small(), (torch.randn(3, 1, 8, 8),)), str(tmp_path / "m.pt2"))
    assert read(tmp_path / "m.pt2").artifact.signature.batch == 3


def test_a_trace_that_carries_its_batch_is_read_with_that_batch(tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 64).reshape(-1, 32).sum(1).reshape(int(x.shape[0]), -1)

    torch.jit.save(torch.jit.trace(Fixed(), torch.randn(4, 1, 8, 8)), str(tmp_path / "m.pt"))
    reading = read(tmp_path / "m.pt")
    out = predict(reading.artifact, tmp_path, images(4))
    np.testing.assert_allclose(out, images(4).reshape(4, 2, 32).sum(2), atol=1e-4)


def test_dictionary_outputs_and_tied_weights(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(11, 6)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids, mask):
            hidden = self.table(ids) * mask.unsqueeze(-1)
            return {"logits": self.head(hidden), "hidden": hidden}

    path = tmp_path / "tied.pt"
    torch.save(Tied().state_dict(), path)
    (tmp_path / "tied.py").write_text(
        "import torch\n"
        "class Tied(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(11, 6)\n"
        "        self.head = torch.nn.Linear(6, 11, bias=False)\n"
        "        self.head.weight = self.table.weight\n"
        "    def forward(self, ids, mask):\n"
        "        hidden = self.table(ids) * mask.unsqueeze(-1)\n"
        "        return {'logits': self.head(hidden), 'hidden': hidden}\n"
    )
    kinds = ["ids:int64[batch,sequence]", "mask:float32[batch,sequence]"]
    reading = read(path, arch=f"{tmp_path / 'tied.py'}:Tied", inputs=kinds)
    signature = reading.artifact.signature
    assert [str(spec) for spec in signature.inputs] == kinds
    assert [str(spec) for spec in signature.outputs] == [
        "logits:float32[batch,sequence,11]", "hidden:float32[batch,sequence,6]",
    ]  # fmt: skip
    tables = [v for v in reading.artifact.model.graph.initializers.values() if tuple(v.shape) == (11, 6)]
    assert len(tables) == 1


def test_shapes_from_the_data_where_nothing_else_says(tmp_path):
    path, _ = saved("state", tmp_path)
    data = [TensorSpec("images", "float32", ("batch", 1, 8, 8))]
    signature = read(path, arch=SMALL, example=data).artifact.signature
    assert [str(spec) for spec in signature.inputs] == [IMAGE]


def test_unknown_shapes_give_the_completed_command(tmp_path):
    path, _ = saved("state", tmp_path)
    with pytest.raises(InputError) as caught:
        read(path, arch=SMALL)
    assert f'optimize {path} --target cpu --input "x:float32[batch,1,224,224]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_raw_bytes_in_front_of_the_graph(tmp_path):
    path, arguments = saved("state", tmp_path)
    raw = {"x": RawInput(dtype="uint8", layout="NHWC", scale=1 / 255, mean=[0.5], std=0.25)}
    reading = read(path, raw_inputs=raw, **arguments)
    assert str(reading.artifact.signature.inputs[0]) == "x:uint8[batch,8,8,1]"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    native = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    expected = small()(torch.from_numpy(native)).detach().numpy()
    np.testing.assert_allclose(predict(reading.artifact, tmp_path, pixels), expected, atol=1e-4)


def test_data_that_is_raw_says_what_the_network_takes():
    raw = RawInput(dtype="uint8", layout="NHWC")
    spec = without_raw(TensorSpec("images", "uint8", ("batch", 8, 8, 1)), raw)
    assert str(spec) == "images:float32[batch,1,8,8]"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"y": RawInput()}, "known are x"),
        ({"x": RawInput(mean=[1.0, 2.0, 3.0])}, "3 values, the input has 1 channels"),
    ],
)
def test_raw_inputs_that_do_not_fit(raw, said, tmp_path):
    path, arguments = saved("state", tmp_path)
    with pytest.raises(InputError, match=said):
        read(path, raw_inputs=raw, **arguments)


# --- what is wrong with --arch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "arguments", "said"),
    [
        (None, {}, r"--arch net.py:YourNet"),
        (
            SMALL,
            {"num_classes": 100},
            r"linear.weight is \[10, 4\] in the file and \[100, 4\].*--arch-args num_classes=10",
        ),
        (SMALL, {"width": 8}, r"conv.weight is \[4, 1, 3, 3\] in the file.*--arch-args width=4"),
        (SMALL, {"colour": 1}, "unexpected keyword argument 'colour'.*--arch-args"),
        (f"{NETS}:resnet20", {}, "does not fit|is .* in the file"),
        (f"{NETS}:needs_size", {}, "missing a required argument: 'size'.*--arch-args"),
        (f"{NETS}:broken", {}, "raised RuntimeError: no such luck"),
        (f"{NETS}:smal", {}, "did you mean small"),
        ("nowhere.py:net", {}, "no file nowhere.py"),
        ("no_such_module_at_all:net", {}, "no module no_such_module_at_all"),
        ("net.py", {}, "package.module:callable or net.py:callable"),
    ],
)
def test_arch_that_does_not_fit(arch, arguments, said, tmp_path):
    path, _ = saved("state", tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        read(path, arch=arch, arch_args=arguments, inputs=[IMAGE])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "ema"])
def test_prefixes_and_nests_of_checkpoints(prefix, nest, tmp_path):
    state = {prefix + key: value for key, value in small().state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "m.pt")
    from perwatt.reading_arch import fill, find_state

    net = load_callable(SMALL, "--arch")()
    found = find_state(torch.load(tmp_path / "m.pt", weights_only=True))
    fill(net, found, SMALL, {}, tmp_path / "m.pt")
    assert torch.equal(net.linear.weight, small().linear.weight)


def test_the_working_directory_is_importable(tmp_path, monkeypatch):
    path, _ = saved("state", tmp_path)
    (tmp_path / "my_nets_xyz.py").write_text(NETS.read_text())
    monkeypatch.chdir(tmp_path)
    assert read(path, arch="my_nets_xyz:small", inputs=[IMAGE]).format == "checkpoint"
    assert read(path, arch="my_nets_xyz.py:small", inputs=[IMAGE]).format == "checkpoint"


def test_a_folder_with_weights_and_an_arch(tmp_path):
    from safetensors.torch import save_file

    save_file(small().state_dict(), str(tmp_path / "weights.safetensors"))
    assert read(tmp_path, arch=SMALL, inputs=[IMAGE]).format == "safetensors"


# --- what is no model ------------------------------------------------------------------------------------------------


def bad_text(path):
    path.write_text("these are not the weights you are looking for\n")


def bad_empty(path):
    path.write_bytes(b"")


def bad_truncated(path):
    saved("state", path.parent)
    data = (path.parent / "model.bin").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bad_legacy(path):
    saved("legacy", path.parent)
    data = (path.parent / "model.bin").read_bytes()
    path.write_bytes(data[:-200])


def bad_safetensors(path):
    saved("safetensors", path.parent)
    data = (path.parent / "model.bin").read_bytes()
    path.write_bytes(data[:-100])


def bad_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def bad_zip(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as out:
        out.writestr("hello.txt", "hello")


def bad_arrays(path):
    with path.open("wb") as file:
        np.savez(file, x=np.ones(3))


def bad_list(path):
    torch.save([1, 2, 3], path)


def bad_folder(path):
    path.mkdir()


def bad_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (bad_text, "text file"),
        (bad_empty, "empty"),
        (bad_truncated, "damaged or truncated"),
        (bad_legacy, "damaged or truncated"),
        (bad_safetensors, "damaged or truncated"),
        (bad_noise, "not a model in any known format"),
        (bad_zip, "holds no model.*hello.txt"),
        (bad_arrays, "--data"),
        (bad_list, "without a state dict"),
        (bad_folder, "without config.json"),
        (bad_pointer, "git lfs pull"),
    ],
)
def test_what_is_no_model_is_one_clear_line(make, said, tmp_path):
    path = tmp_path / "net.pt"
    make(path)
    with pytest.raises(InputError, match=said) as caught:
        read(path, arch=SMALL if make in (bad_legacy, bad_safetensors, bad_truncated) else None)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not isinstance(caught.value, UntrustedCodeError)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "model.pt").write_text("x")
    with pytest.raises(InputError, match=r"no file or folder .*modle.pt — did you mean .*model.pt"):
        read(tmp_path / "modle.pt")


@pytest.mark.parametrize(
    ("text", "said"),
    [("x", "write name:type"), ("x:float33[1]", "did you mean float32"), ("x:float32[a b]", "'a b' is no dimension")],
)
def test_inputs_that_can_not_be_understood(text, said):
    with pytest.raises(InputError, match=said):
        parse_input(text)


def test_inputs_of_another_name_are_refused(tmp_path):
    path, _ = saved("state", tmp_path)
    with pytest.raises(InputError, match="known are x"):
        read(path, arch=SMALL, inputs=["image:float32[batch,1,8,8]"])


def test_reading_is_quiet(tmp_path):
    path, _ = saved("torchscript", tmp_path)
    code = "import sys; from perwatt.reading import read; read(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_reading_is_light():
    code = "import sys, perwatt.reading; sys.exit('torch' in sys.modules or 'onnx_ir' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "cifar10_resnet").is_dir(), reason="no shared data: set PERWATT_DATA")
def test_resnet20_predicts_the_same_from_every_format(tmp_path, monkeypatch):
    # A class can be pickled only while the module of its name is the one that it came from.
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    home, arch = DATA / "cifar10_resnet", f"{NETS}:resnet20"
    given = {"arch": arch, "inputs": ["x:float32[batch,3,32,32]"]}
    whole = tmp_path / "whole.pt"
    net = load_callable(arch, "--arch")()
    state = torch.load(home / "resnet20-12fca82f.th", weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    torch.save(net, whole)
    cases = [
        (home / "resnet20.onnx", {}),
        (home / "resnet20.pt2", {}),
        (home / "resnet20_torchscript.pt", {}),
        (home / "resnet20-12fca82f.th", given),
        (home / "resnet20.safetensors", given),
        (whole, {"inputs": given["inputs"], "trust": True}),
    ]
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    results = []
    for path, arguments in cases:
        artifact = read(path, **arguments).artifact
        counts = artifact.operator_counts()
        assert (counts["Conv"], counts["Gemm"]) == (19, 1), path
        assert artifact.signature.batch in ("batch", "n")
        results.append(predict(artifact, tmp_path, x))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-4)
