"""A change of layout keeps what the checkpoint says of KV caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import read_manifest
from optgptq.convert import convert
from optgptq.errors import FormatError
from optgptq.formats.fp8_scales import Fp8Summary, add_fp8_scheme, fp8_scheme, fp8_summary
from optgptq.formats.kv_cache_config import read_cache_setup, write_cache_setup
from optgptq.formats.verify import verify_folder
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.models.registry import model_spec

SIDECAR = "kv_cache/kv_params.safetensors"


def quantized(folder: Path, *, format_name: str) -> CheckpointFolder:
    """Write the bundled model in 4 bits with a cache of 4 and 2 bits and a shift."""
    source, layouts = CheckpointFolder.open(STORY_LLAMA), story_layouts()
    weights = quantize_all(source, layouts, format_name=format_name)
    checkpoint = write_checkpoint(source, folder, layouts, weights, format_name=format_name)
    spec = model_spec(source)
    shift_KD = torch.randn(spec.num_kv_heads, spec.head_dim, generator=torch.Generator().manual_seed(0))
    layer = LayerScheme(
        keys=SideScheme(bits=4, group_size=spec.head_dim), values=SideScheme(bits=2, group_size=spec.head_dim)
    )
    parameters = LayerParameters(keys=SideParameters(shift_KD=shift_KD), values=SideParameters())
    write_cache_setup(
        checkpoint.path,
        CacheScheme(layers=(layer,) * spec.num_layers, past=PastRule(mode="token", sink_tokens=4)),
        [parameters] * spec.num_layers,
        folded={},
        calibration={},
    )
    return CheckpointFolder.open(checkpoint.path)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_key_and_parameters_are_kept(tmp_path: Path, target: str) -> None:
    source = quantized(tmp_path / "source", format_name="gptq_v2")
    convert(source.path, tmp_path / "result", to=target)
    result = CheckpointFolder.open(tmp_path / "result")
    assert (result.path / SIDECAR).read_bytes() == (source.path / SIDECAR).read_bytes()
    spec = model_spec(source)
    first, second = (
        read_cache_setup(folder, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
        for folder in (source, result)
    )
    assert first is not None
    assert second is not None
    assert (first.scheme, first.fingerprint) == (second.scheme, second.fingerprint)
    manifest = read_manifest(result.path)
    assert manifest is not None
    assert SIDECAR in manifest["files"]
    report = verify_folder(result)
    assert (report.problems, report.notes) == ((), ())


def test_a_damaged_cache_is_not_carried_on(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source", format_name="gptq")
    (source.path / SIDECAR).write_bytes(b"other")
    with pytest.raises(FormatError, match="SHA-256"):
        convert(source.path, tmp_path / "result", to="gptq_v2")
    assert not (tmp_path / "result").exists()


def test_fp8_scales_are_kept_where_engines_look_for_them(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source", format_name="compressed-tensors")
    add_fp8_scheme(source.path, fp8_scheme("attn_head"))
    same = convert(source.path, tmp_path / "same", to="compressed-tensors")
    assert same.warnings == ()
    assert fp8_summary(CheckpointFolder.open(same.output)) == Fp8Summary(strategy="attn_head", num_layers=0)
    other = convert(source.path, tmp_path / "other", to="gptq")
    assert [warning for warning in other.warnings if "kv_cache_scheme is left out" in warning]
    assert fp8_summary(CheckpointFolder.open(other.output)) is None
