"""Evaluation from folders: the real bundled model, and everything that does not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import mixed_story_layouts, quantize_all, write_checkpoint

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource
from optgptq.errors import InputError, TextError, UsageError
from optgptq.evaluation.run import EvaluationSettings, evaluate_folders

STORY = bundled_path("bundled:story-llama")


def story_settings(**values: int) -> EvaluationSettings:
    return EvaluationSettings(source=TextSource(source="bundled:story-evaluation"), **values)


def test_the_bundled_model_has_the_known_perplexity():
    report = evaluate_folders(STORY, story_settings(window_size=512, max_tokens=20_000))
    assert round(report.result.perplexity, 3) == 5.283
    assert report.result.num_tokens == 39 * 511
    assert (report.num_windows, report.remainder_tokens) == (39, 32)
    assert "32 tokens at the end fill no window" in report.notes[0]


def test_a_stride_scores_every_token_but_the_first_once():
    report = evaluate_folders(STORY, story_settings(window_size=128, max_tokens=1024, stride=100))
    # Windows start at 0, 100, ..., 800 and end at 928.
    assert report.num_windows == 9
    assert report.result.num_tokens == 927
    plain = evaluate_folders(STORY, story_settings(window_size=128, max_tokens=1024))
    assert report.result.perplexity < plain.result.perplexity


def test_the_window_is_the_models_own_where_none_is_named():
    assert evaluate_folders(STORY, story_settings(max_tokens=2048)).window_size == 1024


def test_windows_beyond_the_models_positions_are_a_warning():
    report = evaluate_folders(STORY, story_settings(window_size=1100, max_tokens=1100))
    assert len(report.warnings) == 1
    assert "1100 tokens" in report.warnings[0]
    assert "1024 positions" in report.warnings[0]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_quantized_checkpoints_are_scored_by_their_decoded_weights(tmp_path, form):
    source = CheckpointFolder.open(STORY)
    layouts = mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name=form)
    folder = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name=form).path
    report = evaluate_folders(folder, story_settings(window_size=128, max_tokens=2048), baseline=STORY)
    dense = make_dense(tmp_path / "dense", weights)
    expected = evaluate_folders(dense, story_settings(window_size=128, max_tokens=2048), baseline=STORY)
    assert report.result == expected.result
    assert 0 < report.result.mean_kl < 1
    assert report.result.baseline_perplexity < report.result.perplexity


def make_dense(folder, weights):
    shutil.copytree(STORY, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = weight.dequantize(torch.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edited(tmp_path, file: str, change) -> object:
    folder = tmp_path / "edited"
    shutil.copytree(STORY, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_a_baseline_that_reads_text_differently_is_refused(tmp_path):
    def swap(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]

    other = edited(tmp_path, "tokenizer.json", swap)
    with pytest.raises(InputError, match="tokenizer of the baseline"):
        evaluate_folders(STORY, story_settings(window_size=64, max_tokens=640), baseline=other)


def test_a_baseline_whose_tokenizer_differs_only_in_spelling_is_accepted(tmp_path):
    same = edited(tmp_path, "tokenizer.json", lambda tokenizer: None)
    report = evaluate_folders(STORY, story_settings(window_size=64, max_tokens=640), baseline=same)
    assert report.result.mean_kl == 0


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    def lengthen(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["e"] = 2000

    folder = edited(tmp_path, "tokenizer.json", lengthen)
    with pytest.raises(InputError) as caught:
        evaluate_folders(folder, story_settings(window_size=64, max_tokens=640))
    assert caught.value.found == "2000"


def test_a_text_shorter_than_a_window(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.")
    with pytest.raises(TextError, match="at least 512 tokens"):
        evaluate_folders(STORY, EvaluationSettings(source=TextSource(source=str(text)), window_size=512))


def test_numbers_that_cannot_be_obeyed():
    with pytest.raises(UsageError, match="--stride"):
        evaluate_folders(STORY, story_settings(window_size=512, stride=0))
