"""`optgptq verify --target`: answers beside the integrity check, and exit code 4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq_cli.main import main


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts(bits=3)
    folder = tmp_path_factory.mktemp("targets") / "w3"
    weights = quantize_all(source, layouts, format_name="gptq")
    return write_checkpoint(source, folder, layouts, weights, format_name="gptq").path


def test_a_target_that_loads(three_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(three_bits), "--target", "gptqmodel", "--target", "transformers"]) == 0
    captured = capsys.readouterr()
    assert "GPTQModel 7.7: loads it" in captured.out
    assert "transformers 5.23: needs optimum >= 1.24 and gptqmodel >= 1.4.3" in captured.out


def test_a_target_that_refuses(three_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(three_bits), "--target", "vllm"]) == 4
    captured = capsys.readouterr()
    assert "vLLM 0.33 (cuda): It loads after optgptq convert --to compressed-tensors." in captured.out
    assert "expected: 4 or 8 bits" in captured.err
    assert "found:    3" in captured.err


def test_all_reasons_are_in_the_object(three_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(three_bits), "--target", "optgptq", "--target", "sglang", "--tensor-parallel", "4"]
    assert main([*arguments, "--json"]) == 4
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["intact"] is True
    first, second = result["targets"]
    assert (first["target"], first["loads"]) == ("optgptq", False)
    assert first["suggestion"]["tensor_parallel"] == 1
    assert {refusal["rule"] for refusal in second["refusals"]} >= {"bits", "tensor_parallel"}
    assert json.loads(captured.err)["error"]["exit_code"] == 4


def test_without_a_target_nothing_is_said(three_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(three_bits), "--json"]) == 0
    assert "targets" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "vlm"], "Did you mean vllm"),
        (["--tensor-parallel", "2"], "--target ENGINE"),
        (["--target", "vllm", "--tensor-parallel", "0"], "--tensor-parallel"),
    ],
)
def test_bad_usage(three_bits: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(three_bits), *arguments]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_a_damaged_checkpoint_is_not_asked_about(
    three_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(three_bits, tmp_path / "damaged")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".scales"))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", str(folder), "--target", "vllm", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["intact"] is False
    assert result["targets"] == []
