"""`StepStore`: what is put comes back as it was or not at all, whoever is killed, writes at the same time or damages files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from models import (
    build,
    context,
    control_flow,
    conv_net,
    inner_types,
    mlp,
    no_batch,
    node,
    proto,
    transformer,
    two_and_two,
)
from onnx import helper, numpy_helper

from perwatt import registry, step_store
from perwatt.artifact import Artifact, Step
from perwatt.pipeline import Row
from perwatt.recipe import PassStep
from perwatt.step_store import ENTRY, PARTIAL, TENSOR, StepStore, open_step_store

KEY = "c0ffee" * 8


@pytest.fixture
def store(tmp_path: Path) -> StepStore:
    return StepStore(tmp_path / "steps")


def wide(seed: int = 0, width: int = 256) -> Artifact:
    """A product with a weight that is a file of its own, and a bias that is none."""
    random = np.random.default_rng(seed)
    weights = {
        "w": random.standard_normal((width, width)).astype(np.float32),
        "b": random.standard_normal(width).astype(np.float32),
    }
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "s"), node("Relu", "s", "y")]
    return build(nodes, f"x:float32[n,{width}]", f"y:float32[n,{width}]", weights)


def changed(artifact: Artifact, change: Callable[[ir.Model], None], name: str = "scripted") -> Artifact:
    model = artifact.edit()
    change(model)
    return artifact.after(model, Step(name, {"ratio": 0.5, "exclude": ("a", "b")}, ("half of it",)))


def stored(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))


def other_operator(model: ir.Model) -> None:
    """A change of the graph alone."""
    model.graph[-1].op_type = "Sigmoid"


def applied(**more: object) -> Row:
    facts: dict[str, object] = {
        "changes": ["one thing", "another: é"], "drift": {"max_abs": 1e-7, "relative": None},
        "drift_from_original": {"max_abs": 0.25, "relative": 1e-3}, "seconds": 12.345, "size_bytes": (1000, 500),
        "operators": ({"Conv": 2}, {"Conv": 1}),
    }  # fmt: skip
    return Row("scripted", {"ratio": 0.5}, "applied", **{**facts, **more})  # type: ignore[arg-type]


def assert_same(a: Artifact, b: Artifact) -> None:
    assert a.digest() == b.digest() == Artifact(model=a.model).digest()
    assert inner_types(a) == inner_types(b)
    assert [n.name for n in a.model.graph] == [n.name for n in b.model.graph]
    assert a.signature == b.signature
    assert [(s.name, s.changes) for s in a.steps] == [(s.name, s.changes) for s in b.steps]


def files(store: StepStore, ending: str = "") -> list[Path]:
    found = store.folder.iterdir() if store.folder.exists() else ()
    return sorted(path for path in found if path.name.endswith(ending))


def size_on_disk(store: StepStore) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files(store))


# What comes back ------------------------------------------------------------------------------------------------------


def test_a_step_comes_back_with_its_row_its_history_and_the_same_model(store: StepStore) -> None:
    before = wide()
    after, row = changed(before, other_operator), applied()
    store.put(KEY, before, after, row)
    again, told = StepStore(store.folder).get(KEY, before)
    assert_same(again, after)
    assert told == row and told.to_json() == row.to_json()
    assert again.steps[-1].settings == {"ratio": 0.5, "exclude": ["a", "b"]}
    assert again.path is None


@pytest.mark.parametrize("make", [conv_net, transformer, mlp, control_flow, two_and_two, no_batch])
@pytest.mark.parametrize("large", [1, 1 << 16])
def test_every_kind_of_model_comes_back(store: StepStore, monkeypatch: pytest.MonkeyPatch, make, large: int) -> None:
    monkeypatch.setattr(step_store, "LARGE_BYTES", large)
    before = make()
    after = changed(before, lambda model: None)
    store.put(KEY, before, after, applied())
    again, _ = store.get(KEY, wide())
    assert_same(again, after)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "INT8", "INT4", "UINT4", "FLOAT8E4M3FN", "BOOL", "INT64"])
def test_weights_of_every_type_come_back(store: StepStore, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(step_store, "LARGE_BYTES", 1)
    dtype = ir.DataType[kind]

    def retype(model: ir.Model) -> None:
        array = (np.arange(15).reshape(3, 5) % 2).astype(dtype.numpy())
        model.graph.register_initializer(stored("odd", ir.tensor(array, dtype=dtype, name="odd")))

    before = wide()
    after = changed(before, retype)
    store.put(KEY, before, after, applied())
    again, _ = store.get(KEY, before)
    assert_same(again, after)
    weight = again.model.graph.initializers["odd"].const_value
    assert weight.dtype == dtype and not weight.raw.flags.writeable


def test_texts_and_weights_of_packed_types_come_back(store: StepStore) -> None:
    """As quantization stores them: int4, packed; and a table of words, which no file of numbers can hold."""

    def put_in(model: ir.Model) -> None:
        array = np.ones((512, 512), ml_dtypes.int4)
        for name, tensor in (
            ("q", ir.tensor(array, dtype=ir.DataType.INT4, name="q")),
            ("words", ir.StringTensor(np.array([b"a", b"b" * 100_000], dtype=object), name="words")),
        ):
            model.graph.register_initializer(stored(name, tensor))

    before = wide()
    after = changed(before, put_in)
    store.put(KEY, before, after, applied())
    again, _ = store.get(KEY, before)
    assert_same(again, after)
    assert [path.stat().st_size for path in files(store, TENSOR)].count(512 * 512 // 2) == 1


@pytest.mark.parametrize("status", ["unchanged", "refused", "rolled-back"])
def test_a_step_that_changed_nothing_costs_next_to_nothing_and_gives_back_what_it_was_given(
    store: StepStore, status
) -> None:
    before, row = wide(), Row("scripted", {}, status, "nothing to do on this model")
    store.put(KEY, before, before, row)
    [path] = files(store)
    assert path.stat().st_size < 600
    again, told = store.get(KEY, before)
    assert again is before and told == row


def test_types_and_shapes_that_were_noted_come_back_though_the_digest_is_the_same(store: StepStore) -> None:
    before = wide()

    def note(model: ir.Model) -> None:
        out = model.graph[0].outputs[0]
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 256])

    model = before.edit()
    note(model)
    after = Artifact(model=model, steps=before.steps)
    assert after.digest() == before.digest()
    store.put(KEY, before, after, Row("scripted", {}, "unchanged", "noted"))
    again, _ = store.get(KEY, before)
    assert again is not before
    assert_same(again, after)
    assert str(again.model.graph[0].outputs[0].shape) == "[n,256]"


def test_passes_find_the_history_that_they_look_at(store: StepStore) -> None:
    before = wide()
    after = changed(before, other_operator, "prune-channels")
    store.put(KEY, before, after, applied())
    again, _ = store.get(KEY, before)
    recover = registry.bind(PassStep(name="recover"))
    words = "nothing was pruned that could be learnt back"
    assert words in list(recover.requires(before, context()))
    assert words not in list(recover.requires(again, context()))


def test_an_artifact_that_lies_in_a_file_with_its_weights_beside_it_is_kept_whole(
    store: StepStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perwatt.artifact.EXTERNAL_DATA_ABOVE_BYTES", 1000)
    after = changed(wide(), other_operator)
    loaded = Artifact.load(after.save(tmp_path / "big.onnx"))
    assert (tmp_path / "big.onnx.data").exists()
    store.put(KEY, wide(), loaded, applied())
    for left in tmp_path.glob("big*"):
        left.unlink()
    again, _ = store.get(KEY, wide(seed=1))
    assert_same(again, after)


def test_what_passes_really_make_comes_back(store: StepStore) -> None:
    artifact = conv_net(width=64, side=16)
    for number, name in enumerate(("fold-batchnorm", "fuse-swish", "common-subexpression", "remove-dead")):
        after, changes = registry.bind(PassStep(name=name)).run(artifact, context())
        store.put(f"{number}", artifact, after, applied(changes=changes))
        again, row = store.get(f"{number}", artifact)
        assert_same(again, after)
        assert row.changes == changes
        artifact = again


# Weights --------------------------------------------------------------------------------------------------------------


def test_a_step_that_changes_the_graph_alone_writes_no_weights_again(store: StepStore) -> None:
    before = wide()
    store.put("1", before, changed(before, other_operator), applied())
    [weights] = files(store, TENSOR)
    assert weights.stat().st_size == 256 * 256 * 4
    store.put("2", before, changed(before, lambda model: None), applied())
    assert files(store, TENSOR) == [weights]
    assert all(path.stat().st_size < 4096 for path in files(store, ENTRY))


def test_weights_are_shared_with_the_artifact_before(store: StepStore) -> None:
    before = wide()
    store.put(KEY, before, changed(before, other_operator), applied())
    again, _ = store.get(KEY, before)
    mine, its = (artifact.model.graph.initializers["w"].const_value for artifact in (again, before))
    assert mine is its


def test_a_weight_that_goes_by_another_name_now_keeps_the_old_name_where_it_was(store: StepStore) -> None:
    before = wide()

    def rename(model: ir.Model) -> None:
        old = model.graph.initializers["w"]
        new = stored("other", ir.Tensor(old.const_value.numpy(), name="other"))
        model.graph.register_initializer(new)
        model.graph[0].replace_input_with(1, new)
        del model.graph.initializers["w"]

    after = changed(before, rename)
    store.put(KEY, before, after, applied())
    again, _ = store.get(KEY, before)
    assert_same(again, after)
    assert before.model.graph.initializers["w"].const_value.name == "w"


# Damage ---------------------------------------------------------------------------------------------------------------


def put_one(store: StepStore) -> tuple[Artifact, Path, Path]:
    """The artifact before; the file of the entry, and that of its weight."""
    before = wide()
    store.put(KEY, before, changed(before, other_operator), applied())
    [entry], [weights] = files(store, ENTRY), files(store, TENSOR)
    return before, entry, weights


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def test_an_entry_with_one_wrong_bit_anywhere_is_none_and_is_removed(store: StepStore) -> None:
    before, entry, _ = put_one(store)
    content = entry.read_bytes()
    for place in [*range(0, len(content), 37), len(content) - 1]:
        entry.write_bytes(flipped(content, place))
        assert store.get(KEY, before) is None, place
        assert not entry.exists()
    entry.write_bytes(content)
    assert store.get(KEY, before) is not None


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 32, b"\0" * 5000])
def test_an_entry_that_is_no_entry_is_none(store: StepStore, content: bytes) -> None:
    before, entry, _ = put_one(store)
    entry.write_bytes(content)
    assert store.get(KEY, before) is None


def test_an_entry_that_is_cut_off_is_none(store: StepStore) -> None:
    before, entry, _ = put_one(store)
    content = entry.read_bytes()
    for length in range(0, len(content), 101):
        entry.write_bytes(content[:length])
        assert store.get(KEY, before) is None


@pytest.mark.parametrize("harm", [lambda c: flipped(c, 1000), lambda c: c[:-1], lambda c: b"", lambda c: c + b"x"])
def test_a_damaged_weight_makes_its_entries_none_and_is_written_anew(store: StepStore, harm) -> None:
    before, _, weights = put_one(store)
    weights.write_bytes(harm(weights.read_bytes()))
    harmless = weights.stat().st_size > 256 * 256 * 4
    found = store.get(KEY, wide(seed=1))
    assert (found is not None) == harmless
    # Whoever makes the step again keeps it again, whole.
    after = changed(before, other_operator)
    store.put(KEY, before, after, applied())
    assert_same(store.get(KEY, wide(seed=1))[0], after)


def test_a_weight_that_is_gone_makes_the_entry_none_but_where_it_is_at_hand(store: StepStore) -> None:
    before, entry, weights = put_one(store)
    weights.unlink()
    assert_same(store.get(KEY, before)[0], changed(before, other_operator))
    assert store.get(KEY, wide(seed=1)) is None
    assert not entry.exists()


def test_another_model_than_was_put_there_is_none(store: StepStore) -> None:
    before, entry, _ = put_one(store)
    facts, graph = step_store._unpacked(entry.read_bytes())
    entry.write_bytes(step_store._packed(facts, graph.replace(b"Sigmoid", b"Softmax")))
    assert store.get(KEY, before) is None


def test_a_row_of_another_version_is_none(store: StepStore) -> None:
    before, entry, _ = put_one(store)
    facts, graph = step_store._unpacked(entry.read_bytes())
    facts["row"]["colour"] = "blue"
    entry.write_bytes(step_store._packed(facts, graph))
    assert store.get(KEY, before) is None


# Disks that can't be written ------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_costs_the_head_start_only(store: StepStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = wide(), []

    def full(handle: int) -> None:
        asked.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for key in "123":
            store.put(key, before, changed(before, other_operator), applied())
    assert store.get("1", before) is None
    assert files(store) == []
    assert len(asked) == 1, "a full disk is tried once"


def test_a_folder_that_can_not_be_made_costs_the_head_start_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = StepStore(tmp_path / "file" / "steps")
    before = wide()
    store.put(KEY, before, changed(before, other_operator), applied())
    assert store.get(KEY, before) is None


def test_a_folder_that_may_only_be_read_serves_all_the_same(store: StepStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, _ = put_one(store)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(step_store.tempfile, "NamedTemporaryFile", refuse)
    store.put("other", before, before, Row("scripted", {}, "unchanged"))
    assert store.get(KEY, before) is not None


def test_what_can_not_be_written_down_is_not_kept(store: StepStore) -> None:
    before = wide()
    store.put(KEY, before, before, Row("scripted", {"what": object()}, "unchanged"))
    assert store.get(KEY, before) is None
    store.put(KEY, before, before, Row("scripted", {}, "unchanged"))
    assert store.get(KEY, before) is not None


# Room -----------------------------------------------------------------------------------------------------------------


def aged(store: StepStore, hours: float) -> None:
    """All that is there was used so much earlier."""
    for path in files(store):
        told = path.stat()
        os.utime(path, (told.st_atime - 3600 * hours, told.st_mtime - 3600 * hours))


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "steps", limit_bytes=3 * (256 * 1024 + 4096))
    models = {f"{seed}": wide(seed) for seed in range(3)}
    for key, model in models.items():
        store.put(key, model, changed(model, other_operator), applied())
        aged(store, 1)
    assert store.get("0", models["0"]) is not None
    for seed in (3, 4):
        aged(store, 1)
        model = wide(seed)
        store.put(f"{seed}", model, changed(model, other_operator), applied())
        assert size_on_disk(store) <= store.limit_bytes
    elsewhere = wide(9)
    assert [key for key in "01234" if store.get(key, elsewhere) is not None] == ["0", "3", "4"]
    assert len(files(store, TENSOR)) == len(files(store, ENTRY)) == 3


def test_an_entry_goes_before_the_weights_that_it_needs(tmp_path: Path) -> None:
    """Many steps over few weights: what is left can all be read."""
    store = StepStore(tmp_path / "steps", limit_bytes=2 * 256 * 1024 + 16 * 4096)
    models = [wide(seed) for seed in range(3)]
    for number in range(60):
        before = models[number % 3]
        store.put(f"{number}", before, changed(before, lambda model: None, f"step-{number}"), applied())
    left = [path.name.removesuffix(ENTRY) for path in files(store, ENTRY)]
    assert left
    assert all(store.get(key, wide(9)) is not None for key in left)
    assert size_on_disk(store) <= store.limit_bytes


def test_a_model_above_half_of_the_limit_is_not_kept(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "steps", limit_bytes=300 * 1024)
    before = wide()
    store.put(KEY, before, changed(before, other_operator), applied())
    assert store.get(KEY, before) is None and files(store) == []
    store.put(KEY, before, before, Row("scripted", {}, "unchanged"))
    assert store.get(KEY, before) is not None


def test_what_killed_writers_left_is_swept_and_what_others_write_now_is_not(store: StepStore) -> None:
    store.folder.mkdir()
    old, new = store.folder / f"old{PARTIAL}", store.folder / f"new{PARTIAL}"
    for path in (old, new):
        path.write_bytes(b"x" * 100)
    os.utime(old, (0, 0))
    put_one(store)
    assert not old.exists() and new.exists()


def test_the_store_of_the_user_lies_in_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_step_store()
    assert store is not None and store.folder == tmp_path / "perwatt" / "steps"
    monkeypatch.setattr(step_store, "cache_folder", lambda name: None)
    assert open_step_store() is None


# Several processes ----------------------------------------------------------------------------------------------------

WRITER = """
import random, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_step_store import applied, assert_same, changed, other_operator, wide
from perwatt.step_store import StepStore

store = StepStore(Path(sys.argv[1]), limit_bytes=5 * 256 * 1024)
chance = random.Random(sys.argv[2])
models = [wide(seed) for seed in range(4)]
made = [changed(model, other_operator) for model in models]
print("begun", flush=True)
found = 0
for turn in range(10_000):
    number = chance.randrange(4)
    store.put(str(number), models[number], made[number], applied())
    number = chance.randrange(4)
    again = store.get(str(number), models[chance.randrange(4)])
    if again is not None:
        assert_same(again[0], made[number])
        found += 1
    if turn == int(sys.argv[2]):
        break
print(found, flush=True)
"""


def writer(folder: Path, turns: int) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", WRITER, str(folder), str(turns), str(here), str(here.parent)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begun(folder: Path, turns: Iterator[int]) -> list[subprocess.Popen[str]]:
    processes = [writer(folder, count) for count in turns]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "begun\n", process.stderr.read()
    return processes


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_moment_leaves_whole_entries_or_none(store: StepStore) -> None:
    chance = random.Random(0)
    made = {f"{seed}": changed(wide(seed), other_operator) for seed in range(4)}
    found = 0
    for _ in range(6):
        [process] = begun(store.folder, iter([-1]))
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(path.name.endswith((ENTRY, TENSOR, PARTIAL)) for path in files(store))
        for key, after in made.items():
            again = store.get(key, wide(9))
            if again is not None:
                assert_same(again[0], after)
                found += 1
    assert found


@pytest.mark.slow
def test_several_processes_may_use_one_folder_while_it_overflows(store: StepStore) -> None:
    processes = begun(store.folder, iter([60, 61, 62]))
    for process in processes:
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert int(told) > 0
    assert not files(store, PARTIAL)


def test_two_outputs_and_tensors_in_attributes_are_no_initializers(store: StepStore) -> None:
    """What is in a Constant stays in the graph."""
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((200, 200), np.float32)))
    made = proto([constant, node("MatMul", "x c", "y")], "x:float32[n,200]", "y:float32[n,200]")
    after = Artifact(model=ir.from_proto(made))
    store.put(KEY, wide(), after, applied())
    assert_same(store.get(KEY, wide())[0], after)
    assert files(store, TENSOR) == []
