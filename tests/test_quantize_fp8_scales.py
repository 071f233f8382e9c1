"""The scales of an 8-bit float cache that a job writes, beside a forward of the model that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import tiny_model, write_model

from optgptq.calibration_text import calibration_windows
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.layer import DecoderLayer
from optgptq.models.registry import model_spec
from optgptq.quantize import quantize
from optgptq.recipe.records import Recipe
from optgptq.runtime.load import load_model


def largest_heads(folder: Path, tokens_WS: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the largest keys and values `[W, K]` of each layer in a forward of the whole model."""
    decoder = load_model(folder)
    keys, values = list[torch.Tensor](), list[torch.Tensor]()
    project = DecoderLayer.project_heads

    def watched(layer: DecoderLayer, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = project(layer, *arguments)
        keys.append(heads[1].abs().amax((2, 3)))
        values.append(heads[2].abs().amax((2, 3)))
        return heads

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(DecoderLayer, "project_heads", watched)
        decoder.logits(tokens_WS)
    return keys, values


def test_scales_for_other_engines_are_maxima_over_all_windows(tmp_path: Path) -> None:
    model = write_model(tiny_model("llama-multi_head_biases", hidden_size=48), tmp_path / "model")
    output = tmp_path / "out"
    recipe = Recipe.model_validate(
        {
            "weights": {"method": "rtn", "group_size": -1},
            "kv_cache": {"fp8_scales": "head"},
            "calibration": {"num_windows": 4, "window_size": 20, "full_precision_windows": 0},
            "export": {"format": "compressed-tensors"},
        }
    )
    quantize(model, recipe, output)
    source = CheckpointFolder.open(model)
    windows, _ = calibration_windows(source, model_spec(source), recipe.calibration, dtype=torch.float32, device="cpu")
    written = CheckpointFolder.open(output)
    largest = largest_heads(output, windows.tokens_WS)
    winners = set[int]()
    for leaf, layers in zip(("k_scale", "v_scale"), largest, strict=True):
        assert len(layers) == 3
        for index, maximum_WK in enumerate(layers):
            scale_K = written.read(f"model.layers.{index}.self_attn.{leaf}").flatten().float()
            # The largest number of a float of 8 bits; scales are kept in 16.
            torch.testing.assert_close(scale_K * 448, maximum_WK.amax(0), rtol=1e-2, atol=1e-6)
            winners |= set(maximum_WK.argmax(0).tolist())
    # Every window counts: no single one has all maxima.
    assert winners == {0, 1, 2, 3}
