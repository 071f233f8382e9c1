"""What `transformers` makes of our checkpoints, compared with the weights that we decode ourselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from warnings import catch_warnings, simplefilter

import pytest
import torch
from support.checkpoints import (
    STORY_LLAMA,
    mixed_story_layouts,
    quantize_all,
    story_layouts,
    write_checkpoint,
)
from transformers import AutoModelForCausalLM

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.layout import LinearLayout


@contextmanager
def others_may_warn() -> Iterator[None]:
    """Deprecations inside the libraries are theirs to fix."""
    with catch_warnings():
        simplefilter("ignore")
        yield


def logits_of(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), others_may_warn():
        logits: torch.Tensor = model(tokens_BS).logits
    return logits


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(story_layouts(), id="W4"),
        pytest.param(story_layouts(bits=3, group_size=128), id="W3"),
        pytest.param(story_layouts(bits=8, group_size=-1), id="W8 channel"),
        pytest.param(mixed_story_layouts(), id="mixed, sharded"),
    ],
)
def test_transformers_gives_the_logits_of_the_decoded_weights(tmp_path: Path, layouts: list[LinearLayout]) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    write_checkpoint(
        source, tmp_path / "out", layouts, weights, format_name="compressed-tensors", max_shard_bytes=400_000
    )
    tokens_BS = torch.randint(2, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    with others_may_warn():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        reference = AutoModelForCausalLM.from_pretrained(STORY_LLAMA, dtype=torch.float32)
    for name, weight in weights.items():
        reference.get_submodule(name).weight.data = weight.dequantize()
    difference = (logits_of(loaded, tokens_BS) - logits_of(reference, tokens_BS)).abs().max()
    assert float(difference) < 1e-3
