"""The registry: a file is a pass, settings are checked, the default orders itself, the schema says the same."""

import re
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
from jsonschema import Draft202012Validator

from perwatt import catalogue, passes, registry, targets
from perwatt.contract import Pass, Stage, Target
from perwatt.errors import InputError, PerwattError
from perwatt.passes.quantize_int8 import QuantizeInt8
from perwatt.recipe import OneOf, PassStep, parse

CLEAN = [
    "free-batch", "fold-shapes", "fold-constants", "common-subexpression", "remove-dead", "decompose-einsum",
    "simplify-arithmetic", "cancel-casts", "cancel-transposes", "move-transposes", "unflatten-gemm", "cancel-reshapes",
]  # fmt: skip
TIDY = ["cancel-reshapes", "common-subexpression", "remove-dead"]
"""What runs once more after fusing."""
PRECISION = ("cast-half", "quantize-fp8", *("quantize-int8",) * 3, "assign-precision")
NOT_BY_DEFAULT = ["merge-convolutions", "merge-projections"]


def fuse():
    """The names of all passes that fuse by default, in their order."""
    names = plain(registry.default_steps())
    return names[len(CLEAN) : -len(TIDY) - 1]


def plain(steps):
    """Steps as names; alternatives as a tuple of names."""
    return [tuple(s.name for s in step.steps) if isinstance(step, OneOf) else step.name for step in steps]


def fake(name, stage=Stage.CLEAN, after=(), in_default=True, also_after=None):
    """A class that says no more of itself than the registry asks."""
    return SimpleNamespace(
        name=name, stage=stage, after=after, in_default=in_default, also_after=also_after, variants=({},)
    )


@pytest.fixture
def only(monkeypatch):
    """`only(fake(…), …)`: these are all passes there are."""

    def install(*classes):
        known = {cls.name: cls for cls in classes}
        monkeypatch.setattr(registry, "names", lambda kind: sorted(known))
        monkeypatch.setattr(registry, "pass_class", known.__getitem__)

    return install


@pytest.fixture
def entries(monkeypatch):
    """`entries(EntryPoint, …)`: what other packages bring; forgotten again afterwards."""

    def install(*found):
        monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in found if e.group == group])
        registry._found.cache_clear()

    yield install
    monkeypatch.undo()
    registry._found.cache_clear()


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "package"), [("passes", passes), ("targets", targets)])
def test_every_file_without_an_underscore_is_one(kind, package):
    files = {
        path.stem.replace("_", "-") for path in Path(package.__path__[0]).glob("*.py") if not path.stem.startswith("_")
    }
    assert set(registry.names(kind)) == files


def test_what_is_shipped_is_there_and_bears_its_file_s_name():
    assert {*CLEAN, *PRECISION, *NOT_BY_DEFAULT, "fold-batchnorm", "fuse-gelu"} <= set(registry.names("passes"))
    assert {"null", "openvino"} <= set(registry.names("targets"))
    for name in registry.names("passes"):
        cls = registry.pass_class(name)
        assert issubclass(cls, Pass) and cls.name() == name
    for name in registry.names("targets"):
        found = registry.target(name)
        assert isinstance(found, Target) and found.name() == name


def test_an_alias_stands_for_all_that_serve_it_best_liked_first_and_slow_ones_last():
    assert registry.serving("cpu") == ["openvino", "onnxruntime", "inductor"]
    assert registry.serving("gpu")[0] == "tensorrt" and registry.serving("gpu")[-1] == "inductor:cuda"
    assert {"onnxruntime:cuda", "openvino:gpu"} <= set(registry.serving("gpu"))
    assert registry.serving("null") == ["null"]


def test_a_variant_stands_behind_a_colon_and_an_unknown_one_lists_those_there_are():
    found = registry.target("onnxruntime:cuda")
    assert (found.name(), found.variant, found.full_name, found.device) == (
        "onnxruntime",
        "cuda",
        "onnxruntime:cuda",
        "gpu",
    )
    assert registry.target("onnxruntime").full_name == "onnxruntime"
    with pytest.raises(InputError, match=r"inductor has no variant 'metal': known are inductor, inductor:cuda"):
        registry.target("inductor:metal")


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(InputError, match="unknown pass 'quantise-int8': did you mean quantize-int8"):
        registry.pass_class("quantise-int8")
    with pytest.raises(InputError, match="unknown target 'openvin': did you mean openvino"):
        registry.target("openvin")
    with pytest.raises(
        InputError, match=r"unknown target 'xyzzy': known are cpu, gpu, inductor, null, onnxruntime, openvino, tensorrt"
    ):
        registry.target("xyzzy")


THEIRS = """
from dataclasses import dataclass
from perwatt.contract import Pass, Stage

@dataclass(frozen=True)
class Theirs(Pass):
    \"\"\"No settings.\"\"\"

    stage = Stage.CLEAN
    in_default = True

    def run(self, artifact, context):
        return artifact, []
"""


def test_third_parties_bring_theirs_by_entry_points(entries, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    entries(EntryPoint("theirs", "theirs:Theirs", "perwatt.passes"))
    assert "theirs" in registry.names("passes") and "theirs" not in registry.names("targets")
    assert registry.pass_class("theirs").name() == "theirs"
    assert "theirs" in [step.name for step in registry.default_steps() if isinstance(step, PassStep)]


def test_an_entry_point_by_another_name_than_its_file_is_refused(entries):
    entries(EntryPoint("other", "perwatt.passes.remove_dead:RemoveDead", "perwatt.passes"))
    with pytest.raises(InputError, match="calls passes 'other' what calls itself 'remove-dead'"):
        registry.pass_class("other")


def test_a_broken_package_of_somebody_elses_harms_only_who_names_it(entries):
    entries(EntryPoint("broken", "no_such_module_here:P", "perwatt.passes"))
    assert "broken" not in str(registry.default_steps())
    assert "broken" not in str(registry.recipe_schema())
    with pytest.raises(InputError, match="'broken' of no_such_module_here:P can't be loaded"):
        registry.pass_class("broken")
    told = catalogue.all_passes()[-1]
    assert told["name"] == "broken" and "can't be loaded: ModuleNotFoundError" in told["problem"]
    assert "✗ 'broken' of no_such_module_here:P can't be loaded" in catalogue.as_text(catalogue.all_passes())


def test_passes_are_listed_in_the_order_in_which_they_run():
    listed = [entry["name"] for entry in catalogue.all_passes()]
    assert sorted(listed) == registry.names("passes")
    runs = [one.name for step in registry.default_steps(True) for one in getattr(step, "steps", [step])]
    default = [entry["name"] for entry in catalogue.all_passes() if entry["default"]]
    assert default == list(dict.fromkeys(runs))
    stages = [Stage[entry["stage"].upper()] for entry in catalogue.all_passes()]
    assert stages == sorted(stages)


def test_steps_that_stand_before_what_prepares_models_for_them_are_told():
    def told(*names):
        return registry.out_of_order([PassStep(name=name) for name in names])

    assert registry.out_of_order(registry.default_steps(True)) == []
    assert told("fuse-attention", "cancel-casts") == [
        "fuse-attention stands before cancel-casts, after which it finds more"
    ]
    assert told("decompose-attention", "fuse-attention", "fold-shapes") == [
        "decompose-attention stands before fold-shapes, fuse-attention, after which it finds more",
        "fuse-attention stands before fold-shapes, after which it finds more",
    ]
    # What tidies up behind it may stand behind it alone.
    assert told("fuse-gelu", "remove-dead") == told("remove-dead", "fuse-gelu", "remove-dead") == []


@pytest.mark.parametrize("name", ["remove-dead", "theirs"])
def test_a_clash_of_names_raises_and_names_both(name, entries):
    entries(EntryPoint(name, "one:Pass", "perwatt.passes"), EntryPoint(name, "two:Pass", "perwatt.passes"))
    with pytest.raises(PerwattError, match=f"two passes are called '{name}'.*(remove_dead and one|one:Pass.* and two)"):
        registry.names("passes")


# Settings -----------------------------------------------------------------------------------------------------------


def test_settings_become_the_fields_of_the_pass():
    made = registry.bind(PassStep(name="quantize-int8", settings={"exclude": ["/a/*"], "subset_size": 10}))
    assert made == QuantizeInt8(exclude=("/a/*",), subset_size=10)
    assert registry.bind(PassStep(name="quantize-int8", settings=made.settings())) == made
    for name in registry.names("passes"):
        assert registry.bind(PassStep(name=name)) == registry.pass_class(name)()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exlude": []}, "unknown setting of quantize-int8 'exlude': did you mean exclude?"),
        ({"subset_size": "many"}, "quantize-int8.subset_size: Input should be a valid integer"),
        ({"subset_size": "300"}, "quantize-int8.subset_size: Input should be a valid integer"),
        ({"subset_size": True}, "quantize-int8.subset_size: Input should be a valid integer"),
        ({"bias_correction": 1}, "quantize-int8.bias_correction: Input should be a valid boolean"),
        ({"exclude": "/a/*"}, "quantize-int8.exclude: Input should be a valid array"),
        ({"activations": "best"}, "quantize-int8.activations: Input should be 'auto', 'symmetric' or 'asymmetric'"),
        ({"exclude": {1, 2}}, "the settings of quantize-int8 must be plain data"),
    ],
)
def test_settings_are_strict_and_errors_are_one_line(settings, words):
    with pytest.raises(InputError) as error:
        registry.bind(PassStep(name="quantize-int8", settings=settings))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_setting_for_a_pass_that_has_none_is_told():
    with pytest.raises(InputError, match="remove-dead has no settings, 'x' was given"):
        registry.bind(PassStep(name="remove-dead", settings={"x": 1}))


def test_settings_may_be_required_or_made_by_a_factory(monkeypatch):
    @dataclass(frozen=True)
    class Wide(Pass):
        stage: ClassVar[Stage] = Stage.CLEAN
        needed: int
        layers: list[str] = field(default_factory=list)
        mode: Literal["a", "b"] = "a"

        def run(self, artifact, context):
            return artifact, []

    monkeypatch.setattr(registry, "pass_class", lambda name: Wide)
    assert registry.bind(PassStep(name="wide", settings={"needed": 3})) == Wide(3)
    with pytest.raises(InputError, match=r"wide\.needed: Field required"):
        registry.bind(PassStep(name="wide"))


# The default pipeline and its edits ---------------------------------------------------------------------------------


def test_the_default_is_clean_fuse_and_the_precision_to_choose():
    steps = plain(registry.default_steps())
    assert steps[: len(CLEAN)] == CLEAN
    assert steps[-len(TIDY) - 1 :] == [*TIDY, PRECISION]
    fusing = [name for name in registry.names("passes") if registry.pass_class(name).stage is Stage.FUSE]
    assert sorted(fuse()) == [name for name in fusing if name not in NOT_BY_DEFAULT]


def test_what_fuses_finds_what_it_needs_done():
    order = fuse()
    before = [
        ("remove-softmax-guards", "fuse-attention"), ("fuse-rotary-embedding", "fuse-attention"),
        ("fuse-attention", "flatten-attention"), ("fuse-attention", "decompose-attention"),
        ("fuse-rms-normalization", "fold-scales"), ("fold-batchnorm", "fold-scales"), ("fuse-gelu", "fold-scales"),
    ]  # fmt: skip
    assert [pair for pair in before if order.index(pair[0]) > order.index(pair[1])] == []


def test_a_pass_that_tidies_up_runs_once_more_after_the_stage_it_names(only):
    only(fake("a", also_after=Stage.FUSE), fake("b", Stage.FUSE), fake("c", also_after=Stage.FUSE, in_default=False))
    assert plain(registry.default_steps()) == ["a", "b", "a"]


def test_stages_come_in_order_and_after_is_respected_within_them(only):
    only(
        fake("a", after=("c",)), fake("b", Stage.FUSE), fake("c"), fake("d", after=("a", "gone")),
        fake("e", in_default=False), fake("p", Stage.PRUNE), fake("z", Stage.PRECISION), fake("y", Stage.PRECISION),
    )  # fmt: skip
    assert plain(registry.default_steps()) == ["c", "a", "d", "b", ("y", "z")]
    assert plain(registry.default_steps(True)) == ["c", "a", "d", "b", "p", ("y", "z")]


def test_passes_that_wait_for_each_other_are_an_error(only):
    only(fake("a", after=("b",)), fake("b", after=("a",)))
    with pytest.raises(PerwattError, match=r"\['a', 'b'\] wait for each other"):
        registry.default_steps()


@pytest.mark.parametrize(
    ("edits", "result"),
    [
        ("-quantize-int8", [*CLEAN, ..., *TIDY, ("cast-half", "quantize-fp8", "assign-precision")]),
        ("-quantize-int8,-quantize-fp8,-cast-half,-assign-precision", [*CLEAN, ..., *TIDY]),
        ("-fold-constants, -remove-dead", [*sorted({*CLEAN} - {"fold-constants", "remove-dead"}, key=CLEAN.index), ...,
                                           *TIDY[:2], PRECISION]),
        ("fold-batchnorm,cast-half", ["fold-batchnorm", "cast-half"]),
        ("lossless", [*CLEAN, ..., *TIDY]),
        ("+remove-dead", [*CLEAN, ..., *TIDY, PRECISION]),
    ],
)  # fmt: skip
def test_plus_and_minus_edit_and_plain_names_replace(edits, result):
    wanted = [name for part in result for name in (fuse() if part is ... else [part])]
    assert plain(registry.edit_steps(registry.default_steps(), edits)) == wanted


@pytest.mark.parametrize("name", ["fold-shapes", "fuse-gelu", "fold-batchnorm", "fuse-attention", "quantize-int8"])
def test_what_is_taken_out_and_put_in_again_stands_where_it_stood(name):
    steps = registry.default_steps()
    assert plain(registry.edit_steps(steps, f"-{name},+{name}")) == plain(steps)


def test_what_is_there_already_keeps_its_settings():
    steps = [PassStep(name="quantize-int8", settings={"subset_size": 8})]
    assert registry.edit_steps(steps, "+quantize-int8") == steps
    assert registry.edit_steps([OneOf(steps=steps)], "+quantize-int8") == [OneOf(steps=steps)]


@pytest.mark.parametrize(
    ("edits", "words"),
    [("+nope", "unknown pass 'nope'"), ("-nope", "unknown pass 'nope'"), ("nope", "unknown pass 'nope'"),
     ("+cast-half,fold-batchnorm", "write .name or -name for each, or plain names only")],
)  # fmt: skip
def test_wrong_edits_are_told(edits, words):
    with pytest.raises(InputError, match=words):
        registry.edit_steps([], edits)


# The schema ---------------------------------------------------------------------------------------------------------

ACCEPTED = [
    {},
    {"passes": "default"},
    {"passes": []},
    {
        "passes": [
            "fold-batchnorm",
            {"quantize-int8": {"exclude": ["/a/*"], "activations": "asymmetric"}},
            {"remove-dead": None},
        ]
    },
    {"passes": [{"one-of": ["cast-half", {"quantize-int8": {"subset_size": 5}}]}]},
    {"budget": {"time": "10m", "p99_ms": "20ms", "min_gain": "3%", "max_drop": 1}},
    {"budget": {"time": 600, "p99_ms": 20.5, "min_gain": 0.05, "max_drop": None}},
    {"data": {"text": "a,b", "image": 224}},
    {"data": {"text": ["a"], "image": [224, 320]}},
    {"inputs": {"x": {"mean": [1, 2, 3], "std": 2}}},
    {"target": {"name": "cpu", "threads": None, "batch": 4}},
]
REFUSED = [
    {"unknown": 1},
    {"passes": "fold-batchnorm"},
    {"passes": None},
    {"passes": ["nope"]},
    {"passes": [3]},
    {"passes": [{"nope": {}}]},
    {"passes": [{"quantize-int8": 3}]},
    {"passes": [{"quantize-int8": {"exlude": []}}]},
    {"passes": [{"quantize-int8": {"subset_size": "300"}}]},
    {"passes": [{"quantize-int8": {"subset_size": True}}]},
    {"passes": [{"quantize-int8": {"activations": "best"}}]},
    {"passes": [{"remove-dead": {"x": 1}}]},
    {"passes": [{"remove-dead": {}, "cast-half": {}}]},
    {"passes": [{"one-of": []}]},
    {"passes": [{"one-of": "cast-half"}]},
    {"passes": [{"one-of": [{"one-of": ["cast-half"]}]}]},
    {"budget": {"time": "soon"}},
    {"budget": {"time": 0}},
    {"budget": {"min_gain": 3}},
    {"budget": {"max_drop": True}},
    {"target": {"threads": "2"}},
    {"target": {"scenario": "server"}},
    {"data": {"text": 3}},
    {"seed": "x"},
]


def parsed_and_bound(recipe):
    """What a run does with a recipe before it does anything else."""
    steps = parse(recipe).passes
    for step in [] if steps == "default" else steps:
        for one in step.steps if isinstance(step, OneOf) else [step]:
            registry.bind(one)


@pytest.fixture(scope="module")
def validator():
    schema = registry.recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("parts", ACCEPTED)
def test_what_the_parser_takes_the_schema_takes(parts, validator):
    recipe = {"model": {"path": "m.pt"}, **parts}
    parsed_and_bound(recipe)
    assert [error.message for error in validator.iter_errors(recipe)] == []


@pytest.mark.parametrize("parts", REFUSED)
def test_what_the_parser_refuses_the_schema_refuses(parts, validator):
    recipe = {"model": {"path": "m.pt"}, **parts}
    with pytest.raises(InputError):
        parsed_and_bound(recipe)
    assert not validator.is_valid(recipe)


def test_the_schema_describes_every_pass(validator):
    described = validator.schema["$defs"]["step"]["anyOf"][1]["properties"]
    assert sorted(described) == registry.names("passes")
    assert all(entry["anyOf"][0]["description"] for entry in described.values())


def test_settings_that_no_model_could_do_with_are_told_before_anything_runs() -> None:
    for name, settings, words in (
        ("drop-blocks", {"blocks": -3}, "drop-blocks: -3 blocks: it must be 1 or more — blocks: 1"),
        ("prune-channels", {"ratio": 1.5}, "must lie between 0 and 1"),
        ("prune-n-of-m", {"n": 5}, "n must be at least 1 and below m"),
        ("recover", {"minutes": -1}, "minutes must be more than 0"),
        ("recover", {"temperature": 0}, "temperature must be more than 0"),
        ("tune-quantization", {"learning_rate": 0}, "it must be more than 0"),
        ("quantize-int8", {"subset_size": 0}, "at least 1"),
        ("quantize-int8", {"smooth": 3}, "must lie between 0 and 1"),
        ("quantize-weights", {"damping": -1}, "damping 0 or more"),
        ("assign-precision", {"steps": -1}, "steps must be 0 or more"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            registry.bind(PassStep(name=name, settings=settings))


def test_what_mends_comes_behind_the_alternatives_and_is_told_where_there_is_nothing_to_mend() -> None:
    steps = registry.edit_steps(registry.default_steps(), "+tune-quantization")
    place = next(i for i, step in enumerate(steps) if isinstance(step, OneOf))
    assert steps[place + 1] == PassStep(name="tune-quantization")
    assert registry.out_of_order(steps) == []
    alone = registry.out_of_order([PassStep(name="recover"), PassStep(name="drop-blocks")])
    assert alone[0].startswith("recover has nothing to mend: it comes behind drop-blocks or ")
