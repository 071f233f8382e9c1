"""From a model and settings to a runner with its memory: kernels are chosen, memory is planned, both are logged."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

import torch

from optgptq.errors import ModelError, UsageError
from optgptq.kernels.attention_choice import AttentionChoice, choose_attention
from optgptq.kernels.cache_choice import CacheChoice, choose_cache_attention
from optgptq.kv_cache.setup import CacheSetup
from optgptq.memory import available_memory_bytes
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_attend import CacheAttend
from optgptq.runtime.cache_plan import CachePlan, exact_pages, layer_page_bytes, plan_cache, tokens_of_page
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.fused_linears import fuse_linears
from optgptq.runtime.graphs import DeviceRecorder
from optgptq.runtime.joined_layer import join_layers
from optgptq.runtime.memory_plan import MemoryPlan, plan_memory
from optgptq.runtime.packed_linears import pack_linears
from optgptq.runtime.page_pool import PagePool
from optgptq.runtime.runner import Runner
from optgptq.scheduling.settings import PageGroup, SchedulerSettings

logger = logging.getLogger(__name__)

# Where the system does not say what is left.
_UNKNOWN_MEMORY_BYTES = 4 << 30


def start_runner(
    decoder: Decoder, settings: EngineSettings, setup: CacheSetup | None = None
) -> tuple[Runner, SchedulerSettings]:
    """Return a runner and what its scheduler has to know. The decoder's linears are fused and packed in place.

    Args:
        decoder: the model.
        settings: how requests share it.
        setup: of a quantized cache, from the model's folder.

    Raises:
        ModelError: a model that promises fewer than two positions, or that the quantized cache does not go with.
        UsageError: a `max_length` beyond the model's table of positions, settings that the cache does not go with.
        CapacityError: not even one text fits into the memory.
    """
    spec, device = decoder.spec, decoder.device
    _require_positions(spec, settings.max_length)
    cache = plan_cache(setup, spec, settings, number_bytes=decoder.dtype.itemsize)
    plan = _plan(decoder, settings, cache)
    attention = choose_attention(device, decoder.dtype, spec.head_dim)
    codes = None if cache is None else _choose_codes(cache, decoder)
    kernels = _kernels_in_use(attention, codes, cache)
    _log_kernels(kernels)
    pool = PagePool.allocate(plan, spec, dtype=decoder.dtype, device=device, cache=cache)
    attend = None
    if cache is not None and codes is not None:
        by_token = settings.deterministic and not codes.rows_are_independent
        attend = CacheAttend.start(codes, cache, device, exact_group=pool.exact_group, by_token=by_token)
    fused = fuse_linears(decoder)
    pack_linears(fused)
    runner = Runner.start(
        join_layers(fused),
        pool,
        attention,
        cache=attend,
        deterministic=settings.deterministic,
        capture=DeviceRecorder() if _records(settings, device, kernels) else None,
    )
    return runner, scheduler_settings(
        plan,
        spec,
        settings,
        step_tokens=settings.step_tokens(device.type),
        max_running=settings.running(device.type),
    )


def _plan(decoder: Decoder, settings: EngineSettings, cache: CachePlan | None) -> MemoryPlan:
    """Return how many pages there are, and log what they hold."""
    spec, device = decoder.spec, decoder.device
    step_tokens = settings.step_tokens(device.type)
    page = {"page_size": tokens_of_page(settings, cache), "number_bytes": decoder.dtype.itemsize}
    plan = plan_memory(
        spec,
        page_size=page["page_size"],
        layer_page_bytes=layer_page_bytes(spec, cache, **page),
        budget_bytes=cache_budget(decoder, settings, step_tokens),
        max_length=settings.max_length,
        max_running=settings.running(device.type),
        max_step_tokens=step_tokens,
        exact=exact_pages(spec, cache, **page),
    )
    if cache is not None:
        _log_cache(cache, spec, page)
    _log_plan(plan, spec, wanted=settings.max_length)
    return plan


def _log_cache(cache: CachePlan, spec: DecoderSpec, page: Mapping[str, int]) -> None:
    size = page["page_size"]
    logger.info(
        "quantized KV cache: %s; %.1f bytes per token, %.1f as computed",
        cache.sentence(),
        sum(layer_page_bytes(spec, cache, **page)) / size,
        sum(layer_page_bytes(spec, None, **page)) / size,
    )


def _choose_codes(cache: CachePlan, decoder: Decoder) -> CacheChoice:
    schemes = [layout.scheme for layout in cache.layouts if layout is not None]
    return choose_cache_attention(decoder.device, decoder.dtype, decoder.spec.head_dim, schemes)


def _kernels_in_use(
    attention: AttentionChoice, codes: CacheChoice | None, cache: CachePlan | None
) -> list[AttentionChoice | CacheChoice]:
    plain = [attention] if cache is None or None in cache.layouts else []
    return [*plain, *([] if codes is None else [codes])]


def _log_kernels(kernels: Sequence[AttentionChoice | CacheChoice]) -> None:
    for kernel in kernels:
        what = "attention" if isinstance(kernel, AttentionChoice) else "attention over codes"
        level = logging.WARNING if kernel.is_makeshift else logging.INFO
        logger.log(level, "%s kernel for %s: %s", kernel.name, what, kernel.reason)


def _records(settings: EngineSettings, device: torch.device, kernels: Sequence[AttentionChoice | CacheChoice]) -> bool:
    """Return whether decode steps are to be recorded; where a kernel stands in the way, that is logged."""
    if device.type != "cuda" or not settings.graphs:
        return False
    reading = [kernel.name for kernel in kernels if not kernel.can_be_recorded]
    if reading:
        logger.warning("decode steps are not recorded: %s attention reads numbers back from the device", reading[0])
    return not reading


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
            PageGroup(
                num_pages=pages,
                window=group.window,
                num_sinks=group.num_sinks,
                forgets_window=group.forgets_window,
            )
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


def cache_budget(decoder: Decoder, settings: EngineSettings, step_tokens: int) -> int:
    """Return the bytes that keys and values may take."""
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
    # The last token of a text is not computed, so that it takes no position.
    if wanted is not None and promised is not None and wanted > promised + 1:
        logger.warning("texts may have %d tokens, the model promises %d: they get worse beyond them", wanted, promised)
