"""Parts of the suite `fusion.py` that decide what it says: counting nodes, holding graphs against bars, telling ratios.

What it measures is not checked here. Suites are scripts with a `models` module of their own, which is not the tests'.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import feed, transformer

from perwatt.contract import Capabilities
from perwatt.measurement import Ratio

SUITES = Path(__file__).resolve().parents[2] / "bench" / "suites"


# Counting -------------------------------------------------------------------------------------------------------------


def with_function_and_branch(path):
    """x → a function of two nodes → If with one node in a branch and an Identity in the other."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    value = helper.make_tensor_value_info
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    twice = helper.make_function("own", "Twice", ["a"], ["c"], body, [helper.make_opsetid("", 20)])
    branches = {
        f"{word}_branch": helper.make_graph(
            [helper.make_node(kind, ["y"], [word])], word, [], [value(word, floats, [2])]
        )
        for word, kind in (("then", "Exp"), ("else", "Identity"))
    }
    nodes = [
        helper.make_node("Twice", ["x"], ["y"], domain="own"),
        helper.make_node("Constant", [], ["yes"], value=onnx.numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["z"], **branches),
        helper.make_node("FastGelu", ["z"], ["out"], domain="com.microsoft"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", floats, [2])], [value("out", floats, [2])])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("own", 1), ("com.microsoft", 1))]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=10), path)
    return path


def test_nodes_of_functions_and_branches_count_and_constants_and_identities_do_not(suite, tmp_path):
    found = suite("_fusion_counts").operators(with_function_and_branch(tmp_path / "m.onnx"))
    assert found == {"Relu": 1, "Neg": 1, "If": 1, "Exp": 1, "com.microsoft:FastGelu": 1}


def test_operators_are_added_up_where_the_architecture_names_several(suite):
    compared = suite("_fusion_counts").compared
    has = {"MatMul|Gemm": 5, "Erf": 0}
    assert compared(has, {"MatMul": 3, "Gemm": 2, "Add": 9}) == {
        "MatMul|Gemm": {"wanted": 5, "found": 5},
        "Erf": {"wanted": 0, "found": 0},
    }


def test_the_newest_operators_are_those_of_the_standard_since_opset_23(suite):
    newest = suite("_fusion_counts").newest().operators
    assert {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish"} <= set(newest)
    # GridSample and Cast have newer versions too, but not their first.
    assert not {"Gelu", "LayerNormalization", "Cast", "GroupNormalization"} & set(newest)


def test_passes_are_those_that_clean_and_fuse_and_every_one_is_proved(suite, tmp_path):
    counts = suite("_fusion_counts")
    passes = counts.fusing_passes()
    assert {made.stage.name for made in passes} == {"CLEAN", "FUSE"}
    artifact = transformer()
    after, rows = counts.pipeline(artifact, feed(artifact), tmp_path).for_target(Capabilities()).run(artifact, passes)
    assert [row.name for row in rows] == [made.name() for made in passes]
    assert all(row.drift for row in rows if row.status == "applied")
    assert counts.total(counts.operators(after.file(tmp_path))) <= counts.total(
        counts.operators(artifact.file(tmp_path))
    )


# Bars -----------------------------------------------------------------------------------------------------------------


def graph_told(ours, slim, script, tools, session, status="applied", gelus=12):
    """What `count_graph` tells, with these numbers of nodes."""
    form = {"operators": {"Add": ours}, "as_run": {"Add": ours}, "passes": {}}
    rolled = {"fuse-gelu": {"status": status, "reason": "moved too far", "changes": ["12 Gelu | put together"]}}
    return {
        "original": {"Add": 100},
        "rivals": {
            "onnxslim": {"operators": {"Add": slim}, "in_pieces": {"Add": slim}} if slim else {"failed": "ImportError"},
            "onnxscript": {"operators": {"Add": script}, "in_pieces": {"Add": script}},
            "transformer-optimizer": {"operators": {"Add": tools + 5}, "as_run": {"Add": tools}},
            "session": {"operators": {"Add": session}},
        },
        "ours": {
            **{name: form for name in ("standard", "openvino", "onnxruntime")},
            "newest": {**form, "passes": rolled},
        },
        "has": {"Gelu": {"wanted": 12, "found": gelus}},
    }


def test_ours_may_have_no_more_nodes_than_the_best_of_the_others_in_each_form(suite):
    verdicts = suite("_fusion_counts").verdicts
    assert all(holds for _, holds in verdicts("bert", graph_told(50, 60, 50, 50, 55)))
    missed = [line for line, holds in verdicts("bert", graph_told(50, 60, 49, 50, 55)) if not holds]
    assert missed == ["bert, standard: 50 nodes, onnxscript 49", "bert, openvino: 50 nodes, onnxscript 49"]
    missed = [line for line, holds in verdicts("bert", graph_told(50, 60, 70, 80, 40)) if not holds]
    assert missed == ["bert, onnxruntime: 50 nodes, session 40"]


def test_a_rival_that_failed_is_none(suite):
    told = graph_told(50, None, 60, 60, 60)
    counts = suite("_fusion_counts")
    assert counts.rival_nodes(told, "standard") == {"onnxscript": 60}
    assert "| failed, 0 |" in counts.table({"bert": told})


def test_in_openvinos_form_what_it_wants_in_pieces_counts_as_pieces_on_both_sides(suite):
    told = graph_told(50, 60, 40, 60, 60)
    told["ours"]["standard"] = {**told["ours"]["standard"], "operators": {"Add": 38}}
    told["rivals"]["onnxscript"]["in_pieces"] = {"Add": 55}
    verdicts = dict(suite("_fusion_counts").verdicts("bert", told))
    assert verdicts["bert, openvino: 50 nodes, onnxscript 55"]
    assert verdicts["bert, standard: 38 nodes, onnxscript 40"]


def test_a_missing_match_and_a_pass_rolled_back_are_missed_bars(suite):
    told = graph_told(50, 60, 60, 60, 60, status="rolled-back", gelus=11)
    missed = [line for line, holds in suite("_fusion_counts").verdicts("bert", told) if not holds]
    assert missed == ["bert: Gelu 11, the architecture has 12", "bert: fuse-gelu rolled back: moved too far"]


def test_tables_have_as_many_cells_in_each_row(suite):
    counts = suite("_fusion_counts")
    for table in (counts.table, counts.matches):
        lines = table({"bert": graph_told(50, 60, 60, 60, 60)}).split("\n")
        assert {line.count("|") for line in lines} == {lines[0].count("|")}


@pytest.mark.parametrize(
    ("value", "low", "high", "holds"),
    [
        (0.9, 0.8, 1.0, True),
        (1.01, 0.995, 1.025, True),  # 1 lies within, and the noise is small
        (1.05, 0.9, 1.2, False),  # so wide that it says nothing
        (1.02, 1.01, 1.03, False),
        (None, None, None, False),
    ],
)
def test_at_least_as_fast_is_told_within_noise(suite, value, low, high, holds):
    assert suite("_fusion_speed").not_slower(Ratio(value, low, high)) is holds


def test_every_side_has_a_window_in_each_round(suite):
    calls = []

    def window(side, cost):
        return lambda: calls.append(side) or cost

    found = suite("_fusion_speed").interleaved({"ours": window("ours", 1.0), "direct": window("direct", 2.0)}, 5)
    assert found == {"ours": [1.0] * 5, "direct": [2.0] * 5}
    assert all(set(calls[2 * n : 2 * n + 2]) == {"ours", "direct"} for n in range(5))


def place(model, value, high=None):
    ratio = {"value": value, "low": value - 0.05, "high": high or value + 0.05}
    return {"model": model, "side": "openvino:f32", "nodes": 12, "in_default": True, "with_to_without": ratio}


def test_a_pass_pays_where_its_interval_ends_below_one(suite):
    speed = suite("_fusion_speed")
    assert speed.pays({"screened": [], "best": place("bert", 0.9)})
    assert not speed.pays({"screened": [], "best": place("bert", 0.98)})
    assert not speed.pays({"screened": [], "best": None})


def test_the_table_of_passes_has_as_many_cells_in_each_row(suite):
    known = {"fuse-gelu": {"screened": [], "best": place("bert", 0.9)}, "fuse-mish": {"screened": [], "best": None}}
    lines = suite("_fusion_speed").patterns_table(known).split("\n")
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_longer_look_is_taken_where_a_place_promises_more_than_the_best(suite, monkeypatch):
    speed = suite("_fusion_speed")
    looks = []

    def ratio_of(mine, other, effort):
        looks.append(effort)
        return Ratio(mine, mine - 0.01, mine + 0.01)

    monkeypatch.setattr(speed, "ratio_of", ratio_of)
    entries = {"screened": [], "best": None}
    for value in (0.9, 0.95, 0.8):
        speed.look_closer(entries, {"model": f"{value}"}, (value, None), speed.Effort(12, 1.0))
    assert [effort.rounds for effort in looks] == [4, 12, 4, 4, 12]
    assert entries["best"]["model"] == "0.8"
    assert [entry["model"] for entry in entries["screened"]] == ["0.9", "0.95", "0.8"]


def test_places_of_models_that_run_again_are_forgotten(suite):
    kept = {
        "patterns": {"fuse-gelu": {"screened": [place("bert", 0.7), place("vit", 0.8)], "best": place("bert", 0.7)}}
    }
    suite("fusion").forget(kept, ["bert"])
    assert kept["patterns"]["fuse-gelu"]["best"]["model"] == "vit"
    suite("fusion").forget(kept, ["vit"])
    assert kept["patterns"]["fuse-gelu"] == {"screened": [], "best": None}


# Models ---------------------------------------------------------------------------------------------------------------


def test_parameters_that_are_all_alike_are_moved(suite):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    weight = net[0].weight.clone()
    with torch.no_grad():
        suite("fusion_models").roughen(net)
    assert torch.equal(net[0].weight, weight)
    assert net[1].weight.unique().numel() == 4
    assert net[1].bias.unique().numel() == 4


def test_an_unknown_model_names_the_known_ones():
    done = subprocess.run(
        [sys.executable, str(SUITES / "fusion.py"), "--models", "vgg"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "known are bert-base" in done.stderr


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_each_pass_finds_what_it_looks_for_in_the_graph_that_it_is_measured_on(suite, tmp_path, target):
    module, counts = suite("_fusion_alone"), suite("_fusion_counts")
    for made, (inputs, form) in module.cases().items():
        graph = suite("_fusion_forms").Graph()
        path = graph.save(inputs, form(graph), tmp_path / f"{made}.onnx")
        after = module.after(made, path, target, tmp_path)
        assert counts.operators(after) != counts.operators(path), made
