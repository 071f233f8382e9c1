"""A checkpoint as a whole: the source's tensors with the quantized weights replaced, and its other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import CONFIG_FILE
from optgptq.checkpoint.manifest import MANIFEST_FILE
from optgptq.checkpoint.paths import require_inside
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.errors import ModelError
from optgptq.formats.base import CheckpointFormat
from optgptq.formats.gptq_config import QUANTIZE_CONFIG_FILE
from optgptq.formats.kv_cache_keys import CACHE_KEY
from optgptq.layout import LinearLayout

QUANTIZATION_KEY = "quantization_config"
# Written anew for every checkpoint: a copy from the source would describe something else.
OWN_FILES = (CONFIG_FILE, MANIFEST_FILE, QUANTIZE_CONFIG_FILE)


def plan_entries(source: TensorSource, layouts: Sequence[LinearLayout], form: CheckpointFormat) -> list[TensorEntry]:
    """Return all tensors of the result, in name order of the source, quantized weights replaced.

    Args:
        source: dense checkpoint.
        layouts: its linears; those without bits stay dense.
        form: format of the result.

    Raises:
        ModelError: the source lacks a weight, or stores it in another shape.
    """
    quantized = _by_weight(layouts)
    for weight_name, layout in quantized.items():
        info = source.info(weight_name)
        shape = (layout.out_features, layout.in_features)
        expected = shape[::-1] if layout.stored_transposed else shape
        if info.shape != expected:
            raise ModelError(
                f"{source.path}, tensor {weight_name}",
                expected=str(list(expected)),
                found=str(list(info.shape)),
                action="Check that the weights belong to config.json.",
            )
    entries: list[TensorEntry] = []
    for name, info in source.tensors.items():
        if name in quantized:
            entries += form.entries(quantized[name], dense_dtype=info.torch_dtype)
        else:
            entries.append(TensorEntry(name, info.torch_dtype, info.shape))
    return entries


def copy_dense(source: TensorSource, writer: ShardWriter, layouts: Sequence[LinearLayout]) -> None:
    """Copy every tensor of `source` that is not quantized, bit for bit, in pieces."""
    quantized = _by_weight(layouts)
    for name in source.tensors:
        if name not in quantized:
            writer.write_chunks(name, source.read_chunks(name))


def write_side_files(
    source: TensorSource, folder: Path, form: CheckpointFormat, layouts: Sequence[LinearLayout]
) -> None:
    """Copy every other file byte for byte and write the configuration of the result.

    `config.json` keeps the source's bytes and gains the key `quantization_config`; a source whose config is not that of
    its file has it written anew. A quantized KV cache is not taken over: it was measured with the weights it came with.

    Raises:
        CapacityError, OutputError: a file cannot be written.
    """
    copy_side_files(source, folder)
    _write_text(folder / CONFIG_FILE, config_text(_source_text(source), form.quantization_config(layouts)))
    for name, content in form.extra_files(layouts).items():
        _write_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_side_files(source: TensorSource, folder: Path) -> None:
    """Copy every other file byte for byte, but for those that every checkpoint has of its own.

    Raises:
        CapacityError, OutputError: a file cannot be written.
    """
    for name in source.side_files:
        if name not in OWN_FILES:
            _copy_file(require_inside(source.path, name), folder / name)


def write_dense_config(source: TensorSource, folder: Path) -> None:
    """Write the config of `source`, without a quantized KV cache: the bytes of its file where that says the same.

    Raises:
        CapacityError, OutputError: the file cannot be written.
    """
    _write_text(folder / CONFIG_FILE, _source_text(source))


def config_text(text: str, quantization: Mapping[str, Any]) -> str:
    """Return the text of a config.json with `quantization_config` set, everything else as it was."""
    return with_config_key(text, QUANTIZATION_KEY, quantization)


def with_config_key(text: str, key: str, value: Mapping[str, Any]) -> str:
    """Return the text of a config.json with `key` set, everything else as it was.

    A new key is put before the last brace, so that spacing and numbers stay as they are; to replace one, the object is
    written again in the order of its keys.
    """
    config = json.loads(text)
    wanted = {**config, key: value}
    if key not in config:
        body = text.rstrip().removesuffix("}").rstrip()
        addition = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        comma = "," if config else ""
        return f'{body}{comma}\n  "{key}": {addition}\n}}\n'
    return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def same_config(folder: TensorSource, source: TensorSource) -> bool:
    """True if both config.json say the same, `quantization_config` and the KV cache left aside."""
    own = (QUANTIZATION_KEY, CACHE_KEY)
    first, second = ({key: value for key, value in part.config.items() if key not in own} for part in (folder, source))
    return _same_json(first, second)


def _source_text(source: TensorSource) -> str:
    text = (source.path / CONFIG_FILE).read_text(encoding="utf-8-sig")
    config = {key: value for key, value in source.config.items() if key != CACHE_KEY}
    if _same_json(json.loads(text), config):
        return text
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _same_json(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    # As text: NaN is a legal value in these files and is not equal to itself.
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _by_weight(layouts: Sequence[LinearLayout]) -> dict[str, LinearLayout]:
    return {f"{layout.name}.weight": layout for layout in layouts if layout.bits is not None}


def _copy_file(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise disk_error(target, error) from error


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise disk_error(path, error) from error
