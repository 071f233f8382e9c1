"""Runs for tests of reports, of any depth, without a model: what `inspect` would tell, a manifest and a run record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optgptq.reports.inspect import InspectReport, LayerReport
from optgptq.reports.run_data import RunData

MODULES = (
    ("self_attn.q_proj", 8192, 8192),
    ("self_attn.k_proj", 1024, 8192),
    ("self_attn.v_proj", 1024, 8192),
    ("self_attn.o_proj", 8192, 8192),
    ("mlp.gate_proj", 28672, 8192),
    ("mlp.up_proj", 28672, 8192),
    ("mlp.down_proj", 8192, 28672),
)
HASH = "0123456789abcdef" * 4


def linear_names(num_layers: int, *, num_experts: int = 0) -> list[str]:
    """Names of all linears; with experts the MLP of each layer is there so often."""
    names = []
    for layer in range(num_layers):
        for module, _, _ in MODULES:
            if num_experts and module.startswith("mlp."):
                names += [f"model.layers.{layer}.mlp.experts.{e}.{module[4:]}" for e in range(num_experts)]
            else:
                names.append(f"model.layers.{layer}.{module}")
    return names


def loss_of(name: str) -> float:
    """A loss that differs from linear to linear."""
    return 1e-3 * (2 + math.sin(sum(map(ord, name)) * 0.7))


def run_data(
    num_layers: int = 2,
    *,
    num_experts: int = 0,
    names: list[str] | None = None,
    manifest: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    inspected: Mapping[str, Any] | None = None,
    **fields: Any,
) -> RunData:
    """A finished run; `manifest`, `record` and `inspected` replace single keys."""
    linears = linear_names(num_layers, num_experts=num_experts) if names is None else names
    full_manifest = {**manifest_of(linears, num_layers), **(manifest or {})}
    layers = tuple(_layer(entry) for entry in full_manifest["layers"])
    checkpoint = {
        "format": "gptq",
        "architecture": "LlamaForCausalLM",
        "bits_per_weight": 4.15625,
        "num_quantized_weights": 10**9,
        "num_tensors": 4 * len(layers),
        "tensor_bytes": 6 * 10**8,
        "quantized_bytes": 5 * 10**8,
        "layers": layers,
        "dense": ({"name": "lm_head", "reason": "outside the decoder layers"},),
        "decoder_layers": (),
        "recipe": "gptq-w4",
        "made_by": "0.1.0",
        "warnings": (),
        "kv_cache": None,
        "fp8_cache": None,
        **(inspected or {}),
    }
    known = {"name": "out", "evaluation": EVALUATION, "config": CONFIG, **fields}
    run_record = {**full_manifest, **record_of(num_layers), **(record or {})}
    return RunData(checkpoint=InspectReport(**checkpoint), manifest=full_manifest, record=run_record, **known)


CONFIG = {"num_hidden_layers": 2, "hidden_size": 8192, "_name_or_path": "meta-llama/Llama-3.1-70B"}
EVALUATION = {
    "perplexity": 5.0875,
    "baseline_perplexity": 5.0553,
    "mean_kl": 0.0083,
    "top1_agreement": 0.9566,
    "num_tokens": 4080,
    "window_size": 256,
    "num_windows": 16,
    "tokens_sha256": HASH,
}


def manifest_of(linears: list[str], num_layers: int) -> dict[str, Any]:
    return {
        "optgptq": "0.1.0",
        "recipe": {
            "name": "gptq-w4",
            "description": "GPTQ, 4 bits",
            "weights": {"method": "gptq", "bits": 4, "damp_ratio": 0.01, "rules": []},
        },
        "model": {"files": {"model.safetensors": {"sha256": HASH, "bytes": 2 * 10**9}}},
        "calibration": {"tokens_sha256": HASH, "num_windows": 128, "notes": []},
        "device": "cpu",
        "versions": {"python": "3.11", "torch": "2.13"},
        "bits_per_weight": 4.15625,
        "layers": [
            {
                "name": name,
                "method": "gptq",
                "loss": loss_of(name),
                "rtn_loss": 2 * loss_of(name),
                "clip_fraction": 0.01,
                "damp_ratio_used": 0.01,
                "notes": [],
            }
            for name in linears
        ],
        "dense": [],
        "decoder_layers": [{"index": index, "output_error": 0.001 * (index + 1)} for index in range(num_layers)],
        "warnings": [],
        "files": {f"model-{i:05}.safetensors": {"sha256": HASH, "bytes": 10**9} for i in range(num_layers)},
    }


def record_of(num_layers: int) -> dict[str, Any]:
    cells = [[0.001 * (row + column + 1) for column in range(32)] for row in range(32)]
    name = "model.layers.1.mlp.down_proj"
    error_map = {"name": name, "loss": 0.02, "rows": 8192, "columns": 28672, "weight": cells, "error": cells}
    return {
        "run_record": 1,
        "seconds": 7200.0,
        "peak_memory_bytes": 20 * 2**30,
        "sessions": [
            {"started": "2026-01-01T00:00:00Z", "seconds": 3000.0, "ended": "interrupted", "first_layer": 0},
            {"started": "2026-01-01T02:00:00Z", "seconds": 4200.0, "ended": "finished", "first_layer": num_layers // 2},
        ],
        "phases": [
            {
                "name": "calibration text",
                "detail": "self",
                "seconds": 60.0,
                "resident_bytes": 2**30,
                "peak_bytes": 2**31,
            },
            {"name": "verifying", "detail": "", "seconds": 30.0, "resident_bytes": 2**30, "peak_bytes": 2**31},
        ],
        "decoder_layer_costs": [
            {
                "index": index,
                "seconds": 60.0 + index,
                "resident_bytes": 10 * 2**30,
                "peak_bytes": 20 * 2**30,
                "windows_per_batch": 16 if index < num_layers // 2 else 8,
            }
            for index in range(num_layers)
        ],
        "error_maps": [error_map] * 6,
        "plan": {"seconds": 6000.0, "peak_memory_bytes": 19 * 2**30, "phases": [{"name": "decoder layers"}]},
        "gates": [
            {"gate": "max_kl", "figure": "mean KL", "value": 0.0083, "limit": 0.001, "passed": False, "excess": 0.0073},
            {"gate": "max_perplexity", "figure": "perplexity", "value": 5.1, "limit": 6.0, "passed": True, "excess": 0},
        ],
        "sample": {"prompt": "Once upon", "text": "a time there was"},
        "environment": {"python": "3.11", "processor": "a processor", "memory_bytes": 2**35, "device": "cpu"},
    }


def _layer(entry: Mapping[str, Any]) -> LayerReport:
    name = str(entry["name"])
    rows, columns = next(((rows, columns) for end, rows, columns in MODULES if name.endswith(end)), (64, 128))
    return LayerReport(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=4,
        group_size=128,
        symmetric=True,
        coefficients=None,
        bits_per_weight=4.15625,
        loss=entry.get("loss"),
        rtn_loss=entry.get("rtn_loss"),
        damp_ratio_used=entry.get("damp_ratio_used"),
        notes=tuple(entry.get("notes") or ()),
    )
