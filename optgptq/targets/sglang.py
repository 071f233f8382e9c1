"""Records of SGLang 0.5.23."""

from __future__ import annotations

from dataclasses import replace

from optgptq.targets.records import Kernel, LoadPath, Source
from optgptq.targets.vllm import HEAD_ROWS, MARLIN_GROUPS, TIED_FAMILIES

VERSION = "0.5.23"
_DATE = "2026-11-22"
_GPTQ = Source(what="sglang 0.5.23, layers/quantization/gptq and hardware_backend", date=_DATE)
_WNA16 = Source(what="sglang 0.5.23, compressed_tensors_wNa16.py", date=_DATE)
_HUMMING = Source(what="sglang 0.5.23, layers/quantization/humming.py", date=_DATE, sure=False)
_DENSE = Source(what="sglang 0.5.23, srt/models", date=_DATE)

_NO_CLASS = "it has no class for them, and transformers' own does not take its attention"
_REFUSED_FAMILIES = tuple((family, _NO_CLASS) for family in ("bloom", "falcon", "mpt"))
# What the kernel of Marlin is compiled for: 128 columns and 64 rows, or the other way round. SGLang pads nothing.
_TILES = ((128, 64), (64, 128))
_INT4_GROUPS = (32, 64, 128, 256)
_ALL_BITS = (2, 3, 4, 5, 6, 7, 8)

_MARLIN = Kernel(name="Marlin", bits=(4, 8), group_sizes=MARLIN_GROUPS, tiles=_TILES)
_MARLIN_ZEROS = Kernel(
    name="Marlin", bits=(4, 8), symmetric=False, asymmetric=True, group_sizes=MARLIN_GROUPS, tiles=_TILES
)
_AMX = Kernel(name="AMX", bits=(4,), row_multiple=8)
_ASCEND = Kernel(name="Ascend", bits=(4, 8), asymmetric=True, whole_rows=False)
_XPU = Kernel(name="XPU int4", bits=(4,), asymmetric=True, group_sizes=_INT4_GROUPS, whole_rows=False)
_XPU_SYMMETRIC = Kernel(name="XPU int4", bits=(4,), group_sizes=_INT4_GROUPS, whole_rows=False)


_DENSE_PATH = LoadPath(
    engine="sglang",
    version=VERSION,
    platform="cuda",
    name="dense",
    formats=("dense",),
    kernels=(),
    source=_DENSE,
    fused_apart=True,
    refused_families=_REFUSED_FAMILIES,
)
_PACKED = replace(
    _DENSE_PATH,
    fused_apart=False,
    quantized_head=True,
    head_row_multiple=HEAD_ROWS,
    tied_families=TIED_FAMILIES,
    source=_GPTQ,
    formats=("gptq", "gptq_v2"),
)
_WNA16_PATH = replace(
    _PACKED,
    name="compressed-tensors wNa16",
    source=_WNA16,
    formats=("compressed-tensors",),
    head_row_multiple=1,
    fp8_scales=("tensor",),
)
_HUMMING_PATH = replace(
    _PACKED,
    platform="humming",
    name="humming",
    source=_HUMMING,
    option="--quantization humming",
    asymmetric_versions=(2,),
    quantized_head=False,
)

# The first platform is the default one.
PATHS = (
    replace(_PACKED, name="gptq_marlin", kernels=(_MARLIN,), act_order="yes"),
    replace(_WNA16_PATH, kernels=(_MARLIN, _MARLIN_ZEROS), act_order="yes"),
    _DENSE_PATH,
    # On processors and NPUs every linear is built by the settings of the whole file: its rules are not looked at.
    replace(
        _PACKED,
        platform="cpu",
        name="gptq on AMX",
        kernels=(_AMX,),
        reads_zero_points=True,
        labels=(1,),
        mixed=False,
        dense_linears=False,
        quantized_head=False,
    ),
    replace(_DENSE_PATH, platform="cpu"),
    replace(
        _PACKED,
        platform="npu",
        name="gptq on Ascend",
        kernels=(_ASCEND,),
        reads_zero_points=True,
        mixed=False,
        dense_linears=False,
        quantized_head=False,
    ),
    replace(_DENSE_PATH, platform="npu"),
    replace(_PACKED, platform="xpu", name="gptq on XPU", kernels=(_XPU,), reads_zero_points=True, act_order="yes"),
    replace(_WNA16_PATH, platform="xpu", kernels=(_XPU_SYMMETRIC,)),
    replace(_DENSE_PATH, platform="xpu"),
    replace(_HUMMING_PATH, kernels=(Kernel(name="Humming", bits=_ALL_BITS, asymmetric=True, whole_rows=False),)),
    replace(
        _HUMMING_PATH,
        formats=("compressed-tensors",),
        kernels=(Kernel(name="Humming", bits=_ALL_BITS, asymmetric=True),),
        mixed=False,
    ),
    replace(_DENSE_PATH, platform="humming"),
)
