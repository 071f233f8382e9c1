"""Codes fitted to a metric: the same steps in float64, one number at a time, and what they lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kv_cache import random_metric

from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.fitting import FEEDBACK_DAMP, NUM_REFITS, error_feedback
from optgptq.kv_cache.scheme import CODE_BITS, SideScheme
from optgptq.kv_cache.setup import SideParameters

CPU = torch.device("cpu")
RANGES = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.75, 1.0]])


def half(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).half())


class LiteralCodec:
    """One vector of one head at a time, with Python's numbers."""

    def __init__(self, metric: torch.Tensor, *, bits: int, size: int) -> None:
        self.metric, self.bits, self.size = metric.double(), bits, size
        self.head_dim = len(metric)
        damped = self.metric + FEEDBACK_DAMP * self.metric.diagonal().mean() * torch.eye(self.head_dim)
        self.inverse = torch.linalg.inv(damped)

    def code(self, number: float, scale: float, minimum: float) -> int:
        return min(max(round((number - minimum) / scale), 0), 2**self.bits - 1) if scale > 0 else 0

    def decoded(self, codes: list[int], scales: list[float], minimums: list[float]) -> list[float]:
        return [code * scales[at // self.size] + minimums[at // self.size] for at, code in enumerate(codes)]

    def loss(self, x: list[float], codes: list[int], scales: list[float], minimums: list[float]) -> float:
        error = torch.tensor(x).double() - torch.tensor(self.decoded(codes, scales, minimums)).double()
        return float(error @ self.metric @ error)

    def range_of(self, x: list[float], first: int) -> tuple[float, float]:
        group = x[first : first + self.size]
        middle = (min(group) + max(group)) / 2
        candidates = []
        for low_share, high_share in RANGES.tolist():
            low, high = middle + (min(group) - middle) * low_share, middle + (max(group) - middle) * high_share
            scale, minimum = half((high - low) / (2**self.bits - 1)), half(low)
            codes = [self.code(number, scale, minimum) for number in group]
            loss = sum(
                (number - code * scale - minimum) ** 2 * float(self.metric[first + at, first + at])
                for at, (number, code) in enumerate(zip(group, codes, strict=True))
            )
            candidates.append((loss, scale, minimum))
        return min(candidates, key=lambda candidate: candidate[0])[1:]

    def rounded(self, x: list[float], scales: list[float], minimums: list[float]) -> list[int]:
        """GPTQ of one row: after each channel, the inverse of the metric of the channels that are left."""
        inverse, left, codes = self.inverse.clone(), torch.tensor(x).double(), []
        for at in range(self.head_dim):
            scale, minimum = scales[at // self.size], minimums[at // self.size]
            codes.append(self.code(float(left[at]), scale, minimum))
            error = (left[at] - (codes[-1] * scale + minimum)) / inverse[at, at]
            left = left - error * inverse[at]
            inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        return codes

    def searched(self, x: list[float], codes: list[int], scales: list[float], minimums: list[float]) -> list[int]:
        codes = list(codes)
        for at in range(self.head_dim):
            # A parabola in one code: its lowest point, then the code next to it.
            error = torch.tensor(x).double() - torch.tensor(self.decoded(codes, scales, minimums)).double()
            step = float(self.metric[at] @ error) / (scales[at // self.size] * float(self.metric[at, at]))
            codes[at] = min(max(round(codes[at] + step), 0), 2**self.bits - 1)
        return codes

    def refitted(
        self, x: list[float], codes: list[int], scales: list[float], minimums: list[float]
    ) -> list[list[float]]:
        """Least squares of scale and minimum, each group for itself with the others as they were."""
        error = torch.tensor(x).double() - torch.tensor(self.decoded(codes, scales, minimums)).double()
        fitted: list[list[float]] = [[], []]
        for group in range(self.head_dim // self.size):
            basis = torch.zeros(self.head_dim, 2, dtype=torch.float64)
            part = slice(group * self.size, (group + 1) * self.size)
            basis[part, 0], basis[part, 1] = torch.tensor(codes[part]).double(), 1.0
            change = torch.linalg.solve(basis.T @ self.metric @ basis, basis.T @ self.metric @ error)
            fitted[0].append(half(scales[group] + float(change[0])))
            fitted[1].append(half(minimums[group] + float(change[1])))
        return fitted

    def encode(self, x: list[float]) -> tuple[list[int], list[float], list[float]]:
        scales, minimums = (
            list(ends)
            for ends in zip(*(self.range_of(x, at) for at in range(0, self.head_dim, self.size)), strict=True)
        )
        codes = self.searched(x, self.rounded(x, scales, minimums), scales, minimums)
        for _ in range(NUM_REFITS):
            new_scales, new_minimums = self.refitted(x, codes, scales, minimums)
            new = self.searched(x, codes, new_scales, new_minimums)
            if self.loss(x, new, new_scales, new_minimums) < self.loss(x, codes, scales, minimums):
                codes, scales, minimums = new, new_scales, new_minimums
        return codes, scales, minimums


def fitted_codec(metric_KDD: torch.Tensor, bits: int, group_size: int) -> SideCodec:
    scheme = SideScheme(bits=bits, group_size=group_size)
    return SideCodec.of(scheme, SideParameters(metric_KDD=metric_KDD, ranges_C2=RANGES), CPU)


def metric_losses(x_TKD: torch.Tensor, codec: SideCodec, metric_KDD: torch.Tensor) -> torch.Tensor:
    error_TKD = (x_TKD - decode(encode(x_TKD, codec), codec.scheme)).double()
    return torch.einsum("tkd,kde,tke->tk", error_TKD, metric_KDD.double(), error_TKD)


@pytest.mark.parametrize("group_size", [8, 16])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_same_steps_one_number_at_a_time(bits: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    metric_KDD = random_metric(2, 16, generator)
    x_TKD = torch.randn(20, 2, 16, generator=generator) * torch.linspace(0.5, 4, 16)
    codes = encode(x_TKD, fitted_codec(metric_KDD, bits, group_size))
    num_equal, losses = 0, []
    for head in range(2):
        literal = LiteralCodec(metric_KDD[head], bits=bits, size=group_size)
        for token in range(20):
            x = x_TKD[token, head].tolist()
            expected, scales, minimums = literal.encode(x)
            found = codes.code_TKD[token, head].tolist()
            num_equal += sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
            lost = literal.loss(
                x, found, codes.scale_TKG[token, head].tolist(), codes.minimum_TKG[token, head].tolist()
            )
            losses.append((lost, literal.loss(x, expected, scales, minimums)))
    # Float32 takes another of two codes, or another float16, only where they are equally good up to rounding.
    assert num_equal >= 0.99 * x_TKD.numel()
    found_loss, expected_loss = torch.tensor(losses).sum(0).tolist()
    assert found_loss == pytest.approx(expected_loss, rel=5e-3)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from(CODE_BITS), seed=st.integers(0, 10_000), halves=st.booleans())
def test_less_is_lost_on_average_than_by_the_nearest_codes(bits: int, seed: int, halves: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric_KDD = random_metric(2, 16, generator)
    x_TKD = torch.randn(40, 2, 16, generator=generator)
    codec = fitted_codec(metric_KDD, bits, 8 if halves else 16)
    nearest = SideCodec.of(codec.scheme, SideParameters(), CPU)
    fitted, plain = (metric_losses(x_TKD, choice, metric_KDD).mean() for choice in (codec, nearest))
    assert fitted < plain


def test_feedback_is_that_of_gptq() -> None:
    metric_KDD = random_metric(3, 12, torch.Generator().manual_seed(0))
    feedback_KDD = error_feedback(metric_KDD)
    assert feedback_KDD.dtype == torch.float32
    assert not feedback_KDD.tril().any()
    for metric, feedback in zip(metric_KDD.double(), feedback_KDD, strict=True):
        damped = metric + FEEDBACK_DAMP * metric.diagonal().mean() * torch.eye(12)
        for channel in range(11):
            # The later channels that make up best for an error of one, with the earlier ones as they are.
            rest = slice(channel + 1, None)
            best = torch.linalg.solve(damped[rest, rest], damped[rest, channel])
            torch.testing.assert_close(feedback[channel, rest].double(), best, rtol=1e-4, atol=1e-5)


def test_a_head_without_a_metric_is_rounded_to_finite_codes() -> None:
    codec = fitted_codec(torch.zeros(1, 16, 16), 4, 8)
    x_TKD = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))
    error_TKD = decode(encode(x_TKD, codec), codec.scheme) - x_TKD
    assert float(error_TKD.abs().max()) < 1.0


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_vector_stays_exact(value: float) -> None:
    codec = fitted_codec(random_metric(2, 16, torch.Generator().manual_seed(0)), 3, 16)
    x_TKD = torch.full((2, 2, 16), value)
    assert torch.equal(decode(encode(x_TKD, codec), codec.scheme), x_TKD)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_and_other_vectors_are_as_before(bad: float) -> None:
    codec = fitted_codec(random_metric(2, 16, torch.Generator().manual_seed(0)), 4, 8)
    x_TKD = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1))
    clean = encode(x_TKD, codec)
    x_TKD[2, 1, 3] = bad
    codes = encode(x_TKD, codec)
    assert bool(codes.minimum_TKG[2, 1, 0].isnan())
    assert not codes.code_TKD[2, 1, :8].any()
    others = torch.ones(4, 2, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(codes.code_TKD[others], clean.code_TKD[others])
    assert torch.equal(codes.minimum_TKG[others], clean.minimum_TKG[others])


def test_a_metric_is_not_used_along_tokens() -> None:
    scheme = SideScheme(bits=4, group_size=8, axis="token")
    codec = SideCodec.of(scheme, SideParameters(metric_KDD=torch.eye(16).unsqueeze(0)), CPU)
    assert codec.metric_KDD is None
    assert codec.feedback_KDD is None


def test_numbers_beyond_float16_count_as_its_largest() -> None:
    codec = fitted_codec(random_metric(2, 16, torch.Generator().manual_seed(0)), 4, 8)
    x_TKD = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1)) * 4e4
    assert float(x_TKD.abs().max()) > 65504
    codes, expected = encode(x_TKD, codec), encode(x_TKD.clamp(-65504, 65504), codec)
    assert torch.equal(codes.code_TKD, expected.code_TKD)
    assert torch.equal(codes.scale_TKG, expected.scale_TKG)
