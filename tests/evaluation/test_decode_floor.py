"""Bytes of a decoded token, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.affine_weight import AffineWeight
from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.evaluation.decode_floor import decode_bytes, held_bytes, measure_bandwidth
from optgptq.models.decoder import load_decoder
from optgptq.runtime.linear import QuantLinear


def open_story(dtype: torch.dtype = torch.float32):
    return load_decoder(CheckpointFolder.open(bundled_path("story-llama")), dtype=dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_dense_llama(dtype: torch.dtype, size: int) -> None:
    # Width 128, 6 layers, 4 query and 2 key/value heads of 32, feed-forward width 384, 1024 tokens in the vocabulary.
    needed = decode_bytes(open_story(dtype), context=100)
    assert needed.linears == 6 * (128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 384) * size
    assert needed.head == (1024 * 128 + 128) * size
    assert needed.cache == 6 * 2 * 2 * 32 * 100 * size
    assert needed.rest == (6 * 2 * 128 + 128) * size
    assert needed.total == needed.linears + needed.head + needed.cache + needed.rest


def test_quantized_linears_count_as_they_are_held() -> None:
    decoder = open_story()
    before = decode_bytes(decoder, context=1)
    codes_OI = torch.zeros(128, 384, dtype=torch.uint8)
    scale_OG = torch.ones(128, 3, dtype=torch.float16)
    zero_point_OG = torch.zeros(128, 3, dtype=torch.int32)
    weight = AffineWeight(
        codes_OI=codes_OI, scale_OG=scale_OG, zero_point_OG=zero_point_OG, bits=4, group_size=128, symmetric=True
    )
    bias_O = torch.zeros(128)
    decoder.layers[2].linears["mlp.down_proj"] = QuantLinear(weight=weight, bias_O=bias_O, kernel=torch.matmul)
    after = decode_bytes(decoder, context=1)
    assert after.linears - before.linears == 128 * 384 + 128 * 3 * (2 + 4) + 128 * 4 - 128 * 384 * 4


def test_windows_bound_what_is_read(tmp_path: Path) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name.startswith("gemma2"))
    decoder = load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))
    spec = decoder.spec
    windows = [layer.sliding_window for layer in spec.layers]
    assert len(set(windows)) > 1
    seen = sum(50 if window is None else min(window, 50) for window in windows)
    assert decode_bytes(decoder, context=50).cache == 2 * spec.num_kv_heads * spec.head_dim * 4 * seen


def test_a_tensor_that_is_there_twice_counts_once() -> None:
    shared = torch.zeros(3, 5)
    assert held_bytes({"a": shared, "b": [shared, (torch.zeros(2, dtype=torch.int16), None, 7)]}) == 60 + 4


def test_a_bandwidth_says_how_it_was_measured() -> None:
    found = measure_bandwidth(torch.device("cpu"), num_bytes=1 << 20)
    assert found.bytes_per_second > 1e7
    assert found.method in ("a sum over 1 MiB, the best of 5", "a copy of 1 MiB, the best of 5")
