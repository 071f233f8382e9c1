"""Quantizes with llm-compressor, on the windows that every tool of a comparison gets."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from job import PeerJob, read_job
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def quantize(job: PeerJob) -> None:
    """Run `oneshot`; the asymmetric mode searches its grids, which is the best setting of this tool."""
    tokens_WS = np.load(job.windows)
    dataset = Dataset.from_dict({"input_ids": tokens_WS.tolist(), "attention_mask": np.ones_like(tokens_WS).tolist()})
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group_size,
        "observer": "minmax" if job.symmetric else "mse",
    }
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"),
        dataset=dataset,
        recipe=GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
        max_seq_length=tokens_WS.shape[1],
        num_calibration_samples=len(tokens_WS),
        shuffle_calibration_samples=False,
        output_dir=job.output,
    )


if __name__ == "__main__":
    quantize(read_job(__doc__))
