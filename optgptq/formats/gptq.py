"""GPTQ checkpoints, versions 1 and 2: written, and read with act-order `g_idx` and wrong labels.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `W` 32-bit words.
Byte-level page: docs/formats/gptq.md.
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
from optgptq.formats.consumers import check_gptq
from optgptq.formats.gptq_config import QUANTIZE_CONFIG_FILE, GptqConfig, gptq_config, read_gptq_config
from optgptq.formats.gptq_zero_points import ZeroPoints, load_zero_points, store_zero_points
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
class GptqFormat:
    """One version of the GPTQ layout.

    Attributes:
        name: `gptq` or `gptq_v2`, also the label in the file.
        version: 1 stores zero points minus one, 2 stores them as they are.
    """

    name: str
    version: int
    stores_symmetric_zero_points: bool = True
    holds_binary_codes: bool = False
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def smallest_zero_point(self) -> int:
        return 1 if self.version == 1 else 0

    def scale_dtype(self, dense_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def check(self, layouts: Sequence[LinearLayout], *, scale_dtype: torch.dtype) -> tuple[str, ...]:
        return check_gptq(layouts, version=self.version, scale_dtype=scale_dtype)

    def entries(self, layout: LinearLayout, *, dense_dtype: torch.dtype) -> tuple[TensorEntry, ...]:
        bits, groups = require_bits(layout), groups_per_row(layout)
        rows, columns, name = layout.out_features, layout.in_features, layout.name
        return (
            TensorEntry(f"{name}.g_idx", torch.int32, (columns,)),
            TensorEntry(f"{name}.qweight", torch.int32, (words_per_row(columns, bits), rows)),
            TensorEntry(f"{name}.qzeros", torch.int32, (groups, words_per_row(rows, bits))),
            TensorEntry(f"{name}.scales", self.scale_dtype(dense_dtype), (groups, rows)),
        )

    def encode(self, layout: LinearLayout, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        bits, name = require_bits(layout), layout.name
        affine = require_affine(layout, weight)
        require_fits(layout, affine, zero_points=range(self.smallest_zero_point, 2**bits))
        scale_OG = exact_scales(affine.scale_OG, torch.float16, where=name)
        index_I = torch.arange(layout.in_features, dtype=torch.int32) // columns_per_group(layout)
        zero_point_GO = affine.zero_point_OG.t().contiguous()
        return {
            f"{name}.g_idx": index_I,
            f"{name}.qweight": pack_rows(affine.codes_OI, bits).t().contiguous(),
            f"{name}.qzeros": store_zero_points(zero_point_GO, bits, version=self.version),
            f"{name}.scales": scale_OG.t().contiguous(),
        }

    def quantization_config(self, layouts: Sequence[LinearLayout]) -> dict[str, Any]:
        return gptq_config(layouts, label=self.name)

    def extra_files(self, layouts: Sequence[LinearLayout]) -> dict[str, dict[str, Any]]:
        return {QUANTIZE_CONFIG_FILE: self.quantization_config(layouts)}

    def read_layouts(self, folder: CheckpointFolder) -> tuple[LinearLayout, ...]:
        config = read_gptq_config(folder)
        names = [name.removesuffix(".qweight") for name in folder.tensors if name.endswith(".qweight")]
        if not names:
            raise FormatError(
                str(folder.path),
                expected="tensors named *.qweight, as quantization_config says",
                found="none",
                action="Remove quantization_config from config.json if the weights are dense.",
            )
        return with_engine_names(folder, [_read_layout(folder, config, name) for name in names])

    def decode(self, folder: TensorSource, layout: LinearLayout) -> AffineWeight:
        bits = require_bits(layout)
        zero_points = self._zero_points(folder, layout)
        middle = 2 ** (bits - 1)
        words_OW = folder.read(f"{layout.name}.qweight").t().contiguous()
        return AffineWeight(
            codes_OI=unpack_rows(words_OW, bits, layout.in_features),
            scale_OG=folder.read(f"{layout.name}.scales").t().contiguous(),
            zero_point_OG=zero_points.zero_point_GO.t().contiguous(),
            bits=bits,
            group_size=columns_per_group(layout),
            symmetric=layout.symmetric and bool((zero_points.zero_point_GO == middle).all()),
            group_index_I=_read_group_index(folder, layout),
        )

    def stored_bits(self, layout: LinearLayout, tensors: Sequence[TensorInfo]) -> int:
        return affine_stored_bits(layout, tensors, symmetric_zero_points=self.stores_symmetric_zero_points)

    def notes(self, folder: CheckpointFolder, layout: LinearLayout) -> tuple[str, ...]:
        zero_points = self._zero_points(folder, layout)
        notes = list(zero_points.notes)
        if layout.symmetric and not bool((zero_points.zero_point_GO == 2 ** (require_bits(layout) - 1)).all()):
            notes.append("the configuration says symmetric, but the zero points vary; they are read as stored")
        if _read_group_index(folder, layout) is not None:
            notes.append("its columns are assigned to groups by an act-order g_idx")
        return tuple(notes)

    def _zero_points(self, folder: TensorSource, layout: LinearLayout) -> ZeroPoints:
        return load_zero_points(
            folder.read(f"{layout.name}.qzeros"),
            require_bits(layout),
            layout.out_features,
            version=self.version,
            symmetric=layout.symmetric,
        )


def _read_layout(folder: CheckpointFolder, config: GptqConfig, name: str) -> LinearLayout:
    """Return the layout of one linear, with the shapes of all its tensors checked."""
    settings = config.settings_for(name)
    scales = require_tensor(folder, f"{name}.scales", dtypes=SCALE_DTYPES)
    words = require_tensor(folder, f"{name}.qweight", dtypes=("I32",))
    rows = scales.shape[-1] if scales.shape else 0
    columns = words.shape[0] * 32 // settings.bits if words.shape else 0
    if f"{name}.g_idx" in folder.tensors:
        columns = require_tensor(folder, f"{name}.g_idx", dtypes=("I32",)).shape[0]
    layout = LinearLayout(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=settings.bits,
        group_size=settings.group_size if settings.group_size <= columns else -1,
        symmetric=settings.symmetric,
    )
    groups = groups_per_row(layout) if columns else 0
    require_tensor(folder, f"{name}.scales", dtypes=SCALE_DTYPES, shape=(groups, rows))
    require_tensor(folder, f"{name}.qweight", dtypes=("I32",), shape=(words_per_row(columns, settings.bits), rows))
    require_tensor(folder, f"{name}.qzeros", dtypes=("I32",), shape=(groups, words_per_row(rows, settings.bits)))
    return layout


def _read_group_index(folder: TensorSource, layout: LinearLayout) -> torch.Tensor | None:
    """Return the group of each column, int32 `[I]`; None when there is no `g_idx` or it only says `i // group_size`."""
    name = f"{layout.name}.g_idx"
    if name not in folder.tensors:
        return None
    index_I = folder.read(name)
    if torch.equal(index_I, torch.arange(layout.in_features, dtype=torch.int32) // columns_per_group(layout)):
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


GPTQ_V1 = GptqFormat("gptq", 1)
GPTQ_V2 = GptqFormat("gptq_v2", 2)
