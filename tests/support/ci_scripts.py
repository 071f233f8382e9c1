"""The examples for CI as they stand in the repository, and a way to run them as the machines of CI do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "ci.md"
ACTION = ROOT / "action.yml"
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
RECIPE = """\
weights: {method: rtn, bits: 4}
calibration: {source: "bundled:story-calibration", num_windows: 2, window_size: 64}
"""


def page_blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


def action() -> dict[str, Any]:
    """Return the parsed action."""
    parsed: dict[str, Any] = yaml.safe_load(ACTION.read_text())
    return parsed


def environment(path: Path, **values: str) -> dict[str, str]:
    """Return what a machine of CI would set, `path` before everything else, and nothing of this terminal."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL") if name in os.environ}
    folders = [str(path), str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]
    threads = {"OMP_NUM_THREADS": "1", "CI": "true", "HF_HUB_OFFLINE": "1"}
    return {**kept, **threads, "PATH": os.pathsep.join(folders), **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a script ended, and what it told GitHub."""

    code: int
    stdout: str
    stderr: str
    outputs: Mapping[str, str]
    summary: str


def run_bash(script: str, folder: Path, variables: Mapping[str, str], *arguments: str) -> Ended:
    """Run a script in `folder` as GitHub runs `shell: bash`."""
    output, summary = folder / ".github-output", folder / ".github-summary"
    output.write_text("")
    summary.write_text("")
    told = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    file = folder / ".script.sh"
    file.write_text(script)
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(file), *arguments]
    done = subprocess.run(command, cwd=folder, env={**variables, **told}, capture_output=True, text=True, check=False)
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return Ended(
        code=done.returncode, stdout=done.stdout, stderr=done.stderr, outputs=outputs, summary=summary.read_text()
    )


def run_action(folder: Path, path: Path, **inputs: str) -> Ended:
    """Run the steps `Names` and `Quantize` of the action with these inputs, the others at their defaults."""
    parsed = action()
    given = {name: str(spec.get("default", "")) for name, spec in parsed["inputs"].items()} | inputs
    known = {f"inputs.{name}": value for name, value in given.items()}
    ended = None
    for step in parsed["runs"]["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        values = {name: _filled(text, known) for name, text in step.get("env", {}).items()}
        ended = run_bash(step["run"], folder, environment(path, **values))
        known |= {f"steps.{step['id']}.outputs.{name}": value for name, value in ended.outputs.items()}
        if ended.code:
            break
    assert ended is not None
    return ended


def _filled(text: str, known: Mapping[str, str]) -> str:
    return _EXPRESSION.sub(lambda found: known[found[1]], text)


def accepted(line: str) -> None:
    """Parse a command line that `fake_command` noted as the real command does; an unknown option is an error."""
    from typer.main import get_command

    from optgptq_cli.main import app

    name, *arguments = shlex.split(line)
    if name != "--version":
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def fake_command(folder: Path, *codes: int) -> Path:
    """Return a folder with an `optgptq` that notes its arguments; `quantize` ends with one code after the other."""
    folder.mkdir()
    log, count = folder / "log", folder / "count"
    script = f"""#!/usr/bin/env bash
printf '%q ' "$@" >>{log}; echo >>{log}
[[ $1 == quantize ]] || exit 0
codes=({" ".join(map(str, codes))})
number=$(cat {count} 2>/dev/null || echo 0)
echo $((number + 1)) >{count}
echo '{{"bits_per_weight": 4.125}}'
exit "${{codes[number]}}"
"""
    command = folder / "optgptq"
    command.write_text(script)
    command.chmod(0o755)
    return folder
