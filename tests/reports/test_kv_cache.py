"""Bits per value and bytes per token of the caches that checkpoints ask for, against sums written out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import quantize_all, story_layouts, write_checkpoint

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError, ModelError
from optgptq.formats.fp8_scales import Fp8Summary
from optgptq.formats.kv_cache_config import write_cache_setup
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.models.registry import model_spec
from optgptq.reports.inspect import inspect_checkpoint
from optgptq.reports.kv_cache import CacheReport, CacheSideReport, cache_report
from optgptq_cli.main import main

STORY = bundled_path("bundled:story-llama")
SPEC = model_spec(CheckpointFolder.open(STORY))
K, D, LAYERS = SPEC.num_kv_heads, SPEC.head_dim, SPEC.num_layers
EXACT = SideScheme()
FOUR = SideScheme(bits=4, group_size=D)
TWO = SideScheme(bits=2, group_size=D // 2)
ALONG = SideScheme(bits=3, group_size=32, axis="token")


def story_with_cache(
    folder: Path, schemes: Sequence[LayerScheme], parameters: LayerParameters, *, past: PastRule
) -> CheckpointFolder:
    shutil.copytree(STORY, folder)
    write_cache_setup(
        folder,
        CacheScheme(layers=tuple(schemes), past=past),
        [parameters] * len(schemes),
        folded={"k_scale": False},
        calibration={"tokens": 128},
    )
    return CheckpointFolder.open(folder)


def calibrated() -> LayerParameters:
    """Keys with everything and a metric, values rotated."""
    keys = SideParameters(shift_KD=torch.ones(K, D), metric_KDD=torch.eye(D).repeat(K, 1, 1))
    values = SideParameters(rotation_KDD=block_hadamard(D).expand(K, -1, -1))
    return LayerParameters(keys=keys, values=values)


def report_of(folder: CheckpointFolder) -> CacheReport:
    report = cache_report(folder)
    assert report is not None
    return report


def test_one_scheme_for_all_layers(tmp_path: Path) -> None:
    scheme = LayerScheme(keys=FOUR, values=TWO)
    past = PastRule(mode="window", window=64, sink_tokens=4, recent_tokens=16)
    report = report_of(story_with_cache(tmp_path / "model", [scheme] * LAYERS, calibrated(), past=past))
    assert report.key_bits_per_value == 4 + 32 / D
    assert report.value_bits_per_value == 2 + 2 * 32 / D
    keys, values = D * 4 // 8 + 4, D * 2 // 8 + 2 * 4
    assert report.bytes_per_token == LAYERS * K * (keys + values)
    assert report.exact_bytes_per_token == LAYERS * K * 2 * 2 * D
    assert (report.past_only, report.sink_tokens, report.recent_tokens) == ("window:64", 4, 16)
    assert not report.layers_differ
    assert report.layers[0].keys == CacheSideReport(
        bits=4, group_size=D, axis="channel", bits_per_value=4 + 32 / D, transform="shift_scale", fitted=True
    )
    assert report.layers[-1].values == CacheSideReport(
        bits=2, group_size=D // 2, axis="channel", bits_per_value=2 + 64 / D, transform="hadamard", fitted=False
    )
    assert (report.folded, report.calibration) == ({"k_scale": False}, {"tokens": 128})


def test_layers_that_differ(tmp_path: Path) -> None:
    schemes = [
        LayerScheme(keys=EXACT, values=EXACT),
        LayerScheme(keys=ALONG, values=EXACT),
        *[LayerScheme(keys=FOUR, values=FOUR)] * (LAYERS - 2),
    ]
    plain = LayerParameters(keys=SideParameters(), values=SideParameters())
    report = report_of(story_with_cache(tmp_path / "model", schemes, plain, past=PastRule(mode="token", granule=32)))
    assert report.layers_differ
    assert [layer.keys.bits for layer in report.layers] == [16, 3, *[4] * (LAYERS - 2)]
    assert report.layers[1].keys.bits_per_value == 3 + 32 / 32
    assert report.layers[0].bytes_per_token == K * 4 * D
    # Three bits: two planes, each filled up to four bytes; scale and minimum of a channel for 32 tokens.
    along = -(-D // 4 // 4) * 4 + -(-D // 8 // 4) * 4 + D * 4 / 32
    assert report.layers[1].bytes_per_token == K * (along + 2 * D)
    four = K * 2 * (D // 2 + 4)
    assert report.bytes_per_token == K * 4 * D + K * (along + 2 * D) + (LAYERS - 2) * four


def test_a_checkpoint_without_a_cache() -> None:
    report = inspect_checkpoint(CheckpointFolder.open(STORY))
    assert report.kv_cache is None
    assert report.fp8_cache is None
    assert cache_report(CheckpointFolder.open(STORY)) is None


def test_inspect_shows_it_to_people_and_to_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = LayerScheme(keys=FOUR, values=TWO)
    past = PastRule(mode="token", sink_tokens=4)
    folder = story_with_cache(tmp_path / "same", [scheme] * LAYERS, calibrated(), past=past)
    assert main(["inspect", str(folder.path)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    report = report_of(folder)
    for text in (
        f"kv cache keys {4 + 32 / D:.4f}, values {2 + 64 / D:.4f} bits per value",
        f"bytes per token {report.bytes_per_token:,.1f}; {report.exact_bytes_per_token:,.1f} with 16 bits",
        "past only token, 4 sinks, 0 recent",
        f"keys 4 bits, {D} channels, shift_scale, fitted",
        f"values 2 bits, {D // 2} channels, hadamard, nearest",
        "folded k_scale False",
        "calibration tokens 128",
    ):
        assert text in page
    assert main(["inspect", str(folder.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"] == json.loads(json.dumps(dataclasses.asdict(report)))


def test_layers_that_differ_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemes = [LayerScheme(keys=EXACT, values=EXACT), *[LayerScheme(keys=FOUR, values=FOUR)] * (LAYERS - 1)]
    folder = story_with_cache(tmp_path / "model", schemes, calibrated(), past=PastRule())
    assert main(["inspect", str(folder.path)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert f"0 16 bits 16 bits {K * 4 * D:,.1f}" in page
    assert f"1 4 bits, {D} channels, shift_scale, fitted 4 bits, {D} channels, hadamard, nearest" in page


def test_scales_for_an_fp8_cache_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    source, layouts = CheckpointFolder.open(STORY), story_layouts()
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    folder = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name="compressed-tensors")
    config = folder.config
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder.path / "config.json").write_text(json.dumps(config))
    report = inspect_checkpoint(CheckpointFolder.open(folder.path))
    assert report.fp8_cache == Fp8Summary(strategy="tensor", num_layers=0)
    assert main(["inspect", str(folder.path)]) == 0
    assert "fp8 kv cache scales 0 layers, tensor" in " ".join(capsys.readouterr().out.split())


def test_bad_caches_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = LayerScheme(keys=FOUR, values=FOUR)
    folder = story_with_cache(tmp_path / "model", [scheme] * LAYERS, calibrated(), past=PastRule())
    sidecar = folder.path / "kv_cache" / "kv_params.safetensors"
    sidecar.write_bytes(b"\xff" * 20)
    with pytest.raises(FormatError, match="a safetensors file"):
        cache_report(folder)
    assert main(["verify", str(folder.path)]) == 3
    assert "SHA-256" in capsys.readouterr().err
    sidecar.unlink()
    with pytest.raises(ModelError):
        cache_report(folder)
    assert main(["inspect", str(folder.path)]) == 3
    assert "kv_params.safetensors" in capsys.readouterr().err
