"""Checks of a checkpoint on disk: that it is what was meant to be written, or, for any checkpoint, that it is sound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import Problem, check_manifest, read_manifest, sha256_file
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.errors import FormatError, OptGPTQError
from optgptq.formats import CheckpointFormat, detect
from optgptq.formats.checkpoint import OWN_FILES, plan_entries, same_config
from optgptq.formats.fp8_scales import check_fp8_scales
from optgptq.formats.kv_cache_verify import cache_file, check_cache
from optgptq.formats.tensors import columns_per_group
from optgptq.layout import LinearLayout
from optgptq.quantized_weight import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify_folder` found.

    Attributes:
        format: name of the format, `dense` where nothing is quantized.
        num_tensors: tensors that were read.
        num_quantized: linears that were decoded.
        has_manifest: hashes were compared.
        problems: what is wrong; empty when the checkpoint is sound.
        notes: what is odd and was dealt with.
    """

    format: str
    num_tensors: int
    num_quantized: int
    has_manifest: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def weight_digest(weight: QuantizedWeight) -> str:
    """Return the SHA-256 of everything that `dequantize` depends on.

    Two weights have the same digest exactly if they have the same codes and dequantize alike, whatever the dtype that
    stores their grids. Hashing the parts reads a quarter of the bytes of the dequantized weight.
    """
    digest = hashlib.sha256(f"{weight.bits} {[weight.out_features, weight.in_features]} {weight.num_groups}".encode())
    for part in weight.digest_parts():
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def verify_written(
    folder: CheckpointFolder,
    source: TensorSource,
    layouts: Sequence[LinearLayout],
    digests: Mapping[str, str],
    *,
    added: Sequence[TensorEntry] = (),
) -> None:
    """Read back everything that was written and compare it with what was meant.

    Args:
        folder: the written checkpoint.
        source: the dense checkpoint that it was made of.
        layouts: what was decided about each linear.
        digests: `weight_digest` of the solver's weight, by linear.
        added: tensors that no source has; their values are not looked at.

    Raises:
        FormatError: naming the first tensor or file that differs.
    """
    form = detect(folder)
    if form is None:
        raise _differs(str(folder.path), "a quantized checkpoint", "a dense one")
    _verify_inventory(folder, [*plan_entries(source, layouts, form), *added])
    found = {layout.name: layout for layout in form.read_layouts(folder)}
    for layout in layouts:
        if layout.bits is not None:
            _verify_quantized(folder, form, layout, found=found.get(layout.name), digest=digests[layout.name])
    quantized = {f"{layout.name}.weight" for layout in layouts if layout.bits is not None}
    for name in source.tensors:
        if name not in quantized and not same_bytes(folder, source, name):
            raise _differs(f"{folder.path}, tensor {name}", "the bytes of the source", "others")
    _verify_side_files(folder, source)


def verify_folder(folder: CheckpointFolder) -> VerifyReport:
    """Return every problem of a checkpoint, ours or foreign: hashes, shapes, words, groups, finite values, KV cache.

    Raises:
        FormatError: its configuration cannot be understood at all.
    """
    manifest = read_manifest(folder.path)
    problems = check_manifest(folder.path, manifest) if manifest is not None else []
    form = detect(folder)
    layouts = form.read_layouts(folder) if form is not None else ()
    quantized = [layout for layout in layouts if layout.bits is not None]
    notes: list[str] = []
    packed: set[str] = set()
    if form is not None:
        for layout in quantized:
            packed |= {f"{layout.name}.{suffix}" for suffix in form.suffixes}
            problems += _check_quantized(folder, form, layout, notes)
    for name in folder.tensors:
        if name not in packed:
            problems += _check_dense(folder, name)
    problems += check_fp8_scales(folder)
    problems += check_cache(folder)
    unread = [name for name in folder.left_out_files if name != cache_file(folder)]
    if unread:
        notes.append(f"not looked at: {', '.join(unread)}")
    return VerifyReport(
        format=form.name if form is not None else "dense",
        num_tensors=len(folder.tensors),
        num_quantized=len(quantized),
        has_manifest=manifest is not None,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def same_bytes(first: TensorSource, second: TensorSource, name: str) -> bool:
    """True if tensor `name` has the same bytes in both folders; read in pieces."""
    pairs = zip_longest(first.read_chunks(name), second.read_chunks(name))
    return all(left is not None and right is not None and torch.equal(left, right) for left, right in pairs)


def _verify_inventory(folder: CheckpointFolder, entries: Sequence[TensorEntry]) -> None:
    planned = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    stored = {name: (info.torch_dtype, info.shape) for name, info in folder.tensors.items()}
    for name in sorted(planned.keys() | stored.keys()):
        if planned.get(name) != stored.get(name):
            raise _differs(
                f"{folder.path}, tensor {name}",
                str(planned.get(name, "no such tensor")),
                str(stored.get(name, "no such tensor")),
            )


def _verify_quantized(
    folder: CheckpointFolder, form: CheckpointFormat, layout: LinearLayout, *, found: LinearLayout | None, digest: str
) -> None:
    def essence(record: LinearLayout) -> tuple[object, ...]:
        group_size = columns_per_group(record)
        grid = record.coefficients or record.symmetric
        return (record.out_features, record.in_features, record.bits, group_size, grid)

    if found is None or essence(found) != essence(layout):
        raise _differs(
            f"{folder.path}, linear {layout.name}",
            f"rows, columns, bits, group size, symmetric or coefficients {essence(layout)}",
            str(essence(found)) if found else "not quantized",
        )
    decoded = weight_digest(form.decode(folder, layout))
    if decoded != digest:
        raise _differs(
            f"{folder.path}, linear {layout.name}", f"the solver's weight, digest {digest[:16]}", f"{decoded[:16]}"
        )


def _verify_side_files(folder: CheckpointFolder, source: TensorSource) -> None:
    if not same_config(folder, source):
        raise _differs(f"{folder.path}, config.json", "the keys and values of the source", "others")
    for name in source.side_files:
        if name in OWN_FILES:
            continue
        if name not in folder.side_files or sha256_file(folder.path / name) != sha256_file(source.path / name):
            raise _differs(f"{folder.path}, {name}", "a copy of the source's file", "another or none")


def _check_quantized(
    folder: CheckpointFolder, form: CheckpointFormat, layout: LinearLayout, notes: list[str]
) -> Iterator[Problem]:
    where = f"linear {layout.name}"
    try:
        weight = form.decode(folder, layout)
        notes += [f"{where}: {note}" for note in form.notes(folder, layout)]
    except OptGPTQError as error:
        yield Problem(error.where, error.expected, error.found)
        return
    for part, expected, found in weight.problems():
        yield Problem(f"{where}, {part}", expected, found)


def _check_dense(folder: CheckpointFolder, name: str) -> Iterator[Problem]:
    info = folder.info(name)
    if not info.torch_dtype.is_floating_point or info.dtype.startswith("F8"):
        return
    bad = 0
    for chunk in folder.read_chunks(name):
        bad += int((~torch.isfinite(chunk.view(info.torch_dtype))).sum())
    if bad:
        yield Problem(f"tensor {name}", "finite values", f"{bad} that are NaN or infinite")


def _differs(where: str, expected: str, found: str) -> FormatError:
    return FormatError(
        where,
        expected=expected,
        found=found,
        action="Nothing was published. Check the disk, run again, and report it if it happens twice.",
    )
