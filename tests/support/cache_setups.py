"""Parameters of quantized caches for tests, and folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats.kv_cache_config import write_cache_setup
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import CacheSetup, LayerParameters, SideParameters

NUM_KV_HEADS, HEAD_DIM = 3, 24
FOLDED = {"k_scale": True, "v_rotation": "hadamard", "k_norm_gain": False}
CALIBRATION = {"dataset": "self", "tokens": 4096, "seed": 0}
EXACT = SideScheme()
FOUR = SideScheme(bits=4, group_size=HEAD_DIM)
TWO = SideScheme(bits=2, group_size=8)
ALONG_TOKENS = SideScheme(bits=3, group_size=48, axis="token")


def random_orthogonal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return float32 orthogonal matrices, made in float64."""
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q.float()


def tied_scale(generator: torch.Generator, *, rotary_dim: int = HEAD_DIM) -> torch.Tensor:
    """Return scales `[K, D]`, alike for the two halves of the first `rotary_dim` channels."""
    scale_KD = torch.rand(NUM_KV_HEADS, HEAD_DIM, generator=generator) + 0.5
    half = rotary_dim // 2
    scale_KD[:, half:rotary_dim] = scale_KD[:, :half]
    return scale_KD


def full_side(generator: torch.Generator, *, rotation: str = "matrix") -> SideParameters:
    """Return a side with everything that there is; `rotation`: none, hadamard or matrix."""
    factor = torch.randn(NUM_KV_HEADS, HEAD_DIM, 5, generator=generator)
    rotations = {
        "none": None,
        "hadamard": block_hadamard(HEAD_DIM).expand(NUM_KV_HEADS, -1, -1),
        "matrix": random_orthogonal(generator, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM),
    }
    return SideParameters(
        shift_KD=torch.randn(NUM_KV_HEADS, HEAD_DIM, generator=generator),
        scale_KD=tied_scale(generator),
        rotation_KDD=rotations[rotation],
        metric_KDD=factor @ factor.mT,
        ranges_C2=torch.tensor([[1.0, 1.0], [0.9, 0.95]]),
    )


def mixed_scheme() -> CacheScheme:
    """Return five layers: two alike, one exact, one with an exact side, one with groups along tokens."""
    layers = (
        LayerScheme(keys=FOUR, values=FOUR),
        LayerScheme(keys=EXACT, values=EXACT),
        LayerScheme(keys=FOUR, values=FOUR),
        LayerScheme(keys=FOUR, values=EXACT),
        LayerScheme(keys=ALONG_TOKENS, values=TWO),
    )
    return CacheScheme(layers=layers, past=PastRule(mode="window", window=48, sink_tokens=4, granule=48))


def mixed_layers() -> tuple[LayerParameters, ...]:
    """Return parameters for `mixed_scheme`."""
    generator = torch.Generator().manual_seed(5)
    nothing = SideParameters()
    return (
        LayerParameters(keys=full_side(generator), values=full_side(generator)),
        LayerParameters(keys=nothing, values=nothing),
        LayerParameters(keys=full_side(generator, rotation="hadamard"), values=nothing),
        LayerParameters(keys=full_side(generator, rotation="none"), values=nothing),
        LayerParameters(keys=nothing, values=full_side(generator, rotation="hadamard")),
    )


def empty_checkpoint(folder: Path, **config: Any) -> CheckpointFolder:
    """Write and open a folder with one tensor and this config.json."""
    from support.checkpoints import write_tensors

    return write_tensors(folder, {"a.weight": torch.zeros(2, 2)}, {"model_type": "tiny", **config})


def written_cache(
    folder: Path, scheme: CacheScheme | None = None, layers: Sequence[LayerParameters] | None = None
) -> CheckpointFolder:
    """Write a cache into a folder with one tensor and open it."""
    empty_checkpoint(folder)
    write_cache_setup(
        folder,
        mixed_scheme() if scheme is None else scheme,
        mixed_layers() if layers is None else layers,
        folded=FOLDED,
        calibration=CALIBRATION,
    )
    return CheckpointFolder.open(folder)


def with_cache_key(folder: CheckpointFolder, content: object) -> CheckpointFolder:
    """Write another key into config.json of `folder` and open it again."""
    path = folder.path / "config.json"
    path.write_text(json.dumps({**folder.config, "kv_cache_quantization": content}))
    return CheckpointFolder.open(folder.path)


def same_parameters(first: SideParameters, second: SideParameters) -> bool:
    """True if all tensors are equal bit for bit."""
    pairs = [
        (first.shift_KD, second.shift_KD),
        (first.scale_KD, second.scale_KD),
        (first.rotation_KDD, second.rotation_KDD),
        (first.metric_KDD, second.metric_KDD),
        (first.ranges_C2, second.ranges_C2),
    ]
    return all(
        left is right if left is None or right is None else left.dtype == right.dtype and torch.equal(left, right)
        for left, right in pairs
    )


def same_setup(setup: CacheSetup, scheme: CacheScheme, layers: Sequence[LayerParameters]) -> bool:
    """True if the setup has this scheme and these parameters."""
    return setup.scheme == scheme and all(
        same_parameters(found.keys, layer.keys) and same_parameters(found.values, layer.values)
        for found, layer in zip(setup.layers, layers, strict=True)
    )
