"""The examples with the real command: a checkpoint, its figures and its report, and a gate that is missed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.ci_scripts import RECIPE, environment, page_blocks, run_action, run_bash

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
MODEL = "bundled:story-llama"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def failures(file: Path) -> int:
    return len(ElementTree.parse(file).getroot().findall(".//failure"))


def test_the_action_leaves_checkpoint_figures_and_report_even_where_a_gate_is_missed(workspace):
    ended = run_action(
        workspace,
        workspace,
        model=MODEL,
        recipe="recipe.yaml",
        set="weights.bits=8\nweights.group_size=64",
        target="transformers",
        gates="max_linear_loss=1e-9\nmax_dense_share=0.9",
        output="made/out",
        minutes="5",
        offline="true",
    )
    assert ended.code == 7, ended.stderr
    results = workspace / "made" / "out.results"
    assert ended.outputs["exit-code"] == "7"
    assert float(ended.outputs["bits-per-weight"]) > 8
    assert failures(results / "junit.xml") == 1
    assert json.loads((results / "run.json").read_text())["recipe"]["weights"]["bits"] == 8
    assert "<html" in (results / "report.html").read_text()
    assert (results / "model-card.md").read_text().startswith("---")
    assert (workspace / "made" / "out" / "model.safetensors").exists()
    assert not (workspace / "made" / ".out.work").exists()
    assert "exit code 7" in ended.summary
    assert len(ended.stderr.splitlines()) < 60


def test_the_shell_script_does_the_whole_job(workspace):
    (workspace / "recipe.yaml").write_text(RECIPE + "gates: {window_size: 128}\n")
    (script,) = page_blocks("bash")
    variables = environment(workspace, MAX_INCREASE="1000", SET="gates.max_tokens=512", LIMIT="300")
    ended = run_bash(script, workspace, variables, MODEL, "recipe.yaml", "out")
    assert ended.code == 0, ended.stderr
    assert ended.stdout.endswith("done: out\n")
    assert failures(workspace / "out.results" / "junit.xml") == 0
    assert {file.name for file in (workspace / "out.results").iterdir()} == {
        "plan.txt",
        "summary.json",
        "run.json",
        "junit.xml",
        "report.html",
        "card.md",
    }
