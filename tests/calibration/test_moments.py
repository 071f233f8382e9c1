"""Sums of second moments: additive, exact, and without a trace in the settings of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.backends import mkldnn

from optgptq.calibration.moments import InputMoment, add_sum

MKLDNN_MATMUL: Any = mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture
def torch_precisions() -> Iterator[None]:
    """Put the settings of torch back, whatever a test does to them."""
    cpu, cuda = MKLDNN_MATMUL, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    yield
    cpu.fp32_precision, cuda.fp32_precision = before


def inputs(num_tokens: int, num_columns: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_columns, generator=generator).to(dtype)


def moment_of(*parts: torch.Tensor, dtype: torch.dtype = torch.float64) -> InputMoment:
    moment = InputMoment(parts[0].shape[-1], dtype=dtype)
    for part in parts:
        moment.add(part)
    return moment


@pytest.mark.parametrize("num_columns", [1, 7, 127, 128, 129, 301, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_above_the_diagonal_give_the_whole_product(num_columns: int, dtype: torch.dtype) -> None:
    inputs_TI = inputs(37, num_columns)
    expected_II = inputs_TI.double().T @ inputs_TI.double() / 37
    mean_II = moment_of(inputs_TI, dtype=dtype).mean()
    assert mean_II.dtype == dtype
    assert torch.equal(mean_II, mean_II.T)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert float((mean_II - expected_II).norm() / expected_II.norm()) < tolerance


@pytest.mark.parametrize("num_columns", [64, 129])
def test_bfloat16_inputs_lose_nothing_in_a_float32_sum(num_columns: int) -> None:
    inputs_TI = inputs(5000, num_columns, dtype=torch.bfloat16)
    expected_II = moment_of(inputs_TI).mean()
    mean_II = moment_of(inputs_TI, dtype=torch.float32).mean()
    assert mean_II.dtype == torch.float32
    assert float((mean_II - expected_II).norm() / expected_II.norm()) < 1e-6


def test_float32_inputs_keep_their_digits() -> None:
    inputs_TI = inputs(3000, 96) * (1 + 1e-3)
    expected_II = moment_of(inputs_TI).mean()
    mean_II = moment_of(inputs_TI, dtype=torch.float32).mean()
    # Products in bfloat16 or TF32 would be wrong by 1e-3.
    assert float((mean_II - expected_II).norm() / expected_II.norm()) < 1e-6


def test_halves_merge_by_a_sum() -> None:
    inputs_TI = inputs(90, 33)
    whole, first, second = moment_of(inputs_TI), moment_of(inputs_TI[:31]), moment_of(inputs_TI[31:])
    first.merge(second)
    assert first.num_tokens == whole.num_tokens == 90
    torch.testing.assert_close(first.sum_II, whole.sum_II, rtol=1e-13, atol=1e-12)
    assert second.num_tokens == 59


def test_chunks_of_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_TI = inputs(100, 20)
    whole = moment_of(inputs_TI)
    monkeypatch.setattr("optgptq.calibration.moments._TOKENS_PER_CHUNK", 7)
    torch.testing.assert_close(moment_of(inputs_TI).mean(), whole.mean(), rtol=1e-13, atol=1e-14)


def test_padding_is_the_same_as_removed_tokens() -> None:
    inputs_BSI = inputs(24, 9).reshape(4, 6, 9)
    valid_BS = torch.arange(6) < torch.tensor([6, 2, 0, 5])[:, None]
    padded = InputMoment(9, dtype=torch.float64)
    poisoned_BSI = inputs_BSI.masked_fill(~valid_BS[..., None], float("nan"))
    padded.add(poisoned_BSI, valid_BS)
    assert padded.num_tokens == 13
    assert padded.is_finite()
    assert torch.equal(padded.mean(), moment_of(inputs_BSI[valid_BS]).mean())


def test_a_batch_of_nothing_but_padding_adds_nothing() -> None:
    moment = InputMoment(5, dtype=torch.float32)
    moment.add(inputs(6, 5).reshape(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool))
    assert moment.num_tokens == 0
    assert torch.equal(moment.mean(), torch.zeros(5, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite_are_noticed(value: float) -> None:
    inputs_TI = inputs(4, 6)
    inputs_TI[2, 3] = value
    assert not moment_of(inputs_TI, dtype=torch.float32).is_finite()
    assert moment_of(inputs(4, 6), dtype=torch.float32).is_finite()


@pytest.mark.usefixtures("torch_precisions")
@pytest.mark.parametrize("setting", ["ieee", "bf16", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_of_torch_are_put_back(setting: str, dtype: torch.dtype) -> None:
    cpu, cuda = MKLDNN_MATMUL, torch.backends.cuda.matmul
    cpu.fp32_precision = setting
    before = cpu.fp32_precision, cuda.fp32_precision
    moment = InputMoment(8, dtype=torch.float32)
    moment.add(inputs(4, 8, dtype=dtype))
    assert (cpu.fp32_precision, cuda.fp32_precision) == before
    with pytest.raises(RuntimeError):
        moment.add(inputs(4, 9, dtype=dtype))
    assert (cpu.fp32_precision, cuda.fp32_precision) == before


@pytest.mark.usefixtures("torch_precisions")
def test_a_setting_of_the_caller_does_not_reach_float32_products() -> None:
    MKLDNN_MATMUL.fp32_precision = "bf16"
    inputs_TI = inputs(500, 96)
    expected_II = moment_of(inputs_TI).mean()
    mean_II = moment_of(inputs_TI, dtype=torch.float32).mean()
    assert float((mean_II - expected_II).norm() / expected_II.norm()) < 1e-6


@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_two_matrices_are_those_of_float64(dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left_TX, right_TI = (torch.randn(8200, columns, generator=generator).to(dtype) for columns in (5, 7))
    sum_XI = torch.ones(5, 7, dtype=sum_dtype)
    add_sum(left_TX, right_TI, sum_XI)
    expected_XI = left_TX.double().T @ right_TI.double() + 1
    torch.testing.assert_close(sum_XI.double(), expected_XI, rtol=1e-5, atol=1e-3)


def test_the_mean_that_is_taken_is_the_mean_and_the_sum_is_gone() -> None:
    inputs_TI = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    moments = [InputMoment(5, dtype=torch.float32) for _ in range(2)]
    for moment in moments:
        moment.add(inputs_TI)
    assert torch.equal(moments[0].take_mean(), moments[1].mean())
    assert (moments[0].sum_II.numel(), moments[0].num_tokens) == (0, 9)
