"""Records of vLLM 0.33."""

from __future__ import annotations

from dataclasses import replace

from optgptq.targets.records import Kernel, LoadPath, Source

VERSION = "0.33"
_DATE = "2026-11-22"
MARLIN_GROUPS = (-1, 32, 64, 128)
_GPTQ = Source(what="vllm 0.33.0, layers/quantization/auto_gptq.py and kernels/linear", date=_DATE)
_WNA16 = Source(what="vllm 0.33.0, compressed_tensors_wNa16.py and kernels/linear", date=_DATE)
_HUMMING = Source(what="vllm 0.33.0, layers/quantization/humming.py; humming-kernels 0.1.19", date=_DATE, sure=False)
_DENSE = Source(what="vllm 0.33.0, models/registry.py", date=_DATE)

_REFUSED_FAMILIES = (("mpt", "its last release with MPT is 0.28.0"),)
_REFUSED_TRAITS = (
    ("grouped-mpt", "transformers, which reads the config, has no MPT whose heads share keys and values"),
    ("grouped-sequential", "it has no Falcon with shared heads and a sequential residual"),
)

_MARLIN = Kernel(name="Marlin", bits=(4, 8), group_sizes=MARLIN_GROUPS)
_MARLIN_ZEROS = Kernel(name="Marlin", bits=(4,), symmetric=False, asymmetric=True, group_sizes=MARLIN_GROUPS)
_TRITON = Kernel(name="Triton W4A16", bits=(4,), asymmetric=True, group_sizes=(-1, 32, 64, 128, 256), row_multiple=8)
_CONCH = Kernel(name="Conch", bits=(4, 8), group_sizes=(-1, 128), package="conch-triton-kernels")
_EXLLAMA = Kernel(name="ExLlama", bits=(4, 8), whole_rows=False, row_multiple=8, model_dtypes=("float16",))
_CPU = Kernel(name="CPU W4A16", bits=(4,), asymmetric=True, group_multiple=2, row_multiple=32, column_multiple=32)
_XPU = Kernel(name="XPU W4A16", bits=(4,), asymmetric=True, group_multiple=32, column_multiple=32)
_ANY = Kernel(
    name="Humming",
    bits=(2, 3, 4, 5, 6, 7, 8),
    asymmetric=True,
    head=False,
    note="runs on the Humming kernels, which need an NVIDIA GPU of compute capability 7.5 or newer",
)


_ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
# They demand a config that ties the head to the embedding.
TIED_FAMILIES = ("gemma", "gemma2")
# Heads are padded to a multiple of it, and the loader pads the first dimension, which of GPTQ words is the input's.
HEAD_ROWS = 64
_GPTQ_TRITON = replace(_TRITON, asymmetric=False, group_sizes=MARLIN_GROUPS)
_GPTQ_EXLLAMA = replace(_EXLLAMA, group_sizes=MARLIN_GROUPS[1:])
_GPTQ_CPU = replace(_CPU, asymmetric=False, group_sizes=MARLIN_GROUPS)
_GPTQ_XPU = replace(_XPU, asymmetric=False, group_sizes=MARLIN_GROUPS)

_DENSE_PATH = LoadPath(
    engine="vllm",
    version=VERSION,
    platform="cuda",
    name="dense",
    formats=("dense",),
    kernels=(),
    source=_DENSE,
    fused_apart=True,
    refused_families=_REFUSED_FAMILIES,
    refused_traits=_REFUSED_TRAITS,
)
# Grids are symmetric and groups those of Marlin, whatever kernel then does the work.
_GPTQ_PATH = replace(
    _DENSE_PATH,
    name="auto_gptq",
    formats=("gptq", "gptq_v2"),
    source=_GPTQ,
    fused_apart=False,
    act_order="whole rows",
    quantized_head=True,
    head_row_multiple=HEAD_ROWS,
    tied_families=TIED_FAMILIES,
)
_WNA16_PATH = replace(
    _DENSE_PATH,
    name="compressed-tensors wNa16",
    formats=("compressed-tensors",),
    source=_WNA16,
    fused_apart=False,
    quantized_head=True,
    tied_families=TIED_FAMILIES,
    fp8_scales=("tensor", "head"),
)
_HUMMING_PATH = replace(
    _DENSE_PATH,
    platform="humming",
    name="humming",
    formats=("gptq", "gptq_v2"),
    source=_HUMMING,
    option="--quantization humming",
    fused_apart=False,
    asymmetric_versions=(2,),
)

# The first platform is the default one.
PATHS = (
    replace(_GPTQ_PATH, kernels=(_MARLIN,)),
    replace(_WNA16_PATH, kernels=(_MARLIN, _MARLIN_ZEROS, _TRITON, _ANY)),
    _DENSE_PATH,
    replace(_GPTQ_PATH, platform="rocm", kernels=(_GPTQ_TRITON, _GPTQ_EXLLAMA, _CONCH)),
    replace(_WNA16_PATH, platform="rocm", kernels=(_TRITON, _EXLLAMA, _CONCH)),
    replace(_DENSE_PATH, platform="rocm"),
    replace(_GPTQ_PATH, platform="cpu", kernels=(_GPTQ_CPU,)),
    replace(_WNA16_PATH, platform="cpu", kernels=(_CPU,)),
    replace(_DENSE_PATH, platform="cpu"),
    replace(_GPTQ_PATH, platform="xpu", kernels=(_GPTQ_XPU,)),
    replace(_WNA16_PATH, platform="xpu", kernels=(_XPU,)),
    replace(_DENSE_PATH, platform="xpu"),
    # The shape rule of GPTQ files divides by the group size.
    replace(_HUMMING_PATH, kernels=(Kernel(name="Humming", bits=_ALL_BITS, asymmetric=True, whole_rows=False),)),
    # Of a compressed-tensors file the first config group that targets Linear counts for everything.
    replace(
        _HUMMING_PATH,
        formats=("compressed-tensors",),
        kernels=(Kernel(name="Humming", bits=_ALL_BITS, asymmetric=True),),
        mixed=False,
    ),
    replace(_DENSE_PATH, platform="humming"),
)
