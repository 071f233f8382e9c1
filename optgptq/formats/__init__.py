"""Checkpoint formats by name, and which one a folder is in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optgptq.checkpoint.folder import CheckpointFolder, read_json_object
from optgptq.errors import FormatError, UsageError
from optgptq.formats.base import CheckpointFormat
from optgptq.formats.compressed_tensors import COMPRESSED_TENSORS
from optgptq.formats.gptq import GPTQ_V1, GPTQ_V2
from optgptq.formats.gptq_config import QUANTIZE_CONFIG_FILE, gptq_label

__all__ = ["FORMATS", "CheckpointFormat", "detect", "format_named"]

FORMATS: Mapping[str, CheckpointFormat] = MappingProxyType(
    {form.name: form for form in (GPTQ_V1, GPTQ_V2, COMPRESSED_TENSORS)}
)


def format_named(name: str) -> CheckpointFormat:
    """Return the format called `name`; UsageError that lists the known ones."""
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
    config = folder.config.get("quantization_config")
    if config is None and QUANTIZE_CONFIG_FILE in folder.side_files and _has_suffix(folder, "qweight"):
        config = {"quant_method": "gptq", **read_json_object(folder.path, QUANTIZE_CONFIG_FILE)}
    if config is None and not any(_has_suffix(folder, suffix) for suffix in ("qweight", "weight_packed")):
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    name = ""
    if isinstance(config, dict) and method == "gptq":
        name = gptq_label(config)
    elif method in ("compressed-tensors", "compressed_tensors"):
        name = COMPRESSED_TENSORS.name
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
