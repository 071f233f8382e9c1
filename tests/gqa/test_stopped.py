"""A conversion that is stopped at any decoder layer goes on to the same tensors and the same figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.grouped import gqa_recipe, grouped_into, some_windows
from support.stopped_steps import fresh_journal, stopped_everywhere
from support.tiny_models import TINY_MODELS
from support.transformed import saved

from optgptq.calibration.disk_states import DiskStore
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import OutputError
from optgptq.gqa import convert
from optgptq.gqa.convert import GroupedModel
from optgptq.journal.store import Journal, Steps

MODELS = {tiny.name: tiny for tiny in TINY_MODELS}


def opened(name: str, path: Path) -> CheckpointFolder:
    return saved(MODELS[name], path / "model")


def require_same(found: GroupedModel, expected: GroupedModel) -> None:
    # Names in the order in which they came: a manifest holds them so.
    assert json.dumps(found.record) == json.dumps(expected.record)
    names = sorted(expected.source.planned)
    assert names
    for name in names:
        tensor = expected.source.read(name)
        assert tensor.dtype == expected.source.info(name).torch_dtype
        assert torch.equal(found.source.read(name), tensor)
        assert torch.equal(torch.cat(list(found.source.read_chunks(name, 100))), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "dtype", "is_scored"),
    [
        ("llama-multi_head_biases", torch.float32, False),
        ("phi3-longrope", torch.float32, True),
        ("falcon-multi_head_parallel", torch.bfloat16, False),
        ("mpt-alibi", torch.float32, False),
    ],
)
def test_it_goes_on_to_the_same_bits_wherever_it_was_stopped(
    name: str, dtype: torch.dtype, is_scored: bool, tmp_path: Path
) -> None:
    folder = opened(name, tmp_path)
    evaluation = some_windows(3, seed=6) if is_scored else None

    def work(steps: Steps) -> GroupedModel:
        return grouped_into(folder, gqa_recipe(group=2), steps, evaluation=evaluation, dtype=dtype)

    whole = work(fresh_journal(tmp_path / "whole"))
    results = stopped_everywhere(tmp_path, work)
    # A stop at each layer, at the figures, and at all of them.
    assert len(results) == len(whole.record["layers"]) + 2
    for found in results:
        require_same(found, whole)


def test_a_damaged_layer_is_converted_again_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened("llama-multi_head_biases", tmp_path)
    whole = grouped_into(folder, gqa_recipe(group=2), fresh_journal(tmp_path / "steps"))
    (tmp_path / "steps" / "figures.safetensors").unlink()
    torn = tmp_path / "steps" / "layer-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    converted = []
    convert_layer = convert.convert_layer

    def count(*arguments, **options):
        converted.append(arguments[1].index)
        return convert_layer(*arguments, **options)

    monkeypatch.setattr(convert, "convert_layer", count)
    require_same(grouped_into(folder, gqa_recipe(group=2), Journal(tmp_path / "steps", {})), whole)
    assert converted == [1]


def test_what_is_finished_is_not_walked_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened("llama-multi_head_biases", tmp_path)
    whole = grouped_into(folder, gqa_recipe(group=2), fresh_journal(tmp_path / "steps"))
    evaluation = some_windows(3, seed=6)
    told = [
        grouped_into(folder, gqa_recipe(group=2), Journal(tmp_path / "steps", {}), evaluation=text).record
        for text in (evaluation, some_windows(3, seed=7), evaluation)
    ]
    # Figures are those of the text that is asked for, whatever was measured before.
    assert told[0] == told[2]
    assert len({record["perplexity_after"] for record in (whole.record, *told)}) == 3
    monkeypatch.delattr(convert, "load_layer")
    found = grouped_into(folder, gqa_recipe(group=2), Journal(tmp_path / "steps", {}), evaluation=evaluation)
    assert json.dumps(found.record) == json.dumps(told[2])


def test_tensors_that_are_gone_are_named(tmp_path: Path) -> None:
    folder = opened("llama-multi_head_biases", tmp_path)
    model = grouped_into(folder, gqa_recipe(group=2), fresh_journal(tmp_path / "steps"))
    name = "model.layers.1.self_attn.k_proj.weight"
    model.source.read(name)
    (tmp_path / "steps" / "layer-00002.safetensors").unlink()
    with pytest.raises(OutputError) as caught:
        model.source.read(name.replace("1", "2"))
    assert caught.value.where == "journal, grouped heads of decoder layer 2"
    assert caught.value.found == "none, or a damaged file"
    assert "start the job from its beginning" in caught.value.action


@pytest.mark.parametrize(
    ("name", "is_scored"), [("llama-multi_head_biases", False), ("falcon-multi_head_parallel", True)]
)
def test_activations_on_disk_give_the_same_bits(name: str, is_scored: bool, tmp_path: Path) -> None:
    folder = opened(name, tmp_path)
    evaluation = some_windows(3, seed=6) if is_scored else None
    expected = grouped_into(folder, gqa_recipe(group=2), fresh_journal(tmp_path / "memory"), evaluation=evaluation)
    with DiskStore(tmp_path) as store:
        steps = fresh_journal(tmp_path / "disk")
        require_same(grouped_into(folder, gqa_recipe(group=2), steps, evaluation=evaluation, store=store), expected)
        assert store.most_bytes > 0
