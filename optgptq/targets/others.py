"""Records of transformers 5.23, GPTQModel 7.7, and optgptq itself."""

from __future__ import annotations

from dataclasses import replace

from optgptq.targets.records import Caution, Kernel, LoadPath, Source

_DATE = "2026-11-22"
_TRANSFORMERS = Source(what="transformers 5.23.0 quantizers; optimum 2.3.0 gptq", date=_DATE)
_COMPRESSED = Source(what="transformers 5.23.0 quantizers; compressed-tensors 0.17 to 0.20", date=_DATE)
_GPTQMODEL = Source(what="GPTQModel 7.7.0, kernels and loader", date=_DATE)
_OWN = Source(what="optgptq/formats and optgptq/runtime of this release", date=_DATE)

_REFUSED_TRAITS = (
    ("grouped-mpt", "transformers has no MPT whose heads share keys and values, and refuses the config"),
    ("grouped-sequential", "transformers' Falcon with shared heads and a sequential residual ends with an error"),
)
_TORCH = Kernel(name="Torch", bits=(2, 3, 4, 8), asymmetric=True, group_sizes=(-1, 16, 32, 64, 128, 256, 512, 1024))
_DECOMPRESSED = Kernel(name="decompression", bits=(1, 2, 3, 4, 5, 6, 7, 8), asymmetric=True)
# Families that optgptq implements; their name is the model type of the config.
OWN_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "mpt",
    "falcon",
)

_DENSE_PATH = LoadPath(
    engine="transformers",
    version="5.23",
    platform="",
    name="dense",
    formats=("dense",),
    kernels=(),
    source=_TRANSFORMERS,
    fused_apart=True,
    max_tensor_parallel=1,
    refused_traits=_REFUSED_TRAITS,
)
_GPTQMODEL_DENSE = replace(_DENSE_PATH, engine="gptqmodel", version="7.7", source=_GPTQMODEL)
_OWN_DENSE = replace(
    _DENSE_PATH,
    engine="optgptq",
    version="",
    source=_OWN,
    own_cache=True,
    families=OWN_FAMILIES,
    refused_traits=(),
)

PATHS = (
    _DENSE_PATH,
    # optimum replaces all linears of the decoder layers by the settings of the whole file: rules are not looked at.
    replace(
        _DENSE_PATH,
        name="GPTQ through optimum and gptqmodel",
        formats=("gptq", "gptq_v2"),
        kernels=(_TORCH,),
        act_order="yes",
        reads_zero_points=True,
        mixed=False,
        dense_linears=False,
        requires=("optimum >= 1.24", "gptqmodel >= 1.4.3"),
    ),
    replace(
        _DENSE_PATH,
        name="compressed-tensors",
        formats=("compressed-tensors",),
        kernels=(_DECOMPRESSED,),
        source=_COMPRESSED,
        transposed=False,
        quantized_head=True,
        loose_words=True,
        whole_words=False,
        requires=("compressed-tensors >= 0.15",),
        cautions=(
            Caution(bits=(3, 5, 6, 7), text="compressed-tensors 0.18 or newer decodes 3, 5, 6 and 7 bits, older not"),
            Caution(
                symmetric=False,
                text="with compressed-tensors 0.20 asymmetric files load only with "
                "CompressedTensorsConfig(dequantize=True)",
            ),
            Caution(text="weights are decoded to full size at the first forward pass: no memory is saved"),
        ),
    ),
    _GPTQMODEL_DENSE,
    replace(
        _GPTQMODEL_DENSE,
        name="GPTQ",
        formats=("gptq", "gptq_v2"),
        kernels=(_TORCH,),
        act_order="yes",
        asymmetric_versions=(2,),
        reads_zero_points=True,
        fused_apart=True,
        quantized_head=True,
        whole_words=False,
    ),
    _OWN_DENSE,
    replace(
        _OWN_DENSE,
        name="uniform grids",
        formats=("gptq", "gptq_v2", "compressed-tensors"),
        kernels=(_DECOMPRESSED,),
        act_order="yes",
        quantized_head=True,
        loose_words=True,
        whole_words=False,
    ),
    replace(
        _OWN_DENSE,
        name="sums of signs",
        formats=("optgptq", "lut-gemm", "anybcq", "bpdq"),
        kernels=(Kernel(name="planes", bits=(1, 2, 3, 4, 5, 6, 7, 8), asymmetric=True),),
        binary=True,
        whole_words=False,
    ),
)
