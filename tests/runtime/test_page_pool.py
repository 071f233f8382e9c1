"""The storages of keys and values, and copies of pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.registry import model_spec
from optgptq.runtime.layer_groups import plain_page_bytes
from optgptq.runtime.memory_plan import plan_memory
from optgptq.runtime.page_pool import PagePool
from optgptq.scheduling.step import PageCopy


def test_each_layer_has_storages_and_a_copy_touches_its_group_alone(tmp_path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == "llama-grouped_query")
    spec = model_spec(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))
    layers = tuple(
        replace(layer, sliding_window=window) for layer, window in zip(spec.layers, (5, None, 5), strict=True)
    )
    spec = replace(spec, layers=layers)
    plan = plan_memory(
        spec,
        page_size=8,
        layer_page_bytes=plain_page_bytes(spec, page_size=8, number_bytes=2),
        budget_bytes=10**6,
        max_length=40,
        max_running=2,
        max_step_tokens=4,
    )
    pool = PagePool.allocate(plan, spec, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pool.group_of_layer == (1, 0, 1)
    assert plan.num_pages == (11, 5)
    assert [tuple(pages.keys_ZKDY.shape) for pages in pool.layers] == [(5, 2, 4, 8), (11, 2, 4, 8), (5, 2, 4, 8)]
    assert [tuple(pages.values_ZKYD.shape) for pages in pool.layers] == [(5, 2, 8, 4), (11, 2, 8, 4), (5, 2, 8, 4)]
    storages = [storage for pages in pool.layers for storage in (pages.keys_ZKDY, pages.values_ZKYD)]
    assert sum(storage.nbytes for storage in storages) == plan.num_bytes
    assert {storage.dtype for storage in storages} == {torch.bfloat16}

    generator = torch.Generator().manual_seed(0)
    for storage in storages:
        storage.copy_(torch.randn(storage.shape, generator=generator))
    expected = [storage.clone() for storage in storages]
    for index in (0, 1, 4, 5):
        expected[index][3], expected[index][4] = expected[index][1], expected[index][1]
    for index in (2, 3):
        expected[index][9] = expected[index][2]
    pool.copy([PageCopy(1, 1, 3), PageCopy(1, 1, 4), PageCopy(0, 2, 9)])
    assert all(torch.equal(found, wanted) for found, wanted in zip(storages, expected, strict=True))
