"""The conversion as a part of a job: texts read, new tensors kept among the job's steps, progress told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optgptq.calibration.states import ActivationPlace
from optgptq.checkpoint.source import TensorSource
from optgptq.data.corpora import TextSource, load_documents, source_warnings
from optgptq.data.evaluation import evaluation_windows
from optgptq.data.tokenizer import load_tokenizer
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.gqa.convert import GroupedModel, Texts, group_heads
from optgptq.gqa.plan import GroupingPlan
from optgptq.journal.store import Steps
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener

# Before the names of its steps.
_SCOPE = "heads"
# Tokens of a user's text that are scored.
_TEXT_TOKENS = 20_000


def group_into(
    source: TensorSource,
    plan: GroupingPlan,
    recipe: Recipe,
    windows: Windows,
    *,
    steps: Steps,
    place: ActivationPlace,
    progress: ProgressListener,
) -> GroupedModel:
    """Return the converted model, whose new tensors are read from `steps`, which must keep what is put there.

    Raises:
        RecipeError: too few calibration windows.
        TextError: the text for perplexity cannot be used.
        GateError: perplexity grew by more than the recipe allows.
        NumericalError: activations are not finite.
        CapacityError, OutputError: a step cannot be written.
    """

    def tell(index: int) -> None:
        detail = f"decoder layer {index + 1}/{plan.spec.num_layers}"
        progress(events.PhaseStarted(name="grouping heads", detail=detail))

    texts = Texts(calibration=windows, evaluation=_evaluation_windows(source, recipe, windows.window_size))
    model = group_heads(
        source,
        plan,
        recipe,
        texts,
        steps=steps.scope(_SCOPE),
        place=place,
        layer_started=tell,
    )
    progress(_event(model.record))
    return model


def grouping_warnings(plan: GroupingPlan, recipe: Recipe) -> tuple[str, ...]:
    """Return what a user must hear about a conversion: who can load the result, and a text that may change."""
    told = [] if recipe.gqa.text is None else list(source_warnings(TextSource(source=recipe.gqa.text)))
    if plan.new_spec.qkv_layout == "concatenated" and plan.new_spec.alibi is not None:
        told.append(
            "gqa.group: transformers has no MPT whose query heads share keys and values and refuses the config; it is "
            "written as llm-foundry writes it (attn_type grouped_query_attention, kv_n_heads)."
        )
    if plan.new_spec.qkv_layout == "grouped_interleaved" and plan.new_spec.residual == "sequential":
        told.append(
            "gqa.group: transformers cannot run a Falcon of the new decoder architecture with parallel_attn false, and "
            "ends with an error; optgptq runs it."
        )
    return tuple(told)


def _evaluation_windows(source: TensorSource, recipe: Recipe, window_size: int) -> Windows | None:
    if recipe.gqa.text is None:
        return None
    tokenizer = load_tokenizer(source.path)
    documents = load_documents(TextSource(source=recipe.gqa.text), render_chat=tokenizer.render_chat)
    read = evaluation_windows(documents, tokenizer, window_size=window_size, max_tokens=max(_TEXT_TOKENS, window_size))
    return windows_from_tokens(read.tokens_WS)


def _event(record: Mapping[str, Any]) -> events.HeadsGrouped:
    return events.HeadsGrouped(
        num_kv_heads_before=record["num_kv_heads_before"],
        num_kv_heads_after=record["num_kv_heads_after"],
        kv_bytes_per_token_before=record["kv_bytes_per_token_before"],
        kv_bytes_per_token_after=record["kv_bytes_per_token_after"],
        perplexity_before=record["perplexity_before"],
        perplexity_after=record["perplexity_after"],
        measured_on=record["measured_on"],
    )
