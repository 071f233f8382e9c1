"""`LLM`: a model folder, and texts from it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.hub import resolve_model
from optgptq.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from optgptq.errors import OptGPTQError, UsageError
from optgptq.kernels.native_affine import takes_native
from optgptq.kv_cache.setup import CacheSetup
from optgptq.memory import available_memory_bytes
from optgptq.models.decoder import Decoder
from optgptq.models.inventory import model_linears
from optgptq.models.registry import model_spec
from optgptq.runtime.cache_plan import cache_of_folder
from optgptq.runtime.device import require_device, run_dtype
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import CACHE_OF_CHECKPOINT, EngineSettings
from optgptq.runtime.load import HeldWeights, load_model
from optgptq.runtime.prompt_tokens import Prompt, is_list, is_token_id
from optgptq.runtime.results import GenerationResult, Piece, failure_result
from optgptq.scheduling.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Of the memory that is left, for the linears of a quantized model decoded; keys and values take another half of it.
_DENSE_SHARE = 0.4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedModel:
    """A model with its tokenizer and what its folder says of a quantized cache, ready for an engine."""

    decoder: Decoder
    tokenizer: Tokenizer | None
    cache: CacheSetup | None


def load_for_engine(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    weights: HeldWeights | Literal["auto"] = "auto",
    revision: str | None = None,
    settings: EngineSettings | None = None,
) -> LoadedModel:
    """Read a model for an engine; the arguments are those of `LLM`.

    What the folder says of a quantized cache is read only where `settings` ask for it.
    """
    folder, torch_device = resolve_model(str(model), revision), require_device(device)
    checkpoint = CheckpointFolder.open(folder)
    number = run_dtype(checkpoint, torch_device, wanted=dtype)
    held = weights if weights != "auto" else _faster_to_hold(checkpoint, torch_device, number)
    decoder = load_model(folder, dtype=number, device=torch_device, weights=held)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if tokenizer is None:
        logger.warning("%s has no tokenizer: prompts must be token ids, and results have no text", folder)
    wanted = (settings or EngineSettings()).kv_cache == CACHE_OF_CHECKPOINT
    return LoadedModel(
        decoder=decoder, tokenizer=tokenizer, cache=cache_of_folder(checkpoint, decoder.spec) if wanted else None
    )


def with_cache(settings: EngineSettings | None, kv_cache: str | None, past_only: str | None) -> EngineSettings:
    """Return the settings with another cache, or another mode of it; None for what the settings say."""
    chosen = settings or EngineSettings()
    if kv_cache is not None:
        chosen = replace(chosen, kv_cache=kv_cache)
    return chosen if past_only is None else replace(chosen, past_only=past_only)


def _faster_to_hold(checkpoint: CheckpointFolder, device: torch.device, dtype: torch.dtype) -> HeldWeights:
    """Return how quantized linears are held: codes where a kernel is made for them, else decoded, if memory allows."""
    if device.type != "cpu" or takes_native(device, dtype):
        return "quantized"
    linears = model_linears(model_spec(checkpoint))
    num_bytes = sum(linear.out_features * linear.in_features for linear in linears) * dtype.itemsize
    available = available_memory_bytes()
    if available is None or num_bytes <= _DENSE_SHARE * available:
        return "dense"
    logger.warning(
        "quantized linears stay in codes, which is slow on a processor: decoded they take %.1f of %.1f GiB of memory",
        num_bytes / 2**30,
        available / 2**30,
    )
    return "quantized"


class LLM:
    """A causal language model that writes many texts at a time.

    Attributes:
        engine: what runs it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        weights: HeldWeights | Literal["auto"] = "auto",
        revision: str | None = None,
        settings: EngineSettings | None = None,
        kv_cache: str | None = None,
        past_only: str | None = None,
    ) -> None:
        """Load a model and take the memory for its keys and values.

        Args:
            model: folder, hub id, or `bundled:NAME`; dense or in any layout that this package reads.
            device: `cpu`, or `cuda` or `cuda:N` for a CUDA or HIP device.
            dtype: of activations, dense weights, keys and values; `auto`: float32 on a processor, on a GPU the dtype of
                the weights (bfloat16 for those in float32).
            weights: `quantized` multiplies with codes as they are stored, on a processor with activations rounded to 8
                bits, `exact` with activations as they are, `dense` decodes the codes once; `auto`: what is faster on
                the device, as far as memory allows.
            revision: of a hub id.
            settings: how requests share the model.
            kv_cache: in place of that of the settings: `checkpoint`, `16`, `8`, `4`, `3` or `2`.
            past_only: in place of that of the settings: `off`, `token`, `chunk` or `window:N`.

        Raises:
            ModelError, FormatError: the checkpoint is damaged, or its model or layout is not implemented.
            CapacityError: no memory for keys and values.
            UsageError: no such device.
        """
        chosen = with_cache(settings, kv_cache, past_only)
        loaded = load_for_engine(model, device=device, dtype=dtype, weights=weights, revision=revision, settings=chosen)
        self.engine = Engine(loaded.decoder, loaded.tokenizer, chosen, loaded.cache)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[int, GenerationResult], None] | None = None,
        on_piece: Callable[[int, Piece], None] | None = None,
    ) -> list[GenerationResult]:
        """Continue prompts and return one result for each, in order.

        A prompt that cannot be served has its reason in `error` of its result; the others go on.

        Args:
            prompts: one or more; text, which gets a BOS token where the tokenizer adds one, or token ids, taken as they
                are.
            sampling_params: for all prompts, or one for each; None for the defaults of `SamplingParams`.
            progress: called with prompts done and asked for, after each one that ends.
            on_result: called with the number of a prompt, from 0, and its result, as soon as it is there.
            on_piece: called with the number of a prompt and what was added to its text, after each step.

        Raises:
            UsageError: not as many sampling parameters as prompts.
        """
        return generate(
            self.engine, prompts, sampling_params, progress=progress, on_result=on_result, on_piece=on_piece
        )


def generate(
    engine: Engine,
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_result: Callable[[int, GenerationResult], None] | None = None,
    on_piece: Callable[[int, Piece], None] | None = None,
) -> list[GenerationResult]:
    """Continue prompts on an engine that has nothing else to do; see `LLM.generate`.

    After an exception the engine is as new: nothing that it has begun is left.
    """
    several = _prompt_list(prompts)
    params = _params_list(sampling_params, len(several))
    results: dict[int, GenerationResult] = {}

    def take(index: int, result: GenerationResult) -> None:
        results[index] = result
        if on_result is not None:
            on_result(index, result)

    try:
        for index, result in _ended(engine, list(zip(several, params, strict=True)), on_piece):
            take(index, result)
            if progress is not None:
                progress(len(results), len(several))
    except BaseException:
        # Ctrl-C, an error of the model or of a callback.
        engine.reset()
        raise
    failed = sum(result.error is not None for result in results.values())
    if failed:
        logger.warning("%d of %d prompts failed; `error` of their results says why", failed, len(several))
    return [results[index] for index in range(len(several))]


def _ended(
    engine: Engine,
    requests: Sequence[tuple[Prompt, SamplingParams]],
    on_piece: Callable[[int, Piece], None] | None,
) -> Iterator[tuple[int, GenerationResult]]:
    """Run steps until all requests have ended, and yield what ends; a full queue gets them as it has room."""
    held_back = deque(enumerate(requests))
    waiting: dict[str, int] = {}
    while held_back or waiting:
        while held_back and engine.has_room:
            index, (prompt, params) = held_back.popleft()
            try:
                waiting[engine.submit(prompt, params, stream=on_piece is not None)] = index
            except OptGPTQError as error:
                yield index, failure_result(f"prompt {index + 1}", prompt, error)
        for piece in engine.step():
            if on_piece is not None and piece.request_id in waiting:
                on_piece(waiting[piece.request_id], piece)
        for name, result in engine.take_results():
            if name in waiting:
                yield waiting.pop(name), result


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts. A string is one, so are numbers alone, and so is what is no list: it will be refused."""
    if isinstance(prompts, str) or not is_list(prompts):
        return [cast(Prompt, prompts)]
    is_one = len(prompts) > 0 and all(is_token_id(item) for item in prompts)
    return [cast(Sequence[int], prompts)] if is_one else list(cast(Sequence[Prompt], prompts))


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(
            "sampling_params",
            expected=f"one, or one for each of {count} prompts",
            found=str(len(params)),
            action="Give one SamplingParams, or as many as prompts.",
        )
    return list(params)
