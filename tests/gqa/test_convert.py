"""Whole models: nothing is lost where nothing has to be, and what is written is what was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.grouped import gqa_recipe, grouped, some_windows, with_common_subspaces
from support.quantizable import padded_windows
from support.tiny_models import TINY_MODELS, random_tokens
from support.transformed import exact_logits, relative_error, saved

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import GateError, ModelError, RecipeError
from optgptq.evaluation.perplexity import evaluate
from optgptq.gqa.plan import plan_grouping
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec

MODELS = {tiny.name: tiny for tiny in TINY_MODELS}
LOSSLESS = [
    ("llama-grouped_query", 2),
    ("llama-multi_head_biases", 3),
    ("mistral-short_window", 2),
    ("qwen2-biases", 2),
    ("gemma2-softcaps", 2),
    ("phi3-longrope", 2),
    ("mpt-alibi", 2),
    ("mpt-alibi", 4),
    ("falcon-rw_alibi", 2),
    ("falcon-rw_alibi", 6),
    ("falcon-multi_head_parallel", 3),
    ("falcon-grouped", 2),
]


def opened(name: str, folder: Path) -> CheckpointFolder:
    return saved(MODELS[name], folder)


def same_logits(first: object, second: object, bound: float) -> None:
    tokens = random_tokens(2, 40, seed=9)
    logits = [exact_logits(load_decoder(source, dtype=torch.float64), tokens) for source in (first, second)]
    assert relative_error(logits[1], logits[0]) < bound


@pytest.mark.parametrize(("name", "size"), LOSSLESS)
def test_heads_of_a_common_subspace_merge_without_loss(name: str, size: int, tmp_path: Path) -> None:
    folder = opened(name, tmp_path / "model")
    heads = model_spec(folder).num_kv_heads
    groups = [tuple(range(first, first + size)) for first in range(0, heads, size)]
    alike = with_common_subspaces(folder, groups, tmp_path / "alike")
    recipe = gqa_recipe(group=size, grouping="adjacent", refit_output=False, refit_queries=False)
    model = grouped(alike, recipe, tmp_path / "heads")
    assert model_spec(model.source).num_kv_heads == heads // size
    same_logits(alike, model.source, 1e-10)
    assert model.record["perplexity_after"] == pytest.approx(model.record["perplexity_before"], rel=1e-6)
    assert model.record["kv_bytes_per_token_before"] == size * model.record["kv_bytes_per_token_after"]
    assert all(layer["key_error"] < 1e-9 and layer["value_error"] < 1e-9 for layer in model.record["layers"])


def test_distant_heads_are_found_and_put_side_by_side(tmp_path: Path) -> None:
    folder = opened("llama-multi_head_biases", tmp_path / "model")
    alike = with_common_subspaces(folder, [(0, 4), (1, 3), (2, 5)], tmp_path / "alike")
    model = grouped(alike, gqa_recipe(group=2, refit_output=False, refit_queries=False), tmp_path / "heads")
    assert [layer["groups"] for layer in model.record["layers"]] == [[[0, 4], [1, 3], [2, 5]]] * 3
    same_logits(alike, model.source, 1e-10)


@pytest.mark.parametrize("name", ["llama-multi_head_biases", "mpt-alibi", "falcon-rw_alibi"])
def test_what_is_told_is_what_the_written_model_does(name: str, tmp_path: Path) -> None:
    folder = opened(name, tmp_path / "model")
    windows = some_windows()
    model = grouped(folder, gqa_recipe(group=2), tmp_path / "heads", windows=windows)
    held_out = windows.tokens_WS[-2:]
    decoders = [load_decoder(source, dtype=torch.float64) for source in (model.source, folder)]
    result = evaluate(decoders[0], held_out, baseline=decoders[1])
    assert model.record["perplexity_after"] == pytest.approx(result.perplexity, rel=1e-6)
    assert model.record["perplexity_before"] == pytest.approx(result.baseline_perplexity, rel=1e-6)
    assert model.record["mean_kl"] == pytest.approx(result.mean_kl, rel=1e-4)
    assert model.record["num_tokens"] == result.num_tokens
    for layer in model.record["layers"]:
        for refit in (layer["output_refit"], layer["query_refit"]):
            assert refit["held_out_error_after"] <= refit["held_out_error_before"]
        assert 0 < layer["key_error"] < 1
        assert 0 < layer["value_error"] < 1


def test_padding_is_in_no_moment_and_no_figure(tmp_path: Path) -> None:
    folder = opened("llama-multi_head_biases", tmp_path / "model")
    tokens = random_tokens(8, 24, seed=5)
    lengths = [24, 20, 24, 9, 24, 24, 13, 24]
    records = []
    for fill in (0, 1):
        padded = padded_windows(tokens, lengths)
        changed = padded.tokens_WS.clone()
        for row, length in enumerate(lengths):
            changed[row, length:] = fill
        windows = replace(padded, tokens_WS=changed)
        records.append(grouped(folder, gqa_recipe(group=2), tmp_path / f"heads{fill}", windows=windows).record)
    assert records[0]["num_tokens"] == 12 + 23
    assert records[0]["perplexity_after"] == pytest.approx(records[1]["perplexity_after"], rel=1e-9)


def test_the_gate_compares_perplexities(tmp_path: Path) -> None:
    folder = opened("llama-multi_head_biases", tmp_path / "model")
    record = grouped(folder, gqa_recipe(group=6), tmp_path / "free").record
    ratio = record["perplexity_after"] / record["perplexity_before"]
    assert math.isfinite(ratio)
    grouped(folder, gqa_recipe(group=6, max_perplexity_ratio=ratio * 1.001), tmp_path / "above")
    with pytest.raises(GateError) as caught:
        grouped(folder, gqa_recipe(group=6, max_perplexity_ratio=ratio * 0.999), tmp_path / "below")
    assert f"{record['perplexity_after']:.6g}" in caught.value.found
    assert "held-out calibration windows" in caught.value.found


@pytest.mark.parametrize(
    ("name", "values", "error", "text"),
    [
        ("bloom-alibi", {"group": 2}, ModelError, "falcon, gemma"),
        ("opt-pre_norm", {"group": 3}, ModelError, "family opt"),
        ("gpt2-conv1d", {"group": 3}, ModelError, "family gpt2"),
        ("qwen3-norms", {"group": 2}, ModelError, "a norm stands between"),
        ("mpt-six_heads_clipped", {"group": 2}, ModelError, "clipped at 0.4"),
        ("llama-multi_query", {"group": 2}, ModelError, "one key/value head already"),
        ("llama-grouped_query", {"group": 3}, RecipeError, "a divisor of the model's 2 key/value heads"),
        ("mpt-alibi", {"group": 2, "grouping": "similarity"}, RecipeError, "slopes belong to the places"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(
    name: str, values: dict[str, object], error: type[Exception], text: str, tmp_path: Path
) -> None:
    folder = opened(name, tmp_path / "model")
    with pytest.raises(error, match=text):
        plan_grouping(folder, model_spec(folder), gqa_recipe(**values))


def test_one_head_per_group_is_no_conversion(tmp_path: Path) -> None:
    folder = opened("bloom-alibi", tmp_path / "model")
    assert plan_grouping(folder, model_spec(folder), gqa_recipe()) is None


def test_too_few_windows_are_refused(tmp_path: Path) -> None:
    folder = opened("llama-grouped_query", tmp_path / "model")
    with pytest.raises(RecipeError, match="at least 4 calibration windows"):
        grouped(folder, gqa_recipe(group=2), tmp_path / "heads", windows=some_windows(3))
