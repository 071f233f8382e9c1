"""Jobs that quantize the KV cache, end to end: every family, with dense and quantized weights, the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_model, write_model
from support.tiny_models import random_tokens

from optgptq.cache_job import cache_facts
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats.dense import verify_dense
from optgptq.formats.kv_cache_config import read_cache_setup
from optgptq.formats.kv_cache_keys import CACHE_KEY
from optgptq.formats.verify import verify_folder
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.registry import model_spec
from optgptq.quantize import QuantizeResult, quantize
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import LLM
from optgptq.runtime.load import load_model
from optgptq.scheduling.sampling_params import SamplingParams

# Heads of 8 or 16 channels, which codes can be packed from.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-multi_head_biases": {"hidden_size": 48},
    "mistral-short_window": {"hidden_size": 48},
    "qwen2-biases": {"hidden_size": 48},
    "qwen3-norms": {"head_dim": 16},
    "gemma2-softcaps": {"head_dim": 16},
    "gemma3text-local_global": {"head_dim": 8},
    "phi3-longrope": {},
    "gpt2-conv1d": {},
    "gptneox-parallel": {},
    "opt-pre_norm": {},
    "bloom-six_heads": {"hidden_size": 48},
    "mpt-alibi": {"d_model": 32},
    "falcon-multi_query": {"hidden_size": 48},
    "falcon-grouped": {"hidden_size": 48},
}
# Heads whose codes of 2, 3, 4 and 8 bits take different bytes.
WIDE_HEADS = {"head_dim": 32, "num_hidden_layers": 2}
TEXT = {"num_windows": 2, "window_size": 20, "full_precision_windows": 0}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name, written when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp("models") / "model"
            self[name] = write_model(tiny_model(name, **FAMILIES[name]), folder)
            return self[name]

    return Folders()


def recipe_of(weights: dict[str, Any] | None = None, **kv_cache: Any) -> Recipe:
    """Return a recipe with so few exact tokens that short windows have others."""
    return Recipe.model_validate(
        {
            "weights": weights or {"method": "none"},
            "kv_cache": {"bits": 4, "recent_tokens": 0, "sink_tokens": 2, **kv_cache},
            "calibration": TEXT,
        }
    )


RTN = {"method": "rtn", "group_size": -1}


def setup_of(folder: Path) -> CacheSetup:
    checkpoint = CheckpointFolder.open(folder)
    spec = model_spec(checkpoint)
    sizes = {"num_layers": spec.num_layers, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    setup = read_cache_setup(checkpoint, **sizes)
    assert setup is not None
    return setup


def written(folder: Path, **settings: Any) -> list[list[int]]:
    """Return what an engine writes after two prompts."""
    llm = LLM(folder, settings=EngineSettings(max_length=64, max_running=2, kv_cache_bytes=2**22, **settings))
    prompts = random_tokens(2, 9).tolist()
    return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, GREEDY)]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "optgptq_manifest.json").read_text())
    return manifest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_for_every_family_leaves_its_weights_alone(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    bits = (4, 3, 2, 8)[list(FAMILIES).index(name) % 4]
    output = tmp_path / "out"
    result = quantize(models[name], recipe_of(bits=bits), output)
    # `verify_dense` compares config.json too, but for the key of the cache.
    verify_dense(CheckpointFolder.open(output), CheckpointFolder.open(models[name]))
    report = verify_folder(CheckpointFolder.open(output))
    assert (report.format, report.problems, report.notes) == ("dense", (), ())
    assert result.bits_per_weight == 0
    setup = setup_of(output)
    assert {side.bits for layer in setup.scheme.layers for side in (layer.keys, layer.values)} == {bits}
    spec = model_spec(CheckpointFolder.open(output))
    facts = cache_facts(spec, setup.scheme)
    assert {key: result.record["kv_cache"][key] for key in facts} == facts
    assert manifest_of(output)["kv_cache"] == json.loads(json.dumps(result.record["kv_cache"]))
    # What the folder says is run; a plain cache gives what the model gave.
    assert all(len(tokens) == 6 for tokens in written(output))
    assert written(output, kv_cache="16") == written(models[name])


@pytest.mark.parametrize("name", ["qwen3-norms", "gpt2-conv1d"])
def test_weights_and_cache_together(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    both, weights, cache = (tmp_path / part for part in ("both", "weights", "cache"))
    result = quantize(models[name], recipe_of(RTN), both)
    quantize(models[name], recipe_of(RTN, bits=16), weights)
    quantize(models[name], recipe_of(), cache)
    assert verify_folder(CheckpointFolder.open(both)).problems == ()
    stored = folder_bytes(both), folder_bytes(weights)
    assert stored[0]["model.safetensors"] == stored[1]["model.safetensors"]
    assert result.bits_per_weight > 4
    # The cache is calibrated beside the quantized weights, not beside those of the source.
    assert setup_of(both).fingerprint != setup_of(cache).fingerprint
    assert manifest_of(both)["kv_cache"]["calibration"] != manifest_of(cache)["kv_cache"]["calibration"]
    content = CheckpointFolder.open(both).config[CACHE_KEY]
    assert content["calibration"]["weights"] == "quantized"
    assert CheckpointFolder.open(cache).config[CACHE_KEY]["calibration"] == {
        "dataset": "self",
        "tokens": 40,
        "max_position": 20,
        "seed": 0,
        "weights": "dense",
    }
    assert all(len(tokens) == 6 for tokens in written(both))


def test_the_same_job_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of({"method": "gptq", "group_size": -1}, value_bits=2, fold=True)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        quantize(models["qwen2-biases"], recipe, folder)
    assert folder_bytes(first) == folder_bytes(second)


@pytest.mark.parametrize("name", ["qwen3-norms", "gemma2-softcaps", "gpt2-conv1d"])
def test_folded_scales_change_weights_and_not_the_model(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = quantize(models[name], recipe_of(fold=True), output)
    before, after = load_model(models[name]), load_model(output)
    tokens_BS = random_tokens(2, 23)
    with torch.no_grad():
        expected_BSV, found_BSV = before.logits(tokens_BS), after.logits(tokens_BS)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=1e-4, atol=1e-4)
    assert (output / "model.safetensors").read_bytes() != (models[name] / "model.safetensors").read_bytes()
    folded = result.record["kv_cache"]["folded"]
    assert folded == {"k_scale": True, "v_scale": True, "k_norm_gain": name == "qwen3-norms"}
    assert CheckpointFolder.open(output).config[CACHE_KEY]["folded"] == folded


def test_without_calibration_nothing_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    output, seen = tmp_path / "out", list[events.ProgressEvent]()
    recipe = recipe_of(bits=3, calibrated=False, skip_layers="1", value_transform="none")
    quantize(models["llama-multi_head_biases"], recipe, output, progress=seen.append)
    assert "calibration text" not in {event.name for event in seen if isinstance(event, events.PhaseStarted)}
    assert manifest_of(output)["calibration"] is None
    setup = setup_of(output)
    for index, layer in enumerate(setup.layers):
        assert layer.values.rotation_KDD is None
        if index == 1:
            assert layer.keys.rotation_KDD is None
            assert setup.scheme.layers[index].is_exact
        else:
            assert layer.keys.rotation_KDD is not None
            torch.testing.assert_close(layer.keys.rotation_KDD, block_hadamard(8).expand(6, -1, -1), rtol=0, atol=0)
    assert all(len(tokens) == 6 for tokens in written(output))


def test_groups_of_tokens_and_windows(models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = recipe_of(
        bits=2, key_axis="token", key_group_tokens=16, past_only="window:32", sink_tokens=3, recent_tokens=5
    )
    longer = recipe.calibration.model_copy(update={"window_size": 40})
    quantize(models["llama-multi_head_biases"], recipe.model_copy(update={"calibration": longer}), output)
    past = setup_of(output).scheme.past
    assert (past.name, past.sink_tokens, past.recent_tokens, past.granule) == ("window:32", 3, 5, 16)
    assert all(len(tokens) == 6 for tokens in written(output))


def test_a_budget_is_spent_and_named_layers_keep_their_bits(tmp_path: Path) -> None:
    model = write_model(tiny_model("llama-explicit_head_dim", **WIDE_HEADS), tmp_path / "model")
    output = tmp_path / "out"
    recipe = recipe_of(budget_bits=3.5, layers=[{"layers": "0", "key_bits": 8, "value_bits": 8}])
    result = quantize(model, recipe, output)
    layers = setup_of(output).scheme.layers
    assert (layers[0].keys.bits, layers[0].values.bits) == (8, 8)
    spent = [side.bits for layer in layers[1:] for side in (layer.keys, layer.values)]
    assert sum(spent) / len(spent) <= 3.5
    assert "allocation" in result.record["kv_cache"]["calibration"]


def test_the_cache_of_a_source_is_not_taken_over(models: dict[str, Path], tmp_path: Path) -> None:
    with_cache, quantized, again = (tmp_path / part for part in ("cache", "quantized", "again"))
    quantize(models["llama-multi_head_biases"], recipe_of(), with_cache)
    result = quantize(with_cache, recipe_of(RTN, bits=16), quantized)
    told = "the quantized KV cache of the source is left out: its parameters belong to the weights it came with"
    assert told in result.warnings
    assert CACHE_KEY not in CheckpointFolder.open(quantized).config
    assert not (quantized / "kv_cache").exists()
    # A new one is the one that the model without a cache gets.
    quantize(with_cache, recipe_of(), again)
    assert setup_of(again).fingerprint == setup_of(with_cache).fingerprint


def test_progress_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[events.ProgressEvent] = []
    result: QuantizeResult = quantize(
        models["llama-multi_head_biases"], recipe_of(RTN, fold=True), tmp_path / "out", progress=seen.append
    )
    phases = [(event.name, event.detail) for event in seen if isinstance(event, events.PhaseStarted)]
    layers = [f"decoder layer {number}/3" for number in (1, 2, 3)]
    assert [detail for name, detail in phases if name == "scales to fold"] == layers
    assert [detail for name, detail in phases if name == "kv cache"] == layers
    # Folded before the weights are quantized, calibrated after they were checked.
    names = [name for name, _ in phases]
    assert names.index("scales to fold") < names.index("writing") < names.index("verifying") < names.index("kv cache")
    (found,) = [event for event in seen if isinstance(event, events.CacheFound)]
    record = result.record["kv_cache"]
    assert (found.key_bits, found.bytes_per_token) == (record["bits_per_key"], record["bytes_per_token"])
    assert found.exact_bytes_per_token == 3 * 2 * 6 * 8 * 2


def test_scales_for_other_engines_are_the_largest_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    for strategy, shape in (("head", (6, 1, 1)), ("tensor", (1,))):
        output = tmp_path / strategy
        recipe = Recipe.model_validate(
            {
                "weights": RTN,
                "kv_cache": {"fp8_scales": strategy},
                "calibration": TEXT,
                "export": {"format": "compressed-tensors"},
            }
        )
        quantize(models["llama-multi_head_biases"], recipe, output)
        folder = CheckpointFolder.open(output)
        assert verify_folder(folder).problems == ()
        names = [f"model.layers.{index}.self_attn.{leaf}" for index in range(3) for leaf in ("k_scale", "v_scale")]
        scales = [folder.read(name) for name in names]
        assert {tuple(scale.shape) for scale in scales} == {shape}
        assert all(bool((scale > 0).all()) for scale in scales)
        scheme = folder.config["quantization_config"]["kv_cache_scheme"]
        assert scheme["strategy"] == {"head": "attn_head", "tensor": "tensor"}[strategy]
        load_model(output)
    heads, whole = (CheckpointFolder.open(tmp_path / strategy).read(names[0]) for strategy in ("head", "tensor"))
    assert float(heads.max()) == float(whole)


def test_only_what_was_folded_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(bits=16, value_bits=4, fold=True)
    result = quantize(models["qwen3-norms"], recipe, tmp_path / "out")
    folded = result.record["kv_cache"]["folded"]
    assert folded == {"k_scale": False, "v_scale": True, "k_norm_gain": False}


def test_a_cache_alone_needs_no_tokens_for_linears(models: dict[str, Path], tmp_path: Path) -> None:
    both, cache = (
        quantize(models["qwen3-norms"], recipe_of(weights), tmp_path / name).warnings
        for name, weights in (("both", RTN), ("cache", None))
    )
    assert any("Hessian" in warning for warning in both)
    assert not any("Hessian" in warning for warning in cache)
