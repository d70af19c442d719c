"""`flatten-attention`: transpositions and Reshapes around an Attention, and what has to stay."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, run_twice

from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.flatten_attention import FlattenAttention

S, T = 5, 7


def net(heads=4, kv=2, depth=8, width=6, rotary="", mask=False, causal=0, split="reshape", end="merge"):
    """Projections on three axes, an Attention on four, and back; `rotary`: which of q and k are turned."""
    nodes, inner, inputs, weights = [], [], [], {"qh": np.int64([0, 0, heads, depth])}
    weights |= {
        "kh": np.int64([0, 0, kv, depth]),
        "vh": np.int64([0, 0, kv, width]),
        "back": np.int64([0, 0, heads * width]),
    }
    for name, length, count, size in (("q", S, heads, depth), ("k", T, kv, depth), ("v", T, kv, width)):
        four, turned = f"batch,{length},{count},{size}", f"batch,{count},{length},{size}"
        if split == "reshape":
            inputs.append(f"{name}:float32[batch,{length},{count * size}]")
            nodes.append(node("Reshape", f"{name} {name}h", f"{name}4"))
        else:
            inputs.append(f"{name}:float32[{four}]")
            nodes.append(node("Neg", name, f"{name}4"))
        nodes.append(node("Transpose", f"{name}4", f"{name}t", perm=[0, 2, 1, 3]))
        inner += [f"{name}4:float32[{four}]", f"{name}t:float32[{turned}]"]
        if name in rotary:
            inputs.append(f"{name}cos:float32[batch,{length},{size // 2}]")
            nodes.append(node("RotaryEmbedding", f"{name}t {name}cos {name}cos", f"{name}r"))
            inner.append(f"{name}r:float32[{turned}]")
    inputs += [f"bias:float32[batch,1,{S},{T}]"] if mask else []
    q, k = ("qr" if "q" in rotary else "qt"), ("kr" if "k" in rotary else "kt")
    given_to = f"{q} {k} vt bias" if mask else f"{q} {k} vt"
    nodes += [node("Attention", given_to, "a", is_causal=causal), node("Transpose", "a", "at", perm=[0, 2, 1, 3])]
    inner += [f"a:float32[batch,{heads},{S},{width}]", f"at:float32[batch,{S},{heads},{width}]"]
    if end == "rows":
        weights["back"] = np.int64([-1, heads * width])
    shape = f"batch,{S},{heads * width}" if end == "merge" else f"rows,{heads * width}"
    nodes.append(node("Reshape", "at back", "y"))
    used = {name: array for name, array in weights.items() if any(name in each.input for each in nodes)}
    return build(nodes, " ".join(inputs), f"y:float32[{shape}]", used, inner=" ".join(inner))


def flat(artifact):
    after, changes = run_twice(FlattenAttention(), artifact)
    assert changes == ["1 attentions without their transpositions"]
    for items in (1, 3):
        batch = feed(artifact, items)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FlattenAttention.tolerance).reasons
    return after, changes


def left(artifact, reason):
    after, changes = run_twice(FlattenAttention(), artifact)
    assert after is artifact
    assert changes == ([f"1 left: {reason}"] if reason else [])


def test_the_form_of_transformers(golden_pass):
    before = net()
    after, changes = flat(before)
    golden_pass("flatten_attention", before, after, changes)
    assert after.operator_counts() == {"Attention": 1}


@given(
    heads=st.sampled_from([2, 4]), kv=st.sampled_from([1, 2]), depth=st.sampled_from([2, 8]), width=st.sampled_from([3, 8]),
    mask=st.booleans(), causal=st.sampled_from([0, 1]), split=st.sampled_from(["reshape", "other"]),
    rotary=st.sampled_from(["", "qk", "q"]),
)  # fmt: skip
def test_heads_masks_and_rotary_embeddings(heads, kv, depth, width, mask, causal, split, rotary):
    after, _ = flat(net(heads, kv, depth, width, rotary, mask, causal, split))
    counts = after.operator_counts()
    assert "Transpose" not in counts
    assert counts.get("RotaryEmbedding", 0) == len(rotary)
    assert counts.get("Reshape", 0) == (0 if split == "reshape" else 3)


def test_a_result_in_rows():
    assert flat(net(end="rows"))[0].operator_counts() == {"Attention": 1, "Reshape": 1}


def test_operands_of_another_origin_stay():
    nodes = [
        node("Attention", "q k v", "a"),
        node("Transpose", "a", "t", perm=[0, 2, 1, 3]),
        node("Reshape", "t back", "y"),
    ]
    inputs = "q:float32[batch,4,5,8] k:float32[batch,4,7,8] v:float32[batch,4,7,8]"
    inner = "a:float32[batch,4,5,8] t:float32[batch,5,4,8]"
    before = build(nodes, inputs, "y:float32[batch,5,32]", {"back": np.int64([0, 0, 32])}, inner=inner)
    left(before, "its queries, keys and values don't all come from a transposition")


def test_heads_that_are_not_merged_stay():
    nodes = [node("Attention", "q k v", "a"), node("Transpose", "a", "t", perm=[0, 2, 1, 3]), node("Relu", "t", "y")]
    inputs = "q:float32[batch,4,5,8] k:float32[batch,4,7,8] v:float32[batch,4,7,8]"
    left(build(nodes, inputs, "y:float32[batch,5,4,8]", inner="a:float32[batch,4,5,8]"), None)


def test_a_rotary_embedding_that_others_use_stays():
    before = net(rotary="q")
    graph = before.edit()
    turned = next(each for each in graph.graph if each.op_type == "RotaryEmbedding").outputs[0]
    turned.name = "turned"
    graph.graph.outputs.append(turned)
    from perwatt.artifact import Artifact

    left(Artifact(model=graph), "its queries, keys and values don't all come from a transposition")


def test_unknown_heads_stay():
    nodes = [
        node("Relu", "q", "q1"), node("Attention", "q1 q1 q1", "a"), node("Transpose", "a", "t", perm=[0, 2, 1, 3]),
        node("Reshape", "t back", "y"),
    ]  # fmt: skip
    before = build(nodes, "q:float32[batch,4,5,8]", "y:float32[batch,5,32]", {"back": np.int64([0, 0, 32])})
    left(before, "the heads of its queries, keys and values aren't known")


def test_only_for_backends_that_have_it():
    assert ask(FlattenAttention(), net()) == ["this backend does not run Attention as one operator"]
    able = replace(context(), capabilities=Capabilities(operators=("Attention",)))
    assert ask(FlattenAttention(), net(), able) == []
