"""`optgptq eval` with gates: every outcome is told, in words, as JSON and as JUnit XML, before the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.checkpoints import mixed_story_layouts, quantize_all, write_checkpoint

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import write_manifest
from optgptq.errors import OutputError
from optgptq.evaluation import junit
from optgptq_cli.main import main

STORY = "bundled:story-llama"
TEXT = ["--text", "bundled:story-evaluation", "--window-size", "64", "--max-tokens", "512"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a quantized story model with a manifest."""
    source, layouts = CheckpointFolder.open(bundled_path(STORY)), mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    folder = tmp_path_factory.mktemp("gates") / "out"
    write_checkpoint(source, folder, layouts, weights, format_name="compressed-tensors")
    facts = {"method": "gptq", "loss": 0.125, "clip_fraction": 0.0, "damp_ratio_used": 0.01, "num_dead_inputs": 0}
    layers = [{"name": name, **facts} for name in weights]
    write_manifest(
        folder,
        {
            "recipe": {"weights": {"method": "gptq"}},
            "layers": layers,
            "decoder_layers": [{"index": 4, "output_error": 0.25}],
        },
    )
    return str(folder)


def cases(path: Path) -> dict[str, list[str]]:
    """Return what stands in each test case of a report, by its name."""
    root = ElementTree.parse(path).getroot()
    return {case.attrib["name"]: [child.tag for child in case] for case in root.iter("testcase")}


def test_gates_of_a_record_need_no_text(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", output, "--gate", "max_layer_error=0.25", "--gate", "max_linear_loss=0.125", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "perplexity" not in record
    assert [(each["name"], each["value"], each["passed"]) for each in record["gates"]] == [
        ("max_layer_error", 0.25, True),
        ("max_linear_loss", 0.125, True),
    ]
    assert record["gates"][0]["where"] == "decoder layer 4"


def test_all_outcomes_are_told_before_the_exit(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gates.xml"
    gates = ["--max-kl", "1e-9", "--gate", "max_layer_error=0.2", "--gate", "max_perplexity=1000"]
    assert main(["eval", output, *TEXT, "--baseline", STORY, *gates, "--json", "--junit", str(report)]) == 7
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert {each["name"]: each["passed"] for each in record["gates"]} == {
        "max_perplexity": True,
        "max_kl": False,
        "max_layer_error": False,
    }
    error = json.loads(captured.err.splitlines()[-1])["error"]
    assert error["exit_code"] == 7
    assert error["where"] == "quality gate --max-kl, --gate max_layer_error"
    assert "0.25 in decoder layer 4 (missed by 0.05)" in error["found"]
    assert cases(report) == {"max_perplexity": ["system-out"], "max_kl": ["failure"], "max_layer_error": ["failure"]}
    properties = {each.attrib["name"] for each in ElementTree.parse(report).getroot().iter("property")}
    assert {"perplexity", "mean_kl", "num_tokens", "max_kl.value"} <= properties


def test_the_page_tells_the_place(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", output, "--gate", "max_layer_error=0.2"]) == 7
    captured = capsys.readouterr()
    assert "missed by 0.05: 0.25 against 0.2 (decoder layer 4)" in captured.out
    assert "quality gate --gate max_layer_error" in captured.err


@pytest.mark.parametrize("model", [STORY, "output"])
def test_a_figure_that_no_record_holds_is_bad_input(
    model: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "gates.xml"
    folder = output if model == "output" else model
    arguments = ["--gate", "min_tokens_per_linear=1", "--gate", "max_dense_share=1", "--junit", str(report)]
    assert main(["eval", folder, *arguments]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "record of the checkpoint" in captured.err
    assert cases(report) == {"max_dense_share": ["error"], "min_tokens_per_linear": ["error"]}


def test_a_dense_model_is_all_dense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", STORY, "--gate", "max_dense_share=0.5"]) == 7
    assert "share of weights left dense at most 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gate", "max_kl=0.1"], "--baseline"),
        (["--gate", "max_perplexity=9"], "--text"),
        (["--gate", "max_kll=0.1"], "Did you mean max_kl?"),
        (["--gate", "max_dense_share=0.1", "--decode"], "--text"),
        ([], "--text"),
        ([*TEXT, "--max-kl", "1", "--gate", "max_kl=1", "--baseline", STORY], "each gate once"),
    ],
)
def test_gates_that_cannot_be_obeyed_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", STORY, *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_place_that_takes_no_report_is_refused_before_any_work(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", output, "--gate", "max_layer_error=1", "--junit", str(tmp_path / "no" / "x.xml")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--junit" in captured.err


@pytest.mark.parametrize(("limit", "code", "text"), [("0.2", 7, "quality gate"), ("0.3", 3, "disk")])
def test_a_report_that_cannot_be_written_does_not_hide_the_outcome(
    limit: str,
    code: int,
    text: str,
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(path: Path, document: bytes) -> None:
        raise OutputError(str(path), expected="a disk", found="none", action="Buy one.")

    monkeypatch.setattr(junit, "write_junit", fail)
    arguments = ["--gate", f"max_layer_error={limit}", "--junit", str(tmp_path / "gates.xml"), "--json"]
    assert main(["eval", output, *arguments]) == code
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["gates"]) == 1
    assert "Buy one." in captured.err
    assert text in captured.err.splitlines()[-1]
