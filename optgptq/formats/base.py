"""The contract of a checkpoint format: which tensors stand for a quantized linear, and which JSON describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from optgptq.checkpoint.folder import CheckpointFolder, TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.layout import LinearLayout
from optgptq.quantized_weight import QuantizedWeight


class CheckpointFormat(Protocol):
    """Tensors `<name>.weight` are replaced by `<name>.<suffix>`; everything else in a checkpoint stays as it is."""

    @property
    def name(self) -> str:
        """Name in recipes and on the command line."""

    @property
    def smallest_zero_point(self) -> int:
        """Smallest zero point that an asymmetric weight may have."""

    @property
    def stores_symmetric_zero_points(self) -> bool:
        """Zero points take room in the file even where they are all the same."""

    @property
    def holds_binary_codes(self) -> bool:
        """It holds sums of signs (`BinaryWeight`) and not uniform grids (`AffineWeight`)."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix that a tensor of a quantized linear may have in a file of this format."""

    def scale_dtype(self, dense_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of stored scales for a model whose weights are `dense_dtype`."""

    def check(self, layouts: Sequence[LinearLayout], *, scale_dtype: torch.dtype) -> tuple[str, ...]:
        """Return warnings, in plain sentences, about who cannot load the result.

        Raises:
            TargetError: the format cannot hold it at all.
        """

    def entries(self, layout: LinearLayout, *, dense_dtype: torch.dtype) -> tuple[TensorEntry, ...]:
        """Return the tensors that replace `<name>.weight`; a bias stays as the source has it."""

    def encode(self, layout: LinearLayout, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Return the tensors of `weight` under their full names.

        Raises:
            TargetError: a scale, zero point or column order that the format cannot hold exactly, or a weight of the
                other kind.
        """

    def quantization_config(self, layouts: Sequence[LinearLayout]) -> dict[str, Any]:
        """Return the object for the key `quantization_config` of config.json; `layouts` includes the dense linears."""

    def extra_files(self, layouts: Sequence[LinearLayout]) -> dict[str, dict[str, Any]]:
        """Return further JSON files by name."""

    def read_layouts(self, folder: CheckpointFolder) -> tuple[LinearLayout, ...]:
        """Return the layout of every linear of a checkpoint in this format, dense ones included, sorted by name.

        Raises:
            FormatError: the configuration and the stored tensors contradict each other.
        """

    def decode(self, folder: TensorSource, layout: LinearLayout) -> QuantizedWeight:
        """Return one quantized weight; FormatError when its tensors are not what the layout promises."""

    def stored_bits(self, layout: LinearLayout, tensors: Sequence[TensorInfo]) -> int:
        """Return the bits that codes and grids of a linear take in its `tensors`, without the padding of words."""

    def notes(self, folder: CheckpointFolder, layout: LinearLayout) -> tuple[str, ...]:
        """Return what is odd about a linear and was dealt with, in plain sentences; empty for a clean file."""
