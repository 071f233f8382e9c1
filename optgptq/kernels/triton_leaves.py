"""What lies between the products of a layer, by triton: norms, rotary positions, gated activations, one launch each.

Everything is computed in float32 and rounded once: results are within a rounding or two of those of the same steps in
torch. A row depends on no other row. Importing this module imports triton.

Shapes: `T` tokens, `N` query heads, `K` key/value heads, `D` head dimension, `R` rotated features, `I` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from optgptq.kernels.triton_leaves_source import gated_rows, norm_rows, rotate_query_and_key

# Named because its default changes between versions of triton.
OPTIONS = {"enable_fp_fusion": True}
# Numbers that a program of the norm has at least, and what each of its warps takes.
NORM_NUMBERS = 1024
NUMBERS_PER_WARP = 512
ROTATED_HEADS = 8
GATED_COLUMNS = 1024

# Names of configs to the kernel's.
GATED_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
    }
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in the dtype of `x`.

    Args:
        x: `[..., I]`.
        weight: `[I]` of any float dtype, or None.
        eps: added to the mean.
        residual: contiguous, in the shape of `x`. It becomes the rounded sum of both, and the sum is what is normed.
    """
    size = x.shape[-1]
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return output
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    rows = _rows(x)
    block, num_rows, num_warps = norm_sizes(size)
    with torch.cuda.device(x.get_device()):
        norm_rows[(-(-rows.shape[0] // num_rows),)](
            rows,
            weight,
            residual,
            output,
            rows.shape[0],
            rows.stride(0),
            eps,
            SIZE=size,
            BLOCK=block,
            ROWS=num_rows,
            num_warps=num_warps,
            **OPTIONS,
        )
    return output


def norm_sizes(size: int) -> tuple[int, int, int]:
    """Return for rows of `size` numbers: numbers of a block, rows of a program, its warps."""
    block = 1 << max(size - 1, 0).bit_length()
    num_rows = max(1, NORM_NUMBERS // block)
    return block, num_rows, min(16, max(1, block * num_rows // NUMBERS_PER_WARP))


def rotate_in_place(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Rotate the leading `R` features of every head in the half-split layout; both tensors are overwritten.

    Args:
        query: `[..., N, D]`; heads of a token follow each other, tokens may be apart.
        key: `[..., K, D]`, likewise.
        cosine: `[T, R / 2]`, or `[T, 1, R / 2]`, for the tokens in order.
        sine: likewise.
    """
    query_TND, key_TKD = _tokens(query), _tokens(key)
    num_tokens, num_heads, head_dim = query_TND.shape
    if num_tokens == 0:
        return
    cosine_TR, sine_TR = (table.reshape(num_tokens, -1).contiguous() for table in (cosine, sine))
    half = cosine_TR.shape[1]
    blocks = -(-num_heads // ROTATED_HEADS) - (-key_TKD.shape[1] // ROTATED_HEADS)
    with torch.cuda.device(query.get_device()):
        rotate_query_and_key[(num_tokens, blocks)](
            query_TND,
            key_TKD,
            cosine_TR,
            sine_TR,
            query_TND.stride(0),
            key_TKD.stride(0),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=key_TKD.shape[1],
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_HALF=1 << (half - 1).bit_length(),
            BLOCK_H=ROTATED_HEADS,
            num_warps=1,
            **OPTIONS,
        )


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the activation of `gate` times `up`, `[..., I]`; `kind` is one of `GATED_KINDS`.

    The two may be halves of one joint projection.
    """
    size = gate.shape[-1]
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return output
    gates, ups = _rows(gate), _rows(up)
    with torch.cuda.device(gate.get_device()):
        gated_rows[(gates.shape[0], -(-size // GATED_COLUMNS))](
            gates,
            ups,
            output,
            gates.shape[0],
            gates.stride(0),
            ups.stride(0),
            SIZE=size,
            BLOCK=GATED_COLUMNS,
            KIND=GATED_KINDS[kind],
            num_warps=4,
            **OPTIONS,
        )
    return output


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return `[rows, I]` with neighbouring columns, a view where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _tokens(heads: torch.Tensor) -> torch.Tensor:
    """Return a view `[T, N, D]`."""
    num_heads, head_dim = heads.shape[-2:]
    heads_TND = heads.view(-1, num_heads, head_dim)
    assert heads_TND.stride(2) == 1
    assert num_heads == 1 or heads_TND.stride(1) == head_dim
    return heads_TND
