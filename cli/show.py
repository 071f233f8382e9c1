"""`optgptq inspect` and `optgptq verify`: what is in a checkpoint, and is it intact."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .display import plain_log
from .options import JsonOption, ModelArgument, QuietOption, RevisionOption
from .output import human_bytes, table, write_json, write_result
from .targets import TargetOption, TensorParallelOption, parse_targets, target_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optgptq.formats.verify import VerifyReport
    from optgptq.reports.inspect import InspectReport, LayerReport
    from optgptq.reports.kv_cache import CacheReport, CacheSideReport
    from optgptq.targets import TargetAnswer


def inspect(
    model: ModelArgument, revision: RevisionOption = None, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Show format, bits per weight, sizes, losses per linear, what stayed dense, and the quantized KV cache."""
    from optgptq.checkpoint.folder import CheckpointFolder
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.reports.inspect import inspect_checkpoint

    with plain_log(quiet=quiet):
        report = inspect_checkpoint(CheckpointFolder.open(resolve_model(model, revision)))
    if as_json:
        write_json(dataclasses.asdict(report))
    elif not quiet:
        write_result(_inspect_page(report))


def verify(
    model: ModelArgument,
    revision: RevisionOption = None,
    target: TargetOption = None,
    tensor_parallel: TensorParallelOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Re-check hashes, shapes, words and decodability of any checkpoint, and whether engines will load it.

    Exit code 3 if it is damaged, 4 if it is intact and a --target does not load it.
    """
    from optgptq.checkpoint.folder import CheckpointFolder
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.formats.verify import verify_folder
    from optgptq.target_subject import subject_of_folder
    from optgptq.targets import check_target, require_loads

    targets = parse_targets(target, tensor_parallel)
    with plain_log(quiet=quiet):
        folder = CheckpointFolder.open(resolve_model(model, revision))
        report = verify_folder(folder)
        subject = subject_of_folder(folder) if targets and not report.problems else None
    answers = [] if subject is None else [check_target(one, subject, tensor_parallel) for one in targets]
    if as_json:
        told = {"targets": [answer.record() for answer in answers]} if targets else {}
        write_json({"intact": not report.problems, **dataclasses.asdict(report), **told})
    elif not quiet:
        write_result(_verify_page(report, answers))
    _require_intact(report)
    require_loads(answers)


def _require_intact(report: VerifyReport) -> None:
    """Raise FormatError with the first problem of a damaged checkpoint, and how many there are besides."""
    from optgptq.errors import FormatError

    if report.problems:
        first = report.problems[0]
        others = len(report.problems) - 1
        raise FormatError(
            first.where if not others else f"{first.where} (and {others} more)",
            expected=first.expected,
            found=first.found,
            action="Copy or download the checkpoint again, or quantize the model again.",
        )


def _inspect_page(report: InspectReport) -> str:
    facts = [
        ("format", report.format),
        ("architecture", report.architecture or "-"),
        ("bits per weight", "-" if report.bits_per_weight is None else f"{report.bits_per_weight:.4f}"),
        ("quantized weights", f"{report.num_quantized_weights:,}"),
        ("size", f"{human_bytes(report.tensor_bytes)}, {human_bytes(report.quantized_bytes)} of it quantized linears"),
        ("recipe", report.recipe or "-"),
        ("made by", f"optgptq {report.made_by}" if report.made_by else "another tool"),
    ]
    parts = [table(facts)]
    if report.layers:
        rows = [
            (
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                str(layer.bits),
                "row" if layer.group_size == -1 else str(layer.group_size),
                _grid(layer),
                _loss(layer.loss),
                _loss(layer.rtn_loss),
            )
            for layer in report.layers
        ]
        header = ("linear", "shape", "bits", "group", "grid", "loss", "rounding")
        parts.append(table(rows, header=header))
    if report.dense:
        parts.append(table([(entry["name"], entry["reason"]) for entry in report.dense], header=("dense", "reason")))
    if report.kv_cache is not None:
        parts += _cache_parts(report.kv_cache)
    if report.fp8_cache is not None:
        strategy = report.fp8_cache.strategy or "no scheme says how they are meant"
        parts.append(table([("fp8 kv cache scales", f"{report.fp8_cache.num_layers} layers, {strategy}")]))
    parts += [f"warning: {warning}" for warning in report.warnings]
    return "\n\n".join(parts)


def _cache_parts(cache: CacheReport) -> list[str]:
    bits = f"keys {cache.key_bits_per_value:.4f}, values {cache.value_bits_per_value:.4f} bits per value"
    facts = [
        ("kv cache", bits),
        ("bytes per token", f"{cache.bytes_per_token:,.1f}; {cache.exact_bytes_per_token:,.1f} with 16 bits"),
        ("past only", f"{cache.past_only}, {cache.sink_tokens} sinks, {cache.recent_tokens} recent"),
    ]
    if not cache.layers_differ:
        facts += [("keys", _cache_side(cache.layers[0].keys)), ("values", _cache_side(cache.layers[0].values))]
    facts += [("folded", _items(cache.folded)), ("calibration", _items(cache.calibration))]
    parts = [table(facts)]
    if cache.layers_differ:
        rows = [
            (str(layer.index), _cache_side(layer.keys), _cache_side(layer.values), f"{layer.bytes_per_token:,.1f}")
            for layer in cache.layers
        ]
        parts.append(table(rows, header=("layer", "keys", "values", "bytes per token")))
    return parts


def _cache_side(side: CacheSideReport) -> str:
    if not side.group_size:
        return f"{side.bits} bits"
    groups = "channels" if side.axis == "channel" else "tokens"
    rounding = "fitted" if side.fitted else "nearest"
    return f"{side.bits} bits, {side.group_size} {groups}, {side.transform}, {rounding}"


def _items(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items()) or "-"


def _grid(layer: LayerReport) -> str:
    if layer.coefficients is not None:
        return f"signs, {layer.coefficients}"
    return "symmetric" if layer.symmetric else "asymmetric"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _verify_page(report: VerifyReport, answers: Sequence[TargetAnswer]) -> str:
    facts = [
        ("format", report.format),
        ("tensors", str(report.num_tensors)),
        ("quantized linears", str(report.num_quantized)),
        ("hashes", "compared with the manifest" if report.has_manifest else "no manifest to compare with"),
        ("problems", str(len(report.problems))),
    ]
    lines = [table(facts)]
    lines += [f"problem: {item.where}: expected {item.expected}, found {item.found}" for item in report.problems]
    lines += [f"note: {note}" for note in report.notes]
    lines += target_lines(answers)
    return "\n".join(lines)
