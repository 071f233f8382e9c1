"""Who can load a result: what the formats themselves refuse, and what the engines that read them say to it.

The rules of engines are records of `optgptq.targets`; here they become the warnings of a job that names no target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optgptq.errors import TargetError
from optgptq.layout import LinearLayout
from optgptq.packing.planes import COLUMNS_PER_WORD
from optgptq.targets import TargetSubject, check_target, known_targets, parse_target
from optgptq.targets.rules import file_warnings

GPTQ_BITS = (2, 3, 4, 8)
# Whose answers a job tells that was not asked about anybody.
READERS = {
    "gptq": ("vllm", "sglang", "transformers", "gptqmodel"),
    "compressed-tensors": ("vllm", "sglang", "transformers"),
}
PLANE_BITS = range(1, 5)
ONE_KIND = "A checkpoint holds uniform grids or binary codes, not both"


def check_gptq(layouts: Sequence[LinearLayout], *, version: int, scale_dtype: torch.dtype) -> tuple[str, ...]:
    """Return warnings about a GPTQ file of `layouts`; TargetError when GPTQ cannot hold them."""
    quantized = _require_sound(layouts, bits=GPTQ_BITS)
    if scale_dtype != torch.float16:
        raise TargetError(
            "scales",
            expected="float16, the dtype of scales in GPTQ files",
            found=str(scale_dtype),
            action="Use the layout compressed-tensors, which stores scales in the dtype of the model.",
        )
    name = "gptq" if version == 1 else "gptq_v2"
    warnings = _reader_warnings(TargetSubject(format=name, layouts=tuple(layouts)), READERS["gptq"])
    if version == 2 and all(layout.symmetric for layout in quantized):
        paths = [(target, path) for target in known_targets() for path in target.paths if name in path.formats]
        strict = list(dict.fromkeys(target.title for target, path in paths if version not in path.labels))
        warnings.append(
            f"{_listed(strict)} {'read' if len(strict) > 1 else 'reads'} version 1 alone, which is enough for "
            "symmetric grids: use export.format=gptq unless the reader wants version 2."
        )
    return tuple(warnings)


def check_compressed_tensors(layouts: Sequence[LinearLayout]) -> tuple[str, ...]:
    """Return warnings about a compressed-tensors file of `layouts`; TargetError when it cannot hold them."""
    _require_sound(layouts, bits=range(1, 9))
    transposed = [layout for layout in layouts if layout.stored_transposed]
    if transposed:
        raise TargetError(
            transposed[0].name,
            expected="linears that transformers builds as nn.Linear",
            found="a Conv1D, which compressed-tensors does not replace",
            action="Use export.format=gptq for this model.",
        )
    subject = TargetSubject(format="compressed-tensors", layouts=tuple(layouts), model_dtype="bfloat16")
    return tuple(_reader_warnings(subject, READERS["compressed-tensors"]))


def check_planes(layouts: Sequence[LinearLayout]) -> tuple[str, ...]:
    """Return warnings about sign planes of `layouts`; TargetError when the layout cannot hold them."""
    for layout in layouts:
        if layout.bits is not None:
            require_planes(layout)
    return ("only optgptq reads this layout: vLLM, SGLang and transformers do not load it.",)


def require_planes(layout: LinearLayout) -> None:
    """Raise TargetError unless sign planes can hold `layout`: its codes, its width, its groups."""
    if layout.coefficients is None:
        raise TargetError(
            layout.name,
            expected="binary codes",
            found="a uniform grid",
            action=f"{ONE_KIND}: give every linear that is quantized a method that makes binary codes, or give none "
            "one and use another export.format.",
        )
    if layout.bits not in PLANE_BITS:
        raise TargetError(
            layout.name,
            expected=f"{PLANE_BITS[0]} to {PLANE_BITS[-1]} bits",
            found=str(layout.bits),
            action="In a recipe, choose another width, or another export.format; a checkpoint that is quantized keeps "
            "its width, so keep its layout.",
        )
    columns, group_size = layout.in_features, layout.group_size
    whole_rows = group_size in (-1, columns)
    if not whole_rows and (group_size % COLUMNS_PER_WORD or columns % group_size):
        raise TargetError(
            layout.name,
            expected=f"a group size of -1, or a multiple of {COLUMNS_PER_WORD} that divides its {columns} columns",
            found=str(group_size),
            action=f"In a recipe, choose group size {_nearest_group_size(columns, group_size)} for it, or keep it "
            "dense, by a rule in weights.rules; a checkpoint that is quantized keeps its groups, so keep its layout or "
            "quantize the dense model.",
        )


def _nearest_group_size(columns: int, wanted: int) -> int:
    """Return the allowed group size nearest to `wanted`, the smaller of two; -1 where only whole rows are allowed."""
    allowed = [size for size in range(COLUMNS_PER_WORD, columns, COLUMNS_PER_WORD) if columns % size == 0]
    return min(allowed, key=lambda size: (abs(size - wanted), size), default=-1)


def _require_sound(layouts: Sequence[LinearLayout], *, bits: Sequence[int]) -> list[LinearLayout]:
    """Return the quantized layouts; TargetError for widths, groups or fused linears that no reader accepts."""
    by_name = {layout.name: layout for layout in layouts}
    quantized = [layout for layout in layouts if layout.bits is not None]
    for layout in quantized:
        if layout.coefficients is not None:
            raise TargetError(
                layout.name,
                expected="a uniform grid",
                found="binary codes",
                action=f"Use export.format=optgptq for them. {ONE_KIND}: no other linear may have a uniform grid.",
            )
        if layout.bits not in bits:
            raise TargetError(
                layout.name,
                expected=f"bits among {', '.join(map(str, bits))}",
                found=str(layout.bits),
                action="Choose another width, or another export.format.",
            )
        if layout.group_size != -1 and layout.in_features % layout.group_size:
            raise TargetError(
                layout.name,
                expected=f"a group size that divides its {layout.in_features} columns",
                found=str(layout.group_size),
                action="Choose another group size for it, or keep it dense, by a rule in weights.rules.",
            )
    for layout in layouts:
        for name in layout.fused_names:
            other = by_name.get(name, layout)
            if _settings(other) != _settings(layout):
                raise TargetError(
                    f"{layout.name} and {other.name}",
                    expected=f"the same bits, group size and symmetry, since engines load them as {layout.fused_name}",
                    found=f"{_settings(layout)} and {_settings(other)}",
                    action="Give all of them the same settings in weights.rules.",
                )
    return quantized


def _settings(layout: LinearLayout) -> tuple[int, int, bool] | str:
    return "dense" if layout.bits is None else (layout.bits, layout.group_size, layout.symmetric)


def _reader_warnings(subject: TargetSubject, readers: Sequence[str]) -> list[str]:
    """Return a sentence for each reason for which some of `readers` do not load `subject`, and for each caution."""
    refused: dict[str, list[str]] = {}
    others: dict[str, None] = {}
    advice: dict[str, list[str]] = {}
    for name in readers:
        target = parse_target(name)
        answer = check_target(target, subject)
        for refusal in answer.refusals:
            reason = f"expected {refusal.expected}, found {refusal.found} ({refusal.where})"
            refused.setdefault(reason, []).append(target.title)
        if answer.refusals:
            advice.setdefault(answer.advice, []).append(target.title)
        else:
            path = next(path for path in target.paths if path.name == answer.path)
            others |= {f"{target.title}: {warning}.": None for warning in file_warnings(path, subject)}
    sentences = [
        f"{_listed(titles)} {'do' if len(titles) > 1 else 'does'} not load the result: {reason}."
        for reason, titles in refused.items()
    ]
    sentences += [f"{_listed(titles)}: {text}" for text, titles in advice.items()]
    return [*sentences, *_with_options(subject, [title for titles in advice.values() for title in titles]), *others]


def _with_options(subject: TargetSubject, refusing: Sequence[str]) -> list[str]:
    """Return who loads `subject` all the same when started in another way than by default."""
    engines = {target.engine for target in known_targets() if target.title in refusing}
    told = []
    for target in known_targets():
        if target.engine in engines and any(path.option for path in target.paths):
            answer = check_target(target, subject)
            options = [path.option for path in target.paths if path.name == answer.path and path.option]
            if answer.loads and options:
                told.append(f"{target.title} loads it when started with {options[0]}.")
    return told


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
