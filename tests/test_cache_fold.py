"""Scales to fold: the same wherever the walk that finds them was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.kv_cache_models import cache_settings, layers_of
from support.quantizable import tiny_model, wide_llama, write_model
from support.stopped_steps import fresh_journal, stopped_everywhere
from support.tiny_models import random_tokens

from optgptq import cache_fold
from optgptq.cache_fold import scales_to_fold
from optgptq.calibration.disk_states import DiskStore
from optgptq.calibration.states import ActivationPlace, ActivationStore, MemoryStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import windows_from_tokens
from optgptq.journal.store import Journal, NothingKept, Steps
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.models.registry import model_spec
from optgptq.reports.events import ignore_progress
from optgptq.transforms.kv_scales import KVScales

WINDOWS = windows_from_tokens(random_tokens(4, 24, vocab_size=258))
Scales = tuple[KVScales, ...]


def folded(folder: CheckpointFolder, steps: Steps, store: ActivationStore | None = None, **values: Any) -> Scales:
    spec = model_spec(folder)
    return scales_to_fold(
        folder,
        spec,
        cache_settings(spec, **values),
        WINDOWS,
        steps=steps,
        place=ActivationPlace(dtype=torch.float32, device=torch.device("cpu"), store=store or MemoryStore()),
        progress=ignore_progress,
    )


def require_same(found: Scales, expected: Scales) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.tensors.keys() == right.tensors.keys()
        for name, part in right.tensors.items():
            assert part.dtype == torch.float64
            assert torch.equal(left.tensors[name], part)


def test_activations_on_disk_give_the_same_scales(tmp_path: Path) -> None:
    folder = CheckpointFolder.open(write_model(wide_llama(num_hidden_layers=3), tmp_path / "model"))
    expected = folded(folder, NothingKept())
    with DiskStore(tmp_path) as store:
        require_same(folded(folder, NothingKept(), store), expected)
        assert store.most_bytes > 0


@pytest.mark.parametrize("name", ["llama", "qwen3-norms"])
def test_a_walk_that_was_stopped_goes_on_to_the_same_scales(name: str, tmp_path: Path) -> None:
    tiny = wide_llama(num_hidden_layers=3) if name == "llama" else tiny_model(name, head_dim=8)
    folder = CheckpointFolder.open(write_model(tiny, tmp_path / "model"))
    whole = folded(folder, fresh_journal(tmp_path / "whole"))
    results = stopped_everywhere(tmp_path, lambda steps: folded(folder, steps))
    assert len(results) == len(whole) + 1
    assert all(scales.tensors for scales in whole)
    for found in results:
        require_same(found, whole)


def test_exact_layers_are_finished_too_and_nothing_is_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder.open(write_model(wide_llama(num_hidden_layers=3), tmp_path / "model"))
    exact = SideScheme()
    first, _, third = layers_of(model_spec(folder))
    schemes = (first, LayerScheme(keys=exact, values=exact), LayerScheme(keys=exact, values=third.values))
    whole = folded(folder, fresh_journal(tmp_path / "steps"), schemes=schemes)
    assert [sorted(scales.tensors) for scales in whole] == [["key_KD", "value_KD"], [], ["value_KD"]]
    monkeypatch.delattr(cache_fold, "load_layer")
    require_same(folded(folder, Journal(tmp_path / "steps", {}), schemes=schemes), whole)
