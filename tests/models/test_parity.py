"""Our decoder gives the logits of transformers for every family and variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    TINY_MODELS,
    TinyModel,
    random_tokens,
    reference_logits,
    reference_model,
    save_reference,
)

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.decoder import load_decoder

# Largest difference over largest logit; float32 rounding of a few layers is amplified by the large random weights.
TOLERANCE = 2e-5


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_logits_equal_transformers(tiny: TinyModel, tmp_path: Path) -> None:
    model = reference_model(tiny)
    decoder = load_decoder(CheckpointFolder.open(save_reference(model, tmp_path / "model")))
    # 300 positions cross the chunk of explicit attention and every window and original length of the tiny configs.
    for tokens_BS in (random_tokens(2, 19), random_tokens(1, 300)):
        expected = reference_logits(model, tokens_BS)
        found = decoder.logits(tokens_BS)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE, f"{tiny.name}: relative error {error:.2e} at {tokens_BS.shape[1]} positions"
