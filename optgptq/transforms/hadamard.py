"""Orthogonal matrices: Hadamard where a construction is known, random, and random with a fixed direction.

All are float64. Random ones come from generators of their own; the global generator is not touched.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from optgptq.errors import OptGPTQError

# Sylvester parts above this size are split: x (A ⊗ B) costs two small products instead of one large one.
_LARGEST_SYLVESTER_FACTOR = 64


def hadamard(size: int) -> torch.Tensor:
    """Return a Hadamard matrix over the root of its size, `[size, size]`: orthogonal, all entries equally large.

    Raises:
        OptGPTQError: no construction is known here; ask `hadamard_factors` first.
    """
    factors = hadamard_factors(size)
    if factors is None:
        raise OptGPTQError(
            "transforms.hadamard",
            expected="a size with a Sylvester or Paley construction",
            found=str(size),
            action="Use a random orthogonal matrix for this size.",
        )
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


def hadamard_factors(size: int) -> tuple[torch.Tensor, ...] | None:
    """Return small orthogonal matrices whose Kronecker product is a Hadamard matrix of `size`, None if none is known.

    Source: Sylvester 1867 for powers of two; Paley 1933, constructions I and II, for the odd part with the fewest
    factors of two that has one. The smallest multiple of four without one is 92; 156 and 172 have none either.
    """
    odd = size // (size & -size)
    base, paley = 1, None
    if odd > 1:
        candidates = [odd << power for power in range(2, (size // odd).bit_length())]
        matrices = ((candidate, _paley(candidate)) for candidate in candidates)
        base, paley = next(((candidate, matrix) for candidate, matrix in matrices if matrix is not None), (0, None))
        if paley is None:
            return None
    factors = [] if paley is None else [_normalized(paley)]
    rest = size // base
    while rest > 1:
        part = min(rest, _LARGEST_SYLVESTER_FACTOR)
        factors.append(_normalized(_sylvester(part)))
        rest //= part
    return tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),)


def random_orthogonal(size: int, seed: int, *path: int) -> torch.Tensor:
    """Return an orthogonal matrix `[size, size]`, uniform over all of them, that `seed` and `path` decide.

    Source: Mezzadri 2006, arXiv math-ph/0609050: QR of a Gaussian matrix, made unique by a positive diagonal of R.
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=seeded_generator(seed, *path))
    orthogonal, upper = torch.linalg.qr(gaussian)
    unique: torch.Tensor = orthogonal * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return unique


def orthogonal_fixing_ones(size: int, seed: int, *path: int) -> torch.Tensor:
    """Return a random orthogonal matrix `[size, size]` that maps the vector of ones to itself, as its transpose does.

    A reflection takes the first axis to the direction of ones; between two of them the other axes are rotated.
    """
    matrix = torch.eye(size, dtype=torch.float64)
    if size == 1:
        return matrix
    matrix[1:, 1:] = random_orthogonal(size - 1, seed, *path)
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1.0
    normal /= normal.norm()
    matrix -= 2.0 * torch.outer(normal, normal @ matrix)
    return matrix - 2.0 * torch.outer(matrix @ normal, normal)


def random_signs(size: int, seed: int, *path: int) -> torch.Tensor:
    """Return `[size]` of +1 and -1 that `seed` and `path` decide."""
    bits = torch.randint(0, 2, (size,), generator=seeded_generator(seed, *path))
    return bits.to(torch.float64).mul_(2.0).sub_(1.0)


def seeded_generator(seed: int, *path: int) -> torch.Generator:
    """Return a generator whose stream is independent for every combination of `seed` and `path`."""
    # torch's CPU generator keeps 32 bits of its seed: sums and shifts of several numbers would collide.
    (state,) = np.random.SeedSequence(seed, spawn_key=path).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def _normalized(signs: torch.Tensor) -> torch.Tensor:
    size = signs.shape[0]
    # Sums of at most 2^53 ones are exact, so this is a proof for the matrix at hand.
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64)), f"no Hadamard matrix: {size}"
    return signs / math.sqrt(size)


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(block, matrix)
    return matrix


def _paley(size: int) -> torch.Tensor | None:
    """Return a matrix of +1 and -1 by construction I (`size - 1` is 3 modulo 4) or II (`size / 2 - 1` is 1), if any."""
    if (size - 1) % 4 == 3 and (character := _character_differences(size - 1)) is not None:
        bordered = _bordered(character, column_sign=-1.0)
        return bordered + torch.eye(size, dtype=torch.float64)
    if (size // 2 - 1) % 4 == 1 and (character := _character_differences(size // 2 - 1)) is not None:
        bordered = _bordered(character, column_sign=1.0)
        block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(bordered, block) + torch.kron(torch.eye(size // 2, dtype=torch.float64), diagonal)
    return None


def _bordered(character: torch.Tensor, *, column_sign: float) -> torch.Tensor:
    size = character.shape[0] + 1
    bordered = torch.zeros(size, size, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1.0, column_sign, character
    return bordered


def _character_differences(order: int) -> torch.Tensor | None:
    """Return chi(x - y) for all pairs of the field with `order` elements; None unless a prime or the square of one.

    chi is the quadratic character: 0 for 0, 1 for squares, -1 otherwise. In the field of p^2 elements a + b sqrt(g) it
    is the character of the norm a^2 - g b^2 in the field of p.
    """
    prime = math.isqrt(order) if math.isqrt(order) ** 2 == order else order
    if prime < 3 or any(prime % divisor == 0 for divisor in range(2, math.isqrt(prime) + 1)):
        return None
    legendre = torch.full((prime,), -1.0, dtype=torch.float64)
    legendre[torch.arange(prime) ** 2 % prime] = 1.0
    legendre[0] = 0.0
    difference = (torch.arange(prime)[:, None] - torch.arange(prime)) % prime
    if prime == order:
        return legendre[difference]
    non_square = int((legendre < 0).nonzero()[0])
    norm = difference[:, None, :, None] ** 2 - non_square * difference[None, :, None, :] ** 2
    return legendre[norm % prime].reshape(order, order)
