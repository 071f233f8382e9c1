"""Dense checkpoints: required of a source, written from a view of one, and compared with what was meant."""

from __future__ import annotations

from pathlib import Path

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.errors import FormatError, ModelError
from optgptq.formats import detect
from optgptq.formats.checkpoint import copy_side_files, same_config, write_dense_config
from optgptq.formats.fp8_scales import fp8_summary
from optgptq.formats.verify import same_bytes


def require_dense(folder: CheckpointFolder) -> None:
    """Raise ModelError where the model is quantized already, or comes with scales that were measured on its weights."""
    form = detect(folder)
    if form is not None:
        raise ModelError(
            str(folder.path),
            expected="a model with dense weights",
            found=f"one that is quantized already ({form.name})",
            action="Start from the original model; `optgptq convert` changes the layout of a quantized one.",
        )
    if fp8_summary(folder) is not None:
        raise ModelError(
            str(folder.path),
            expected="weights alone",
            found="scales of an fp8 KV cache beside them, which would no longer fit other weights",
            action="Start from the model without k_scale and v_scale tensors; kv_cache.fp8_scales makes new ones.",
        )


def write_dense(source: TensorSource, folder: Path, *, max_shard_bytes: int) -> None:
    """Write every tensor of `source`, its config and its other files into `folder`, all but a manifest.

    Raises:
        CapacityError, OutputError: a file cannot be written.
    """
    entries = [TensorEntry(name, info.torch_dtype, info.shape) for name, info in source.tensors.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes=max_shard_bytes)
    for name in source.tensors:
        writer.write_chunks(name, source.read_chunks(name))
    writer.finish()
    copy_side_files(source, folder)
    write_dense_config(source, folder)


def verify_dense(folder: CheckpointFolder, source: TensorSource) -> None:
    """Read everything back and compare it with `source`.

    Raises:
        FormatError: naming the first tensor that differs.
    """
    stored = {name: (info.dtype, info.shape) for name, info in folder.tensors.items()}
    meant = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    differing = sorted(name for name in stored.keys() | meant.keys() if stored.get(name) != meant.get(name))
    differing = differing or [name for name in source.tensors if not same_bytes(folder, source, name)]
    if differing or not same_config(folder, source):
        raise FormatError(
            f"{folder.path}, {f'tensor {differing[0]}' if differing else 'config.json'}",
            expected="what was to be written",
            found="something else",
            action="Nothing was published. Check the disk, run again, and report it if it happens twice.",
        )
