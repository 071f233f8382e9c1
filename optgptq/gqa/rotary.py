"""Maps of rotated heads: rotary embeddings commute with one complex factor per frequency plane and with nothing more.

Feature `p` and feature `p + half` of a head are the real and imaginary part of one number, which position `j` turns by
`exp(i j f_p)`; no two planes turn alike. So a shared key is, plane by plane, a complex combination of the group's
keys, and each head gets it back by a complex factor: rank one instead of rank `D`, with the same solution. Features
behind the rotated ones do not turn; they share a subspace as heads without rotation do.

Shapes: `K` heads of the group, `D` features of a head, `P` planes. Real tensors are float64.
"""

from __future__ import annotations

import torch

from optgptq.gqa.subspace import SharedSubspace, shared_subspace


def shared_rotary_key(weights_KDD: torch.Tensor, moment_KDKD: torch.Tensor, rotary_dim: int) -> SharedSubspace:
    """Return real maps of a whole head that commute with the rotation of its first `rotary_dim` features.

    The arguments and the result are those of `shared_subspace` with as many shared features as a head has.
    """
    num_heads, size = weights_KDD.shape[:2]
    turning, still = slice(0, rotary_dim), slice(rotary_dim, size)
    encode_DKD = weights_KDD.new_zeros(size, num_heads, size)
    decode_KDD = weights_KDD.new_zeros(num_heads, size, size)
    planes = _shared_planes(weights_KDD, moment_KDKD, rotary_dim)
    encode_DKD[turning, :, turning] = _real(torch.stack([plane.encode_RKD[0, :, 0] for plane in planes], 1)).transpose(
        0, 1
    )
    decode_KDD[:, turning, turning] = _real(torch.stack([plane.decode_KDR[:, 0, 0] for plane in planes], 1))
    # The real part of a product whose phases are spread evenly has half its energy.
    error, energy = sum(plane.error for plane in planes) / 2, sum(plane.energy for plane in planes) / 2
    if rotary_dim < size:
        rest = shared_subspace(weights_KDD[:, still, still], moment_KDKD[:, still, :, still], size - rotary_dim)
        encode_DKD[still, :, still], decode_KDD[:, still, still] = rest.encode_RKD, rest.decode_KDR
        error, energy = error + rest.error, energy + rest.energy
    return SharedSubspace(encode_RKD=encode_DKD, decode_KDR=decode_KDD, error=error, energy=energy)


def plane_weights(weights_KDD: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Return `[K, P]`: the weight of each plane, the sum of those of its two features."""
    weights_KD = weights_KDD.diagonal(dim1=1, dim2=2)[:, :rotary_dim]
    return weights_KD.reshape(len(weights_KDD), 2, rotary_dim // 2).sum(1)


def plane_moments(moment_KDKD: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Return `[P, K, K]` complex moments `x_h conj(x_g)` of the planes, from the real moment of all features."""
    half = rotary_dim // 2
    real, imaginary = slice(0, half), slice(half, rotary_dim)

    def part(left: slice, right: slice) -> torch.Tensor:
        return torch.diagonal(moment_KDKD[:, left, :, right], dim1=1, dim2=3).permute(2, 0, 1)

    return torch.complex(part(real, real) + part(imaginary, imaginary), part(imaginary, real) - part(real, imaginary))


def _shared_planes(weights_KDD: torch.Tensor, moment_KDKD: torch.Tensor, rotary_dim: int) -> list[SharedSubspace]:
    num_heads, half = len(weights_KDD), rotary_dim // 2
    weights_KP = plane_weights(weights_KDD, rotary_dim)
    moments_PKK = plane_moments(moment_KDKD, rotary_dim)
    return [
        shared_subspace(
            weights_KP[:, plane].reshape(num_heads, 1, 1).to(moments_PKK.dtype),
            moments_PKK[plane].reshape(num_heads, 1, num_heads, 1),
            1,
        )
        for plane in range(half)
    ]


def _real(factors_KP: torch.Tensor) -> torch.Tensor:
    """Return the real matrices `[K, 2 P, 2 P]` of the products with complex factors, plane by plane."""
    real, imaginary = torch.diag_embed(factors_KP.real), torch.diag_embed(factors_KP.imag)
    upper, lower = torch.cat([real, -imaginary], dim=2), torch.cat([imaginary, real], dim=2)
    return torch.cat([upper, lower], dim=1)
