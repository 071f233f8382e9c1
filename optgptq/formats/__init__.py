"""Checkpoint formats by name, and which one a folder is in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optgptq.checkpoint.folder import CheckpointFolder, read_json_object
from optgptq.errors import FormatError, UsageError
from optgptq.formats.base import CheckpointFormat
from optgptq.formats.compressed_tensors import COMPRESSED_TENSORS
from optgptq.formats.foreign_planes import ANYBCQ, BPDQ, LUT_GEMM, ForeignPlanes
from optgptq.formats.gptq import GPTQ_V1, GPTQ_V2
from optgptq.formats.gptq_config import QUANTIZE_CONFIG_FILE, gptq_label
from optgptq.formats.planes import PLANES, PLANES_FORMAT
from optgptq.formats.planes_config import QUANT_METHOD

__all__ = ["FORMATS", "READ_ONLY_FORMATS", "CheckpointFormat", "detect", "format_named"]

FORMATS: Mapping[str, CheckpointFormat] = MappingProxyType(
    {form.name: form for form in (GPTQ_V1, GPTQ_V2, COMPRESSED_TENSORS, PLANES_FORMAT)}
)
# Told by the names of their tensors, and never written.
READ_ONLY_FORMATS: Mapping[str, ForeignPlanes] = MappingProxyType(
    {form.name: form for form in (LUT_GEMM, ANYBCQ, BPDQ)}
)
PACKED_SUFFIXES = ("qweight", "weight_packed", PLANES)


def format_named(name: str) -> CheckpointFormat:
    """Return the format called `name`, to be written; UsageError that lists the known ones."""
    if name in READ_ONLY_FORMATS:
        raise UsageError(
            "format",
            expected=f"one of {', '.join(FORMATS)}",
            found=f"{name!r}, which is only read",
            action="Choose one of these; optgptq holds sign planes.",
        )
    if name not in FORMATS:
        raise UsageError(
            "format", expected=f"one of {', '.join(FORMATS)}", found=repr(name), action="Choose one of these."
        )
    return FORMATS[name]


def detect(folder: CheckpointFolder) -> CheckpointFormat | None:
    """Return the format of a checkpoint, None when its weights are dense.

    Raises:
        FormatError: quantized in a way that is not read here, or packed tensors without a configuration.
    """
    for foreign in READ_ONLY_FORMATS.values():
        if foreign.recognizes(folder):
            return foreign
    config = folder.config.get("quantization_config")
    if config is None and QUANTIZE_CONFIG_FILE in folder.side_files and _has_suffix(folder, "qweight"):
        config = {"quant_method": "gptq", **read_json_object(folder.path, QUANTIZE_CONFIG_FILE)}
    if config is None and not any(_has_suffix(folder, suffix) for suffix in PACKED_SUFFIXES):
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    name = ""
    if isinstance(config, dict) and method == "gptq":
        name = gptq_label(config)
    elif method in ("compressed-tensors", "compressed_tensors"):
        name = COMPRESSED_TENSORS.name
    elif method == QUANT_METHOD:
        name = PLANES_FORMAT.name
    if name not in FORMATS:
        raise FormatError(
            f"{folder.path}, quantization_config",
            expected=f"dense weights, or one of {', '.join(FORMATS)}",
            found=f"{method or 'no quant_method'}{f', {name}' if name else ''}",
            action="Convert the checkpoint with the tool that made it, or start from the dense model.",
        )
    return FORMATS[name]


def _has_suffix(folder: CheckpointFolder, suffix: str) -> bool:
    return any(name.endswith(f".{suffix}") for name in folder.tensors)
