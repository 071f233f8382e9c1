"""From a model and settings to a runner with its memory: kernels are chosen, memory is planned, both are logged."""

from __future__ import annotations

import logging
import sys

import torch

from optgptq.errors import ModelError, UsageError
from optgptq.kernels.attention_choice import choose_attention
from optgptq.memory import available_memory_bytes
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.fused_linears import fuse_linears
from optgptq.runtime.graphs import DeviceRecorder
from optgptq.runtime.memory_plan import MemoryPlan, plan_memory
from optgptq.runtime.packed_linears import pack_linears
from optgptq.runtime.page_pool import PagePool
from optgptq.runtime.runner import Runner
from optgptq.scheduling.settings import PageGroup, SchedulerSettings

logger = logging.getLogger(__name__)

# Where the system does not say what is left.
_UNKNOWN_MEMORY_BYTES = 4 << 30


def start_runner(decoder: Decoder, settings: EngineSettings) -> tuple[Runner, SchedulerSettings]:
    """Return a runner and what its scheduler has to know. The decoder's linears are fused and packed in place.

    Raises:
        ModelError: a model that promises fewer than two positions.
        UsageError: a `max_length` beyond the model's table of positions.
        CapacityError: not even one text fits into the memory.
    """
    spec, device = decoder.spec, decoder.device
    _require_positions(spec, settings.max_length)
    running = settings.running(device.type)
    step_tokens = settings.step_tokens(device.type)
    plan = plan_memory(
        spec,
        page_size=settings.page_size,
        number_bytes=decoder.dtype.itemsize,
        budget_bytes=_budget_bytes(decoder, settings, step_tokens),
        max_length=settings.max_length,
        max_running=running,
        max_step_tokens=step_tokens,
    )
    _log_plan(plan, spec, wanted=settings.max_length)
    attention = choose_attention(device, decoder.dtype, spec.head_dim)
    level = logging.WARNING if attention.is_makeshift else logging.INFO
    logger.log(level, "%s kernel for attention: %s", attention.name, attention.reason)
    pool = PagePool.allocate(plan, spec, dtype=decoder.dtype, device=device)
    records = device.type == "cuda" and settings.graphs and attention.can_be_recorded
    if device.type == "cuda" and settings.graphs and not attention.can_be_recorded:
        logger.warning("decode steps are not recorded: %s attention reads numbers back from the device", attention.name)
    fused = fuse_linears(decoder)
    pack_linears(fused)
    runner = Runner.start(
        fused,
        pool,
        attention,
        deterministic=settings.deterministic,
        capture=DeviceRecorder() if records else None,
    )
    return runner, scheduler_settings(plan, spec, settings, step_tokens=step_tokens, max_running=running)


def _require_positions(spec: DecoderSpec, max_length: int | None) -> None:
    promised = spec.position_limit or spec.max_position
    if promised == 1 and (max_length is None or spec.position_limit is not None):
        raise ModelError(
            "config.json",
            expected="at least 2 positions: a token to read and one to write",
            found="1 (max_position_embeddings, n_positions or max_seq_len)",
            action="Write the number there that the model was trained with.",
        )
    if max_length is not None and spec.position_limit is not None and max_length > spec.position_limit:
        raise UsageError(
            "max_length",
            expected=f"at most {spec.position_limit}, the rows of the model's position table",
            found=str(max_length),
            action="Change this setting of the engine, or leave it out.",
        )


def scheduler_settings(
    plan: MemoryPlan, spec: DecoderSpec, settings: EngineSettings, *, step_tokens: int, max_running: int
) -> SchedulerSettings:
    """Return what the scheduler has to know of the model and the memory."""
    restarts = {rope.original_max_position for rope in spec.ropes if rope.kind == "longrope"}
    return SchedulerSettings(
        page_size=plan.page_size,
        groups=tuple(
            PageGroup(num_pages=pages, window=group.window)
            for group, pages in zip(plan.groups, plan.num_pages, strict=True)
        ),
        max_length=plan.max_length,
        max_step_tokens=step_tokens,
        max_running=max_running,
        max_waiting=sys.maxsize if settings.max_waiting is None else settings.max_waiting,
        prefix_cache=settings.prefix_cache,
        watermark_ratio=settings.watermark_ratio,
        aging_steps=settings.aging_steps,
        restart_lengths=tuple(sorted(length for length in restarts if length < plan.max_length)),
    )


def _budget_bytes(decoder: Decoder, settings: EngineSettings, step_tokens: int) -> int:
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    share = settings.memory_share_of(decoder.device.type)
    if decoder.device.type == "cpu":
        available = available_memory_bytes()
        return int(share * (_UNKNOWN_MEMORY_BYTES if available is None else available))
    free, _ = torch.cuda.mem_get_info(decoder.device)
    # Once for a step that runs, once for what recorded steps keep.
    used = 2 * step_bytes(decoder.spec, step_tokens, decoder.dtype.itemsize)
    return int(share * max(free - used, 0))


def step_bytes(spec: DecoderSpec, step_tokens: int, number_bytes: int) -> int:
    """Return what the activations of one step take at most, roughly: a layer's, and logits of every token."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = 4 * spec.hidden_size + 3 * heads + 3 * spec.intermediate_size
    return step_tokens * (per_token * number_bytes + spec.vocab_size * 8)


def _log_plan(plan: MemoryPlan, spec: DecoderSpec, *, wanted: int | None) -> None:
    logger.info("%s", plan.sentence())
    promised = spec.position_limit or spec.max_position
    if wanted is None and promised is not None and plan.max_length < promised:
        logger.warning(
            "texts end at %d tokens: the model promises %d, but memory for keys and values holds no more",
            plan.max_length,
            promised,
        )
    if wanted is not None and promised is not None and wanted > promised:
        logger.warning("texts may have %d tokens, the model promises %d: they get worse beyond them", wanted, promised)
