"""Facts of a checkpoint that engines care about and layouts do not hold: order of columns, labels, gaps in words.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `W` 32-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.checkpoint.folder import CheckpointFolder, read_json_object
from optgptq.formats import detect
from optgptq.formats.fp8_scales import fp8_summary
from optgptq.formats.gptq import GptqFormat
from optgptq.formats.gptq_config import QUANTIZE_CONFIG_FILE
from optgptq.formats.gptq_zero_points import store_zero_points
from optgptq.formats.kv_cache_keys import CACHE_KEY
from optgptq.formats.tensors import columns_per_group, groups_per_row, require_bits
from optgptq.layout import LinearLayout
from optgptq.packing.words import words_per_row

_INDEXES = ("g_idx", "weight_g_idx")
_SCALES = ("scales", "weight_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a folder says beside its layouts.

    Attributes:
        format: name of its format; `dense` where nothing is quantized.
        layouts: its linears as the format reads them; empty where nothing is quantized.
        says_act_order: its configuration says that columns are assigned to groups by an index.
        stores_act_order: some linear has such an index, and it says more than the place of a column.
        words_version: version of the zero points of symmetric GPTQ linears by their words, where it is not that of the
            label; 0 where it is.
        loose_words: some codes are packed with unused bits in every word.
        scale_dtype: dtype of the first stored scales, such as `float16`; empty where there are none.
        own_cache: it has a quantized KV cache of optgptq.
        fp8_scales: kind of its fp8 KV cache scales, `tensor` or `head`; empty where there are none.
    """

    format: str
    layouts: tuple[LinearLayout, ...]
    says_act_order: bool
    stores_act_order: bool
    words_version: int
    loose_words: bool
    scale_dtype: str
    own_cache: bool
    fp8_scales: str


def engine_facts(folder: CheckpointFolder) -> EngineFacts:
    """Read the facts from configuration, headers, zero points and indexes.

    Raises:
        FormatError: the checkpoint is quantized in a way that is not read here, or contradicts itself.
    """
    form = detect(folder)
    layouts = () if form is None else form.read_layouts(folder)
    quantized = [layout for layout in layouts if layout.bits is not None]
    summary = fp8_summary(folder)
    return EngineFacts(
        format="dense" if form is None else form.name,
        layouts=layouts,
        says_act_order=_says_act_order(folder),
        stores_act_order=any(_stores_act_order(folder, layout) for layout in quantized),
        words_version=_words_version(folder, form, quantized) if isinstance(form, GptqFormat) else 0,
        loose_words=any(_has_loose_words(folder, layout) for layout in quantized),
        scale_dtype=_scale_dtype(folder, quantized),
        own_cache=CACHE_KEY in folder.config,
        fp8_scales="" if summary is None else ("head" if summary.strategy == "attn_head" else "tensor"),
    )


def _says_act_order(folder: CheckpointFolder) -> bool:
    config = folder.config.get("quantization_config")
    if config is None and QUANTIZE_CONFIG_FILE in folder.side_files:
        config = read_json_object(folder.path, QUANTIZE_CONFIG_FILE)
    return isinstance(config, dict) and config.get("desc_act") is True


def _stores_act_order(folder: CheckpointFolder, layout: LinearLayout) -> bool:
    name = next((f"{layout.name}.{leaf}" for leaf in _INDEXES if f"{layout.name}.{leaf}" in folder.tensors), None)
    if name is None:
        return False
    index_I = folder.read(name).to(torch.int32)
    trivial_I = torch.arange(index_I.numel(), dtype=torch.int32) // columns_per_group(layout)
    return not bool((index_I == -1).all()) and not torch.equal(index_I, trivial_I)


def _words_version(folder: CheckpointFolder, form: GptqFormat, quantized: list[LinearLayout]) -> int:
    other = 3 - form.version
    for layout in quantized:
        if layout.symmetric:
            bits = require_bits(layout)
            middle_GO = torch.full((groups_per_row(layout), layout.out_features), 2 ** (bits - 1), dtype=torch.int32)
            words_GW = store_zero_points(middle_GO, bits, version=other)
            if torch.equal(folder.read(f"{layout.name}.qzeros"), words_GW):
                return other
    return 0


def _has_loose_words(folder: CheckpointFolder, layout: LinearLayout) -> bool:
    name = f"{layout.name}.weight_packed"
    return name in folder.tensors and folder.info(name).shape[1] != words_per_row(
        layout.in_features, require_bits(layout)
    )


def _scale_dtype(folder: CheckpointFolder, quantized: list[LinearLayout]) -> str:
    names = (f"{layout.name}.{leaf}" for layout in quantized for leaf in _SCALES)
    first = next((name for name in names if name in folder.tensors), None)
    return "" if first is None else str(folder.info(first).torch_dtype).removeprefix("torch.")
