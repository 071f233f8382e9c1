"""Sound inputs to begin with: small checkpoints of every format, made by this package where it writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.checkpoints import write_tensors
from support.quantizable import tiny_recipe, wide_llama, write_model

from optgptq.packing.planes import pack_planes
from optgptq.quantize import quantize
from optgptq.recipe.kv_cache import KVCacheRecipe
from optgptq.recipe.records import Recipe

NAME = "model.layers.0.mlp.down_proj"


def write_checkpoints(home: Path) -> dict[str, Path]:
    """Return small checkpoints by name, written below `home`: dense, of every format, and with a quantized KV cache."""
    dense = write_model(wide_llama(num_hidden_layers=1, head_dim=16), home / "dense", dtype=torch.float16)
    sources = {"dense": dense, "sharded": _sharded(dense, home / "sharded")} | _foreign(home)
    rounding = {"bits": 4, "group_size": 16, "method": "rtn"}
    recipes = {
        "gptq": tiny_recipe(**rounding, export={"format": "gptq"}),
        "gptq_v2": tiny_recipe(**{**rounding, "symmetric": False}, export={"format": "gptq_v2"}),
        "compressed-tensors": tiny_recipe(**rounding, export={"format": "compressed-tensors"}),
        "fp8 scales": _with_cache(
            tiny_recipe(**rounding, export={"format": "compressed-tensors"}), {"bits": 16, "fp8_scales": "tensor"}
        ),
        "planes": tiny_recipe(method="binary", bits=2, export={"format": "optgptq"}),
        "kv cache": Recipe.model_validate(
            {
                "weights": {"method": "none"},
                "kv_cache": {"bits": 4, "num_windows": 4},
                "calibration": {"num_windows": 4, "window_size": 24},
            }
        ),
    }
    for name, recipe in recipes.items():
        sources[name] = quantize(dense, recipe, home / name.replace(" ", "-")).output
    return sources


def _with_cache(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"kv_cache": KVCacheRecipe.model_validate(fields)})


def _sharded(dense: Path, folder: Path) -> Path:
    """Return the model with its weights in two files and an index."""
    from safetensors.torch import load_file

    folder.mkdir()
    for file in dense.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    tensors = load_file(dense / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _foreign(home: Path) -> dict[str, Path]:
    """Sign planes of other tools: three layouts of one linear."""
    rows, columns, groups = 5, 96, 3
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(0, 8, (rows, columns), generator=generator).to(torch.uint8)
    planes = pack_planes(codes_OI, 3)
    coefficients = torch.randn(groups, 3, rows, generator=generator).half()
    shifts = torch.randn(groups, rows, generator=generator).half()
    layouts = {
        "lut-gemm": {"binary": planes, "alpha": coefficients, "q_bias": shifts},
        "anybcq": {"qweight": planes, "alpha_3": coefficients, "beta_3": shifts},
        "bpdq": {"B": planes[..., :2, :] if planes.dim() == 3 else planes, "c": coefficients},
    }
    found = {}
    for name, tensors in layouts.items():
        named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
        named["model.norm.weight"] = torch.ones(4).half()
        found[name] = write_tensors(home / name, named, {"model_type": "llama"}).path
    return found
