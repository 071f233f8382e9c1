"""Whole models: real checkpoints, a cache through the attend hook, supplied linears, low precision."""

from __future__ import annotations

import warnings
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
from optgptq.models.attention import attention_context, causal_attention
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.inventory import model_linears
from optgptq.models.linear import Linear
from optgptq.models.spec import DecoderSpec

REPOSITORY = Path(__file__).resolve().parents[2]
BY_NAME = {tiny.name: tiny for tiny in TINY_MODELS}
CACHED = (
    "llama-grouped_query",
    "mistral-short_window",
    "qwen3-norms",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-default_window",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-pre_norm",
    "bloom-six_heads",
    "mpt-alibi",
    "falcon-multi_query_alibi",
    "falcon-grouped",
)


class GrowingCache:
    """The simplest `Attend` with a memory: keys and values are concatenated."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor:
        if layer_index in self.stored:
            earlier_keys, earlier_values = self.stored[layer_index]
            key_BKSD = torch.cat([earlier_keys, key_BKSD], dim=2)
            value_BKSD = torch.cat([earlier_values, value_BKSD], dim=2)
        self.stored[layer_index] = (key_BKSD, value_BKSD)
        return causal_attention(query_BNSD, key_BKSD, value_BKSD, spec=spec, layer_index=layer_index)


def _tiny_decoder(tiny: TinyModel, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), folder / "model")), dtype=dtype)


@pytest.mark.parametrize("name", CACHED)
def test_cache_through_the_attend_hook_gives_the_full_forward(name: str, tmp_path: Path) -> None:
    decoder = _tiny_decoder(BY_NAME[name], tmp_path)
    tokens_BS = random_tokens(2, 16)
    expected = decoder.logits(tokens_BS)
    cache, start, pieces = GrowingCache(), 0, []
    for size in (6, 1, 4, 1, 3, 1):
        context = attention_context(decoder.spec, size, start=start, attend=cache)
        pieces.append(decoder.logits(tokens_BS[:, start : start + size], context))
        start += size
    error = (torch.cat(pieces, dim=1) - expected).abs().max() / expected.abs().max()
    assert float(error) < 2e-5


@pytest.mark.parametrize(
    "where", ["configs/bundled/story-llama", "../shared/models/babyllama-105", "../shared/models/tinystories-656k"]
)
def test_real_checkpoints_equal_transformers(where: str) -> None:
    folder = REPOSITORY / where
    if not folder.is_dir():
        pytest.skip(f"{where} is not here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = load_decoder(CheckpointFolder.open(folder))
    tokens_BS = random_tokens(2, 200, vocab_size=decoder.spec.vocab_size)
    expected = reference_logits(model, tokens_BS)
    error = (decoder.logits(tokens_BS) - expected).abs().max() / expected.abs().max()
    assert float(error) < 5e-6


@pytest.mark.parametrize("name", ["llama-grouped_query", "gemma2-softcaps", "falcon-rw_alibi"])
def test_bfloat16_stays_near_float32_and_logits_stay_float32(name: str, tmp_path: Path) -> None:
    tokens_BS = random_tokens(2, 20)
    exact = _tiny_decoder(BY_NAME[name], tmp_path).logits(tokens_BS)
    rounded = _tiny_decoder(BY_NAME[name], tmp_path, torch.bfloat16).logits(tokens_BS)
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.1


def test_supplied_linears_take_the_place_of_stored_ones(tmp_path: Path) -> None:
    model = reference_model(BY_NAME["llama-grouped_query"])
    folder = CheckpointFolder.open(save_reference(model, tmp_path / "model"))
    plain = load_decoder(folder)
    names = tuple(info.name for info in model_linears(plain.spec) if info.stage == "down")
    given: list[str] = []

    def supply(name: str) -> Linear | None:
        if name not in names:
            return None
        given.append(name)
        return Linear(2 * folder.read(f"{name}.weight"))

    decoder = load_decoder(folder, supply_linear=supply, supplied=names)
    assert tuple(given) == names
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    tokens_BS = random_tokens(1, 9)
    expected = reference_logits(model, tokens_BS)
    assert float((decoder.logits(tokens_BS) - expected).abs().max() / expected.abs().max()) < 2e-5


def test_tied_head_shares_the_memory_of_the_embedding(tmp_path: Path) -> None:
    tied = _tiny_decoder(BY_NAME["llama-tied"], tmp_path)
    assert tied.head.project.weight_OI is tied.embedding.tokens_VE


def test_logits_leave_the_global_generator_and_the_weights_alone(tmp_path: Path) -> None:
    decoder = _tiny_decoder(BY_NAME["gemma3text-final_cap"], tmp_path)
    state = torch.get_rng_state()
    first = decoder.logits(random_tokens(2, 11))
    assert torch.equal(first, decoder.logits(random_tokens(2, 11)))
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad
