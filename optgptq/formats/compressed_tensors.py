"""compressed-tensors `pack-quantized` checkpoints: written densely packed, read in old and new packing.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `W` 32-bit words. Byte-level page:
docs/formats/compressed-tensors.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder, TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.errors import FormatError
from optgptq.formats.compressed_tensors_config import (
    CompressedTensorsConfig,
    compressed_tensors_config,
    read_compressed_tensors_config,
)
from optgptq.formats.consumers import check_compressed_tensors
from optgptq.formats.naming import with_engine_names
from optgptq.formats.tensors import (
    SCALE_DTYPES,
    affine_stored_bits,
    columns_per_group,
    exact_scales,
    groups_per_row,
    require_affine,
    require_bits,
    require_fits,
    require_tensor,
)
from optgptq.layout import LinearLayout
from optgptq.packing.words import pack_rows, unpack_rows, words_per_row
from optgptq.quantized_weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    """The layout `pack-quantized`: the words of GPTQ, transposed."""

    name: str = "compressed-tensors"
    smallest_zero_point: int = 0
    stores_symmetric_zero_points: bool = False
    holds_binary_codes: bool = False
    suffixes: tuple[str, ...] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    def scale_dtype(self, dense_dtype: torch.dtype) -> torch.dtype:
        # No reader takes scales in float64.
        return torch.float32 if dense_dtype == torch.float64 else dense_dtype

    def check(self, layouts: Sequence[LinearLayout], *, scale_dtype: torch.dtype) -> tuple[str, ...]:
        return check_compressed_tensors(layouts)

    def entries(self, layout: LinearLayout, *, dense_dtype: torch.dtype) -> tuple[TensorEntry, ...]:
        bits, groups = require_bits(layout), groups_per_row(layout)
        rows, columns, name = layout.out_features, layout.in_features, layout.name
        entries = [
            TensorEntry(f"{name}.weight_packed", torch.int32, (rows, words_per_row(columns, bits))),
            TensorEntry(f"{name}.weight_scale", self.scale_dtype(dense_dtype), (rows, groups)),
            TensorEntry(f"{name}.weight_shape", torch.int64, (2,)),
        ]
        if not layout.symmetric:
            words = words_per_row(rows, bits)
            entries.append(TensorEntry(f"{name}.weight_zero_point", torch.int32, (words, groups)))
        return tuple(entries)

    def encode(self, layout: LinearLayout, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        bits, name = require_bits(layout), layout.name
        affine = require_affine(layout, weight)
        require_fits(layout, affine, zero_points=range(2**bits))
        tensors = {
            f"{name}.weight_packed": pack_rows(affine.codes_OI, bits),
            f"{name}.weight_scale": exact_scales(affine.scale_OG, affine.scale_OG.dtype, where=name),
            f"{name}.weight_shape": torch.tensor([layout.out_features, layout.in_features]),
        }
        if not layout.symmetric:
            words_GW = pack_rows(affine.zero_point_OG.t().contiguous(), bits)
            tensors[f"{name}.weight_zero_point"] = words_GW.t().contiguous()
        return tensors

    def quantization_config(self, layouts: Sequence[LinearLayout]) -> dict[str, Any]:
        return compressed_tensors_config(layouts)

    def extra_files(self, layouts: Sequence[LinearLayout]) -> dict[str, dict[str, Any]]:
        return {}

    def read_layouts(self, folder: CheckpointFolder) -> tuple[LinearLayout, ...]:
        config = read_compressed_tensors_config(folder)
        names = [name.removesuffix(".weight_packed") for name in folder.tensors if name.endswith(".weight_packed")]
        if not names:
            raise FormatError(
                str(folder.path),
                expected="tensors named *.weight_packed, as quantization_config says",
                found="none",
                action="Remove quantization_config from config.json if the weights are dense.",
            )
        return with_engine_names(folder, [_read_layout(folder, config, name) for name in names])

    def decode(self, folder: TensorSource, layout: LinearLayout) -> AffineWeight:
        bits, name = require_bits(layout), layout.name
        return AffineWeight(
            codes_OI=_unpack(folder.read(f"{name}.weight_packed"), bits, layout.in_features),
            scale_OG=folder.read(f"{name}.weight_scale"),
            zero_point_OG=_read_zero_points(folder, layout),
            bits=bits,
            group_size=columns_per_group(layout),
            symmetric=layout.symmetric,
            group_index_I=_read_group_index(folder, layout),
        )

    def stored_bits(self, layout: LinearLayout, tensors: Sequence[TensorInfo]) -> int:
        return affine_stored_bits(layout, tensors, symmetric_zero_points=self.stores_symmetric_zero_points)

    def notes(self, folder: CheckpointFolder, layout: LinearLayout) -> tuple[str, ...]:
        bits = require_bits(layout)
        notes = []
        words = folder.info(f"{layout.name}.weight_packed").shape[1]
        if words != words_per_row(layout.in_features, bits):
            notes.append("its codes are packed as compressed-tensors did before 0.18, with unused bits in every word")
        if _read_group_index(folder, layout) is not None:
            notes.append("its columns are assigned to groups by an act-order g_idx")
        return tuple(notes)


def _read_layout(folder: CheckpointFolder, config: CompressedTensorsConfig, name: str) -> LinearLayout:
    """Return the layout of one linear, with the shapes of all its tensors checked."""
    scheme = config.scheme_for(name)
    require_tensor(folder, f"{name}.weight_shape", dtypes=("I64", "I32"), shape=(2,))
    rows, columns = folder.read(f"{name}.weight_shape").tolist()
    layout = LinearLayout(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=scheme.bits,
        group_size=scheme.group_size if scheme.group_size <= columns else -1,
        symmetric=scheme.symmetric,
    )
    packed = require_tensor(folder, f"{name}.weight_packed", dtypes=("I32",))
    widths = {words_per_row(columns, scheme.bits), _old_words(columns, scheme.bits)} if columns > 0 else set()
    if len(packed.shape) != 2 or packed.shape[0] != rows or packed.shape[1] not in widths or rows < 1:
        raise FormatError(
            f"{folder.path}, tensor {packed.name}",
            expected=f"[{rows}, {' or '.join(map(str, sorted(widths)))}] for {columns} columns of {scheme.bits} bits",
            found=str(list(packed.shape)),
            action="Check quantization_config and weight_shape: they contradict the stored words.",
        )
    require_tensor(folder, f"{name}.weight_scale", dtypes=SCALE_DTYPES, shape=(rows, groups_per_row(layout)))
    return layout


def _read_zero_points(folder: TensorSource, layout: LinearLayout) -> torch.Tensor:
    """Return the zero points in code units, int32 `[O, G]`. Old files store them unpacked and signed, int8 `[O, G]`."""
    bits, rows, groups = require_bits(layout), layout.out_features, groups_per_row(layout)
    middle = 2 ** (bits - 1)
    if layout.symmetric:
        return torch.full((rows, groups), middle, dtype=torch.int32)
    name = f"{layout.name}.weight_zero_point"
    info = require_tensor(folder, name, dtypes=("I32", "I8"))
    if info.dtype == "I8":
        require_tensor(folder, name, dtypes=("I8",), shape=(rows, groups))
        signed_OG = folder.read(name).to(torch.int32)
        return signed_OG.add(middle)
    if info.shape not in {(words_per_row(rows, bits), groups), (_old_words(rows, bits), groups)}:
        require_tensor(folder, name, dtypes=("I32",), shape=(words_per_row(rows, bits), groups))
    words_GW = folder.read(name).t().contiguous()
    return _unpack(words_GW, bits, rows).to(torch.int32).t().contiguous()


def _read_group_index(folder: TensorSource, layout: LinearLayout) -> torch.Tensor | None:
    """Return the group of each column, int32 `[I]`; None when absent, unused (all -1) or trivial."""
    name = f"{layout.name}.weight_g_idx"
    if name not in folder.tensors:
        return None
    require_tensor(folder, name, dtypes=("I32", "I64"), shape=(layout.in_features,))
    index_I = folder.read(name).to(torch.int32)
    trivial_I = torch.arange(layout.in_features, dtype=torch.int32) // columns_per_group(layout)
    if bool((index_I == -1).all()) or torch.equal(index_I, trivial_I):
        return None
    groups = groups_per_row(layout)
    if bool((index_I < 0).any()) or bool((index_I >= groups).any()):
        raise FormatError(
            f"{folder.path}, tensor {name}",
            expected=f"groups from 0 to {groups - 1}",
            found=f"{int(index_I.min())} to {int(index_I.max())}",
            action="Get the checkpoint again: this file is damaged.",
        )
    return index_I


def _old_words(count: int, bits: int) -> int:
    """Words that `count` codes took before 0.18, when no code crossed a word."""
    return -(-count // (32 // bits))


def _unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes, uint8 `[rows, count]`, from words in either packing, told apart by their number."""
    if words.shape[1] == words_per_row(count, bits):
        return unpack_rows(words, bits, count)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: torch.Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return codes.reshape(words.shape[0], -1)[:, :count].to(torch.uint8)


COMPRESSED_TENSORS = CompressedTensorsFormat()
