"""`optgptq report`: pages and cards of a small checkpoint, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint
from support.pages import Page
from support.runs import EVALUATION

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import write_manifest
from optgptq.journal.store import open_journal
from optgptq.reports.run_record import build_run_record, record_path, write_run_record
from optgptq_cli.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with manifest and run record."""
    source, layouts = CheckpointFolder.open(STORY_LLAMA), story_layouts(group_size=128)
    folder = tmp_path_factory.mktemp("made") / "out"
    write_checkpoint(source, folder, layouts, quantize_all(source, layouts, format_name="gptq"), format_name="gptq")
    layers = [{"name": layout.name, "method": "rtn", "loss": 0.01, "rtn_loss": 0.02} for layout in layouts]
    manifest = {"optgptq": "0.1.0", "device": "cpu", "recipe": {"name": "mine"}, "layers": layers, "warnings": ["look"]}
    write_manifest(folder, manifest)
    write_run_record(record_path(folder), build_run_record(folder, {"seconds": 12.0, "peak_memory_bytes": 2**30}))
    return folder


def test_a_page_beside_the_checkpoint(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    path = made.with_name("out.report.html")
    assert told["html"] == str(path)
    assert told["html_bytes"] == path.stat().st_size < 2_000_000
    assert told["warnings"] == ["look"]
    assert told["notes"] == []
    read = Page(path.read_text(encoding="utf-8"))
    assert read.problems == []
    assert "mine" in read.text
    assert "look" in read.text
    assert "12 s" in read.text
    assert "vLLM 0.33 (cuda) loads" in read.text
    assert main(["verify", str(made), "--quiet"]) == 0


def test_an_evaluation_and_a_card(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page, card = tmp_path / "eval.json", tmp_path / "page.html", tmp_path / "card.md"
    figures.write_text(json.dumps(EVALUATION), encoding="utf-8")
    arguments = ["report", str(made), "--eval", str(figures), "--html", str(page), "--card", str(card)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert str(page) in out
    assert str(card) in out
    assert "5.0875" in page.read_text(encoding="utf-8")
    text = card.read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "vllm serve PATH_OR_HUB_ID\n" in text


def test_a_record_of_another_run_is_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"manifest_sha256": "0", "seconds": 1234.0}), encoding="utf-8")
    page = tmp_path / "page.html"
    assert main(["report", str(made), "--record", str(other), "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert "note: out: other.json is of another run" in captured.err
    text = Page(page.read_text(encoding="utf-8")).text
    assert "other.json is of another run" in text
    assert "20:34" not in text


def test_two_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made), "--compare", str(STORY_LLAMA), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    page = made.with_name("out.against-story-llama.html")
    assert "Two quantizations: out and story-llama" in page.read_text(encoding="utf-8")


def test_a_dense_model_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(STORY_LLAMA), "--html", str(page)]) == 0
    assert "No linear is quantized." in page.read_text(encoding="utf-8")
    assert "has no manifest" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--card"])
def test_nothing_is_written_into_a_checkpoint(made: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made), option, str(made / "README.md")]) == 3
    assert "a file outside the checkpoint" in capsys.readouterr().err
    assert not (made / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--html", "none/page.html"], "no folder none"),
        (["--eval", "none.json"], "optgptq eval"),
        (["--record", "none.json"], "a run record"),
        (["--compare", "none"], "none"),
    ],
)
def test_what_is_not_there_is_refused(
    made: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    assert main(["report", str(made), *arguments]) == 3
    assert text in capsys.readouterr().err


def test_an_evaluation_of_something_else_is_refused(made: Path, tmp_path: Path, capsys) -> None:
    wrong = tmp_path / "eval.json"
    wrong.write_text('{"perplexity": "good"}', encoding="utf-8")
    assert main(["report", str(made), "--eval", str(wrong)]) == 3
    assert "an object without perplexity and num_tokens" in capsys.readouterr().err


def test_pictures_are_drawn_by_this_command_only() -> None:
    code = (
        "import sys, optgptq.reports.run_record, optgptq.reports.error_maps, optgptq_cli.main; "
        "sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_that_is_not_finished_says_what_it_has_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    with open_journal(work_folder(output)) as journal:
        journal.begin({"key": {}, "num_decoder_layers": 3})
        journal.put("layer-00000", {}, {})
        assert main(["report", str(output)]) == 3
    told = capsys.readouterr().err
    assert "a job that was interrupted" in told
    assert "1 finished decoder layer is kept. Run the same command again" in told
