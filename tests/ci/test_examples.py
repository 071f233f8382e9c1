"""The action, the GitLab job and the shell script, run as they stand: for real once, and with every exit code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.ci_scripts import RECIPE, accepted, action, environment, fake_command, page_blocks, run_action, run_bash

bash = shutil.which("bash")
pytestmark = pytest.mark.skipif(bash is None, reason="no bash")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_every_yaml_of_the_page_and_the_action_can_be_read():
    github, gitlab = (yaml.safe_load(block) for block in page_blocks("yaml"))
    assert set(github) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as true
    assert gitlab["quantize"]["artifacts"]["reports"] == {"junit": "results/junit.xml"}
    used = next(step for step in github["jobs"]["quantize"]["steps"] if "optgptq" in step.get("uses", ""))
    assert set(used["with"]) <= set(action()["inputs"])


def test_no_input_becomes_part_of_a_script():
    for step in action()["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        if "run" in step and step["name"] != "Install":
            assert step["run"].startswith("set -euo pipefail\n")
    for block in page_blocks("yaml"):
        scripts = re.findall(r"run: (.*)", block)
        assert all("${{" not in script for script in scripts)


def test_every_input_is_used_and_on_the_page():
    text = Path(__file__).parents[2].joinpath("action.yml").read_text()
    page = Path(__file__).parents[2].joinpath("docs", "ci.md").read_text()
    for name in action()["inputs"]:
        assert f"inputs.{name}" in text
        assert f"`{name}`" in page or f"{name}:" in page, name
    for name in action()["outputs"]:
        assert f"`{name}`" in page, name


def test_scripts_have_no_syntax_errors():
    scripts = [*page_blocks("bash"), *(step["run"] for step in action()["runs"]["steps"] if "run" in step)]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run([bash, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("text", ['"; touch pwned; "', "$(touch pwned)", "`touch pwned`", "x\ntouch pwned", "--help"])
@pytest.mark.parametrize("name", ["model", "recipe", "set", "gates", "target", "device", "revision", "text"])
def test_hostile_inputs_stay_text(workspace, tmp_path, name, text):
    commands = fake_command(tmp_path / "commands", 0)
    inputs = {"model": "bundled:story-llama", name: text}
    assert run_action(workspace, commands, **inputs).code == 0
    assert not list(workspace.rglob("pwned"))
    lines = (commands / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["--version", "plan", "quantize", "report"]


@pytest.mark.parametrize("output", ["", "..", "a/..", "a\nwork=/etc", "-o", "a/"])
def test_an_output_that_is_no_folder_is_refused_before_anything_runs(workspace, tmp_path, output):
    ended = run_action(workspace, fake_command(tmp_path / "commands", 0), model="m", output=output)
    assert (ended.code, dict(ended.outputs)) == (2, {})


def test_the_journal_of_another_job_is_not_taken(workspace, tmp_path):
    step = next(step for step in action()["runs"]["steps"] if step.get("id") == "names")
    path = fake_command(tmp_path / "commands")
    base = {"MODEL": "m", "REVISION": "", "RECIPE": "recipe.yaml", "FIELDS": "", "OUTPUT": "a/out", "DEVICE": "cpu"}

    def outputs(**changes: str) -> dict[str, str]:
        return dict(run_bash(step["run"], workspace, environment(path, **{**base, **changes})).outputs)

    first = outputs()
    assert first["work"] == "a/.out.work"
    assert outputs() == first
    jobs = {outputs(**{name: "b"})["job"] for name in base}
    (workspace / "recipe.yaml").write_text("{}")
    assert len({first["job"], outputs()["job"], *jobs}) == 8


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 75, 143])
def test_the_action_ends_with_the_code_of_the_job(workspace, tmp_path, code):
    commands = fake_command(tmp_path / "commands", code)
    ended = run_action(workspace, commands, model="m", minutes="5", gates="max_kl=0.1", text="t.txt")
    assert ended.code == code
    assert ended.outputs == {"exit-code": str(code), "bits-per-weight": "4.125"}
    lines = (commands / "log").read_text().splitlines()
    assert lines[1].startswith("plan --recipe gptq-w4 --output optgptq-output --device cpu -- m")
    assert "--gate text=t.txt --gate max_kl=0.1 --junit optgptq-output.results/junit.xml" in lines[2]
    assert any(line.startswith("report ") for line in lines) == (code in (0, 7))
    assert ("::warning::" in ended.stdout) == (code == 75)


@pytest.mark.parametrize(
    ("codes", "attempts"),
    [([0], 1), ([137, 143, 0], 3), ([143] * 6, 5), ([3, 0], 1), ([5, 0], 1), ([137, 7], 2), ([75], 1)],
)
def test_the_shell_script_tries_again_where_that_can_help(workspace, tmp_path, codes, attempts):
    commands = fake_command(tmp_path / "commands", *codes)
    (script,) = page_blocks("bash")
    ended = run_bash(script, workspace, environment(commands), "model", "recipe.yaml", "out")
    assert ended.code == codes[attempts - 1]
    lines = (commands / "log").read_text().splitlines()
    assert sum(line.startswith("quantize ") for line in lines) == attempts
    assert lines[-1].startswith("report") == (ended.code in (0, 7))


@pytest.mark.parametrize(("limit", "started"), [("0", 0), ("1", 1)])
def test_the_shell_script_leaves_in_time_for_the_next_job(workspace, tmp_path, limit, started):
    """The first attempt is stopped at the limit; there is no time for a second."""
    commands = fake_command(tmp_path / "commands", 0)
    slow = "#!/bin/bash\ncase $1 in quantize) echo >>started; trap 'exit 143' TERM; sleep 20 & wait ;; esac\n"
    (commands / "optgptq").write_text(slow)
    (script,) = page_blocks("bash")
    ended = run_bash(script, workspace, environment(commands, LIMIT=limit), "model", "recipe.yaml", "out")
    assert ended.code == 75
    assert "the same command goes on" in ended.stderr
    notes = workspace / "started"
    assert (len(notes.read_text()) if notes.exists() else 0) == started


def test_another_model_in_the_same_folder_is_another_job(workspace, tmp_path):
    step = next(step for step in action()["runs"]["steps"] if step.get("id") == "names")
    (workspace / "model").mkdir()
    base = {"MODEL": "model", "REVISION": "", "RECIPE": "r", "FIELDS": "", "OUTPUT": "out", "DEVICE": "cpu"}
    commands, jobs = fake_command(tmp_path / "commands"), []
    for name, content in (("config.json", "{}"), ("config.json", "[]"), ("a b.json", "{}")):
        (workspace / "model" / name).write_text(content)
        variables = environment(commands, **base)
        jobs += [run_bash(step["run"], workspace, variables).outputs["job"] for _ in range(2)]
    assert [jobs[index] == jobs[index + 1] for index in range(0, 6, 2)] == [True] * 3
    assert len(set(jobs)) == 3


def test_the_gitlab_job_runs_its_lines_in_order(workspace, tmp_path):
    commands = fake_command(tmp_path / "commands", 0)
    _run_gitlab(workspace, commands)
    lines = (commands / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["plan", "quantize", "report"]
    assert "--revision c1899de289a04d12100db370d81485cdf75e47ca" in lines[1]
    assert json.loads((workspace / "results" / "summary.json").read_text()) == {"bits_per_weight": 4.125}


def test_the_real_command_knows_every_option(workspace, tmp_path):
    """The examples are run with a stand-in; what they give it must be a command line of the real one."""
    noted = []
    for number, run in enumerate((_run_action, _run_shell, _run_gitlab)):
        commands = fake_command(tmp_path / f"commands-{number}", 0)
        run(workspace, commands)
        noted += (commands / "log").read_text().splitlines()
    assert {line.split()[0] for line in noted} == {"--version", "plan", "quantize", "report"}
    for line in noted:
        accepted(line)


def _run_action(workspace: Path, commands: Path) -> None:
    lists = {"set": "weights.bits=4", "target": "transformers\nvllm", "gates": "max_kl=0.1\nmax_dense_share=0.1"}
    single = {"revision": "abc", "tensor-parallel": "2", "text": "t.txt", "minutes": "1", "recipe": "recipe.yaml"}
    assert run_action(workspace, commands, model="m/m", output="out", **lists, **single).code == 0


def _run_shell(workspace: Path, commands: Path) -> None:
    (script,) = page_blocks("bash")
    variables = environment(commands, SET="weights.bits=4")
    assert run_bash(script, workspace, variables, "model", "recipe.yaml", "out").code == 0


def _run_gitlab(workspace: Path, commands: Path) -> None:
    job = yaml.safe_load(page_blocks("yaml")[1])["quantize"]
    script = "\n".join([*job["script"], 'mkdir "$OUTPUT"', *job["after_script"]])
    variables = environment(commands, CI_PROJECT_DIR=str(workspace), **job["variables"])
    assert run_bash(script, workspace, variables).code == 0
