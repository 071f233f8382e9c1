"""Sums over bfloat16 inputs against float64, and against float32 products of the same inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optgptq.calibration.moments import InputMoment
from optgptq.native import moment as moment_module
from optgptq.native.library import load_library
from optgptq.native.moment import add_moment, add_products, adds_moment, adds_products


@pytest.fixture(autouse=True)
def _needs_the_instruction() -> None:
    library = load_library()
    if library is None or not library.bfloat16_products:
        pytest.skip("no compiled inner loops, or a processor without AVX512_BF16")


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(num_tokens: int, num_columns: int, *, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_tokens, num_columns, generator=generator) + shift).bfloat16()


def upper_error(sum_II: torch.Tensor, inputs_TI: torch.Tensor) -> float:
    exact_II = inputs_TI.double().T @ inputs_TI.double()
    return float((sum_II.double() - exact_II).triu().norm() / exact_II.norm())


@pytest.mark.parametrize("num_columns", [1, 15, 16, 47, 48, 49, 97, 200])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 127, 130, 4099])
def test_sums_of_any_size_are_those_of_float64(num_tokens: int, num_columns: int) -> None:
    inputs_TI = inputs(num_tokens, num_columns)
    sum_II = torch.zeros(num_columns, num_columns)
    add_moment(inputs_TI, sum_II)
    assert upper_error(sum_II, inputs_TI) < 4e-7


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_errors_are_no_larger_than_those_of_float32_products(shift: float) -> None:
    inputs_TI = inputs(8192, 256, shift=shift)
    native_II, float32_II = torch.zeros(256, 256), torch.zeros(256, 256)
    add_moment(inputs_TI, native_II)
    float32_II.addmm_(inputs_TI.float().T, inputs_TI.float())
    # Both are the rounding of float32 sums, in different orders.
    assert upper_error(native_II, inputs_TI) < 2 * upper_error(float32_II, inputs_TI) + 1e-7
    assert upper_error(native_II, inputs_TI) < 4e-7


def test_sums_add_to_what_is_there_and_stay_in_their_block() -> None:
    inputs_TI = inputs(100, 60)
    around_II = torch.full((64, 70), 3.0)
    add_moment(inputs_TI, around_II[2:62, 5:65])
    inside_II = around_II[2:62, 5:65] - 3.0
    assert upper_error(inside_II, inputs_TI) < 4e-6
    outside_II = around_II.clone()
    outside_II[2:62, 5:65] = 3.0
    assert torch.equal(outside_II, torch.full((64, 70), 3.0))


def test_strided_inputs_are_read_right() -> None:
    inputs_TI = inputs(50, 90)
    expected_II, rows_II, transposed_II = torch.zeros(3, 40, 40).unbind()
    add_moment(inputs_TI[::2, 3:43].contiguous(), expected_II)
    add_moment(inputs_TI[::2, 3:43], rows_II)
    add_moment(inputs_TI[::2, 3:43].T.contiguous().T, transposed_II)
    assert torch.equal(rows_II, expected_II)
    assert torch.equal(transposed_II, expected_II)


@pytest.mark.usefixtures("threads_of_torch")
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs_TI = inputs(6000, 320)
    sums = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        sum_II = torch.zeros(320, 320)
        add_moment(inputs_TI, sum_II)
        sums.append(sum_II.triu())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize(("num_left", "num_right"), [(1, 1), (5, 97), (48, 49), (200, 33)])
@pytest.mark.parametrize("num_tokens", [1, 131, 4099])
def test_products_of_two_matrices_are_those_of_float64(num_tokens: int, num_left: int, num_right: int) -> None:
    left_TX, right_TI = inputs(num_tokens, num_left), inputs(num_tokens, num_right, seed=1)
    exact_XI = left_TX.double().T @ right_TI.double()
    around_XI = torch.full((num_left + 2, num_right + 2), 3.0)
    add_products(left_TX, right_TI, around_XI[1:-1, 1:-1])
    found_XI = around_XI.double() - 3
    size = float(left_TX.double().norm() * right_TI.double().norm())
    assert float((found_XI[1:-1, 1:-1] - exact_XI).norm()) < 1e-6 * size
    found_XI[1:-1, 1:-1] = 0
    assert float(found_XI.abs().max()) == 0


def test_products_of_views_of_one_matrix_are_whole() -> None:
    inputs_TI, sum_XI = inputs(100, 60), torch.zeros(20, 60)
    add_products(inputs_TI[:, :20], inputs_TI, sum_XI)
    torch.testing.assert_close(sum_XI, inputs_TI[:, :20].float().T @ inputs_TI.float(), rtol=1e-5, atol=1e-4)
    assert adds_products(inputs_TI[:, :20], inputs_TI, sum_XI)
    assert not adds_products(inputs_TI[:, :20].float(), inputs_TI, sum_XI)
    assert not adds_products(inputs_TI[:50, :20], inputs_TI, sum_XI)
    assert not adds_products(inputs_TI, inputs_TI, sum_XI)


@pytest.mark.usefixtures("threads_of_torch")
def test_threads_change_no_bit_of_products() -> None:
    left_TX, right_TI = inputs(6000, 200), inputs(6000, 320, seed=1)
    sums = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        sums.append(torch.zeros(200, 320))
        add_products(left_TX, right_TI, sums[-1])
    assert torch.equal(*sums)


def test_only_bfloat16_inputs_with_a_float32_sum_are_taken() -> None:
    sum_II = torch.zeros(8, 8)
    assert adds_moment(inputs(4, 8), sum_II)
    assert not adds_moment(inputs(4, 8).float(), sum_II)
    assert not adds_moment(inputs(4, 8).half(), sum_II)
    assert not adds_moment(inputs(4, 8), sum_II.double())
    assert not adds_moment(inputs(4, 9), sum_II)
    assert not adds_moment(inputs(4, 8).to("meta"), sum_II)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_seen(value: float) -> None:
    inputs_TI = inputs(300, 70)
    inputs_TI[123, 55] = value
    moment = InputMoment(70, dtype=torch.float32)
    moment.add(inputs_TI)
    assert not moment.is_finite()


def test_moments_use_it_and_do_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_TI = inputs(700, 130)
    native, plain = InputMoment(130, dtype=torch.float32), InputMoment(130, dtype=torch.float32)
    native.add(inputs_TI)
    monkeypatch.setattr(moment_module, "load_library", lambda: None)
    plain.add(inputs_TI)
    torch.testing.assert_close(native.mean(), plain.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(native.mean(), native.mean().T)
