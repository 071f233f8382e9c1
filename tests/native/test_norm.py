"""The RMS norm of the native library against float64 and against torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.models.norm import Norm
from optgptq.models.spec import NormSpec
from optgptq.native.library import load_library
from optgptq.native.norm import norms_rows, rms_norm

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")


@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 1), (2, 16), (130, 128), (5, 400, 1100)])
def test_every_number_is_the_nearest_or_its_neighbour(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16()
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).bfloat16()
    exact = F.rms_norm(x.double(), (shape[-1],), weight.double(), 1e-5)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-8, atol=1e-30)
    assert float((found != exact.bfloat16()).double().mean()) < 1e-3


def test_threads_change_no_bit() -> None:
    x = torch.randn(64, 100_003, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.ones(100_003, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(3, 40, dtype=torch.bfloat16)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = rms_norm(x, torch.ones(40, dtype=torch.bfloat16), 1e-6)
    assert bool(found[0].isnan().all())
    assert bool(found[1, 3].isnan())
    assert bool(found[2].isfinite().all())


def test_only_what_fits_is_taken() -> None:
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    assert norms_rows(x, weight)
    assert not norms_rows(x, None)
    assert not norms_rows(x.float(), weight)
    assert not norms_rows(x.T.contiguous().T, weight)
    assert not norms_rows(x, weight.requires_grad_())


def test_the_norm_of_a_model_uses_it() -> None:
    x = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight = torch.full((64,), 1.5, dtype=torch.bfloat16)
    norm = Norm(NormSpec(kind="rms", eps=1e-5), 64, weight, None)
    assert torch.equal(norm(x), rms_norm(x, weight, 1e-5))
