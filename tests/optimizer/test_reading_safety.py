"""Files that run code when loaded: each one here really does, writes a marker if it gets to run, and is refused."""

import contextlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from perwatt.errors import UntrustedCodeError  # noqa: E402
from perwatt.reading import read  # noqa: E402
from perwatt.reading_program import check_expression, check_guard  # noqa: E402

NETS = Path(__file__).resolve().parents[1] / "nets.py"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Net(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x + 1], 1)


def refused(path, marker, **arguments):
    with pytest.raises(UntrustedCodeError) as caught:
        read(path, **arguments)
    assert not marker.exists(), "the refused file ran its code"
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def program(folder):
    path = folder / "good.pt2"
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("width")},)
    torch.export.save(torch.export.export(Net(), (torch.randn(3, 8),), dynamic_shapes=shapes), str(path))
    return path


def rewritten(path, change, extra=None):
    """A copy of an archive whose members went through `change(name, data)`."""
    result = path.with_name("evil" + path.suffix)
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as after:
        root = before.namelist()[0].split("/")[0]
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
        for name, data in (extra or {}).items():
            after.writestr(f"{root}/{name}", data)
    return result


def changed_json(path, change):
    """A copy of a .pt2 whose program (parsed JSON) went through `change`."""

    def edit(name, data):
        if "/models/" not in name:
            return data
        plain = json.loads(data)
        change(plain)
        return json.dumps(plain)

    return rewritten(path, edit)


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickled_object(new_format, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.pt"
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "extra": Evil(marker)}, path, _use_new_zipfile_serialization=new_format
    )
    said = refused(path, marker)
    assert "open" in said
    for way in ("torch.jit.save", "torch.export.save", "--arch", "ONNX", "--trust"):
        assert way in said
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack of this test does not work"


def test_a_pickled_module_needs_trust(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "m.pt", tmp_path / "marker")
    assert read(tmp_path / "m.pt", trust=True, inputs=["input:float32[batch,3]"]).format == "pickled-module"


def test_a_plain_pickle_is_never_loaded(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Evil(marker)))
    assert "Python pickle that imports" in refused(path, marker, trust=True)
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_an_archive_with_two_members_of_a_name(name, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    path = rewritten(tmp_path / "m.pt", lambda _, data: data, {name: pickle.dumps(Evil(tmp_path / "marker"))})
    assert "ambiguous" in refused(path, tmp_path / "marker", arch="net.py:x")


def test_weights_in_a_folder_that_are_pickles(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(Evil(tmp_path / "marker"), folder / "pytorch_model.bin")
    refused(folder, tmp_path / "marker", arch=f"{NETS}:small")


# --- torch.export ----------------------------------------------------------------------------------------------------


def test_a_good_program_with_expressions_is_read(tmp_path):
    signature = read(program(tmp_path)).artifact.signature
    assert signature.batch == "batch"
    assert signature.outputs[0].shape == ("batch", "2*sequence")


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_sample_inputs_that_are_pickles(tmp_path):
    marker = tmp_path / "marker"
    evil = pickled(((Evil(marker),), {}))
    path = rewritten(program(tmp_path), lambda name, data: evil if "sample_inputs" in name else data)
    assert "sample_inputs" in refused(path, marker)
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists()


def test_the_layout_of_older_versions(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "old.pt2"
    with zipfile.ZipFile(program(tmp_path)) as new, zipfile.ZipFile(path, "w") as old:
        names = {name.split("/", 1)[1]: name for name in new.namelist()}
        old.writestr("version", "8.20")
        old.writestr("serialized_exported_program.json", new.read(names["models/model.json"]))
        old.writestr("serialized_state_dict.pt", pickled({}))
        old.writestr("serialized_constants.pt", pickled({}))
        old.writestr("serialized_example_inputs.pt", pickled(((Evil(marker),), {})))
    assert "serialized_example_inputs" in refused(path, marker)


def test_members_that_are_objects(tmp_path):
    marker = tmp_path / "marker"

    def edit(name, data):
        if not name.endswith("model_constants_config.json"):
            return data
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"thing": payload}})

    path = rewritten(program(tmp_path), edit, {"data/constants/opaque_obj_0": pickle.dumps(Evil(marker))})
    refused(path, marker)
    torch.export.load(path)
    assert marker.exists()


def test_native_code_in_the_package(tmp_path):
    path = rewritten(program(tmp_path), lambda _, data: data, {"data/aotinductor/model/model.so": b"\x7fELF"})
    assert "model.so" in refused(path, tmp_path / "marker")


def set_everywhere(node, key, value):
    if isinstance(node, dict):
        for name in node:
            if name == key and isinstance(node[name], str):
                node[name] = value
            else:
                set_everywhere(node[name], key, value)
    elif isinstance(node, list):
        for entry in node:
            set_everywhere(entry, key, value)


def test_size_expressions_that_are_evaluated(tmp_path):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch() or 2"
    path = changed_json(program(tmp_path), lambda plain: set_everywhere(plain, "expr_str", code))
    assert "size expression" in refused(path, marker)
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(path)
    assert marker.exists()


def test_guards_that_are_compiled(tmp_path):
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')"
    path = changed_json(program(tmp_path), lambda plain: plain.update(guards_code=[code]))
    assert "guard" in refused(path, marker)


def test_names_that_reach_generated_source(tmp_path):
    marker = tmp_path / "marker"
    name = f"x=open({str(marker)!r},'w')"

    def rename(plain):
        text = (
            json.dumps(plain)
            .replace('"name": "x"', f'"name": {json.dumps(name)}')
            .replace('"x":', json.dumps(name) + ":")
        )
        plain.clear()
        plain.update(json.loads(text))

    path = changed_json(program(tmp_path), rename)
    assert "no plain word" in refused(path, marker)
    torch.export.load(path)
    assert marker.exists(), "default arguments of generated source are evaluated"


def test_tree_specifications_that_import_modules(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "evil_module_of_this_test.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    context = json.dumps([{"__enum__": True, "fqn": "evil_module_of_this_test:x", "name": "x"}])
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
    path = changed_json(program(tmp_path), lambda plain: set_everywhere(plain, "in_spec", spec))
    assert "tree specification" in refused(path, marker)
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(path)
    assert marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "torch.hub.load", "torch.ops.load_library", "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default", "torch.ops.higher_order.call_torchbind", "torch.os.system", "#executor:op",
        "_operator.methodcaller", "_operator.attrgetter", "builtins.exec", "math.__loader__.load_module",
        "torch.ops.aten.__init__.__globals__",
    ],
)  # fmt: skip
def test_operators_outside_the_allow_list(target, tmp_path):
    path = changed_json(program(tmp_path), lambda plain: set_everywhere(plain, "target", target))
    assert "no known operator" in refused(path, tmp_path / "marker")


def test_stack_traces_are_left_out(tmp_path):
    text = "\n__import__('os').abort()\n"
    path = changed_json(program(tmp_path), lambda plain: set_everywhere(plain, "stack_trace", text))
    assert read(path).format == "torch-export"


@pytest.mark.parametrize(
    "text",
    [
        "s77", "2*s77", "s0 + 3*s1 - 4", "FloorDiv(s77, 2)", "Symbol('s77', positive=True, integer=True)",
        "Max(1, s77 - 2)", "Mod(s0, 8)", "Mul(Integer(2), Symbol('s3', integer=True))", "s0**2", "Eq(s0, s1)",
        "s0 // 2 % 3", "-s0", "ceiling(s0/2)",
    ],
)  # fmt: skip
def test_expressions_that_sizes_are_made_of(text):
    assert check_expression(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "().__class__", "s0.func", "exec('1')", "Max('__import__(1)')", "[1 for x in s0]",
        "lambda: 1", "s0[0]", "9**9**9", "(s0, s1)[0]", "f'{s0}'", "Symbol('a b()')", "Symbol('s', cls=exec)",
        "a := 1", "s0\n__import__('os')", "__builtins__", "1 if s0 else 2", "Max(*s0)", "Pow(9, 999999999)",
    ],
)  # fmt: skip
def test_expressions_that_are_more(text):
    assert check_expression(text) is not None


def test_guards():
    assert check_guard("L['x'].size()[0] == L['mask'].size()[0]") is None
    assert check_guard("2 <= L['x'].size()[1] and L['x'].size()[1] <= 512") is None
    assert check_guard("L['x'].__class__") is not None
    assert check_guard("L['x'].size().__reduce__()") is not None
    assert check_guard("open('x')") is not None


# --- TorchScript -----------------------------------------------------------------------------------------------------


class Reads(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x + torch.from_file(self.path, False, 3, dtype=torch.float32)


class Writes(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        torch.save(x, self.path)
        return x


class WritesWhenLoaded(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.w = torch.ones(3)

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.w = state[1]
        self.training = state[2]
        torch.save(self.w, self.path)

    def forward(self, x):
        return x + self.w


@pytest.mark.parametrize(("kind", "operator"), [(Reads, "from_file"), (Writes, "save"), (WritesWhenLoaded, "save")])
def test_torchscript_that_touches_files(kind, operator, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(kind(str(marker))), str(path))
    marker.unlink(missing_ok=True)
    assert operator in refused(path, marker, inputs=["x:float32[3]"])
    if kind is not Reads:
        torch.jit.load(str(path))(torch.ones(3))
        assert marker.exists()


def test_torchscript_may_have_an_attribute_named_save(tmp_path):
    class Has(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.save = [1, 2]

        def forward(self, x):
            return x * self.save[1]

    torch.jit.save(torch.jit.script(Has()), str(tmp_path / "m.pt"))
    assert read(tmp_path / "m.pt", inputs=["x:float32[batch,3]"]).format == "torchscript"


@pytest.mark.parametrize(
    "source",
    [
        "torch.save(x, 'f')", "x.save('f')", "torch . from_file('f')", "getattr(torch, 'save')(x, 'f')",
        "ops.aten.from_file('f')", "ops.custom.anything(x)", "ops.prim.rpc_sync(x)", "torch.\\\n    save(x)",
        "__torch__.torch.classes.dist_rpc.Thing(x)", "fork(torch.save, x)", "x = `torch.save`",
    ],
)  # fmt: skip
def test_torchscript_source_is_judged_as_text(source):
    from perwatt.reading_safety import _torchscript_reasons

    text = f"def forward(self, x: Tensor) -> Tensor:\n  y = {source}\n  return x\n"
    assert list(_torchscript_reasons(text.encode()))


def test_telemetry_is_off_and_nothing_asks_the_network():
    from perwatt import reading_huggingface

    source = (Path(reading_huggingface.__file__)).read_text()
    assert "HF_HUB_OFFLINE" in source
    assert "HF_HUB_DISABLE_TELEMETRY" in source
    assert os.environ.get("HF_HUB_OFFLINE", "1") == "1"
