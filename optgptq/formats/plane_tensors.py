"""What all layouts of sign planes share: reading planes, checking values, counting bits.

Shapes: `O` output rows, `I` input columns, `W` 32-bit words, `P` planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.errors import FormatError
from optgptq.formats.tensors import require_bits
from optgptq.layout import LinearLayout
from optgptq.packing.planes import num_set_padding_bits, unpack_planes


def read_codes(folder: TensorSource, name: str, layout: LinearLayout) -> torch.Tensor:
    """Return the codes of the first planes of tensor `name`, int32 `[W, >= P, O]`, as uint8 `[O, I]`.

    Raises:
        FormatError: bits beyond the last column are set.
    """
    planes_WPO = folder.read(name)[:, : require_bits(layout)]
    num_bad = num_set_padding_bits(planes_WPO, layout.in_features)
    if num_bad:
        raise FormatError(
            f"{folder.path}, tensor {name}",
            expected=f"zeros after column {layout.in_features - 1}",
            found=f"{num_bad} last words with other bits",
            action="Get the checkpoint again: this file is damaged, or its configuration belongs to another.",
        )
    return unpack_planes(planes_WPO, layout.in_features)


def require_sound(weight: BinaryWeight, place_of: Callable[[str], str]) -> BinaryWeight:
    """Return `weight`; FormatError for values that no weight has, at the place of the part that holds them."""
    for part, expected, found in weight.problems():
        raise FormatError(
            place_of(part),
            expected=expected,
            found=found,
            action="The checkpoint is damaged: get it again, or quantize the model again.",
        )
    return weight


def planes_stored_bits(layout: LinearLayout, tensors: Sequence[TensorInfo], *, planes: str) -> int:
    """Return the bits of the codes in tensor `planes`, without its padding, and of every other tensor."""
    beside = sum(tensor.num_bytes * 8 for tensor in tensors if tensor.name != planes)
    return layout.out_features * layout.in_features * require_bits(layout) + beside
