"""The sampler written out literally: Python loops over one row, float64."""

from __future__ import annotations

import math

from optgptq.runtime.sampler import SamplingRow
from optgptq.scheduling.sampling_params import SamplingParams


def row_of(params: SamplingParams, *, prompt=(), output=(), seed=0, fork=0, eos=()) -> SamplingRow:
    return SamplingRow(
        params=params, prompt_ids=prompt, token_ids=[*prompt, *output], seed=seed, fork=fork, eos_token_ids=tuple(eos)
    )


def slow_adjusted(logits: list[float], row: SamplingRow) -> list[float]:
    """Bias, min_tokens, penalties."""
    params, changed = row.params, list(logits)
    for token_id, bias in (params.logit_bias or {}).items():
        changed[token_id] += bias
    if len(row.output_ids) < params.min_tokens:
        for token_id in [*row.eos_token_ids, *params.stop_ids]:
            changed[token_id] = -math.inf
    for token_id in range(len(changed)):
        written = list(row.output_ids).count(token_id)
        if written or token_id in row.prompt_ids:
            factor = params.repetition_penalty
            changed[token_id] = changed[token_id] / factor if changed[token_id] > 0 else changed[token_id] * factor
        changed[token_id] -= params.frequency_penalty * written
        changed[token_id] -= params.presence_penalty * (written > 0)
    return changed


def slow_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min-p, top-k, top-p; the result sums to 1."""
    greatest = max(logits)
    weights = [math.exp((logit - greatest) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))
    order = [token_id for token_id in order if weights[token_id] >= params.min_p]
    if params.top_k > 0:
        order = order[: params.top_k]
    total, before, kept = math.fsum(weights[token_id] for token_id in order), 0.0, []
    for token_id in order:
        if before < params.top_p * total or not kept:
            kept.append(token_id)
        before += weights[token_id]
    total = math.fsum(weights[token_id] for token_id in kept)
    return [weights[token_id] / total if token_id in kept else 0.0 for token_id in range(len(logits))]
