"""Codes of new tokens written into pages by triton. Importing this module imports triton.

Shapes: `T` tokens of a step, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

import torch

from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kernels.triton_attention import padded_head_dim
from optgptq.kernels.triton_codes_source import CodeSide, PageShape
from optgptq.kernels.triton_store_codes_source import store_groups_of_side, store_tokens_of_side
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.fitting import NUM_REFITS
from optgptq.kv_cache.page_planes import Side

# Tokens of a program. A fitted code waits for those of all channels before it: fewer tokens, more programs.
ROUNDED_TOGETHER, FITTED_TOGETHER = 16, 2
# Products and sums stay apart: codes are those of torch.
ROUNDED_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
FITTED_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def num_parts(side: CodeSide) -> int:
    """Return the parts of a row of codes that no byte has two codes of."""
    if side.bits == 0:
        return 1
    return 8 if side.bits == 3 else 8 // side.bits


def group_warps(num_numbers: int) -> int:
    """Return the warps for a group of tokens of one head: 32 numbers for each thread, as far as there are threads."""
    return min(max(num_numbers // 1024, 4), 16)


def store_side(
    x_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    *,
    side: Side,
    shape: PageShape,
    constants: CodeSide,
) -> None:
    """Write keys, or values, of new tokens into pages of codes; those of a token one after the other."""
    codec = storage.key_codec if side == "keys" else storage.value_codec
    with torch.cuda.device(x_TKD.get_device()):
        if constants.by_token:
            assert codec is not None
            _store_groups(x_TKD, storage, batch, codec, side=side, shape=shape, constants=constants)
        else:
            _store_tokens(x_TKD, storage, batch, codec, shape=shape, constants=constants)


def _store_tokens(
    x_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    codec: SideCodec | None,
    *,
    shape: PageShape,
    constants: CodeSide,
) -> None:
    num_tokens, num_kv_heads, head_dim = x_TKD.shape
    is_fitted = codec is not None and codec.metric_KDD is not None
    together = FITTED_TOGETHER if is_fitted else ROUNDED_TOGETHER
    num_ranges = 1 if codec is None else len(codec.ranges_C2)
    store_tokens_of_side[(-(-num_tokens // together), num_kv_heads)](
        x_TKD,
        storage.pages_ZB,
        storage.pages_ZB.view(torch.int32),
        storage.pages_ZB.view(x_TKD.dtype),
        batch.pages.slot_T,
        None if codec is None else codec.ranges_C2,
        None if codec is None else codec.metric_KDD,
        None if codec is None else codec.feedback_KDD,
        num_tokens,
        num_ranges,
        x_TKD.stride(0),
        SHAPE=shape,
        SIDE=constants,
        PARTS=num_parts(constants),
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_T=together,
        SEARCHED=num_ranges > 1,
        REFITS=NUM_REFITS,
        **(FITTED_OPTIONS if is_fitted else ROUNDED_OPTIONS),
    )


def _store_groups(
    x_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    codec: SideCodec,
    *,
    side: Side,
    shape: PageShape,
    constants: CodeSide,
) -> None:
    num_tokens, num_kv_heads, head_dim = x_TKD.shape
    pages, exact = batch.pages, batch.exact
    block_d, block_t = padded_head_dim(head_dim), 1 << (constants.group_size - 1).bit_length()
    kept = storage.exact_keys_ZKDY if side == "keys" else storage.exact_values_ZKYD
    store_groups_of_side[(num_tokens, num_kv_heads)](
        x_TKD,
        None if exact is None else kept,
        None if exact is None else exact.page_table_RP,
        storage.pages_ZB,
        storage.pages_ZB.view(torch.int32),
        pages.slot_T,
        pages.query_start_R1,
        pages.context_R,
        codec.ranges_C2,
        pages.context_R.shape[0],
        len(codec.ranges_C2),
        x_TKD.stride(0),
        0 if exact is None else exact.page_table_RP.shape[1],
        SHAPE=shape,
        SIDE=constants,
        PARTS=num_parts(constants),
        BLOCK_D=block_d,
        BLOCK_T=block_t,
        SEARCHED=len(codec.ranges_C2) > 1,
        TRANSPOSED=side == "keys",
        **ROUNDED_OPTIONS | {"num_warps": group_warps(block_d * block_t)},
    )
