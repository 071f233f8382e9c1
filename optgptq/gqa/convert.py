"""A whole model converted layer by layer, with two streams of activations and one decoder layer in memory.

The new tensors of attention are kept as steps of the job as they are made; the rest of the model is not copied. A layer
that is known already is not measured again: both streams run through it. Perplexity before and after comes from these
streams, carried to the head: on windows that are in no moment.

Shapes: `W` windows, `S` positions, `M` model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.calibration.states import ActivationPlace, ActivationStore
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import GateError, RecipeError
from optgptq.evaluation.perplexity import EvalResult, evaluate
from optgptq.gqa.kept import KeptHeads
from optgptq.gqa.layer import convert_layer, restored_layer
from optgptq.gqa.plan import GroupingPlan, kv_bytes_per_token
from optgptq.gqa.source import GroupedSource, grouped_source
from optgptq.journal.store import Steps
from optgptq.models.attention import attention_context
from optgptq.models.ends import Embedding, Head
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_embedding, load_head, load_layer
from optgptq.models.spec import STAGE_NAMES
from optgptq.recipe.records import Recipe

_FIGURES = "figures"
Streams = tuple[ActivationStream, ActivationStream]
"""The new and the original one."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupedModel:
    """The converted model and what came of it.

    Attributes:
        source: the model, readable as long as the job keeps its steps.
        record: what was done, as plain values, without times and paths.
    """

    source: GroupedSource
    record: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Texts:
    """What is read.

    Attributes:
        calibration: windows to measure on; the last of them are held out.
        evaluation: windows for perplexity; None for those held out.
    """

    calibration: Windows
    evaluation: Windows | None


def num_held_out(recipe: Recipe, num_windows: int) -> int:
    """Return how many calibration windows judge the refit and give the perplexity: at most a quarter of all.

    Raises:
        RecipeError: fewer than four windows.
    """
    if num_windows < 4:
        raise RecipeError(
            "gqa.group",
            expected="at least 4 calibration windows, of which one is held out",
            found=str(num_windows),
            action="Use more text or a smaller calibration.window_size, or set gqa.group=1.",
        )
    return min(recipe.calibration.held_out_windows, num_windows // 4)


@torch.no_grad()
def group_heads(
    source: TensorSource,
    plan: GroupingPlan,
    recipe: Recipe,
    texts: Texts,
    *,
    steps: Steps,
    place: ActivationPlace,
    layer_started: Callable[[int], None],
) -> GroupedModel:
    """Convert the model and keep its new tensors in `steps`, or go on where these end.

    Raises:
        RecipeError: too few windows.
        GateError: perplexity grew by more than the recipe allows.
        NumericalError: activations are not finite.
        CapacityError, OutputError: a step cannot be written.
    """
    held_out = num_held_out(recipe, texts.calibration.num_windows)
    dtype, device = place.dtype, place.device
    kept = KeptHeads.of(plan, steps)
    known = steps.get(_FIGURES)
    evaluated = None if texts.evaluation is None else texts.evaluation.sha256
    if known is not None and known.facts["evaluation_sha256"] == evaluated:
        record = dict(known.facts["record"])
    else:
        embedding = load_embedding(source, plan.spec, dtype=dtype, device=device)
        streams = _streams(texts.calibration, embedding, recipe, held_out=held_out, store=place.store)
        scored = None
        if texts.evaluation is not None:
            scored = _streams(texts.evaluation, embedding, recipe, held_out=0, store=place.store)
        layers = []
        for index in range(plan.spec.num_layers):
            layer_started(index)
            layer = load_layer(source, plan.spec, index, dtype=dtype, device=device)
            layers.append(_through(plan, layer, streams, scored, kept))
        head = load_head(source, plan.spec, embedding=embedding, dtype=dtype, device=device)
        record = _record(plan, recipe, _figures(head, scored or streams, texts), layers)
        steps.put(_FIGURES, {}, {"evaluation_sha256": evaluated, "record": record})
        steps.sync()
    _require_gate(recipe, record)
    return GroupedModel(source=grouped_source(source, plan, kept), record=record)


def _through(
    plan: GroupingPlan, layer: DecoderLayer, streams: Streams, scored: Streams | None, kept: KeptHeads
) -> dict[str, Any]:
    """Convert a layer and keep it, or take it as it was kept; take all streams through it; return what was done."""
    known = kept.layer(layer.index)
    followers = [] if scored is None else [scored]
    if known is not None:
        converted = restored_layer(layer, plan.new_spec, (known.tensors, known.facts["record"]))
        followers.append(streams)
    else:
        stored = {entry.name: entry.dtype for entry in plan.entries}
        converted = convert_layer(streams, layer, plan.new_spec, plan.settings, stored_dtype=stored.__getitem__)
        kept.put(converted)
    for new, original in followers:
        for stage in STAGE_NAMES:
            new.advance(converted.layer, stage)
            original.advance(layer, stage)
    return converted.record


def _streams(
    windows: Windows, embedding: Embedding, recipe: Recipe, *, held_out: int, store: ActivationStore
) -> Streams:
    device, dtype = embedding.tokens_VE.device, embedding.tokens_VE.dtype
    context = attention_context(embedding.spec, windows.window_size, dtype=dtype, device=device)
    size = recipe.calibration.windows_per_batch
    first, second = (
        embed(windows, embedding, context, windows_per_batch=size, num_held_out=held_out, store=store) for _ in range(2)
    )
    return first, second


@dataclass(frozen=True, slots=True, eq=False)
class _ReadyStates:
    """A `LanguageModel` whose hidden states of one window are known."""

    head: Head
    hidden_1SM: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.hidden_1SM.device

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        del tokens_BS
        return self.hidden_1SM


def _figures(head: Head, streams: Streams, texts: Texts) -> Sequence[EvalResult]:
    """Return the figures of each window that may be scored: those held out, or all where none is."""
    windows = texts.evaluation or texts.calibration
    some_held_out = any(batch.held_out for batch in streams[0].batches)
    found = []
    for batch, reference in zip(streams[0].batches, streams[1].batches, strict=True):
        states = (batch.state, reference.state) if batch.held_out or not some_held_out else ()
        for row in range(batch.num_windows) if states else ():
            window = batch.first_window + row
            length = int(windows.lengths_W[window])
            if length >= 2:
                models = [_ReadyStates(head, state.hidden_BSM[row : row + 1, :length]) for state in states]
                tokens_1S = windows.tokens_WS[window : window + 1, :length]
                found.append(evaluate(models[0], tokens_1S, baseline=models[1]))
    return found


def _record(
    plan: GroupingPlan, recipe: Recipe, figures: Sequence[EvalResult], layers: list[dict[str, Any]]
) -> dict[str, Any]:
    num_tokens = sum(each.num_tokens for each in figures)

    def mean(value: Callable[[EvalResult], float]) -> float:
        return sum(value(each) * each.num_tokens for each in figures) / max(num_tokens, 1)

    return {
        "group": plan.settings.size,
        "grouping": plan.settings.grouping,
        "num_heads": plan.spec.num_heads,
        "num_kv_heads_before": plan.spec.num_kv_heads,
        "num_kv_heads_after": plan.new_spec.num_kv_heads,
        "kv_bytes_per_token_before": kv_bytes_per_token(plan.spec),
        "kv_bytes_per_token_after": kv_bytes_per_token(plan.new_spec),
        "measured_on": "text" if recipe.gqa.text else "held-out calibration windows",
        "num_tokens": num_tokens,
        "perplexity_before": math.exp(mean(lambda each: math.log(each.baseline_perplexity or math.nan))),
        "perplexity_after": math.exp(mean(lambda each: math.log(each.perplexity))),
        "mean_kl": mean(lambda each: each.mean_kl or 0.0),
        "layers": layers,
    }


def _require_gate(recipe: Recipe, record: dict[str, Any]) -> None:
    limit = recipe.gqa.max_perplexity_ratio
    before, after = record["perplexity_before"], record["perplexity_after"]
    if limit is None or after <= limit * before:
        return
    raise GateError(
        "quality gate gqa.max_perplexity_ratio",
        expected=f"a perplexity of at most {limit:.6g} times {before:.6g} after heads were grouped",
        found=f"{after:.6g}, {after / before:.6g} times as much (on {record['measured_on']})",
        action="Merge fewer heads (a smaller gqa.group), use more calibration text, or agree on another limit.",
    )
