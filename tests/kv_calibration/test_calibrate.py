"""The whole calibration on tiny models: what is kept exact, what is chosen, and how much is held in memory."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kv_cache_models import cache_settings, layers_of, streamed
from support.quantizable import padded_windows, tiny_model, wide_llama, write_model
from support.tiny_models import TinyModel, random_tokens

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.errors import RecipeError
from optgptq.journal.store import NothingKept
from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_calibration import calibrate as calibrate_module
from optgptq.kv_calibration.calibrate import CalibratedCache, calibrate_cache
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.loading import load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec

CPU = torch.device("cpu")
WINDOWS = windows_from_tokens(random_tokens(4, 24, vocab_size=258))


def opened(tiny: TinyModel, path: Any) -> tuple[CheckpointFolder, DecoderSpec]:
    folder = CheckpointFolder.open(write_model(tiny, path / "model"))
    return folder, model_spec(folder)


def calibrated(
    folder: CheckpointFolder, settings: CacheCalibrationSettings, windows: Windows = WINDOWS
) -> CalibratedCache:
    return calibrate_cache(streamed(folder), settings, windows, steps=NothingKept(), layer_started=lambda index: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointFolder, DecoderSpec]:
    return opened(wide_llama(head_dim=16), tmp_path_factory.mktemp("llama"))


def test_it_does_better_than_plain_rounding_where_no_candidate_saw_the_text(
    llama: tuple[CheckpointFolder, DecoderSpec],
) -> None:
    folder, spec = llama
    found = calibrated(folder, cache_settings(spec, max_ranges=4))
    assert not found.record["is_plain"]
    assert 0 < found.record["held_out_kl"] < found.record["held_out_kl_plain"]
    assert [layer["index"] for layer in found.record["layers"]] == [0, 1]
    for layer in found.record["layers"]:
        assert layer["score"] <= layer["plain_score"]
    for layer in found.layers:
        scale_KD = layer.keys.scale_KD
        assert scale_KD is None or untied_pair(scale_KD, RotaryPairs(rotary_dim=spec.head_dim)) is None


def test_the_same_text_gives_the_same_parameters(llama: tuple[CheckpointFolder, DecoderSpec]) -> None:
    folder, spec = llama
    first, second = (calibrated(folder, cache_settings(spec, value_transform="covariance")) for _ in range(2))
    assert first.record == second.record
    for left, right in zip(first.layers, second.layers, strict=True):
        assert left.tensors.keys() == right.tensors.keys()
        assert all(torch.equal(part, right.tensors[name]) for name, part in left.tensors.items())


def test_exact_layers_and_sides_get_no_parameters(llama: tuple[CheckpointFolder, DecoderSpec]) -> None:
    folder, spec = llama
    exact = SideScheme()
    schemes = LayerScheme(keys=exact, values=exact), replace(layers_of(spec)[1], keys=exact)
    found = calibrated(folder, cache_settings(spec, schemes=schemes))
    for side in (found.layers[0].keys, found.layers[0].values, found.layers[1].keys):
        assert not side.tensors
    assert found.layers[1].values.ranges_C2 is not None
    assert found.scheme.layers == schemes


def test_bits_are_allocated_within_the_bytes_of_the_budget(tmp_path: Any) -> None:
    folder, spec = opened(wide_llama(head_dim=32), tmp_path)
    fixed = cache_settings(spec, budget_bits=3.0, fixed_layers=frozenset({0}))
    found = calibrated(folder, fixed)
    assert found.scheme.layers[0] == fixed.schemes[0]
    bits = found.scheme.layers[1]
    assert bits.keys.bits + bits.values.bits <= 6
    assert set(found.record["allocation"]["costs"]) == {"1 keys", "1 values"}
    costs = found.record["allocation"]["costs"]["1 keys"]
    assert costs["2"] > costs["3"] > costs["4"] > costs["8"]


def test_keys_of_a_model_with_a_soft_cap_are_not_shifted(tmp_path: Any) -> None:
    folder, spec = opened(tiny_model("gemma2-softcaps", head_dim=16), tmp_path)
    assert spec.attention_softcap is not None
    found = calibrated(folder, cache_settings(spec, key_transform="hadamard"))
    assert all(layer.keys.shift_KD is None for layer in found.layers)


def test_groups_along_tokens_and_padded_windows(llama: tuple[CheckpointFolder, DecoderSpec]) -> None:
    folder, spec = llama
    keys = SideScheme(bits=2, group_size=4, axis="token")
    schemes = tuple(replace(layer, keys=keys) for layer in layers_of(spec))
    past = PastRule(mode="token", granule=4, sink_tokens=2)
    windows = padded_windows(random_tokens(4, 24, vocab_size=258), [24, 13, 24, 17])
    found = calibrated(folder, cache_settings(spec, schemes=schemes, past=past), windows)
    assert all(layer.keys.rotation_KDD is None and layer.keys.metric_KDD is None for layer in found.layers)
    for name in ("held_out_kl", "held_out_kl_plain"):
        assert 0 < found.record[name] < math.inf


def test_gradients_are_kept_only_where_they_help(llama: tuple[CheckpointFolder, DecoderSpec]) -> None:
    folder, spec = llama
    asked = cache_settings(spec, key_transform="shift_scale", value_transform="hadamard")
    plain, refined = (calibrated(folder, replace(asked, refine=refine)) for refine in ("off", "gradient"))
    before, after = (found.record["layers"][0] for found in (plain, refined))
    assert after["score"] <= before["score"]
    for layer in refined.layers:
        scale_KD = layer.keys.scale_KD
        assert scale_KD is None or untied_pair(scale_KD, RotaryPairs(rotary_dim=spec.head_dim)) is None
        assert scale_KD is None or not scale_KD.requires_grad


def test_at_most_six_decoder_layers_are_held(tmp_path: Any) -> None:
    folder, spec = opened(tiny_model("llama-multi_query", num_hidden_layers=9, head_dim=8), tmp_path)
    alive: list[weakref.ReferenceType[torch.Tensor]] = []
    most = 0

    def read(index: int) -> DecoderLayer:
        nonlocal most
        layer = load_layer(folder, spec, index, dtype=torch.float32)
        first = next(iter(layer.linears.values()))
        assert isinstance(first, Linear)
        alive.append(weakref.ref(first.weight_OI))
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        return layer

    settings = cache_settings(spec, key_transform="none", value_transform="none")
    started: list[int] = []
    calibrate_cache(streamed(folder, read), settings, WINDOWS, steps=NothingKept(), layer_started=started.append)
    assert most == 6
    assert len(alive) == 9
    assert started == list(range(9))


def test_one_window_is_too_few(llama: tuple[CheckpointFolder, DecoderSpec]) -> None:
    folder, spec = llama
    with pytest.raises(RecipeError) as raised:
        calibrated(folder, cache_settings(spec), WINDOWS.first(1))
    assert "at least 2 windows" in str(raised.value)
    assert "num_windows" in str(raised.value)


@pytest.mark.parametrize(("calibrated_kl", "is_plain"), [(0.75, True), (0.5, False)])
def test_plain_rounding_is_written_where_calibration_lost(
    llama: tuple[CheckpointFolder, DecoderSpec],
    monkeypatch: pytest.MonkeyPatch,
    calibrated_kl: float,
    is_plain: bool,
) -> None:
    folder, spec = llama
    divergences = iter((calibrated_kl, 0.5))
    monkeypatch.setattr(calibrate_module, "mean_divergence", lambda *arguments: next(divergences))
    found = calibrated(folder, cache_settings(spec, key_transform="shift_scale"))
    assert any(layer.tensors for layer in found.layers) != is_plain
    assert found.record["is_plain"] == is_plain
    # The figure of the record is that of what is written.
    assert (found.record["held_out_kl"], found.record["held_out_kl_plain"]) == (0.5, 0.5)
    assert found.record.get("held_out_kl_discarded") == (0.75 if is_plain else None)
    assert found.scheme.layers == layers_of(spec)
    for layer in found.record["layers"]:
        assert ("discarded" in layer) == is_plain
        if is_plain:
            assert (layer["keys"], layer["values"], layer["score"]) == ("plain", "plain", layer["plain_score"])
            assert layer["discarded"]["score"] <= layer["score"]
