"""On a GPU the operations between products are taken from the leaves; here stand-ins record that they are."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import TINY_MODELS, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels.leaves import leaves_for
from optgptq.models import layer, norm, rope
from optgptq.models.activations import ACTIVATIONS
from optgptq.models.decoder import load_decoder
from optgptq.runtime.fused_linears import fuse_linears


class PlainLeaves:
    """What the kernels compute, in torch, and with their demands on layouts."""

    def __init__(self) -> None:
        self.called: set[str] = set()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        self.called.add("rms_norm")
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def rotate_in_place(self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        self.called.add("rotate_in_place")
        for heads in (query, key):
            assert heads.stride()[-2:] == (heads.shape[-1], 1)
            assert len(cosine) == heads.view(-1, *heads.shape[-2:]).shape[0]
            half = cosine.shape[-1]
            first, second = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
            heads[..., :half] = first * cosine - second * sine
            heads[..., half : 2 * half] = second * cosine + first * sine

    def gated(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        self.called.add("gated")
        return ACTIVATIONS[kind](gate.clone()) * up


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_the_logits_are_those_without_leaves(tiny, fused, tmp_path, monkeypatch):
    folder = CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path))
    plain, leafy = load_decoder(folder), load_decoder(folder)
    leafy = fuse_linears(leafy) if fused else leafy
    leaves = PlainLeaves()
    batches = (random_tokens(1, 12), random_tokens(2, 9))
    expected = [plain.logits(tokens_BS) for tokens_BS in batches]
    for module in (layer, norm, rope):
        monkeypatch.setattr(module, "leaves_for", lambda x: leaves)
    for tokens_BS, logits_BSV in zip(batches, expected, strict=True):
        torch.testing.assert_close(leafy.logits(tokens_BS), logits_BSV, rtol=1e-4, atol=1e-4)
    assert ("rms_norm" in leaves.called) == (plain.spec.norm.kind == "rms")
    assert ("gated" in leaves.called) == plain.spec.gated


def test_processors_and_gradients_have_no_leaves():
    assert leaves_for(torch.zeros(2)) is None
    assert leaves_for(torch.zeros(2, requires_grad=True)) is None
