"""Scales of an fp8 KV cache, which other engines read from compressed-tensors files; optgptq itself does not use them.

A stored number is `x / scale` in float8 e4m3fn, so a scale is the largest absolute value over 448. Engines on hardware
with another float8 adapt the scale themselves. Source: compressed-tensors 0.17 to 0.20, `kv_cache_scheme`.

Shapes: `K` key/value heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.manifest import Problem
from optgptq.checkpoint.writer import TensorEntry
from optgptq.errors import NumericalError, TargetError
from optgptq.formats.checkpoint import QUANTIZATION_KEY

Strategy = Literal["tensor", "attn_head"]

COMPRESSED_TENSORS = "compressed-tensors"
LARGEST_FP8 = 448.0
SCHEME_KEY = "kv_cache_scheme"
_KEY, _VALUE = "k_scale", "v_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Summary:
    """What a checkpoint holds for an fp8 cache.

    Attributes:
        strategy: `tensor`: one scale for a layer; `attn_head`: one for each head; empty where no scheme says it.
        num_layers: attention modules with scales.
    """

    strategy: str
    num_layers: int


def fp8_scheme(strategy: Strategy) -> dict[str, Any]:
    """Return the object for the key `kv_cache_scheme` of `quantization_config`."""
    return {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}


def fp8_entries(modules: Sequence[str], *, strategy: Strategy, num_kv_heads: int) -> tuple[TensorEntry, ...]:
    """Return the tensors that go beside the weights; `modules`: full name of each layer's attention, one per layer."""
    shape = (1,) if strategy == "tensor" else (num_kv_heads, 1, 1)
    return tuple(TensorEntry(f"{module}.{leaf}", torch.float32, shape) for module in modules for leaf in (_KEY, _VALUE))


def fp8_tensors(
    modules: Sequence[str],
    key_maxima: Sequence[torch.Tensor],
    value_maxima: Sequence[torch.Tensor],
    *,
    strategy: Strategy,
) -> dict[str, torch.Tensor]:
    """Return the tensors of `fp8_entries` by name, from the largest absolute value `[K]` of each layer's heads.

    Heads whose numbers are all zero get the scale 1.

    Raises:
        NumericalError: a maximum that is not finite.
    """
    tensors = {}
    for module, key_K, value_K in zip(modules, key_maxima, value_maxima, strict=True):
        for leaf, maximum_K in ((_KEY, key_K), (_VALUE, value_K)):
            tensors[f"{module}.{leaf}"] = _scale(maximum_K, f"{module}.{leaf}", strategy)
    return tensors


def add_fp8_scheme(folder: Path, scheme: Mapping[str, Any]) -> None:
    """Set `kv_cache_scheme` in config.json of the compressed-tensors checkpoint in `folder`.

    Raises:
        TargetError: the checkpoint is of another format, whose readers ignore such scales.
        CapacityError, OutputError: the file cannot be written.
    """
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8-sig"))
    quantization = config.get(QUANTIZATION_KEY) or {}
    method = quantization.get("quant_method")
    if method != COMPRESSED_TENSORS:
        raise TargetError(
            str(path),
            expected=f"quant_method {COMPRESSED_TENSORS}: only there do engines look for fp8 scales of a KV cache",
            found=str(method),
            action=f"Use export.format={COMPRESSED_TENSORS}, or leave the fp8 scales out.",
        )
    config[QUANTIZATION_KEY] = {**quantization, SCHEME_KEY: dict(scheme)}
    try:
        path.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise disk_error(path, error) from error


def stored_scheme(folder: CheckpointFolder) -> Mapping[str, Any] | None:
    """Return the object under `kv_cache_scheme`, None where there is none."""
    quantization = folder.config.get(QUANTIZATION_KEY)
    scheme = quantization.get(SCHEME_KEY) if isinstance(quantization, Mapping) else None
    return scheme if isinstance(scheme, Mapping) else None


def fp8_summary(folder: CheckpointFolder) -> Fp8Summary | None:
    """Return what there is for an fp8 cache, None where there is nothing; reads no tensor."""
    scheme, names = stored_scheme(folder), _scale_names(folder)
    if scheme is None and not names:
        return None
    modules = {name.rpartition(".")[0] for name in names}
    return Fp8Summary(strategy=str((scheme or {}).get("strategy") or ""), num_layers=len(modules))


def check_fp8_scales(folder: CheckpointFolder) -> list[Problem]:
    """Return every scale of an fp8 cache that no engine can divide by."""
    problems = []
    for name in _scale_names(folder):
        scale = folder.read(name).float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            problems.append(Problem(f"tensor {name}", "positive finite scales", str(scale.flatten().tolist()[:4])))
    return problems


def _scale(maximum_K: torch.Tensor, name: str, strategy: Strategy) -> torch.Tensor:
    maximum_K = maximum_K.detach().cpu().float().reshape(-1)
    if not bool(torch.isfinite(maximum_K).all()):
        raise NumericalError(
            name,
            expected="finite keys and values",
            found=str(maximum_K.tolist()[:4]),
            action="Check the model and its dtype: what it computes on the calibration text is not finite.",
        )
    largest = maximum_K.max().reshape(1) if strategy == "tensor" else maximum_K.reshape(-1, 1, 1)
    return torch.where(largest > 0, largest / LARGEST_FP8, 1.0)


def _scale_names(folder: CheckpointFolder) -> list[str]:
    """Return names of scales of an attention module: not those of a linear, which end alike in some formats."""
    return [
        name
        for name in folder.tensors
        if name.rpartition(".")[2] in (_KEY, _VALUE) and f"{name.rpartition('.')[0]}.weight" not in folder.tensors
    ]
