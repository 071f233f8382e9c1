"""The rotation without calibration, against the definition."""

from __future__ import annotations

import pytest
import torch

from optgptq.kv_cache.hadamard import block_hadamard, hadamard_block


@pytest.mark.parametrize(
    ("head_dim", "block"), [(1, 1), (3, 1), (2, 2), (24, 8), (64, 64), (80, 16), (96, 32), (112, 16), (128, 128)]
)
def test_blocks_are_sylvester_matrices(head_dim: int, block: int) -> None:
    assert hadamard_block(head_dim) == block
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while sylvester.shape[0] < block:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    expected_DD = torch.block_diag(*[sylvester / block**0.5] * (head_dim // block)).float()
    found_DD = block_hadamard(head_dim)
    assert found_DD.dtype == torch.float32
    assert torch.equal(found_DD, expected_DD)
    assert float((found_DD.double() @ found_DD.double().T - torch.eye(head_dim)).abs().max()) < 1e-6
