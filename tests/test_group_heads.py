"""Converted models as folders: checked, loadable here and, where it can say so, in transformers; then quantized."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from support.quantizable import tiny_model, wide_llama, write_model
from support.stops import folder_bytes
from support.texts import shared_path
from support.tiny_models import TinyModel, random_tokens

from optgptq.calibration.disk_states import Activations, DiskStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import MANIFEST_FILE
from optgptq.errors import GateError, ModelError, RecipeError
from optgptq.evaluation.run import EvaluationSettings, TextSource, evaluate_folders
from optgptq.formats.verify import verify_folder
from optgptq.group_heads import GroupResult, group_model
from optgptq.job_options import JobOptions
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec
from optgptq.quantize import quantize
from optgptq.recipe import load_recipe
from optgptq.recipe.records import Recipe
from optgptq.runtime.load import load_model

TEXT = "bundled:story-calibration"
SMALL = ("calibration.source=" + TEXT, "calibration.num_windows=8", "calibration.window_size=24")


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("opt-gqa-w4", [*SMALL, *overrides])


def converted(tiny: TinyModel, tmp_path: Path, *overrides: str, dtype: torch.dtype = torch.float32) -> GroupResult:
    source = write_model(tiny, tmp_path / "model", dtype=dtype)
    return group_model(source, small_recipe(*overrides), tmp_path / "grouped")


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(tokens, use_cache=False).logits.float()


@pytest.mark.parametrize(
    "tiny",
    [
        wide_llama(num_key_value_heads=4, attention_bias=True),
        tiny_model("qwen2-biases"),
        tiny_model("mistral-short_window"),
        tiny_model("gemma-plain"),
        tiny_model("phi3-longrope"),
        tiny_model("gemma2-softcaps"),
        tiny_model("falcon-multi_head_parallel"),
        tiny_model("falcon-multi_head_parallel", alibi=True),
        tiny_model("falcon-grouped"),
    ],
    ids=lambda tiny: f"{tiny.name}-{'alibi' if tiny.values.get('alibi') else 'as-it-is'}",
)
def test_transformers_runs_the_converted_model(tiny: TinyModel, tmp_path: Path) -> None:
    result = converted(tiny, tmp_path)
    assert result.warnings == tuple(warning for warning in result.warnings if "gqa.group" not in warning)
    tokens = random_tokens(2, 20)
    ours = load_decoder(CheckpointFolder.open(result.output)).logits(tokens)
    torch.testing.assert_close(ours, transformers_logits(result.output, tokens), rtol=2e-4, atol=2e-4)


def test_an_mpt_is_written_as_llm_foundry_writes_it(tmp_path: Path) -> None:
    result = converted(tiny_model("mpt-alibi"), tmp_path, dtype=torch.bfloat16)
    config = json.loads((result.output / "config.json").read_text())
    assert config["attn_config"]["attn_type"] == "grouped_query_attention"
    assert config["attn_config"]["kv_n_heads"] == 2
    folder = CheckpointFolder.open(result.output)
    # Queries, keys and values of one position: width 24 of 4 heads, and 2 shared heads of 6 each.
    assert folder.info("transformer.blocks.0.attn.Wqkv.weight").shape == (24 + 2 * 12, 24)
    assert folder.info("transformer.blocks.0.attn.Wqkv.weight").dtype == "BF16"
    assert any("llm-foundry" in warning for warning in result.warnings)
    with pytest.raises(StrictDataclassFieldValidationError, match="grouped_query_attention"):
        transformers_logits(result.output, random_tokens(1, 5))


def test_a_sequential_falcon_fails_loudly_in_transformers(tmp_path: Path) -> None:
    result = converted(tiny_model("falcon-rw_alibi"), tmp_path)
    assert any("transformers cannot run" in warning for warning in result.warnings)
    spec = model_spec(CheckpointFolder.open(result.output))
    assert (spec.num_kv_heads, spec.residual, spec.qkv_layout) == (3, "sequential", "grouped_interleaved")
    with pytest.raises(UnboundLocalError):
        transformers_logits(result.output, random_tokens(1, 5))


def test_the_folder_is_sound_and_says_what_was_done(tmp_path: Path) -> None:
    result = converted(wide_llama(num_key_value_heads=4), tmp_path, "gqa.text=bundled:story-evaluation")
    report = verify_folder(CheckpointFolder.open(result.output))
    assert (report.format, report.has_manifest, report.problems) == ("dense", True, ())
    manifest = json.loads((result.output / MANIFEST_FILE).read_text())
    assert manifest["gqa"] == result.record
    assert manifest["recipe"]["gqa"]["group"] == 2
    assert manifest["gqa"]["measured_on"] == "text"
    # 4 heads of 12 numbers in 2 layers, keys and values, 2 bytes each.
    assert manifest["gqa"]["kv_bytes_per_token_before"] == 4 * 12 * 2 * 2 * 2
    assert manifest["gqa"]["kv_bytes_per_token_after"] == 2 * 12 * 2 * 2 * 2
    settings = EvaluationSettings(
        source=TextSource(source="bundled:story-evaluation"), window_size=24, max_tokens=20_000
    )
    evaluated = evaluate_folders(result.output, settings, baseline=tmp_path / "model").result
    assert evaluated.perplexity == pytest.approx(result.record["perplexity_after"], rel=1e-4)
    assert evaluated.baseline_perplexity == pytest.approx(result.record["perplexity_before"], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "model"]
    assert not (result.output / ".heads").exists()


@pytest.mark.parametrize("name", ["mpt-alibi", "llama-grouped_query"])
def test_a_converted_model_is_quantized_in_one_go(name: str, tmp_path: Path) -> None:
    tiny = tiny_model(name, n_layers=1) if name == "mpt-alibi" else wide_llama(num_key_value_heads=4)
    source = write_model(tiny, tmp_path / "model")
    recipe = small_recipe("weights.group_size=-1", "weights.bits=8", "export.format=compressed-tensors")
    result = quantize(source, recipe, tmp_path / "quantized")
    assert result.record["gqa"]["num_kv_heads_after"] == 2
    assert not (tmp_path / "quantized" / ".heads").exists()
    dense = group_model(source, recipe, tmp_path / "grouped")
    assert dense.record == result.record["gqa"]
    tokens = random_tokens(2, 20)
    quantized = load_model(tmp_path / "quantized")
    assert quantized.spec.num_kv_heads == 2
    expected = load_decoder(CheckpointFolder.open(dense.output)).logits(tokens)
    assert float((quantized.logits(tokens) - expected).abs().max() / expected.abs().max()) < 0.1
    # The same as quantizing the folder that the other command wrote.
    again = quantize(dense.output, load_recipe_without_groups(recipe), tmp_path / "again")
    assert [layer["loss"] for layer in again.record["layers"]] == [layer["loss"] for layer in result.record["layers"]]


def load_recipe_without_groups(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"gqa": recipe.gqa.model_copy(update={"group": 1})})


@pytest.mark.parametrize("job", [group_model, quantize])
def test_a_missed_gate_leaves_no_output(job: Any, tmp_path: Path) -> None:
    source = write_model(wide_llama(num_key_value_heads=4), tmp_path / "model")
    recipe = small_recipe("gqa.max_perplexity_ratio=0.5", "weights.group_size=-1")
    with pytest.raises(GateError, match="max_perplexity_ratio"):
        job(source, recipe, tmp_path / "out")
    # The heads that were made are kept: the same command goes on with them.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "model"]


def test_a_conversion_that_does_nothing_is_refused(tmp_path: Path) -> None:
    source = write_model(wide_llama(), tmp_path / "model")
    with pytest.raises(RecipeError, match="which leaves the model as it is"):
        group_model(source, small_recipe("gqa.group=1"), tmp_path / "out")


def test_a_family_that_cannot_say_it_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = write_model(tiny_model("bloom-alibi"), tmp_path / "model")
    for job in (group_model, quantize):
        with pytest.raises(ModelError, match="bloom"):
            job(source, small_recipe("calibration.source=no-such.txt"), tmp_path / "out")


@pytest.mark.parametrize("name", ["story-llama", "babyllama-105", "tinystories-656k"])
def test_trained_models_stay_close(name: str, tmp_path: Path) -> None:
    source = shared_path(f"models/{name}")
    recipe = small_recipe("calibration.num_windows=16", "calibration.window_size=128")
    record = group_model(source, recipe, tmp_path / "out").record
    assert record["num_kv_heads_before"] == 2 * record["num_kv_heads_after"]
    assert 1 < record["perplexity_after"] / record["perplexity_before"] < 2.5


@pytest.mark.parametrize("command", ["gqa", "quantize"])
def test_activations_on_disk_write_the_same_bytes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(wide_llama(num_key_value_heads=4, head_dim=16), tmp_path / "model")
    cache = ("kv_cache.key_bits=4", "kv_cache.value_bits=4", "kv_cache.fold=true")
    recipe = small_recipe("weights.group_size=-1", *(cache if command == "quantize" else ()))
    stores: list[DiskStore] = []
    monkeypatch.setattr(DiskStore, "close", lambda store, close=DiskStore.close: (stores.append(store), close(store)))
    places: tuple[Activations, ...] = ("memory", "disk")
    for place in places:
        if command == "gqa":
            group_model(source, recipe, tmp_path / place, activations=place)
        else:
            quantize(source, recipe, tmp_path / place, options=JobOptions(activations=place))
    # Heads and scales, the weights, the cache.
    assert len(stores) == (1 if command == "gqa" else 3)
    assert all(store.most_bytes for store in stores)
    assert folder_bytes(tmp_path / "disk") == folder_bytes(tmp_path / "memory")
