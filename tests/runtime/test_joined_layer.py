"""Joined layers give what `DecoderLayer` gives; families of another make-up keep it. Parity tests run them too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import TINY_MODELS, TinyModel, random_tokens, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels.leaves import running_leaves
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.runtime import start
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.fused_linears import fuse_linears
from optgptq.runtime.joined_layer import JoinedLayer, join_layers
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    running_leaves(torch.device("cpu"), torch.float32) is None, reason="the native library was not built"
)
# RMS norms that open the branches, sums one after the other, a gated feed-forward.
JOINED = ("llama", "mistral", "qwen", "gemma", "phi3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decoder_of(tiny: TinyModel, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), folder)), dtype=dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_logits_are_those_of_plain_layers(tiny, fused, tmp_path) -> None:
    decoder = decoder_of(tiny, tmp_path)
    decoder = fuse_linears(decoder) if fused else decoder
    tokens_BS = random_tokens(2, 9)
    expected = decoder.logits(tokens_BS)
    joined = join_layers(decoder)
    torch.testing.assert_close(joined.logits(tokens_BS), expected, rtol=1e-4, atol=1e-4)
    assert {isinstance(layer, JoinedLayer) for layer in joined.layers} == {tiny.name.startswith(JOINED)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama-grouped_query", "qwen3-norms", "gemma3text-local_global", "mistral-short_window"]
)
def test_an_engine_is_as_near_to_exact_logprobs(name, dtype, tmp_path, monkeypatch) -> None:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    prompts = [random_tokens(1, size, seed=size)[0].tolist() for size in (3, 9, 14, 17, 21, 30)]

    def likeliest(number: torch.dtype) -> list[dict[int, float]]:
        settings = EngineSettings(page_size=16, max_length=64, max_running=6, max_step_tokens=10)
        engine = Engine(decoder_of(tiny, tmp_path, number), None, settings)
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)
        outputs = [result.outputs[0] for result in generate(engine, prompts, params)]
        return [step for output in outputs for step in output.logprobs or ()]

    joined = likeliest(dtype)
    monkeypatch.setattr(start, "join_layers", lambda decoder: decoder)
    monkeypatch.setattr("optgptq.runtime.runner.start_joint_attend", lambda *arguments: None)
    plain, exact = likeliest(dtype), likeliest(torch.float32)
    assert _distance(joined, exact) <= 2 * _distance(plain, exact) + 1e-5


def _distance(found: list[dict[int, float]], expected: list[dict[int, float]]) -> float:
    """Return the mean distance of logprobs of tokens that are in both."""
    errors = [
        abs(one[token] - two[token])
        for one, two in zip(found, expected, strict=True)
        for token in one.keys() & two.keys()
    ]
    assert len(errors) >= 15 * len(expected)
    return sum(errors) / len(errors)


def test_a_copy_is_a_layer_of_its_own(tmp_path) -> None:
    layer = join_layers(decoder_of(TINY_MODELS[0], tmp_path)).layers[0]
    other = layer.copy()
    assert isinstance(other, JoinedLayer)
    assert other.linears == layer.linears
    assert other.linears is not layer.linears
