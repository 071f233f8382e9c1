"""`verify` looks into the quantized KV cache of a checkpoint, whatever the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_setups import FOUR, HEAD_DIM, TWO, mixed_layers, with_cache_key, written_cache

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import write_manifest
from optgptq.formats.kv_cache_verify import cache_file, check_cache
from optgptq.formats.verify import verify_folder
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters

KEY = "kv_cache_quantization"
SIDECAR = "kv_cache/kv_params.safetensors"
PLAIN = LayerParameters(keys=SideParameters(), values=SideParameters())


def test_sound_caches_pass_and_are_looked_at(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    write_manifest(folder.path, {})
    folder = CheckpointFolder.open(folder.path)
    assert folder.left_out_files == (SIDECAR,)
    assert cache_file(folder) == SIDECAR
    report = verify_folder(folder)
    assert (report.problems, report.notes) == ((), ())
    manifest = json.loads((folder.path / "optgptq_manifest.json").read_text())
    assert manifest["files"][SIDECAR]["sha256"] == folder.config[KEY]["params_sha256"]


def test_a_cache_without_parameters_passes(tmp_path: Path) -> None:
    """Nothing in the file tells the sizes of the heads: groups of 8 and of 24 channels go together."""
    scheme = CacheScheme(layers=(LayerScheme(keys=FOUR, values=TWO), LayerScheme(keys=TWO, values=TWO)))
    assert check_cache(written_cache(tmp_path / "plain", scheme, [PLAIN, PLAIN])) == []
    along = [mixed_layers()[2], PLAIN]
    folder = written_cache(tmp_path / "hadamard", scheme, [along[0], PLAIN])
    assert check_cache(folder) == []


def test_the_sidecar_is_compared(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    data = bytearray((folder.path / SIDECAR).read_bytes())
    data[-3] ^= 64
    (folder.path / SIDECAR).write_bytes(data)
    (problem,) = verify_folder(folder).problems
    assert problem.where == f"{folder.path}, {SIDECAR}"
    assert problem.expected == f"SHA-256 {folder.config[KEY]['params_sha256']}"
    (folder.path / SIDECAR).unlink()
    (problem,) = verify_folder(folder).problems
    assert problem.found == "no such file"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda content: content | {"version": 7}, "version"),
        (lambda content: content | {"packing": "even"}, "packing"),
        (lambda content: content["default"]["k"].update(group_size=HEAD_DIM - 1) or content, "default.k.group_size"),
        (lambda content: content | {"layers": {"99999999999999": {}}}, "layers.99999999999999"),
        (lambda content: content | {"skip_layers": [10**15]}, "skip_layers"),
        (lambda content: content | {"layers": 3}, "layers"),
        (lambda content: content | {"default": 3}, "default"),
        (lambda content: [content], ""),
    ],
)
def test_the_key_is_read_strictly(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], place: str
) -> None:
    folder = written_cache(tmp_path / "model")
    folder = with_cache_key(folder, change(copy.deepcopy(folder.config[KEY])))
    (problem,) = check_cache(folder)
    assert problem.where.endswith(f"{KEY}.{place}" if place else KEY)


def test_huge_groups_reserve_no_memory(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model", CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),)), [PLAIN])
    content = copy.deepcopy(folder.config[KEY])
    content["default"]["k_transform"] = "hadamard"
    content["default"]["k"]["group_size"] = 2**40
    (problem,) = check_cache(with_cache_key(folder, content))
    assert problem.where.endswith("default.k.group_size")
