"""What targets are asked about: from a recipe and a model before the job, or from a folder that exists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import read_manifest
from optgptq.errors import ModelError, RecipeError, TargetError
from optgptq.formats import CheckpointFormat, format_named
from optgptq.formats.engine_facts import EngineFacts, engine_facts
from optgptq.formats.naming import exact_patterns
from optgptq.layout import LinearLayout
from optgptq.models.inventory import model_linears
from optgptq.models.registry import family_of, model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.plan import outer_layouts, plan_head, plan_linears
from optgptq.recipe.records import Recipe
from optgptq.targets.recipe_change import changed_recipe
from optgptq.targets.records import Splits
from optgptq.targets.subject import Change, TargetSubject, Varied
from optgptq.targets.vary import vary_layouts

# Linears whose input engines split among devices, by the last part of their names, where the family is not known.
_SPLIT_COLUMNS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "wo", "w2")


def subject_of_plan(
    spec: DecoderSpec, recipe: Recipe, *, config: Mapping[str, Any], weight_dtype: torch.dtype
) -> TargetSubject:
    """Return what `recipe` will make of a model: nothing is read but what is given.

    Args:
        spec: the model as it will be written, heads grouped.
        recipe: what will be done.
        config: the config.json that will be written.
        weight_dtype: dtype of its linears.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    form = format_named(recipe.export.format)
    outer = outer_layouts(spec, plan_head(spec, recipe, form))
    layouts = (*(plan.layout for plan in plan_linears(spec, recipe, form)), *outer)
    subject = _with_model(TargetSubject(format=form.name, layouts=layouts), spec, config)
    quantized = recipe.weights.method != "none"

    def vary(subject: TargetSubject, change: Change) -> Varied | None:
        changed = changed_recipe(recipe, change)
        if changed is None:
            return None
        wanted, settings = changed
        fresh = _planned(spec, wanted, config=config, weight_dtype=weight_dtype)
        return None if fresh is None else Varied(subject=fresh, settings=settings)

    return replace(
        subject,
        format=form.name if quantized else "dense",
        scale_dtype=_dtype_name(form.scale_dtype(weight_dtype)),
        model_dtype=_dtype_name(weight_dtype),
        own_cache=recipe.kv_cache.is_quantized,
        fp8_scales="" if recipe.kv_cache.fp8_scales == "off" else recipe.kv_cache.fp8_scales,
        vary=vary,
    )


def subject_of_folder(folder: CheckpointFolder) -> TargetSubject:
    """Return what the checkpoint in `folder` is: its configuration, headers, indexes and zero points are read.

    Raises:
        FormatError: it is quantized in a way that is not read here, or contradicts itself.
    """
    facts = engine_facts(folder)
    spec = _spec_of(folder)
    if facts.layouts or spec is None:
        layouts = facts.layouts
    else:
        layouts = (*(_dense(linear.name, linear.stored_shape) for linear in model_linears(spec)), *outer_layouts(spec))
    model_dtype = _model_dtype(folder)
    subject = TargetSubject(
        format=facts.format,
        layouts=layouts,
        scale_dtype=facts.scale_dtype or model_dtype,
        model_dtype=model_dtype,
        act_order=facts.says_act_order or facts.stores_act_order,
        words_version=facts.words_version,
        loose_words=facts.loose_words,
        own_cache=facts.own_cache,
        fp8_scales=facts.fp8_scales,
    )
    if spec is not None:
        subject = _with_model(subject, spec, folder.config)
    else:
        subject = replace(
            subject, model_type=str(folder.config.get("model_type") or ""), splits=_guessed_splits(layouts)
        )

    said = _settings_said(folder)

    def vary(subject: TargetSubject, change: Change) -> Varied | None:
        varied = _vary_folder(subject, change, facts)
        if varied is None:
            return None
        fresh = tuple(setting for setting in varied.settings if setting not in said)
        return replace(varied, settings=fresh or varied.settings)

    return replace(subject, vary=vary)


def _planned(
    spec: DecoderSpec, recipe: Recipe, *, config: Mapping[str, Any], weight_dtype: torch.dtype
) -> TargetSubject | None:
    """Return the subject of a changed recipe; None where the job would refuse it."""
    try:
        subject = subject_of_plan(spec, recipe, config=config, weight_dtype=weight_dtype)
        form: CheckpointFormat = format_named(recipe.export.format)
        form.check(subject.layouts, scale_dtype=form.scale_dtype(weight_dtype))
    except (RecipeError, TargetError):
        return None
    return subject


def _with_model(subject: TargetSubject, spec: DecoderSpec, config: Mapping[str, Any]) -> TargetSubject:
    family = family_of(config).name
    shares_heads = spec.num_kv_heads < spec.num_heads
    traits = []
    if family == "mpt" and shares_heads:
        traits.append("grouped-mpt")
    if family == "falcon" and shares_heads and spec.residual == "sequential":
        traits.append("grouped-sequential")
    splits: dict[str, Splits] = {
        linear.name: "columns" if linear.stage in ("o", "down") else "rows" for linear in model_linears(spec)
    }
    return replace(
        subject,
        model_type=family,
        traits=tuple(traits),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        head_name=spec.names.head,
        splits=splits,
    )


def _vary_folder(subject: TargetSubject, change: Change, facts: EngineFacts) -> Varied | None:
    """Return the folder converted where that is enough, or else quantized again with every setting said."""
    varied = vary_layouts(subject, change)
    if varied is None:
        return None
    binary = any(layout.coefficients is not None for layout in subject.quantized)
    if change.only_format and change.format is not None and not facts.stores_act_order and not binary:
        return replace(varied, settings=(), convert_to=change.format)
    quantized = varied.subject.quantized
    wanted = {(layout.bits, layout.group_size, layout.symmetric) for layout in quantized if subject.is_inner(layout)}
    if len(wanted) != 1 or any(layout.coefficients is not None for layout in quantized):
        return None
    bits, group_size, symmetric = wanted.pop()
    form = change.format or subject.format
    settings = [f"export.format={form}", f"weights.bits={bits}", f"weights.group_size={group_size}"]
    settings.append(f"weights.symmetric={str(symmetric).lower()}")
    dense = [layout.name for layout in varied.subject.layouts if layout.bits is None and subject.is_inner(layout)]
    head = next((layout for layout in quantized if layout.name == subject.head_name), None)
    if head is not None:
        settings += [f"head.bits={head.bits}", f"head.group_size={head.group_size}"]
        settings.append(f"head.symmetric={str(head.symmetric).lower()}")
    elif any(layout.name == subject.head_name for layout in subject.quantized):
        settings.append("head.bits=null")
    if dense:
        settings.append(f"weights.keep_dense={json.dumps(exact_patterns(dense))}")
    return replace(varied, settings=tuple(settings))


def _settings_said(folder: CheckpointFolder) -> frozenset[str]:
    """Return what the recipe in the folder's manifest says already, as texts for `--set`."""
    recipe = (read_manifest(folder.path) or {}).get("recipe")
    sections = recipe.items() if isinstance(recipe, dict) else ()
    return frozenset(
        f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, fields in sections
        if isinstance(fields, dict)
        for name, value in fields.items()
    )


def _spec_of(folder: CheckpointFolder) -> DecoderSpec | None:
    """Return the spec of the model; None where its family, or a value of its config, is not implemented here."""
    try:
        return model_spec(folder)
    except ModelError:
        return None


def _guessed_splits(layouts: Sequence[LinearLayout]) -> dict[str, Splits]:
    return {
        layout.name: "columns" if layout.name.rpartition(".")[2] in _SPLIT_COLUMNS else "rows" for layout in layouts
    }


def _dense(name: str, shape: tuple[int, int]) -> LinearLayout:
    return LinearLayout(name=name, out_features=shape[0], in_features=shape[1], bits=None, dense_reason="dense")


def _model_dtype(folder: CheckpointFolder) -> str:
    """Return the dtype that the config names, or else that of the first dense tensor of floating numbers."""
    named = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if isinstance(named, str):
        return named.removeprefix("torch.")
    dtypes = (info.torch_dtype for name, info in folder.tensors.items() if name.endswith("weight"))
    return next((_dtype_name(dtype) for dtype in dtypes if dtype.is_floating_point), "float32")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
