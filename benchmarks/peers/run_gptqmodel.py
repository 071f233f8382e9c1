"""Quantizes with GPTQModel, on the windows that every tool of a comparison gets."""

from __future__ import annotations

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig
from job import PeerJob, read_job

BATCH_SIZE = 8


def quantize(job: PeerJob) -> None:
    """Run `quantize` and `save`; nothing is offloaded to disk, which is slower on a processor."""
    tokens_WS = np.load(job.windows)
    dataset = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens_WS]
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=job.symmetric, offload_to_disk=False)
    model = GPTQModel.load(job.model, config)
    model.quantize(dataset, batch_size=BATCH_SIZE)
    model.save(job.output)


if __name__ == "__main__":
    quantize(read_job(__doc__))
