"""Second moments of the inputs of a linear: plain sums, so that halves of the calibration set merge by adding.

Shapes: `B` windows, `S` positions, `T` tokens, `I` input columns, `X` columns of another matrix of the same tokens.
"""

from __future__ import annotations

import torch

from optgptq.native.moment import add_moment, add_products, adds_moment, adds_products
from optgptq.numerics import exact_float32_products

# Only blocks on and above the diagonal are multiplied: with n blocks (n + 1) / 2n of the work.
_NUM_BLOCKS = 8
_SMALLEST_BLOCK = 128
_TOKENS_PER_CHUNK = 8192


class InputMoment:
    """Sum of `x x^T` over tokens.

    The accumulator is float32 or float64 whatever the activations are, and so are the products.
    """

    def __init__(self, in_features: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.num_tokens = 0

    def add(self, inputs: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add the tokens of `inputs` `[B, S, I]` or `[T, I]`; `valid` (bool, its leading shape) leaves out padding."""
        inputs_TI = inputs[valid] if valid is not None else inputs.reshape(-1, inputs.shape[-1])
        for chunk_TI in torch.split(inputs_TI, _TOKENS_PER_CHUNK):
            self._add_chunk(chunk_TI)
        self.num_tokens += inputs_TI.shape[0]

    def merge(self, other: InputMoment) -> None:
        """Add what another part of the calibration set measured."""
        self.sum_II += other.sum_II.to(self.sum_II.device)
        self.num_tokens += other.num_tokens

    def mean(self) -> torch.Tensor:
        """Return the symmetric mean `[I, I]` over all tokens."""
        upper_II = self.sum_II.triu()
        full_II = upper_II + upper_II.triu(1).T
        return full_II.div_(max(self.num_tokens, 1))

    def take_mean(self) -> torch.Tensor:
        """Return `mean()` and drop the sum, which takes gigabytes for wide inputs; nothing can be added any more."""
        mean_II = self.mean()
        self.sum_II = self.sum_II.new_empty(0, 0)
        return mean_II

    def is_finite(self) -> bool:
        """False as soon as one added activation was not finite, or its square overflowed."""
        return bool(torch.isfinite(self.sum_II.diagonal()).all())

    def _add_chunk(self, chunk_TI: torch.Tensor) -> None:
        if adds_moment(chunk_TI, self.sum_II):
            add_moment(chunk_TI, self.sum_II)
            return
        values_TI = chunk_TI.to(self.sum_II.dtype)
        num_columns = values_TI.shape[1]
        block = max(_SMALLEST_BLOCK, -(-num_columns // _NUM_BLOCKS))
        with exact_float32_products():
            for begin in range(0, num_columns, block):
                rows_TC = values_TI[:, begin : begin + block]
                self.sum_II[begin : begin + block, begin:].addmm_(rows_TC.T, values_TI[:, begin:])


def add_sum(left_TX: torch.Tensor, right_TI: torch.Tensor, sum_XI: torch.Tensor) -> None:
    """Add `left^T right`, the sum over tokens, in the dtype of the sum, which is changed in place."""
    if adds_products(left_TX, right_TI, sum_XI):
        add_products(left_TX, right_TI, sum_XI)
        return
    dtype = sum_XI.dtype
    with exact_float32_products():
        for begin in range(0, len(left_TX), _TOKENS_PER_CHUNK):
            chunk = slice(begin, begin + _TOKENS_PER_CHUNK)
            sum_XI.addmm_(left_TX[chunk].to(dtype).T, right_TI[chunk].to(dtype))
