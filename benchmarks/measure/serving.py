"""Jobs of many requests, and who runs them: our engine, and two ways of transformers."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optgptq.errors import CapacityError
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import generate, load_for_engine
from optgptq.scheduling.sampling_params import SamplingParams

SHORTEST_PROMPT, LONGEST_PROMPT, NEW_TOKENS = 64, 512, 128
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingJob:
    """Requests that all arrive at once; greedy, and no end token ends a text.

    Attributes:
        prompts: token ids.
        new_tokens: to write for each.
    """

    prompts: Sequence[list[int]]
    new_tokens: int

    @property
    def num_new(self) -> int:
        return len(self.prompts) * self.new_tokens

    @property
    def contiguous_slots(self) -> int:
        """Slots of a contiguous cache: every request has room for the longest one."""
        return len(self.prompts) * (max(map(len, self.prompts)) + self.new_tokens)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One run of a job.

    Attributes:
        tokens: new tokens of each request.
        seconds: from the first request to the last token.
        figures: whatever else was measured.
    """

    tokens: list[list[int]]
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)


Run = Callable[[ServingJob], Outcome]


def mixed_job(*, num_requests: int, vocabulary: int, seed: int, shared_prefix: int = 0) -> ServingJob:
    """Return prompts of random tokens, lengths even from 64 to 512 in random order, the first ones the same for all."""
    generator = random.Random(seed)
    span = LONGEST_PROMPT - SHORTEST_PROMPT
    sizes = [SHORTEST_PROMPT + span * index // max(num_requests - 1, 1) for index in range(num_requests)]
    generator.shuffle(sizes)
    prefix = [generator.randrange(2, vocabulary) for _ in range(shared_prefix)]
    prompts = [prefix + [generator.randrange(2, vocabulary) for _ in range(size)] for size in sizes]
    return ServingJob(prompts=prompts, new_tokens=NEW_TOKENS)


def engine_run(path: Path, settings: EngineSettings) -> Run:
    """Return a run of our engine; the model is loaded once, each run has an engine of its own."""
    loaded = load_for_engine(path)

    def run(job: ServingJob) -> Outcome:
        engine = Engine(loaded.decoder, None, settings)
        # Different tokens than the job's, so that no page of it is there already.
        generate(engine, [[1] * 8], SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0.0, ignore_eos=True))
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        results = generate(engine, job.prompts, params)
        seconds = time.perf_counter() - began
        usage, plan = engine.usage(), engine.runner.attend.pool.plan
        slot_bytes = sum(group.page_bytes for group in plan.groups) // plan.page_size
        return Outcome(
            tokens=[result.token_ids for result in results],
            seconds=seconds,
            figures={
                "peak_slots": usage.peak_allocated_slots,
                "peak_bytes": usage.peak_allocated_slots * slot_bytes,
                "slot_bytes": slot_bytes,
                "waste": usage.waste_ratio,
                "steps": usage.num_steps,
                "preemptions": usage.num_preemptions,
                "prefix_hit_tokens": usage.prefix_hit_tokens,
                "first_token_seconds": sorted(result.seconds_to_first_token or 0.0 for result in results),
            },
        )

    return run


def bytes_for_slots(path: Path, slots: int, *, page_size: int) -> int:
    """Return the memory for keys and values that holds so many slots, the reserved page included."""
    loaded = load_for_engine(path)
    try:
        probe = Engine(loaded.decoder, None, EngineSettings(page_size=page_size, max_running=1))
    except CapacityError as error:
        raise RuntimeError("the machine has no memory for one text") from error
    page_bytes = sum(group.page_bytes for group in probe.runner.attend.pool.plan.groups)
    return page_bytes * (slots // page_size + 1)


def transformers_model(path: Path) -> Any:
    """Return the model in float32, as transformers loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def transformers_one_by_one(model: Any) -> Run:
    """Return `generate`, called for each request."""

    def run(job: ServingJob) -> Outcome:
        began = time.perf_counter()
        tokens = []
        with torch.no_grad():
            for prompt in job.prompts:
                ids = torch.tensor([prompt])
                written = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.new_tokens, do_sample=False
                )
                tokens.append(written[0, len(prompt) :].tolist())
        return Outcome(tokens=tokens, seconds=time.perf_counter() - began)

    return run


def transformers_batched(model: Any) -> Run:
    """Return transformers' own continuous batching."""
    from transformers import GenerationConfig

    def run(job: ServingJob) -> Outcome:
        config = GenerationConfig(max_new_tokens=job.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        began = time.perf_counter()
        outputs = model.generate_batch(inputs=job.prompts, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - began
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return Outcome(tokens=[list(by_prompt[tuple(prompt)]) for prompt in job.prompts], seconds=seconds)

    return run
