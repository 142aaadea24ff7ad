"""The action, the hooks and the example repository: valid, and what they run does what it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diablo_export.measure.parity import parity
from tests import exports
from tests.exports import SMALL

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github" / "actions" / "parity" / "action.yml"
EXAMPLE = ROOT / "examples" / "ci"
PROGRAM = Path(sys.executable).with_name("diablo-export")

# what stands in for the program: it says what it was given, writes the reports and ends as it is told
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SAID"
while [ $# -gt 0 ]; do
  case $1 in --json|--junit|--html|--markdown) [ "$ENDS" = 2 ] || echo "report" > "$2" ;; esac
  shift
done
exit "$ENDS"
"""


def action() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    return read


def filled(text: str, inputs: dict[str, str]) -> str:
    """A value of the action with its expressions put in."""
    text = text.replace("${{ github.action_path }}", str(ACTION.parent))
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: inputs[match[1]], text)


class Job:
    """A job on a machine of GitHub's, as far as shell steps see it."""

    def __init__(self, folder: Path, workspace: Path) -> None:
        self.folder, self.workspace = folder, workspace
        (folder / "bin").mkdir(parents=True)
        self.env = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{PROGRAM.parent}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
            "OMP_NUM_THREADS": "1",
        }
        self.command("pip", '#!/usr/bin/env bash\nprintf \'%s\\n\' "$@" >> "$INSTALLED"\n')
        self.env["INSTALLED"] = str(folder / "installed")

    def command(self, name: str, script: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(script)
        file.chmod(0o755)

    def run(self, script: str, env: dict[str, str] | None = None) -> int:
        """Run a step with `shell: bash`, as GitHub does."""
        (self.folder / "step.sh").write_text(script)
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(self.folder / "step.sh")]
        done = subprocess.run(
            command, cwd=self.workspace, env={**self.env, **(env or {})}, capture_output=True, text=True, check=False
        )
        self.said = done.stdout + done.stderr
        return done.returncode

    def use_action(self, given: dict[str, str]) -> int:
        """Run the action's shell steps until one fails; returns the exit code."""
        inputs = {name: str(entry.get("default", "")) for name, entry in action()["inputs"].items()} | given
        for step in action()["runs"]["steps"]:
            if "run" in step:
                code = self.run(step["run"], {key: filled(value, inputs) for key, value in step["env"].items()})
                if code:
                    return code
        return 0

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "workspace").mkdir()
    job = Job(tmp_path / "job", tmp_path / "workspace")
    job.command("diablo-export", STAND_IN)
    job.env |= {"SAID": str(tmp_path / "job" / "said"), "ENDS": "0"}
    return job


def test_the_action_uses_the_inputs_that_it_declares() -> None:
    text = ACTION.read_text(encoding="utf-8")
    declared = set(action()["inputs"])
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == declared
    assert all(entry["description"] for entry in action()["inputs"].values())
    assert [name for name, entry in action()["inputs"].items() if entry.get("required")] == ["folder"]
    steps = action()["runs"]["steps"]
    for step in steps:
        assert ("run" in step) == (step.get("shell") == "bash")
        assert "${{" not in step.get("run", "")  # expressions in a script would let a file name run commands
    used = {name for step in steps for name in re.findall(r"\$\{?([A-Z_]+)", step.get("run", ""))}
    assert used == {name for step in steps for name in step.get("env", {})} | {"GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"}
    assert "always()" in steps[-1]["if"]  # the reports of what failed are the ones that are wanted
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    table = page[page.index("| input |") : page.index("Outputs:")]
    assert set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))) == declared


def schema_says(schema: str, text: str, file: Path) -> str:
    """What GitHub's (or GitLab's) published schema says against a file; nothing where it is valid."""
    pytest.importorskip("check_jsonschema")
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("ok" in done.stdout), done.stderr
    return "" if done.returncode == 0 else done.stdout


@pytest.mark.parametrize(
    ("schema", "file", "broken"),
    [
        ("github-actions", ACTION, "composite"),
        ("github-workflows", EXAMPLE / ".github" / "workflows" / "parity.yml", "runs-on"),
        ("github-workflows", ROOT / ".github" / "workflows" / "wheels.yml", "runs-on"),
        ("gitlab-ci", ROOT / "docs" / "ci.md", "script"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_published_schemas_hold(schema: str, file: Path, broken: str, tmp_path: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if schema == "gitlab-ci":
        text = text[text.index("```yaml\nparity:") :].removeprefix("```yaml\n").partition("```")[0]
    assert not schema_says(schema, text, tmp_path / "file.yml")
    assert schema_says(schema, text.replace(broken, "unheard-of"), tmp_path / "file.yml")


def test_the_action_hands_its_inputs_on_whole(job: Job) -> None:
    given = {
        "folder": "out/my int4", "model": "base", "adapter": "a=one two\nb=three", "data": "d.jsonl",
        "limits": "parity.toml", "baseline": "last.json", "certificate": "true", "exported-base": "other",
        "arguments": "--limit\nkl.mean=0.1\n",
    }  # fmt: skip
    assert job.use_action(given) == 0, job.said
    reports = "--json parity-report/parity.json --junit parity-report/parity.xml --markdown parity-report/parity.md"
    assert job.read("said").splitlines() == [
        "parity", "out/my int4", *reports.split(), "--html", "parity-report/parity.html", "--model", "base",
        "--exported-base", "other", "--data", "d.jsonl", "--limits", "parity.toml", "--baseline", "last.json",
        "--certificate", "--adapter", "a=one two", "--adapter", "b=three", "--limit", "kl.mean=0.1",
    ]  # fmt: skip
    assert job.read("output").splitlines() == ["verdict=pass", "report=parity-report/parity.json"]
    assert job.read("summary") == "report\n"
    assert job.read("installed").splitlines() == ["install", f"diablo-export[cpu,train,peft] @ file://{ROOT}"]


@pytest.mark.parametrize(("ends", "verdict"), [("1", "fail"), ("2", "error")])
def test_the_action_ends_as_the_program_does(ends: str, verdict: str, job: Job) -> None:
    job.env["ENDS"] = ends
    stale = job.workspace / "parity-report" / "parity.md"
    stale.parent.mkdir()
    stale.write_text("of an earlier run\n")
    assert job.use_action({"folder": "out", "version": "none"}) == int(ends)
    assert f"verdict={verdict}" in job.read("output")
    summary = {"1": "report\n", "2": "Parity of out was not measured: exit code 2\n"}
    assert job.read("summary") == summary[ends]
    assert job.read("installed") == ""  # version: none


def test_the_action_installs_the_version_that_is_asked_for(job: Job) -> None:
    assert job.use_action({"folder": "out", "version": "0.1.0"}) == 0
    assert job.read("installed").splitlines() == ["install", "diablo-export[cpu,train,peft]==0.1.0"]
    assert job.read("said").splitlines()[:2] == ["parity", "out"] and "--certificate" not in job.read("said")


# hooks


@pytest.fixture(scope="module")
def certified(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = exports.copy(exported("llama"), tmp_path_factory.mktemp("ci") / "out")
    assert parity(out, certificate=True, **SMALL)["verdict"] == "pass"
    return out


def hooks() -> dict[str, dict[str, Any]]:
    listed = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    return {hook["id"]: hook for hook in listed}


def test_hooks_run_commands_that_there_are() -> None:
    from diablo_export.cli import COMMANDS

    assert list(hooks()) == ["diablo-export-verify", "diablo-export-parity"]
    for hook in hooks().values():
        program, command, *_ = hook["entry"].split()
        assert program == "diablo-export" and command in COMMANDS
        assert not hook["pass_filenames"]  # the folder is in args
        files = re.compile(hook["files"])
        assert all(files.search(f"release/int4/{name}") for name in ("model.onnx", "model.onnx.data"))
        assert not files.search("README.md")


def test_the_hook_of_verify_finds_a_changed_byte(certified: Path, tmp_path: Path) -> None:
    pytest.importorskip("pre_commit")
    home = {"PRE_COMMIT_HOME": str(tmp_path / "home"), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    repository = tmp_path / "repository"

    def call(*command: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        return subprocess.run(
            words, cwd=repository, env={**os.environ, **home}, capture_output=True, text=True, check=False
        )

    exports.copy(certified, repository / "release" / "float")
    # of its keys only the language is another: this environment in place of one that is made for the hook
    hook = hooks()["diablo-export-verify"] | {"language": "system", "args": ["release/float"]}
    del hook["additional_dependencies"]
    hook["entry"] = hook["entry"].replace("diablo-export", str(PROGRAM), 1)
    config = {"repos": [{"repo": "local", "hooks": [hook]}]}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    assert call("git", "init", "-q").returncode == 0
    assert call("git", "add", "-A").returncode == 0
    good = call(sys.executable, "-m", "pre_commit", "run", "--all-files")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "Passed" in good.stdout
    exports.flip_byte(repository / "release" / "float" / "model.onnx.data", 9)
    bad = call(sys.executable, "-m", "pre_commit", "run", "--all-files")
    assert bad.returncode == 1
    assert "Failed" in bad.stdout and "changed since it was certified: model.onnx.data" in bad.stdout
    checked = call(sys.executable, "-m", "pre_commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml")
    assert checked.returncode == 0, checked.stdout


# the example repository


def test_the_example_names_what_there_is() -> None:
    workflow = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "parity.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["parity"]["steps"]
    (used,) = [step for step in steps if "/actions/parity@" in step.get("uses", "")]
    assert used["uses"].partition("/actions/")[2].partition("@")[0] == ACTION.parent.name
    assert set(used["with"]) <= set(action()["inputs"])
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    tree = re.findall(r"^(\S+) {2,}", readme[readme.index("```") : readme.index("The baseline is made")], re.MULTILINE)
    missing = {name for name in tree if not (EXAMPLE / name).exists()}
    assert missing == {"adapter/", "baseline/int8.json"}  # what it says that a person brings, or makes
    config = yaml.safe_load((EXAMPLE / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {hook["id"] for repo in config["repos"] for hook in repo["hooks"]} <= set(hooks())


@pytest.mark.slow  # six runs of the program, each of which loads torch
def test_the_example_runs_as_on_github(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(EXAMPLE, repository)
    (repository / "model.txt").write_text(f"{tiny_model('llama')}\n")
    shutil.copytree(tiny_adapter("llama"), repository / "adapter")
    job = Job(tmp_path / "job", repository)
    (commands,) = re.findall(r"<!-- runs -->\n```console\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    for line in commands.splitlines():
        assert job.run(line.removeprefix("$ ")) == 0, job.said
    shutil.rmtree(repository / "out")

    def run_workflow() -> int:
        workflow = yaml.safe_load((repository / ".github" / "workflows" / "parity.yml").read_text(encoding="utf-8"))
        for step in workflow["jobs"]["parity"]["steps"]:
            code = job.run(step["run"]) if "run" in step else 0
            if "/actions/parity@" in step.get("uses", ""):
                texts = {
                    name: str(value).lower() if value is True else str(value) for name, value in step["with"].items()
                }
                code = job.use_action(texts)
            if code:
                return code
        return 0

    assert run_workflow() == 0, job.said
    assert job.read("installed").splitlines() == ["install", "-r", "requirements.txt"]
    report = json.loads((repository / "parity-report" / "parity.json").read_text())
    limits = {check["name"]: check["limit"] for check in report["checks"]}
    assert limits["adapter.survival_gain"] == 0.97 and "baseline.kl.mean" in limits
    assert (repository / "out" / "int8" / "certificate.json").is_file()
    assert {path.name for path in (repository / "parity-report").iterdir()} == {
        "parity.json", "parity.xml", "parity.md", "parity.html",
    }  # fmt: skip
    assert "checks held" in job.read("summary")

    # somebody changes a byte of the adapter's file between the merge and the check
    shutil.rmtree(repository / "out")
    job.command("diablo-export", f'#!/usr/bin/env bash\n"{PROGRAM}" "$@" || exit\n'
                '[ "$1" != merge ] || printf x >> adapter/adapter_model.safetensors\n')  # fmt: skip
    assert run_workflow() in (1, 2)
    assert "verdict=pass" not in job.read("output").splitlines()[-2:]
