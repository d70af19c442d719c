"""Distillation: a student learns its teacher's outputs back, never gets worse, and normalization comes and goes unnoticed."""

import os
import re
import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import build, conv_net, feed, mlp, node, outputs, transformer, weight

torch = pytest.importorskip("torch")

from perwatt import distillation  # noqa: E402
from perwatt.artifact import Artifact, Step  # noqa: E402
from perwatt.data import Samples  # noqa: E402
from perwatt.distillation import Plan, distil  # noqa: E402
from perwatt.distillation_answers import Answers, cross_entropy  # noqa: E402
from perwatt.distillation_inputs import UNLABELLED, Drawn, augmentation  # noqa: E402
from perwatt.distillation_norms import fold_norms, put_norms, reestimate, with_biases  # noqa: E402
from perwatt.distillation_weights import learnt_names  # noqa: E402
from perwatt.errors import BackendError  # noqa: E402
from perwatt.interpreter import Interpreter  # noqa: E402

STEP = Step("learn")


def disturbed(artifact, scale=0.5, seed=7, zero=0.0):
    """The artifact with noise on its weights; of each matrix a share of zeros."""
    random = np.random.default_rng(seed)
    model = artifact.edit()
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.ndim > 1:
            array = array + scale * array.std() * random.standard_normal(array.shape).astype(np.float32)
            array = np.where(random.random(array.shape) < zero, np.float32(0), array)
            value.const_value = ir.Tensor(array, name=value.name)
    return artifact.after(model, Step("disturb"))


def samples_of(artifact, items=256, seed=0):
    return Samples([feed(artifact, items=items, seed=seed)])


def learn(student, teacher, folder=None, said=None, **plan):
    data, held = samples_of(teacher), samples_of(teacher, 64, 1)
    plan = Plan(**{"steps": 60, "batch": 32, **plan})
    return distil(student, teacher, data, held, plan, (said if said is not None else []).append, folder, STEP)


def far(teacher, student, seed=2):
    batch = feed(teacher, items=64, seed=seed)
    old, new = outputs(teacher, batch), outputs(student, batch)
    return max(float(np.linalg.norm(new[n] - old[n]) / np.linalg.norm(old[n])) for n in old)


@pytest.mark.parametrize("made", [conv_net, mlp, transformer])
def test_what_was_lost_is_learnt_back(made):
    teacher = made()
    student = disturbed(teacher)
    learnt = learn(student, teacher, steps=150, learning_rate=3e-3 if made is transformer else None)
    onnx.checker.check_model(ir.to_proto(learnt.artifact.model), full_check=True)
    assert learnt.after < 0.5 * learnt.before and 0 < learnt.step <= learnt.steps == 150
    assert far(teacher, learnt.artifact) < 0.8 * far(teacher, student)
    assert learnt.artifact.signature == teacher.signature and learnt.artifact.steps[-1] == STEP


def test_what_is_perfect_already_is_given_back_as_it_is():
    teacher = conv_net()
    learnt = learn(teacher, teacher, steps=10, learning_rate=1.0)
    assert learnt.artifact is teacher and learnt.step == 0
    assert learnt.after == learnt.before < 1e-3


def test_the_same_steps_twice_are_the_same_network():
    teacher = conv_net()
    one, two = (learn(disturbed(teacher), teacher, steps=20) for _ in range(2))
    assert one.artifact.digest() == two.artifact.digest() and one.after == two.after
    assert learn(disturbed(teacher), teacher, steps=20, seed=1).artifact.digest() != one.artifact.digest()


def test_zeros_of_sparse_weights_stay():
    teacher = mlp()
    student = disturbed(teacher, zero=0.5)
    learnt = learn(student, teacher, norms=False, learning_rate=0.01)
    assert learnt.step > 0
    for name, value in student.model.graph.initializers.items():
        before = value.const_value.numpy()
        if before.ndim > 1 and (before == 0).mean() > 0.4:
            after = learnt.artifact.model.graph.initializers[name].const_value.numpy()
            assert (after[before == 0] == 0).all() and (after[before != 0] != before[before != 0]).any()


def test_time_ends_it_and_progress_tells_how_much_is_left():
    teacher, said = mlp(), []
    learnt = learn(disturbed(teacher), teacher, steps=None, seconds=1.0, said=said)
    assert learnt.steps > 1 and 0.9 < learnt.seconds < 5
    assert 4 <= len(said) <= distillation.JUDGED + 1
    assert re.match(r"recover: \d:\d\d left, step \d+, loss ", said[-1])


def test_an_operator_that_torch_lacks_is_named(monkeypatch):
    from perwatt import interpreter

    monkeypatch.setattr(interpreter, "missing_operators", lambda model: ["Strange (opset 23)"])
    with pytest.raises(BackendError, match="learning runs in torch, and the interpreter has no Strange"):
        learn(mlp(), mlp())


def test_a_network_without_weights_has_nothing_to_learn():
    net = build([node("Relu", "x", "y")], "x:float32[batch,2]", "y:float32[batch,2]")
    with pytest.raises(BackendError, match="no weights to learn"):
        learn(net, net)


# What is learnt ---------------------------------------------------------------------------------------------------------


def test_statistics_tables_and_what_was_written_down_are_not_learnt():
    nodes = [
        node("Gather", "table ids", "e"), node("Add", "e positions", "s"), node("MatMul", "s w", "h"),
        node("Add", "h bias", "i"), node("Transpose", "turned", "t", perm=[1, 0]), node("MatMul", "i t", "y"),
    ]  # fmt: skip
    data = {
        "table": weight(9, 4), "positions": weight(1, 6, 4), "w": weight(4, 4, seed=1), "bias": weight(4),
        "turned": weight(3, 4),
    }  # fmt: skip
    net = build(nodes, "ids:int64[batch,6]", "y:float32[batch,6,3]", data)
    assert learnt_names(net.model) == {"w", "bias", "turned"}
    convolutional = conv_net().model
    stored = {value.name for n in convolutional.graph if n.op_type == "BatchNormalization" for value in n.inputs[3:]}
    assert stored and not stored & learnt_names(convolutional)


@pytest.mark.parametrize("items", [64, 65])
def test_one_number_an_item_is_learnt_whatever_the_last_batch_holds(items):
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")]
    teacher = build(nodes, "x:float32[batch,6]", "y:float32[batch,1]", {"w": weight(6, 8), "v": weight(8, 1)})
    data, held = samples_of(teacher), samples_of(teacher, items, 1)
    learnt = distil(disturbed(teacher), teacher, data, held, Plan(steps=60, batch=32), lambda words: None, step=STEP)
    assert learnt.after < 0.5 * learnt.before and learnt.agreement is None


def test_embeddings_are_no_scores():
    rows, noise = (torch.randn(32, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rows = torch.nn.functional.normalize(rows, dim=1)
    answers = Answers(["sentence_embedding"], [[rows]], 4.0, 0.1)
    assert answers.scores is None
    moved = torch.nn.functional.normalize(rows + 0.1 * noise, dim=1)
    assert float(answers.distance([moved], [rows])) > 0.05
    # A softmax would not see what is added to a whole row.
    assert float(answers.distance([rows + 1.0], [rows])) > 1.0


def test_whole_numbers_and_infinities_teach_nothing():
    with pytest.raises(BackendError, match="whole numbers"):
        Answers(["y"], [[torch.arange(6).reshape(2, 3)]], 4.0, 0.1)
    with pytest.raises(BackendError, match="NaN or infinity"):
        Answers(["y"], [[torch.tensor([[1.0, float("nan")]])]], 4.0, 0.1)


def test_a_loss_that_is_not_finite_costs_its_step_and_no_more(monkeypatch):
    teacher = mlp()
    really, calls = distillation.Answers.distance, []

    def now_and_then(self, found, wanted, labels=None):
        calls.append(1)
        loss = really(self, found, wanted, labels)
        return loss * float("nan") if found[0].requires_grad and len(calls) % 7 == 0 else loss

    monkeypatch.setattr(distillation.Answers, "distance", now_and_then)
    learnt = learn(disturbed(teacher), teacher, steps=100)
    assert learnt.after < 0.5 * learnt.before


def test_gates_get_no_normalization(items=17):
    nodes = [
        node("Conv", "x w0 b0", "c", name="/a", pads=[1, 1, 1, 1]), node("GlobalAveragePool", "c", "p"),
        node("Conv", "p w1 b1", "g", name="/gate"), node("Sigmoid", "g", "s"), node("Mul", "c s", "m"),
        node("Conv", "m w2 b2", "y", name="/c"),
    ]  # fmt: skip
    data = {"w0": weight(6, 3, 3, 3), "b0": weight(6), "w1": weight(6, 6, 1, 1), "b1": weight(6, seed=1),
            "w2": weight(4, 6, 1, 1), "b2": weight(4)}  # fmt: skip
    teacher = build(nodes, "x:float32[batch,3,8,8]", "y:float32[batch,4,8,8]", data)
    # The last batch is of one picture.
    samples = samples_of(teacher, items)
    learnt = distil(
        disturbed(teacher), teacher, samples, samples, Plan(steps=20, batch=4), lambda words: None, step=STEP
    )
    assert learnt.after < learnt.before and "1 normalizations put back to learn" in learnt.notes


# Going on ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHECKPOINT_S", 0.0)
    teacher = mlp()
    student = disturbed(teacher)

    class Killed(BaseException):
        pass

    class Ear(list):
        def append(self, text):
            super().append(text)
            if len(self) == 8:
                raise Killed

    with pytest.raises(Killed):
        learn(student, teacher, tmp_path, Ear(), steps=64)
    (state,) = tmp_path.iterdir()
    assert state.suffix == ".pt"
    said = []
    # How much time there is now is another number than it was then.
    learnt = learn(student, teacher, tmp_path, said, steps=64, seconds=77.0)
    assert any(note.startswith("went on at step 2") or note.startswith("went on at step 3") for note in learnt.notes)
    first = int(said[0].split("step ")[1].split(",")[0])
    assert 28 <= first <= 36 and learnt.steps == 64 and learnt.after < learnt.before
    assert not list(tmp_path.iterdir())


def test_state_is_kept_of_networks_with_scalars(tmp_path):
    nodes = [node("MatMul", "x w", "h"), node("Mul", "h s", "y")]
    data = {"w": weight(4, 3), "s": np.float32(2.0)}
    teacher = build(nodes, "x:float32[batch,4]", "y:float32[batch,3]", data)
    made = build(nodes, "x:float32[batch,4]", "y:float32[batch,3]", {**data, "s": np.float32(3.0)})
    works = [distillation._Work(one, two, *(samples_of(one, 8),) * 2, Plan(steps=1, batch=4)).digest()
             for one, two in ((made, teacher), (made, made))]  # fmt: skip
    assert works[0] != works[1]
    assert learn(made, teacher, tmp_path, steps=8).steps == 8 and not list(tmp_path.iterdir())


def test_what_was_learnt_is_kept_when_a_person_stops_it_and_they_are_told(tmp_path):
    teacher = mlp()

    class Ear(list):
        def append(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="what was learnt is kept") as stop:
        learn(disturbed(teacher), teacher, tmp_path, Ear(), steps=64)
    assert "(4 steps)" in str(stop.value)
    learnt = learn(disturbed(teacher), teacher, tmp_path, steps=64)
    assert "went on at step 4, where it had been stopped" in learnt.notes and not list(tmp_path.iterdir())


def test_answers_are_compared_where_they_are_scores():
    teacher = mlp()
    learnt = learn(disturbed(teacher), teacher, steps=150)
    before, after = learnt.agreement
    assert 0 <= before < after <= 1


def test_state_of_something_else_or_a_broken_file_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHECKPOINT_S", 0.0)
    teacher = mlp()
    whole = learn(disturbed(teacher), teacher, steps=8)
    work = distillation._Work(
        disturbed(teacher), teacher, samples_of(teacher), samples_of(teacher, 64, 1), Plan(steps=8, batch=32)
    )
    (tmp_path / f"{work.digest()}.pt").write_bytes(b"broken")
    (tmp_path / "other.pt").write_bytes(b"another's")
    again = learn(disturbed(teacher), teacher, tmp_path, steps=8)
    assert again.artifact.digest() == whole.artifact.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


def test_a_folder_that_nothing_can_be_kept_in_is_told_and_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHECKPOINT_S", 0.0)
    teacher = mlp()
    (tmp_path / "file").write_text("no folder")
    learnt = learn(disturbed(teacher), teacher, tmp_path / "file", steps=60)
    assert learnt.after < learnt.before
    assert sum("can't be kept" in note for note in learnt.notes) == 1


def test_what_was_half_learnt_long_ago_is_removed(tmp_path):
    for name, age in (("old.pt", 30), (".young.pt.1.partial", 1), (".old.pt.1.partial", 30)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age * 86400,) * 2)
    learn(disturbed(mlp()), mlp(), tmp_path, steps=4)
    assert [path.name for path in tmp_path.iterdir()] == [".young.pt.1.partial"]


# Normalization ----------------------------------------------------------------------------------------------------------


def convolutions(bias=True):
    nodes = [
        node("Conv", "x w0 b0" if bias else "x w0", "c0", name="/a", pads=[1, 1, 1, 1]),
        node("Relu", "c0", "r0"),
        node("Conv", "r0 w1", "c1", name="/b", group=6, pads=[1, 1, 1, 1]),
        node("Conv", "c1 w2", "y", name="/c"),
    ]
    weights = {"w0": weight(6, 3, 3, 3), "w1": weight(6, 1, 3, 3, seed=1), "w2": weight(4, 6, 1, 1, seed=2)}
    if bias:
        weights["b0"] = weight(6, seed=3)
    return build(nodes, "x:float32[batch,3,8,8]", "y:float32[batch,4,8,8]", weights)


@pytest.mark.parametrize("bias", [True, False])
def test_normalization_put_back_does_nothing_and_folds_into_the_weights(bias):
    artifact = with_biases(convolutions(bias))
    assert all(len(n.inputs) == 3 for n in artifact.model.graph if n.op_type == "Conv")
    network = Interpreter(artifact.model)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(x)[0]
        norms = put_norms(network, [[x]])
        # The last convolution makes the answer.
        assert len(norms) == 2
        network.eval()
        assert torch.allclose(network(x)[0], before, atol=1e-5)
        for norm in norms:
            norm.module.weight.mul_(torch.linspace(0.5, 2.0, len(norm.module.weight)))
            norm.module.bias.add_(0.1)
        reestimate(network, norms, [[x]])
        changed = network(x)[0]
        assert not torch.allclose(changed, before, atol=1e-2)
        fold_norms(network, norms)
        assert torch.allclose(network(x)[0], changed, atol=1e-5)
    written = network.write_back(artifact, STEP)
    assert np.allclose(outputs(written, {"x": x.numpy()})["y"], changed.numpy(), atol=1e-5)


# Samples ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_gives_every_item_once_with_its_label():
    x, z = np.arange(10, dtype=np.float32).reshape(10, 1), np.arange(10, 14, dtype=np.float32).reshape(4, 1)
    samples = Samples([{"x": x}, {"x": np.repeat(z, 3, axis=1)}], np.arange(14))
    drawn = Drawn(samples, 2, np.random.default_rng(0))
    orders = []
    for _ in range(2):
        seen = []
        for batch, labels in drawn.epoch():
            assert batch["x"][:, 0].tolist() == labels.tolist()
            seen += labels.tolist()
        assert sorted(seen) == list(range(14))
        orders.append(seen)
    assert orders[0] != orders[1]


def directed(sensitive):
    """A net that sees which side is brighter, or only how bright all is."""
    side = np.zeros((2, 3, 16, 16), np.float32)
    side[0, :, :, :8], side[1, :, :, 8:] = 1, 1
    w = side if sensitive else np.stack([np.ones_like(side[0]), -np.ones_like(side[0])])
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "y")]
    return build(nodes, "x:float32[batch,3,16,16]", "y:float32[batch,2]", {"w": w})


@pytest.mark.parametrize(("sensitive", "words"), [(True, "pictures shifted"), (False, "pictures shifted and mirrored")])
def test_pictures_are_mirrored_where_the_teacher_does_not_mind(sensitive, words):
    artifact = directed(sensitive)
    samples = samples_of(artifact, 64)
    augment, notes = augmentation("auto", 0.0, Interpreter(artifact.model), samples)
    assert notes == [words]
    batch, labels = samples.chunks[0], np.arange(64)
    made, same = augment(batch, labels, np.random.default_rng(0))
    made = made["x"]
    assert same is labels
    assert made.shape == batch["x"].shape and not np.array_equal(made, batch["x"])
    # Whatever was moved is still made of the picture's own values.
    assert np.isin(made, batch["x"]).all()
    plain, notes = augmentation("none", 0.5, Interpreter(artifact.model), samples)
    assert notes == [] and plain(batch, labels, np.random.default_rng(0)) == (batch, labels)


@pytest.mark.parametrize("labelled", [True, False])
def test_mixed_pictures_lie_between_two_others_and_have_no_label(labelled):
    artifact = directed(True)
    augment, notes = augmentation("auto", 0.5, Interpreter(artifact.model), samples_of(artifact, 64))
    assert notes == ["pictures shifted and mixed"]
    # Every picture is one number, so that shifting changes nothing.
    levels = np.arange(400, dtype=np.float32)
    batch = {"x": np.broadcast_to(levels[:, None, None, None], (400, 3, 16, 16)).copy()}
    labels = np.arange(400) if labelled else None
    made, names = augment(batch, labels, np.random.default_rng(0))
    flat = made["x"].reshape(400, -1)
    assert made["x"].dtype == np.float32 and np.ptp(flat, axis=1).max() < 1e-3
    mixed = np.abs(flat[:, 0] - levels) > 1e-3
    assert 0.4 < mixed.mean() < 0.6 and flat.min() >= 0 and flat.max() <= 399
    if labelled:
        assert (names[~mixed] == levels[~mixed]).mean() > 0.98 and (names[mixed] == UNLABELLED).all()
        assert set(names[names != levels]) == {UNLABELLED}
    else:
        assert names is None


def test_labels_of_mixed_pictures_count_for_nothing():
    scores = torch.randn(4, 3, requires_grad=True)
    none = torch.full((4,), UNLABELLED)
    assert cross_entropy(scores, none) == 0
    some = torch.tensor([2, UNLABELLED, 0, UNLABELLED])
    wanted = torch.nn.functional.cross_entropy(scores[[0, 2]], some[[0, 2]], reduction="sum") / 4
    assert torch.isclose(cross_entropy(scores, some), wanted)


def test_what_is_no_picture_is_left_as_it_is():
    artifact = mlp()
    samples = samples_of(artifact, 16)
    augment, notes = augmentation("auto", 0.5, Interpreter(artifact.model), samples)
    made, _ = augment(samples.chunks[0], None, np.random.default_rng(0))
    assert notes == [] and made is samples.chunks[0]


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_bytes_are_pictures_too(kind):
    side = np.zeros((2, 3, 16, 16), np.float32)
    side[0, :, :, :8], side[1, :, :, 8:] = 1, 1
    nodes = [node("Cast", "x", "f", to=1), node("Conv", "f w", "c"), node("Flatten", "c", "y")]
    artifact = build(nodes, f"x:{np.dtype(kind)}[batch,3,16,16]", "y:float32[batch,2]", {"w": side})
    levels = np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16)).astype(kind)
    augment, notes = augmentation("auto", 1.0, Interpreter(artifact.model), Samples([{"x": levels}]))
    made, _ = augment({"x": levels}, None, np.random.default_rng(0))
    assert notes == ["pictures shifted and mixed"] and made["x"].dtype == kind
    # Between the two that were mixed, and not around the corner of 255.
    assert abs(float(made["x"].mean()) - float(levels.mean())) < 4 and made["x"].std() < 0.95 * levels.std()


def test_a_student_that_fixes_its_batch_learns_in_batches_all_the_same():
    teacher = conv_net(batch=1)
    student = disturbed(teacher)
    rows = np.random.default_rng(0).standard_normal((256, 3, 8, 8)).astype(np.float32)
    data, held = Samples([{"x": rows[:192]}]), Samples([{"x": rows[192:]}])
    learnt = distil(student, teacher, data, held, Plan(steps=60, batch=32), lambda words: None, step=STEP)
    assert learnt.after < 0.7 * learnt.before
    assert learnt.artifact.signature == teacher.signature
    learnt_graph = [(one.op_type, [v.name for v in one.outputs]) for one in learnt.artifact.model.graph]
    assert learnt_graph == [(one.op_type, [v.name for v in one.outputs]) for one in student.model.graph]


def test_a_fixed_batch_whose_items_depend_on_each_other_is_refused():
    nodes = [node("MatMul", "x w", "a"), node("ReduceMean", "a axes", "m", keepdims=1), node("Sub", "a m", "y")]
    parts = {"w": weight(6, 5), "axes": np.array([0])}
    teacher = build(nodes, "x:float32[2,6]", "y:float32[2,5]", parts)
    rows = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    with pytest.raises(BackendError, match="fixes its batch at 2"):
        distil(disturbed(teacher), teacher, *[Samples([{"x": rows}])] * 2, Plan(steps=1), lambda words: None)


def test_pictures_with_channels_last_are_moved_along_their_sides():
    turned = [node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Conv", "t w", "c"), node("Flatten", "c", "y")]
    artifact = build(turned, "x:float32[batch,16,16,3]", "y:float32[batch,2]", {"w": weight(2, 3, 16, 16)})
    augment, notes = augmentation("auto", 0.0, Interpreter(artifact.model), samples_of(artifact, 64))
    assert notes[0].startswith("pictures shifted")
    # Channels are numbers of their own, so that none may get among the others.
    batch = {"x": np.broadcast_to(np.arange(3, dtype=np.float32), (64, 16, 16, 3)).copy()}
    batch["x"] += 10 * np.arange(16, dtype=np.float32)[:, None, None]
    made = augment(batch, None, np.random.default_rng(0))[0]["x"]
    assert made.shape == batch["x"].shape and not np.array_equal(made, batch["x"])
    assert (made % 10 == np.arange(3)).all()


def softmaxed(artifact):
    model = artifact.edit()
    graph = model.graph
    last = graph.outputs[0]
    made = ir.node("Softmax", [last], {"axis": 1})
    graph.append(made)
    made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = "shares", last.shape, last.type
    graph.outputs[0] = made.outputs[0]
    return Artifact(model=model)


def test_a_teacher_that_answers_shares_teaches_as_one_that_answers_scores():
    teacher = mlp()
    student = disturbed(teacher)
    plain, shares = learn(student, teacher), learn(softmaxed(student), softmaxed(teacher))
    assert shares.before == pytest.approx(plain.before, rel=1e-3)
    assert shares.after == pytest.approx(plain.after, rel=0.05)


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_scores_of_any_size_teach_alike(factor):
    teacher = mlp()
    last = teacher.model.graph.outputs[0].producer()
    model = teacher.edit()
    for value in last.inputs[1:]:
        weights = model.graph.initializers[value.name]
        weights.const_value = ir.Tensor(weights.const_value.numpy() * np.float32(30 * factor), name=value.name)
    teacher = Artifact(model=model)
    learnt = learn(disturbed(teacher), teacher)
    assert 0 < learnt.before < 100 and learnt.after < learnt.before
