"""Who can load a result: the rules of the engines, as read in the releases named in the sentences.

vLLM 0.33.0, SGLang 0.5.23, transformers 5.23, GPTQModel 7.7, compressed-tensors 0.17 to 0.20.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optgptq.errors import TargetError
from optgptq.layout import LinearLayout
from optgptq.packing.planes import COLUMNS_PER_WORD

GPTQ_BITS = (2, 3, 4, 8)
MARLIN_BITS = (4, 8)
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
TILE = 32
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
    asymmetric = [layout for layout in quantized if not layout.symmetric]
    unusual_bits = [layout for layout in quantized if layout.bits not in MARLIN_BITS]
    unusual_groups = [layout for layout in quantized if layout.group_size not in MARLIN_GROUP_SIZES]
    settings = {(layout.bits, layout.group_size, layout.symmetric) for layout in quantized}
    dense = [layout for layout in layouts if layout.bits is None and "." in layout.name]
    warnings = []
    if asymmetric:
        warnings.append(
            f"vLLM 0.33 and SGLang 0.5.23 refuse asymmetric GPTQ files ({_some(asymmetric)}): "
            "use export.format=compressed-tensors to serve them."
        )
    if asymmetric and version == 1:
        warnings.append(
            "GPTQModel refuses asymmetric version 1 files of other tools: use export.format=gptq_v2 for it."
        )
    if version == 2 and not asymmetric:
        warnings.append(
            "engines that read zero points of symmetric files expect version 1 (vLLM and SGLang on CPU): "
            "use export.format=gptq unless the reader is GPTQModel or Humming."
        )
    if unusual_bits:
        warnings.append(
            f"vLLM 0.33 and SGLang 0.5.23 load 2-bit and 3-bit GPTQ files ({_some(unusual_bits)}) only with "
            "--quantization humming on NVIDIA: use export.format=compressed-tensors for vLLM."
        )
    if unusual_groups:
        warnings.append(
            "vLLM 0.33 and SGLang 0.5.23 take GPTQ groups of -1, 32, 64 or 128 columns only, not those of "
            f"{_some(unusual_groups)}."
        )
    if len(settings) > 1 or dense:
        warnings.append(
            "transformers 5.23 ignores the rules for linears that differ from the rest or stay dense: it loads such a "
            "checkpoint as compressed-tensors only; vLLM, SGLang and GPTQModel obey them."
        )
    return (*warnings, *_misaligned(quantized))


def check_compressed_tensors(layouts: Sequence[LinearLayout]) -> tuple[str, ...]:
    """Return warnings about a compressed-tensors file of `layouts`; TargetError when it cannot hold them."""
    quantized = _require_sound(layouts, bits=range(1, 9))
    transposed = [layout for layout in layouts if layout.stored_transposed]
    if transposed:
        raise TargetError(
            transposed[0].name,
            expected="linears that transformers builds as nn.Linear",
            found="a Conv1D, which compressed-tensors does not replace",
            action="Use export.format=gptq for this model.",
        )
    warnings = []
    if any(layout.bits in (3, 5, 6, 7) for layout in quantized):
        warnings.append(
            "transformers decodes 3-bit, 5-bit, 6-bit and 7-bit files with compressed-tensors 0.18 or newer only."
        )
    if any(layout.bits not in MARLIN_BITS for layout in quantized):
        unusual = [layout for layout in quantized if layout.bits not in MARLIN_BITS]
        warnings.append(
            f"vLLM 0.33 loads widths other than 4 and 8 bits ({_some(unusual)}) on NVIDIA GPUs only, and SGLang 0.5.23 "
            "only with --quantization humming."
        )
    if any(not layout.symmetric for layout in quantized):
        warnings.append(
            "transformers 5.23 with compressed-tensors 0.20 loads asymmetric files only with "
            "CompressedTensorsConfig(dequantize=True)."
        )
    if any(layout.bits == 8 and not layout.symmetric for layout in quantized):
        warnings.append("vLLM 0.33 loads asymmetric 8-bit files on NVIDIA GPUs only.")
    return (*warnings, *_misaligned(quantized))


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


def _misaligned(quantized: Sequence[LinearLayout]) -> tuple[str, ...]:
    odd = [layout for layout in quantized if layout.in_features % TILE or layout.out_features % TILE]
    if not odd:
        return ()
    return (
        f"rows and columns that are not multiples of {TILE} are refused by most engines ({_some(odd)}): "
        "keep these linears dense to serve the result.",
    )


def _some(layouts: Sequence[LinearLayout]) -> str:
    names = ", ".join(layout.name for layout in layouts[:3])
    return names if len(layouts) <= 3 else f"{names} and {len(layouts) - 3} more"
