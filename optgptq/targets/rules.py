"""The rules of a target applied to a subject: what refuses it, and what a user must know where nothing does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optgptq.layout import LinearLayout
from optgptq.targets.known import Target
from optgptq.targets.linear_rules import kernel_for, linear_kinds, linear_refusals
from optgptq.targets.records import FORMAT_LIMITS, GPTQ_VERSIONS, LoadPath
from optgptq.targets.refusal import Refusal, merged
from optgptq.targets.subject import TargetSubject


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Refusals of the path that comes nearest, and its warnings; loads where there are no refusals."""

    path: str
    refusals: tuple[Refusal, ...]
    warnings: tuple[str, ...]


def judge(target: Target, subject: TargetSubject, tensor_parallel: int = 1) -> Judgement:
    """Apply every rule of `target`."""
    paths = [path for path in target.paths if subject.format in path.formats]
    if not paths:
        known = dict.fromkeys(name for path in target.paths for name in path.formats)
        refusal = Refusal.of(target.paths[0], "format", expected=f"one of {', '.join(known)}", found=subject.format)
        return Judgement(path="", refusals=(refusal,), warnings=())
    judged = [_judge_path(path, subject, tensor_parallel) for path in paths]
    return min(judged, key=lambda judgement: len(judgement.refusals))


def _judge_path(path: LoadPath, subject: TargetSubject, tensor_parallel: int) -> Judgement:
    refusals = merged(
        (
            *_model_refusals(path, subject),
            *_format_refusals(path, subject),
            *_parallel_refusals(path, subject, tensor_parallel),
            *_layout_refusals(path, subject),
            *_zero_point_refusals(path, subject),
            *_fused_refusals(path, subject),
            *(() if _unsplittable(path, tensor_parallel) else linear_refusals(path, subject, tensor_parallel)),
        )
    )
    return Judgement(path=path.name, refusals=refusals, warnings=tuple(_warnings(path, subject, tensor_parallel)))


def _model_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    if path.families and subject.model_type and subject.model_type not in path.families:
        yield Refusal.of(path, "family", expected=f"a model among {', '.join(path.families)}", found=subject.model_type)
    for family, reason in path.refused_families:
        if subject.model_type == family:
            yield Refusal.of(path, "family", expected="a model that it implements", found=f"{family}: {reason}")
    for trait, reason in path.refused_traits:
        if trait in subject.traits:
            yield Refusal.of(path, "family", expected="a config that it can run", found=reason)


def _format_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    """What the format itself cannot hold, before anybody reads it."""
    for layout in subject.quantized:
        if (layout.coefficients is not None) != path.binary:
            expected, found = ("sums of signs", "uniform grids") if path.binary else ("uniform grids", "sums of signs")
            yield Refusal.of(path, "method", names=(layout.name,), expected=expected, found=found)
    limits = next((limits for limits in FORMAT_LIMITS if limits.name == subject.format), None)
    if limits is None:
        return
    for layout in subject.quantized:
        size = layout.group_size
        if layout.bits not in limits.bits:
            expected = f"{', '.join(map(str, limits.bits))} bits, which {limits.name} holds"
            yield Refusal.of(path, "bits", names=(layout.name,), expected=expected, found=str(layout.bits))
        if layout.stored_transposed and not limits.transposed:
            expected = f"linears that are not stored transposed, which {limits.name} does not hold"
            yield Refusal.of(path, "transposed", names=(layout.name,), expected=expected, found="a Conv1D")
        uneven = layout.in_features % size and (path.whole_words or limits.binary)
        if size not in (-1, layout.in_features) and (uneven or size % limits.group_multiple):
            expected = f"a group size that divides {layout.in_features} columns"
            expected += f" and is a multiple of {limits.group_multiple}" if limits.group_multiple > 1 else ""
            yield Refusal.of(path, "group_size", names=(layout.name,), expected=expected, found=str(size))


def _unsplittable(path: LoadPath, tensor_parallel: int) -> bool:
    return 0 < path.max_tensor_parallel < tensor_parallel


def _parallel_refusals(path: LoadPath, subject: TargetSubject, tensor_parallel: int) -> Iterator[Refusal]:
    if _unsplittable(path, tensor_parallel):
        expected = "one device" if path.max_tensor_parallel == 1 else f"at most {path.max_tensor_parallel} devices"
        yield Refusal.of(path, "tensor_parallel", expected=expected, found=str(tensor_parallel))
        return
    if subject.num_heads % tensor_parallel:
        expected = f"a number of devices that divides {subject.num_heads} heads"
        yield Refusal.of(path, "tensor_parallel", expected=expected, found=str(tensor_parallel))
    heads = subject.num_kv_heads
    if heads and heads % tensor_parallel and tensor_parallel % heads:
        expected = f"a divisor or a multiple of {heads} key/value heads"
        yield Refusal.of(path, "tensor_parallel", expected=expected, found=str(tensor_parallel))


def _layout_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    quantized = subject.quantized
    settings = {_settings(layout): layout.name for layout in quantized}
    if not path.mixed and len(settings) > 1:
        found = " and ".join(_told(key) for key in list(settings)[:2])
        yield Refusal.of(path, "mixed", names=tuple(settings.values()), expected="linears that are alike", found=found)
    dense = tuple(layout.name for layout in subject.layouts if layout.bits is None and subject.is_inner(layout))
    if quantized and dense and not path.dense_linears:
        expected = "every linear of the decoder layers quantized: it does not look at the rules of the file"
        yield Refusal.of(path, "dense", names=dense, expected=expected, found="dense linears")
    yield from _head_refusals(path, subject)
    transposed = tuple(layout.name for layout in quantized if layout.stored_transposed)
    if transposed and not path.transposed:
        yield Refusal.of(path, "transposed", names=transposed, expected="nn.Linear modules", found="Conv1D modules")
    if subject.act_order and path.act_order != "yes":
        whole = all(layout.group_size in (-1, layout.in_features) for layout in quantized)
        if path.act_order == "no" or not whole:
            yield Refusal.of(path, "act_order", expected="groups of neighbouring columns", found="act-order")
    if quantized and subject.scale_dtype not in path.scale_dtypes:
        expected = f"scales in {', '.join(path.scale_dtypes)}"
        yield Refusal.of(path, "scales", expected=expected, found=subject.scale_dtype)
    if subject.loose_words and not path.loose_words:
        expected = "codes without gaps, as compressed-tensors packs them since 0.18"
        yield Refusal.of(path, "packing", expected=expected, found="unused bits in every word, as before 0.18")


def _head_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    head = next((layout for layout in subject.quantized if layout.name == subject.head_name), None)
    if head is None:
        return
    names = (head.name,)
    if not path.quantized_head:
        yield Refusal.of(path, "head", names=names, expected="a dense output head", found="a packed one")
    elif subject.model_type in path.tied_families:
        expected = f"a dense head, as its {subject.model_type} always computes with the embedding"
        yield Refusal.of(path, "head", names=names, expected=expected, found="a packed one")
    elif head.out_features % path.head_row_multiple:
        expected = f"a vocabulary in multiples of {path.head_row_multiple}, since it pads no packed head"
        yield Refusal.of(path, "head", names=names, expected=expected, found=str(head.out_features))


def _zero_point_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    label = GPTQ_VERSIONS.get(subject.format)
    if label is None:
        return
    if label not in path.labels:
        expected = f"zero points of version {', '.join(map(str, path.labels))}"
        yield Refusal.of(path, "zero_points", expected=expected, found=f"the label {subject.format}")
    asymmetric = tuple(layout.name for layout in subject.quantized if not layout.symmetric)
    if asymmetric and label not in path.asymmetric_versions:
        expected = f"version {', '.join(map(str, path.asymmetric_versions))} where zero points vary"
        yield Refusal.of(path, "zero_points", names=asymmetric, expected=expected, found=f"version {label}")
    if path.reads_zero_points and subject.words_version not in (0, label):
        found = f"those of version {subject.words_version}"
        expected = f"zero points of version {label}, as the label says"
        yield Refusal.of(path, "zero_points", expected=expected, found=found)


def _fused_refusals(path: LoadPath, subject: TargetSubject) -> Iterator[Refusal]:
    if path.fused_apart:
        return
    by_name = {layout.name: layout for layout in subject.layouts}
    for layout in subject.layouts:
        members = [by_name[name] for name in layout.fused_names if name in by_name]
        different = [other for other in members if _settings(other) != _settings(layout)]
        if members and members[0] is layout and different:
            yield Refusal.of(
                path,
                "fused",
                names=tuple(member.name for member in members),
                expected="equal settings of linears that engines load as one",
                found=f"{_told(_settings(layout))} and {_told(_settings(different[0]))}",
            )


def _warnings(path: LoadPath, subject: TargetSubject, tensor_parallel: int) -> Iterator[str]:
    if path.requires:
        yield f"needs {' and '.join(path.requires)}"
    if path.option:
        yield f"start it with {path.option}"
    if not path.source.sure:
        yield "its rules were inferred from its source and not tried"
    if subject.quantized:
        yield from (caution.text for caution in path.cautions if not caution.bits and caution.symmetric is None)
    yield from file_warnings(path, subject, tensor_parallel)
    if subject.own_cache and not path.own_cache:
        yield "it keeps keys and values as for any model: only optgptq uses the quantized KV cache"
    if subject.fp8_scales and subject.fp8_scales not in path.fp8_scales:
        yield "it does not use the scales of an fp8 KV cache"


def file_warnings(path: LoadPath, subject: TargetSubject, tensor_parallel: int = 1) -> Iterator[str]:
    """Yield what a user must know about these linears in particular."""
    for caution in path.cautions:
        if (caution.bits or caution.symmetric is not None) and any(
            (not caution.bits or layout.bits in caution.bits) and caution.symmetric in (None, layout.symmetric)
            for layout in subject.quantized
        ):
            yield caution.text
    yield from _kernel_warnings(path, subject, tensor_parallel)


def _kernel_warnings(path: LoadPath, subject: TargetSubject, tensor_parallel: int) -> Sequence[str]:
    notes: dict[str, None] = {}
    for kind in linear_kinds(subject, tensor_parallel):
        kernel = None if kind.layout.bits is None else kernel_for(path, kind, subject)
        if kernel is not None and kernel.package:
            notes[f"{_told(_settings(kind.layout))} need the package {kernel.package}"] = None
        if kernel is not None and kernel.note:
            notes[f"{_told(_settings(kind.layout))}: {kernel.note}"] = None
    return list(notes)


def _settings(layout: LinearLayout) -> tuple[int, int, bool] | None:
    return None if layout.bits is None else (layout.bits, layout.group_size, layout.symmetric)


def _told(settings: tuple[int, int, bool] | None) -> str:
    if settings is None:
        return "dense"
    bits, group_size, symmetric = settings
    groups = "whole rows" if group_size == -1 else f"groups of {group_size}"
    return f"{bits} bits, {groups}, {'symmetric' if symmetric else 'asymmetric'}"
