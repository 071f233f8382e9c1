"""A quantized model in the engine writes what transformers writes with the decoded weights put into its own model."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from support.binary_weights import random_binary
from support.checkpoints import mixed_story_layouts, quantize_all, story_layouts, write_checkpoint
from support.tiny_models import random_tokens, reference_greedy

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import LLM
from optgptq.scheduling.sampling_params import SamplingParams

STORY = bundled_path("bundled:story-llama")
NEW = 24
PROMPTS = [random_tokens(1, size, vocab_size=1024, seed=size)[0].tolist() for size in (2, 31, 90)]


def reference(decoded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in decoded.items():
            parameters[f"{name}.weight"].copy_(weight.dequantize())
    return model


def folder_of(kind: str, path):
    source = CheckpointFolder.open(STORY)
    if kind == "optgptq":
        layouts = [replace(one, coefficients="float") for one in story_layouts(bits=2, symmetric=False)]
        weights = {one.name: random_binary(one, seed=index) for index, one in enumerate(layouts)}
    else:
        layouts = mixed_story_layouts()
        weights = quantize_all(source, layouts, format_name=kind)
    write_checkpoint(source, path, layouts, weights, format_name=kind)
    return path, weights


@pytest.mark.parametrize("held", ["dense", "exact"])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors", "optgptq"])
def test_quantized_checkpoints(kind, held, tmp_path):
    path, decoded = folder_of(kind, tmp_path / "out")
    model = reference(decoded)
    expected = [reference_greedy(model, prompt, NEW) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    small = EngineSettings(max_length=128, max_running=4, max_step_tokens=17)
    for settings in (EngineSettings(max_length=128), small):
        llm = LLM(path, weights=held, settings=settings)
        assert [result.token_ids for result in llm.generate(PROMPTS, params)] == expected
        # Again, now with pages of the first time.
        assert [result.token_ids for result in llm.generate(PROMPTS, params)] == expected
