"""What the steps of `action.yml` and of the GitLab template do when they run: their real scripts, in a real shell.

`optimize` is a scripted stand-in on the PATH: it writes down its arguments, writes a report where it is told to, and ends
with the code that it is told. GitHub's API is a scripted one too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from perwatt.gate_report import EXIT_CODES, GateReport

ROOT = Path(__file__).resolve().parents[2]
STEPS = {step["name"]: step for step in yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]}
OPTIMIZE = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$STUB_ARGUMENTS"
for argument in "$@"; do
  case $argument in
    --out=*) out=${argument#--out=} ;;
  esac
done
if [ -n "$STUB_REPORT" ]; then printf '%s' "$STUB_REPORT" > "$out"; fi
exit "$STUB_CODE"
"""
NO_INPUTS = {
    name: ""
    for name in (
        "BASE", "HEAD", "CONFIG", "LIMITS", "EVAL", "DATA", "NORMALIZE", "TIME", "METER", "EXTRA_ARGS", "ON_INCONCLUSIVE",
    )
}  # fmt: skip
COMMANDS_OF_THE_RUNNER = r"::(error|warning|notice) title=perwatt gate::(.*)"


@dataclass
class Done:
    """What a step left: exit code, outputs, annotations (kind, text), and the arguments that `optimize` was given."""

    code: int
    outputs: dict[str, str]
    annotations: list[tuple[str, str]]
    arguments: list[str] | None
    stderr: str


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with the scripted `optimize` in bin/."""
    (tmp_path / "bin").mkdir()
    write_executable(tmp_path / "bin" / "optimize", OPTIMIZE)
    (tmp_path / "temp").mkdir()
    return tmp_path


def write_executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment(bench: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": f"{bench / 'bin'}:{os.environ['PATH']}",
        "HOME": str(bench),
        "RUNNER_TEMP": str(bench / "temp"),
        "GITHUB_OUTPUT": str(bench / "output"),
        "STUB_ARGUMENTS": str(bench / "arguments"),
        **more,
    }


def run_gate(bench: Path, code: int, report: object = None, **inputs: str) -> Done:
    """Run the decisive step as a runner does, with an `optimize` that ends with `code` and leaves `report`."""
    script = bench / "step.sh"
    script.write_text(STEPS["Gate"]["run"])
    given = {f"GATE_{name}": value for name, value in {**NO_INPUTS, "ON_INCONCLUSIVE": "fail", **inputs}.items()}
    assert set(given) == set(STEPS["Gate"]["env"])
    told = {"STUB_CODE": str(code), "STUB_REPORT": "" if report is None else json.dumps(report)}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        env=environment(bench, **given, **told), cwd=bench, capture_output=True, text=True,
    )  # fmt: skip
    arguments = bench / "arguments"
    return Done(
        code=done.returncode,
        outputs=dict(line.split("=", 1) for line in (bench / "output").read_text().splitlines()),
        annotations=re.findall(COMMANDS_OF_THE_RUNNER, done.stdout),
        arguments=arguments.read_text().split("\0")[:-1] if arguments.exists() else None,
        stderr=done.stderr,
    )


def report(verdict: str, reason: str = "because") -> dict[str, str]:
    return {"verdict": verdict, "reason": reason}


@pytest.mark.parametrize(
    ("code", "verdict", "on_inconclusive", "step_code", "annotation"),
    [
        (0, "pass", "fail", 0, None),
        (1, "fail", "fail", 1, "error"),
        (1, "fail", "pass", 1, "error"),
        (3, "inconclusive", "fail", 3, "error"),
        (3, "inconclusive", "warn", 0, "warning"),
        (3, "inconclusive", "pass", 0, "notice"),
        (0, "inconclusive", "fail", 0, "notice"),
        (0, "inconclusive", "warn", 0, "warning"),
    ],
)
def test_the_step_passes_on_the_verdict_of_a_scripted_optimize(
    bench: Path, code: int, verdict: str, on_inconclusive: str, step_code: int, annotation: str | None
) -> None:
    done = run_gate(bench, code, report(verdict), BASE="b", ON_INCONCLUSIVE=on_inconclusive)
    assert done.code == step_code
    assert (done.outputs["verdict"], done.outputs["exit-code"]) == (verdict, str(code))
    assert json.loads(Path(done.outputs["report"]).read_text())["verdict"] == verdict
    assert [kind for kind, _ in done.annotations] == ([annotation] if annotation else [])
    assert done.stderr == ""


@pytest.mark.parametrize(("code", "step_code"), [(2, 2), (4, 4), (5, 5), (130, 130), (0, 5), (1, 5), (3, 5)])
def test_without_a_report_of_the_scripted_optimize_there_is_no_verdict_and_never_exit_code_1(
    bench: Path, code: int, step_code: int
) -> None:
    done = run_gate(bench, code, BASE="b", ON_INCONCLUSIVE="pass")
    assert done.code == step_code
    assert done.outputs == {
        "verdict": "error", "exit-code": str(code), "folder": done.outputs["folder"], "report": "",
    }  # fmt: skip
    assert [kind for kind, _ in done.annotations] == ["error"]


@pytest.mark.parametrize(
    "said", [report("pass"), {"reason": "no verdict in it"}, "no object", report("error"), report("fail x")]
)
def test_a_report_that_contradicts_the_scripted_exit_code_is_no_verdict(bench: Path, said: object) -> None:
    done = run_gate(bench, 3, said, BASE="b", ON_INCONCLUSIVE="pass")
    assert (done.code, done.outputs["verdict"]) == (5, "error")


def test_inputs_reach_the_scripted_optimize_as_they_are(bench: Path) -> None:
    evil = {
        "BASE": "git:HEAD^1; touch pwned",
        "HEAD": "$(touch pwned) `touch pwned`",
        "CONFIG": "a folder/re*cipe.yaml",
        "LIMITS": "--trust",
        "EVAL": "'\"\n--trust",
        "DATA": "a folder of pictures/; touch pwned",
        "NORMALIZE": "0.5,0.5,0.5/0.2,0.2,0.2 $(touch pwned)",
        "TIME": "30s --trust",
        "METER": "wall:read-meter --watts",
    }
    done = run_gate(bench, 0, report("pass"), EXTRA_ARGS=" --profile long\n --seed 1 *", **evil)
    folder = done.outputs["folder"]
    assert done.arguments == [
        "gate", *(f"--{name.lower()}={value}" for name, value in evil.items()),
        "--profile", "long", "--seed", "1", "*",
        f"--out={folder}/gate.json", f"--markdown={folder}/gate.md", f"--junit={folder}/gate.xml",
    ]  # fmt: skip
    assert not (bench / "pwned").exists()


def test_empty_inputs_are_not_given_to_the_scripted_optimize(bench: Path) -> None:
    done = run_gate(bench, 0, report("pass"), BASE="main-bundle")
    assert done.arguments is not None
    assert [argument.partition("=")[0] for argument in done.arguments] == [
        "gate", "--base", "--out", "--markdown", "--junit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [({"BASE": ""}, "base is empty"), ({"BASE": "b", "ON_INCONCLUSIVE": "ignore\n::error::x"}, "warn, fail or pass")],
)
def test_unusable_inputs_end_with_2_before_the_scripted_optimize_runs(
    bench: Path, inputs: dict[str, str], complaint: str
) -> None:
    done = run_gate(bench, 0, report("pass"), **inputs)
    assert (done.code, done.arguments) == (2, None)
    assert (done.outputs["verdict"], done.outputs["exit-code"]) == ("error", "2")
    ((kind, said),) = done.annotations
    assert kind == "error" and complaint in said


def test_a_missing_optimize_is_a_usage_error(bench: Path) -> None:
    (bench / "bin" / "optimize").unlink()
    for name in ("bash", "mktemp", "python3"):
        found = shutil.which(name)
        assert found
        (bench / "bin" / name).symlink_to(found)
    script = bench / "step.sh"
    script.write_text(STEPS["Gate"]["run"])
    given = {f"GATE_{name}": "" for name in NO_INPUTS} | {"GATE_BASE": "b", "GATE_ON_INCONCLUSIVE": "fail"}
    settings = {**environment(bench, **given), "PATH": str(bench / "bin")}
    done = subprocess.run(["bash", "-eo", "pipefail", str(script)], env=settings, capture_output=True, text=True)
    assert (done.returncode, "no optimize command" in done.stdout) == (2, True)


def test_a_reason_of_the_scripted_report_cannot_speak_to_the_runner(bench: Path) -> None:
    done = run_gate(
        bench, 1, report("fail", "100 % off\n::warning title=perwatt gate::forged\r\nverdict=pass"), BASE="b"
    )
    assert done.annotations == [
        ("error", "failed: 100 %25 off%0A::warning title=perwatt gate::forged%0D%0Averdict=pass")
    ]
    assert done.outputs["verdict"] == "fail"


def test_two_gates_of_one_job_keep_their_scripted_reports_apart(bench: Path) -> None:
    first = run_gate(bench, 0, report("pass"), BASE="b").outputs["report"]
    second = run_gate(bench, 1, report("fail"), BASE="b").outputs["report"]
    assert first != second
    assert json.loads(Path(first).read_text())["verdict"] == "pass"


def test_the_step_reads_what_a_report_really_holds() -> None:
    assert {"verdict", "reason"} <= set(GateReport.model_fields)
    known = re.findall(r'"(\d) ([a-z]+)"', STEPS["Gate"]["run"].partition('case "$code $verdict" in')[2])
    assert {(verdict, int(code)) for code, verdict in known} == {*EXIT_CODES.items(), ("inconclusive", 0)}


# Installing -----------------------------------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$STUB_ARGUMENTS"
printf '\\n' >> "$STUB_ARGUMENTS"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


@pytest.mark.parametrize(
    ("install", "given"),
    [
        ("perwatt", ["/the action"]),
        ("perwatt[torch]  -c constraints.txt", ["/the action[torch]", "-c", "constraints.txt"]),
        ("perwatt==0.1.0 *.whl", ["perwatt==0.1.0", "*.whl"]),
        ("perwatt-extras perwatt[", ["perwatt-extras", "perwatt["]),
    ],
)
def test_install_takes_the_actions_own_source_with_a_scripted_python(
    bench: Path, install: str, given: list[str]
) -> None:
    write_executable(bench / "bin" / "python3", PYTHON)
    (bench / "one.whl").touch()
    settings = environment(bench, GATE_INSTALL=install, GITHUB_ACTION_PATH="/the action")
    script = STEPS["Install perwatt"]["run"]
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=settings, cwd=bench, check=True)
    venv, pip = (line.split("\0")[:-1] for line in (bench / "arguments").read_text().splitlines())
    assert venv == ["-m", "venv", f"{bench}/temp/perwatt-gate-venv"]
    assert pip == ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *given]


# The comment ----------------------------------------------------------------------------------------------------------

COMMENT = """
const [script, existing, refused] = process.argv.slice(1);
const calls = [];
const call = (name) => async (given) => {
  if (refused === "refused") throw new Error("Resource not accessible by integration");
  calls.push({ name, ...given });
};
const issues = { listComments: "list", createComment: call("create"), updateComment: call("update") };
const github = { rest: { issues }, paginate: async () => JSON.parse(existing) };
const context = {
  repo: { owner: "o", repo: "r" }, issue: { number: 7 }, serverUrl: "https://example.org", runId: 42,
};
const core = { warning: (text) => calls.push({ name: "warning", text }) };
const body = (await import("node:fs")).readFileSync(script, "utf8");
const { createRequire } = await import("node:module");
const AsyncFunction = (async () => {}).constructor;
await new AsyncFunction("github", "context", "core", "require", body)(github, context, core, createRequire("file:///"));
console.log(JSON.stringify(calls));
"""
MARKER = "<!-- perwatt: my-gate -->"


def comment(bench: Path, existing: list[dict[str, Any]], refused: str = "") -> dict[str, Any]:
    """Run the comment's script against a scripted API; returns its only call."""
    script = bench / "comment.js"
    script.write_text(STEPS["Comment on the pull request"]["with"]["script"])
    command = ["node", "--input-type=module", "-e", COMMENT, str(script), json.dumps(existing), refused]
    settings = environment(bench, GATE_NAME="my-gate", GATE_FOLDER=str(bench))
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    (called,) = json.loads(done.stdout)
    return dict(called)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the comment's script is JavaScript: install node")


@needs_node
def test_the_first_comment_is_made_at_a_scripted_api(bench: Path) -> None:
    (bench / "gate.md").write_text("### ✓ PASS `${{ }}`\n")
    others = [{"id": 1, "user": {"type": "User"}, "body": MARKER}, {"id": 2, "user": None, "body": None}]
    called = comment(bench, others)
    assert (called["name"], called["issue_number"]) == ("create", 7)
    assert called["body"].startswith(f"{MARKER}\n### ✓ PASS `${{{{ }}}}`\n")
    assert "https://example.org/o/r/actions/runs/42" in called["body"]


@needs_node
def test_a_later_comment_replaces_ours_at_a_scripted_api_also_without_a_verdict(bench: Path) -> None:
    called = comment(bench, [{"id": 3, "user": {"type": "Bot"}, "body": f"{MARKER}\nold"}])
    assert (called["name"], called["comment_id"]) == ("update", 3)
    assert "gave no verdict" in called["body"]


@needs_node
def test_a_scripted_api_that_refuses_the_comment_is_a_warning(bench: Path) -> None:
    called = comment(bench, [], "refused")
    assert called["name"] == "warning"
    assert "pull-requests: write" in called["text"]


# GitLab ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_gitlab_script_ends_with_the_code_of_a_scripted_optimize(bench: Path, code: int, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    job = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab.yml").read_text())[".perwatt-gate"]
    (bench / ".perwatt" / "venv").mkdir(parents=True)
    (bench / "bin").rename(bench / ".perwatt" / "venv" / "bin")
    given = {
        **job["variables"], "GATE_EVAL": "a b; touch pwned", "GATE_DATA": "c d", "GATE_NORMALIZE": "unit $(touch pwned)",
        "GATE_EXTRA_ARGS": "--seed 1 *",
    }  # fmt: skip
    settings = environment(bench, **given, CI_MERGE_REQUEST_DIFF_BASE_SHA="abc", STUB_CODE=str(code), STUB_REPORT="{}")
    script = "\n".join(job["script"])
    done = subprocess.run([shell, "-e", "-c", script], env=settings, cwd=bench, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert (bench / ".perwatt" / "report" / "gate.json").read_text() == "{}"
    assert (bench / "arguments").read_text().split("\0")[:-1] == [
        "gate", "--base=git:abc", "--config=recipe.yaml", "--eval=a b; touch pwned", "--data=c d",
        "--normalize=unit $(touch pwned)", "--seed", "1", "*",
        "--out=.perwatt/report/gate.json", "--markdown=.perwatt/report/gate.md", "--junit=.perwatt/report/gate.xml",
    ]  # fmt: skip
    assert not (bench / "pwned").exists()


# Samples that git doesn't keep ----------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "gate.md").read_text()


def fetching_scripts() -> dict[str, str]:
    """The page's scripts that fetch samples: GitHub's step, and GitLab's lines before the template's own."""

    class Loader(yaml.SafeLoader):
        """SafeLoader that leaves GitLab's `!reference` out."""

    Loader.add_constructor("!reference", lambda loader, node: None)  # type: ignore[arg-type]
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.partition("## Samples on the runner")[2], re.MULTILINE | re.DOTALL)
    github, gitlab = (yaml.load(block, Loader) for block in blocks[:2])
    (step,) = [step for step in github if "run" in step]
    assert "SAMPLES" in step["env"] and "SAMPLES" in gitlab["perwatt-gate"]["variables"]
    return {"bash": step["run"], "sh": "\n".join(line for line in gitlab["perwatt-gate"]["before_script"] if line)}


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's scripts fetch with curl: install it")
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut off"])
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_pages_steps_fetch_samples_and_refuse_others(tmp_path: Path, shell: str, whole: bool) -> None:
    (tmp_path / "store.npz").write_bytes(b"samples")
    digest = hashlib.sha256(b"samples" if whole else b"samples, all of them").hexdigest()
    (tmp_path / "test.npz.sha256").write_text(f"{digest}  data/test.npz\n")
    settings = {**os.environ, "SAMPLES": (tmp_path / "store.npz").as_uri()}
    done = subprocess.run(
        [shell, "-e", "-c", fetching_scripts()[shell]], env=settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert (tmp_path / "data" / "test.npz").read_bytes() == b"samples"
    assert done.returncode == (0 if whole else 1), done.stderr
