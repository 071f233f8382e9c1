"""Rotary positions of bfloat16 heads in one pass; torch takes five, over halves of heads.

Shapes: `B` sequences, `S` positions, `N` heads, `D` head dimension, `H` half of the rotated features.
"""

from __future__ import annotations

import ctypes

import torch

from optgptq.native.library import check_done, load_library


class _RotaryCall(ctypes.Structure):
    """`RotaryCall` of `source/rotary.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("heads", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("sequence_stride", "token_stride", "head_stride")),
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_tokens", "num_heads", "half")),
    )


def rotates_heads(heads_BSND: torch.Tensor, cosine_S1H: torch.Tensor, sine_S1H: torch.Tensor) -> bool:
    """Say whether `rotate_heads` takes these: bfloat16 on a processor, one table for all sequences, no gradient."""
    tensors = (heads_BSND, cosine_S1H, sine_S1H)
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and cosine_S1H.shape == sine_S1H.shape == (heads_BSND.shape[1], 1, cosine_S1H.shape[-1])
        and cosine_S1H.is_contiguous()
        and sine_S1H.is_contiguous()
        and heads_BSND.stride(3) == 1
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and load_library() is not None
    )


def rotate_heads(heads_BSND: torch.Tensor, cosine_S1H: torch.Tensor, sine_S1H: torch.Tensor) -> None:
    """Rotate the first `2 H` features of every head in place, with the bits of the same in torch.

    Every product and every sum is rounded to bfloat16.
    """
    library = load_library()
    assert library is not None
    num_sequences, num_tokens, num_heads, _ = heads_BSND.shape
    call = _RotaryCall(
        heads_BSND.data_ptr(),
        cosine_S1H.data_ptr(),
        sine_S1H.data_ptr(),
        *heads_BSND.stride()[:3],
        num_sequences,
        num_tokens,
        num_heads,
        cosine_S1H.shape[-1],
    )
    check_done(library.shared.optgptq_rotate_bfloat16(ctypes.byref(call), torch.get_num_threads()))
