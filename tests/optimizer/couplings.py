"""Nets for the tests of couplings and slicing, and the proof that a cut does what it promises.

    net = Net()
    x = net.feed("x", "batch", 3, 6, 6)
    h = net.conv("a", x, 3, 8)
    h = net.conv("b", net.put("Relu", h), 8, 4)
    coupling, after = proven(net.built(h))

Cutting units gives what zero weights give wherever those units are read, with smaller weights.
"""

import numpy as np
import onnx
import onnx_ir as ir
from models import feed, node, outputs, proto, weight

from perwatt.artifact import Artifact, Step
from perwatt.coupling import couple
from perwatt.slicing import cut

WIDTH = 8
"""Channels that product `a` makes."""


class Net:
    """A graph put together node by node; values are called t1, t2, …, products as they are asked to be."""

    def __init__(self, opset=23, dtype="float32"):
        self.nodes, self.weights, self.inputs, self.opset, self.dtype = [], {}, [], opset, dtype
        self.seed = 0

    def feed(self, name, *shape, dtype=None):
        """An input."""
        self.inputs.append(f"{name}:{dtype or self.dtype}[{','.join(map(str, shape))}]")
        return name

    def put(self, operator, *inputs, outputs=1, name=None, **attributes):
        """A node; its output, or a list of several. None is an input left out."""
        made = [f"t{len(self.nodes) + 1}" + (f"_{number}" if number else "") for number in range(outputs)]
        words = " ".join("-" if one is None else one for one in inputs)
        self.nodes.append(
            node(operator, words, " ".join(made), name=name or f"/{operator}{len(self.nodes)}", **attributes)
        )
        return made[0] if outputs == 1 else made

    def keep(self, array, name=None):
        """A stored tensor."""
        array = np.asarray(array)
        name = name or f"w{len(self.weights)}"
        self.weights[name] = array.astype(self.dtype) if array.dtype.kind == "f" and self.dtype != "float32" else array
        return name

    def noise(self, *shape, positive=False):
        """A stored tensor of noise, other than the ones before."""
        self.seed += 1
        array = weight(*shape, seed=self.seed)
        return self.keep(np.abs(array) + np.float32(0.5) if positive else array)

    def conv(self, name, x, ins, outs, kernel=1, group=1, bias=False, **attributes):
        """A convolution that keeps the size."""
        attributes = {"group": group, "pads": [kernel // 2] * 4} | attributes
        extra = [self.noise(outs)] if bias else []
        return self.put("Conv", x, self.noise(outs, ins // group, kernel, kernel), *extra, name=name, **attributes)

    def linear(self, name, x, ins, outs, bias=False):
        """x · W, with a bias added."""
        h = self.put("MatMul", x, self.noise(ins, outs), name=name)
        return self.put("Add", h, self.noise(outs)) if bias else h

    def gemm(self, name, x, ins, outs):
        """A fully connected layer as exporters write it."""
        return self.put("Gemm", x, self.noise(outs, ins), self.noise(outs), name=name, transB=1)

    def norm(self, x, channels, **attributes):
        """A batch normalization."""
        parameters = [self.noise(channels, positive=True) for _ in range(4)]
        return self.put("BatchNormalization", x, *parameters, **attributes)

    def built(self, *outs):
        """The artifact, with the shapes that ONNX infers; outputs as names, or typed (`y:float32[2,4]`)."""
        specs = [one if ":" in one else f"{one}:{self.dtype}" for one in outs]
        made = proto(self.nodes, " ".join(self.inputs), " ".join(specs), self.weights, opset=self.opset)
        made = onnx.shape_inference.infer_shapes(made, data_prop=True)
        onnx.checker.check_model(made)
        return Artifact(model=ir.from_proto(made))


def described(coupling):
    """{name: (size, makers, readers)} of the groups, names of nodes in alphabetical order, separated by spaces. Further groups
    of the same product are called a', a'' and so on."""
    found = {}
    for group in coupling.groups:
        name = group.name
        while name in found:
            name += "'"
        sides = (" ".join(sorted(p.node for p in side)) for side in (group.makers, group.readers))
        found[name] = (group.size, *sides)
    return found


def reasons(coupling):
    """{name: reason} of what is left; several of one name follow each other."""
    found = {}
    for left in coupling.left:
        found[left.name] = f"{found[left.name]}; {left.reason}" if left.name in found else left.reason
    return found


def chosen(coupling, share=0.4, seed=0):
    """Some units of every group of more than one, at random: at least one, never all."""
    random = np.random.default_rng(seed)
    counts = {group: min(group.size - 1, max(1, round(group.size * share))) for group in coupling.groups}
    return {group: sorted(random.choice(group.size, many, replace=False)) for group, many in counts.items() if many}


def cut_of(artifact, coupling, units):
    """The artifact without these units."""
    return artifact.after(cut(artifact, coupling, units), Step("cut"))


def stored_values(graph):
    """{name: array}, of initializers and of Constant nodes."""
    found = {name: v.const_value.numpy() for name, v in graph.initializers.items()}
    for each in graph:
        if each.op_type == "Constant":
            found[each.outputs[0].name] = ir.convenience.get_const_tensor(each.outputs[0]).numpy()
    return found


def zeroed(artifact, units):
    """The artifact with zeros for the weights that read these units."""
    model = artifact.edit()
    makers = {each.outputs[0].name: each for each in model.graph if each.op_type == "Constant"}
    for group, which in units.items():
        for product in group.readers:
            name, axis = product.read
            array = np.moveaxis(stored_values(model.graph)[name].copy(), axis, 0)
            array[group.positions(name, axis)[which].reshape(-1)] = 0
            tensor = ir.tensor(np.ascontiguousarray(np.moveaxis(array, 0, axis)), name=name)
            if name in makers:
                makers[name].attributes["value"] = ir.AttrTensor("value", tensor)
            else:
                model.graph.initializers[name].const_value = tensor
    return artifact.after(model, Step("zeroed"))


def consistent(artifact, coupling):
    """What is promised of every coupling: nothing is in two groups, and what is named is there."""
    graph = artifact.model.graph
    nodes, arrays = {each.name: each for each in graph}, stored_values(graph)
    seen = set()
    for group in coupling.groups:
        assert group.size >= 1 and group.makers and group.readers
        assert group.name == group.makers[0].node
        for place, positions in group.along().items():
            assert positions.shape[0] == group.size and positions.shape[1] >= 1
            flat = positions.reshape(-1).tolist()
            assert min(flat) >= 0 and max(flat) < coupling.lengths()[place]
            entries = {(place, position) for position in flat}
            assert len(entries) == len(flat) and not entries & seen
            seen |= entries
        for side, place in (("makers", "made"), ("readers", "read")):
            for product in getattr(group, side):
                assert nodes[product.node].op_type == product.kind
                name, axis = getattr(product, place)
                assert name == product.weight and 0 <= axis < arrays[name].ndim
                assert group.positions(name, axis) is not None
    for left in coupling.left:
        assert left.name in nodes and left.size >= 1 and left.reason


def proven(artifact, share=0.4, seed=0, tolerance=1e-5, moves=True, fed=None, units=None, **sizes):
    """(coupling, the artifact without some units): valid, with the same interface and smaller weights, and equal in what it
    gives to one in which nobody reads those units. `moves`: whether those units matter at all, so that this says something."""
    coupling = couple(artifact)
    consistent(artifact, coupling)
    digest = artifact.digest()
    units = chosen(coupling, share, seed) if units is None else units(coupling)
    after = cut_of(artifact, coupling, units)
    assert Artifact(model=artifact.model).digest() == digest, "the model that was given has changed"
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature
    arrays, old = stored_values(after.model.graph), stored_values(artifact.model.graph)
    gone = {}
    for group, which in units.items():
        for product in (*group.makers, *group.readers):
            for name, axis in (product.made, product.read):
                at = group.positions(name, axis)
                if at is not None:
                    gone.setdefault((name, axis), set()).update(at[which].reshape(-1).tolist())
    for (name, axis), lost in gone.items():
        assert arrays[name].shape[axis] == old[name].shape[axis] - len(lost), f"{name} is as large as it was"
        assert arrays[name].dtype == old[name].dtype
    fed = fed or feed(artifact, items=2, **sizes)
    found, wanted, before = (outputs(one, fed) for one in (after, zeroed(artifact, units), artifact))
    for name, array in wanted.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        size = float(np.abs(array).max()) if array.size else 1.0
        np.testing.assert_allclose(found[name], array, atol=tolerance * max(size, 1e-6), rtol=0)
    if units and moves:
        assert any(not np.allclose(wanted[name], before[name], atol=1e-4) for name in wanted), (
            "nothing was cut that counts"
        )
    return coupling, after


def left_whole(artifact, *words, fed=None, **sizes):
    """The coupling of a model in which there is nothing to cut, for reasons in which these words are."""
    coupling, _ = proven(artifact, moves=False, fed=fed, **sizes)
    assert coupling.groups == []
    told = [left.reason for left in coupling.left]
    for word in words:
        assert any(word in reason for reason in told), f"{word!r} is no reason among {told}"
    return coupling


def between(operator, outs=WIDTH, opset=23, side=6, dtype="float32", **options):
    """(coupling, after) of convolution a → what `operator(net, h)` makes, of `outs` channels → convolution b."""
    net = Net(opset, dtype)
    h = net.conv("a", net.feed("x", "batch", 3, side, side), 3, WIDTH, bias=True)
    return proven(net.built(net.conv("b", operator(net, h), outs, 4)), **options)


def in_sequence(operator, outs=WIDTH, opset=23, width=WIDTH, ins=6, words=5, **options):
    """The same of linear layers on [batch, words, …]."""
    net = Net(opset)
    h = net.linear("a", net.feed("x", "batch", words, ins), ins, width, bias=True)
    return proven(net.built(net.linear("b", operator(net, h), outs, 4)), **options)
