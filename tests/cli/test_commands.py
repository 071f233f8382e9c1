"""The commands end to end on the bundled model, in this process."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from optgptq.bundled import bundled_path
from optgptq_cli.main import main

STORY = "bundled:story-llama"
SMALL = ["--set", "calibration.source=bundled:story-calibration", "--set", "calibration.num_windows=4"]
SMALL += ["--set", "calibration.window_size=128", "--set", "weights.group_size=64"]
TEXT = ["--text", "bundled:story-evaluation", "--window-size", "128", "--max-tokens", "2048"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized bundled model, made by the command itself."""
    folder = tmp_path_factory.mktemp("made") / "w4"
    assert main(["quantize", STORY, "-r", "gptq-w4", "-o", str(folder), "--quiet", *SMALL]) == 0
    return folder


def run_json(capsys, *arguments: str, code: int = 0) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_quantize_ends_with_one_json_object(tmp_path, capsys):
    output, record = tmp_path / "out", tmp_path / "record.json"
    arguments = ["quantize", STORY, "-r", "rtn-w4", "-o", str(output), "--record", str(record), *SMALL]
    result = run_json(capsys, *arguments)
    assert set(result) == {"output", "seconds", "peak_memory_bytes", "bits_per_weight", "warnings"}
    assert result["output"] == str(output)
    assert 0 < result["seconds"] < 300
    assert result["peak_memory_bytes"] > 10**7
    written = json.loads(record.read_text())
    assert written["recipe"]["weights"]["group_size"] == 64
    assert written["seconds"] == result["seconds"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run_json(capsys, "inspect", str(output))["bits_per_weight"] == pytest.approx(result["bits_per_weight"])


def test_quantize_for_people_goes_to_stdout_and_progress_to_stderr(tmp_path, capsys):
    assert main(["quantize", STORY, "-r", "rtn-w4", "-o", str(tmp_path / "out"), *SMALL]) == 0
    captured = capsys.readouterr()
    assert "bits per weight" in captured.out
    assert "decoder layer 6/6, 7 linears, mean loss" in captured.err
    assert "decoder layer" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["quantize", "/no/such/model", "-o", "OUT"], 3, "/no/such/model"),
        (["quantize", STORY, "-o", "OUT", "-r", "no-such-recipe"], 2, "no-such-recipe"),
        (["quantize", STORY, "-o", "OUT", "--set", "weights.bitz=3"], 2, "weights.bits"),
        (["quantize", STORY, "-o", "OUT", "--device", "warp"], 2, "device warp"),
        (["quantize", STORY, "-o", "OUT", "--record", "/no/such/folder/r.json"], 3, "/no/such/folder"),
        (["quantize", STORY, "-o", "OUT", "--set", "weights.group_size=48"], 2, "group_size"),
        (["eval", STORY], 2, "--text bundled:story-evaluation"),
        (["eval", STORY, "--max-kl", "0.1", "--text", "x.txt"], 2, "--baseline"),
        (["eval", STORY, "--text", "/no/such.txt"], 3, "/no/such.txt"),
        (["generate", STORY, "--max-tokens", "0"], 2, "max_tokens"),
        (["inspect", "/no/such/model"], 3, "/no/such/model"),
        (["verify", "/no/such/model"], 3, "/no/such/model"),
        (["convert", STORY, "-o", "OUT", "--to", "gptq"], 3, "dense"),
        (["convert", STORY, "-o", "OUT", "--to", "gguf"], 2, "gptq_v2"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(arguments, code, text, tmp_path, capsys):
    arguments = [str(tmp_path / "out") if item == "OUT" else item for item in arguments]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_refused_and_with_overwrite_replaced(tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "mine.txt").write_text("precious")
    command = ["quantize", STORY, "-r", "rtn-w4", "-o", str(output), "--quiet", *SMALL]
    assert main(command) == 3
    assert (output / "mine.txt").read_text() == "precious"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (output / "model.safetensors").exists()
    assert not (output / "mine.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.run.json"]


def test_eval_prints_the_figures_of_the_contract(checkpoint, capsys):
    result = run_json(capsys, "eval", str(checkpoint), "--baseline", STORY, *TEXT)
    assert result["num_tokens"] == 16 * 127
    assert 0 < result["mean_kl"] < 0.2
    assert result["baseline_perplexity"] < result["perplexity"] < 1.2 * result["baseline_perplexity"]
    assert 0.8 < result["top1_agreement"] < 1
    alone = run_json(capsys, "eval", str(checkpoint), *TEXT)
    assert alone["perplexity"] == pytest.approx(result["perplexity"])
    assert alone["mean_kl"] is None


def test_eval_for_people(checkpoint, capsys):
    assert main(["eval", str(checkpoint), "--baseline", STORY, *TEXT]) == 0
    captured = capsys.readouterr()
    assert "mean KL, nats per token" in captured.out
    assert "16 windows of 128 tokens" in captured.err


def test_a_missed_gate_is_exit_code_7_after_the_result(checkpoint, capsys):
    arguments = ["eval", str(checkpoint), "--baseline", STORY, *TEXT, "--max-kl", "1e-6", "--max-ppl", "1000"]
    assert main([*arguments, "--json"]) == 7
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [(gate["gate"], gate["passed"]) for gate in result["gates"]] == [("--max-ppl", True), ("--max-kl", False)]
    error = json.loads(captured.err.splitlines()[-1])["error"]
    assert error["where"] == "quality gate --max-kl"
    assert "missed by" in error["found"]
    assert main([*arguments[:-4], "--max-kl", "1"]) == 0


def test_inspect(checkpoint, capsys):
    report = run_json(capsys, "inspect", str(checkpoint))
    assert report["format"] == "gptq"
    assert report["bits_per_weight"] == pytest.approx(4 + 16 / 64 + 4 / 64)
    assert len(report["layers"]) == 42
    assert all(0 < layer["loss"] < layer["rtn_loss"] * 1.5 for layer in report["layers"])
    assert report["recipe"] == "gptq-w4"
    assert main(["inspect", str(checkpoint)]) == 0
    assert "model.layers.5.mlp.down_proj" in capsys.readouterr().out
    assert run_json(capsys, "inspect", STORY)["format"] == "dense"


def test_verify_accepts_what_is_intact_and_names_what_is_not(checkpoint, tmp_path, capsys):
    assert run_json(capsys, "verify", str(checkpoint))["intact"]
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    with (damaged / "model.safetensors").open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"\xff\x00\xff\x00")
    report = run_json(capsys, "verify", str(damaged), code=3)
    assert not report["intact"]
    assert report["problems"][0]["where"] == "model.safetensors"


def test_convert(checkpoint, tmp_path, capsys):
    output = tmp_path / "ct"
    result = run_json(capsys, "convert", str(checkpoint), "-o", str(output), "--to", "compressed-tensors")
    assert (result["source_format"], result["format"], result["num_quantized"]) == ("gptq", "compressed-tensors", 42)
    first = run_json(capsys, "eval", str(checkpoint), *TEXT)
    second = run_json(capsys, "eval", str(output), *TEXT)
    assert first["perplexity"] == second["perplexity"]


def test_generate_writes_text(checkpoint, capsys):
    prompt = "Once upon a time"
    assert main(["generate", str(checkpoint), prompt, "--max-tokens", "20", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 20


def test_generate_json_and_seeds(checkpoint, capsys):
    sampled = ["generate", str(checkpoint), "Tom", "Once", "--max-tokens", "12", "--temperature", "1", "--seed", "3"]
    first, second = run_json(capsys, *sampled), run_json(capsys, *sampled)
    assert first["texts"] == second["texts"]
    assert [entry["prompt"] for entry in first["texts"]] == ["Tom", "Once"]
    assert all(len(entry["token_ids"]) <= 12 for entry in first["texts"])
    other = run_json(capsys, *sampled[:-1], "4")
    assert other["texts"] != first["texts"]


def test_generate_ends_at_the_end_token_and_without_a_prompt_begins_with_bos(capsys):
    result = run_json(capsys, "generate", STORY, "--max-tokens", "400")
    (text,) = result["texts"]
    assert text["num_prompt_tokens"] == 1
    assert text["finish_reason"] == "stop"
    assert text["token_ids"][-1] == 1
    assert "</s>" not in text["text"]
    endless = run_json(capsys, "generate", STORY, "--max-tokens", "400", "--ignore-eos")["texts"][0]
    assert len(endless["token_ids"]) == 400
    assert endless["finish_reason"] == "length"


def test_bos_is_added_only_where_it_is_wanted(capsys):
    counts = []
    for extra in ([], ["--bos"], ["--no-bos"]):
        result = run_json(capsys, "generate", STORY, "Tom", "--max-tokens", "1", *extra)
        counts.append(result["texts"][0]["num_prompt_tokens"])
    assert counts[1] == counts[0] + 1 == counts[2] + 1


def test_doctor(capsys):
    report = run_json(capsys, "doctor")
    assert report["versions"]["optgptq"]
    assert report["kernels"][0]["operation"] == "affine_matmul"
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert "free disk" in page
    assert "affine_matmul on cpu" in page


@pytest.mark.parametrize("command", [["doctor"], ["inspect", STORY], ["verify", str(bundled_path("story-llama"))]])
def test_quiet_prints_nothing(command, capsys):
    assert main([*command, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
