"""Calibration of a cache that is stopped at any decoder layer goes on to the same parameters and the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kv_cache_models import cache_settings, streamed
from support.quantizable import padded_windows, tiny_model, wide_llama, write_model
from support.stopped_steps import fresh_journal, stopped_everywhere
from support.tiny_models import random_tokens

from optgptq.calibration.disk_states import DiskStore
from optgptq.calibration.states import ActivationStore, MemoryStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import windows_from_tokens
from optgptq.journal.store import Journal, NothingKept, Steps
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_calibration import allocation, calibrate
from optgptq.kv_calibration.calibrate import CalibratedCache, calibrate_cache
from optgptq.models.registry import model_spec

WINDOWS = windows_from_tokens(random_tokens(4, 24, vocab_size=258))
EXACT = SideScheme()
SIMPLE = {"key_transform": "shift_scale", "value_transform": "none"}
TOKENS = SideScheme(bits=2, group_size=4, axis="token")


def opened(path: Path, num_layers: int = 3) -> CheckpointFolder:
    return CheckpointFolder.open(write_model(wide_llama(num_hidden_layers=num_layers, head_dim=16), path / "model"))


def work_on(folder: CheckpointFolder, windows: Any = WINDOWS, **values: Any) -> Callable[[Steps], CalibratedCache]:
    settings = cache_settings(model_spec(folder), **values)

    def work(steps: Steps) -> CalibratedCache:
        return calibrate_cache(streamed(folder), settings, windows, steps=steps, layer_started=lambda index: None)

    return work


def require_same(found: CalibratedCache, expected: CalibratedCache) -> None:
    # Names in the order in which they came: a manifest holds them so.
    assert json.dumps(found.record) == json.dumps(expected.record)
    assert found.scheme == expected.scheme
    for left, right in zip(found.layers, expected.layers, strict=True):
        assert left.tensors.keys() == right.tensors.keys()
        assert all(torch.equal(part, right.tensors[name]) for name, part in left.tensors.items())


@pytest.mark.parametrize(
    ("values", "num_steps"),
    [
        ({"num_layers": 2, "value_transform": "none", "rounding": "nearest"}, 3),
        ({"num_layers": 2, "key_transform": "covariance", "value_transform": "hadamard", "refine": "gradient"}, 3),
        ({"num_layers": 3, **SIMPLE, "budget_bits": 3.0, "fixed_layers": frozenset({0}), "allowed_bits": (3, 4)}, 6),
    ],
)
def test_it_goes_on_to_the_same_bits_wherever_it_was_stopped(
    values: dict[str, Any], num_steps: int, tmp_path: Path
) -> None:
    settings = dict(values)
    work = work_on(opened(tmp_path, settings.pop("num_layers")), **settings)
    whole = work(fresh_journal(tmp_path / "whole"))
    results = stopped_everywhere(tmp_path, work)
    assert len(results) == num_steps + 1
    for found in results:
        require_same(found, whole)


def test_exact_layers_tokens_and_padding(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    values = SideScheme(bits=3, group_size=16)
    schemes = (
        LayerScheme(keys=TOKENS, values=values),
        LayerScheme(keys=EXACT, values=EXACT),
        LayerScheme(keys=EXACT, values=values),
    )
    past = PastRule(mode="token", granule=4, sink_tokens=2)
    windows = padded_windows(random_tokens(4, 24, vocab_size=258), [24, 13, 24, 17])
    work = work_on(folder, windows, schemes=schemes, past=past, **SIMPLE)
    whole = work(fresh_journal(tmp_path / "whole"))
    for found in stopped_everywhere(tmp_path, work):
        require_same(found, whole)


def test_where_plain_rounding_wins_the_same_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_on(opened(tmp_path), **SIMPLE)
    divergence = calibrate.mean_divergence
    # Whichever of the two is asked for first is that of the search.
    factors = iter([10.0, 1.0] * 20)
    monkeypatch.setattr(calibrate, "mean_divergence", lambda *arguments: next(factors) * divergence(*arguments))
    whole = work(fresh_journal(tmp_path / "whole"))
    assert whole.record["is_plain"]
    assert all(layer["keys"] == "plain" and "discarded" in layer for layer in whole.record["layers"])
    for found in stopped_everywhere(tmp_path, work):
        require_same(found, whole)


def test_what_is_finished_is_neither_searched_nor_walked_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    work = work_on(folder, budget_bits=3.0, allowed_bits=(3, 4), **SIMPLE)
    whole = work(fresh_journal(tmp_path / "steps"))
    monkeypatch.delattr(calibrate, "search_layer")
    monkeypatch.delattr(allocation, "measure_layer")
    (tmp_path / "steps" / "divergence.safetensors").unlink()
    require_same(work(Journal(tmp_path / "steps", {})), whole)
    monkeypatch.setattr(calibrate.Chains, "advance", None)
    require_same(work(Journal(tmp_path / "steps", {})), whole)


def test_a_damaged_layer_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_on(opened(tmp_path), **SIMPLE)
    whole = work(fresh_journal(tmp_path / "steps"))
    torn = tmp_path / "steps" / "layer-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:40])
    searched = []
    search_layer = calibrate.search_layer

    def count(judge: Any, *arguments: Any) -> Any:
        searched.append(judge.layers[0].index)
        return search_layer(judge, *arguments)

    monkeypatch.setattr(calibrate, "search_layer", count)
    require_same(work(Journal(tmp_path / "steps", {})), whole)
    assert searched == [1]


def test_activations_of_16_bits_and_a_soft_cap(tmp_path: Path) -> None:
    folder = CheckpointFolder.open(write_model(tiny_model("gemma2-softcaps", head_dim=16), tmp_path / "model"))
    settings = cache_settings(model_spec(folder), **SIMPLE)
    model = streamed(folder, dtype=torch.bfloat16)

    def work(steps: Steps) -> CalibratedCache:
        return calibrate_cache(model, settings, WINDOWS, steps=steps, layer_started=lambda index: None)

    whole = work(fresh_journal(tmp_path / "whole"))
    for found in stopped_everywhere(tmp_path, work):
        require_same(found, whole)


@pytest.mark.parametrize(
    "values",
    [
        {"budget_bits": 3.0, "fixed_layers": frozenset({0}), "allowed_bits": (3, 4), **SIMPLE},
        {"key_transform": "covariance", "value_transform": "hadamard", "refine": "gradient"},
    ],
)
def test_activations_on_disk_give_the_same_bits(values: dict[str, Any], tmp_path: Path) -> None:
    folder = opened(tmp_path)
    windows = padded_windows(random_tokens(4, 24, vocab_size=258), [24, 13, 24, 17])
    settings = cache_settings(model_spec(folder), **values)

    def work(store: ActivationStore) -> CalibratedCache:
        model = streamed(folder, store=store)
        return calibrate_cache(model, settings, windows, steps=NothingKept(), layer_started=lambda index: None)

    with DiskStore(tmp_path) as store:
        require_same(work(store), work(MemoryStore()))
        assert store.most_bytes > 0
