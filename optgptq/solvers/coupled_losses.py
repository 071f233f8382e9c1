"""Losses of coupled rows, by the Gram matrix of each head's errors under the input moment.

`S = X H X^T` `[D, D]` holds both losses of a head: its diagonal is what each row loses by itself, and
`tr(B X H X^T) = sum(B * S)` is what the head loses. As in `optgptq.solvers.losses`, `X H X^T` is taken by the factor of
the damped moment, `(X P)(X P)^T - X diag(added) X^T`.

Shapes: `I` columns and `D` rows in the walk's order, `N` heads, `C` columns of one
product, `R = D * N`. Sums are in float64.
"""

from __future__ import annotations

import torch

_COLUMNS_PER_PRODUCT = 512


def gram(columns_NDC: torch.Tensor) -> torch.Tensor:
    """Return `x x^T` of each head, float64 `[N, D, D]`; products are in the dtype of the columns."""
    return (columns_NDC @ columns_NDC.transpose(1, 2)).to(torch.float64)


def factored_gram(columns_IDN: torch.Tensor, upper_II: torch.Tensor, added_I: torch.Tensor) -> torch.Tensor:
    """Return `X H X^T` of each head with the undamped moment, float64 `[N, D, D]`."""
    num_columns, head_size, num_heads = columns_IDN.shape
    damped_NDD = columns_IDN.new_zeros(num_heads, head_size, head_size, dtype=torch.float64)
    for begin in range(0, num_columns, _COLUMNS_PER_PRODUCT):
        end = begin + _COLUMNS_PER_PRODUCT
        weighted_RC = columns_IDN[:end].flatten(1).T @ upper_II[:end, begin:end]
        damped_NDD += gram(weighted_RC.view(head_size, num_heads, -1).transpose(0, 1))
    return undamped_gram(damped_NDD, columns_IDN, added_I)


def undamped_gram(damped_NDD: torch.Tensor, columns_IDN: torch.Tensor, added_I: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrices without what damping added; what the arithmetic cannot tell from zero is zero."""
    added_NDD = torch.zeros_like(damped_NDD)
    for begin in range(0, len(columns_IDN), _COLUMNS_PER_PRODUCT):
        part = slice(begin, begin + _COLUMNS_PER_PRODUCT)
        weighted_CDN = columns_IDN[part] * added_I[part, None, None].sqrt()
        added_NDD += gram(weighted_CDN.permute(2, 1, 0).contiguous())
    gram_NDD = damped_NDD - added_NDD
    size_ND = damped_NDD.diagonal(dim1=1, dim2=2).sqrt()
    smallest_NDD = 16 * torch.finfo(columns_IDN.dtype).eps * size_ND[:, :, None] * size_ND[:, None, :]
    gram_NDD = gram_NDD.where(gram_NDD.abs() > smallest_NDD, 0.0)
    gram_NDD.diagonal(dim1=1, dim2=2).clamp_(min=0)
    return gram_NDD


def row_shares(gram_NDD: torch.Tensor, output_moment_NDD: torch.Tensor) -> torch.Tensor:
    """Return each row's part of `tr(B S)`, float64 `[N, D]`."""
    return (gram_NDD * output_moment_NDD).sum(dim=2)
