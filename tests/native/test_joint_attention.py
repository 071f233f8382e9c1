"""Attention from a joint projection on: what the separate steps give, on every path."""

from __future__ import annotations

import pytest
import torch
from support.native_paths import native_paths
from support.paged import Part, paged_texts
from torch.nn import functional as F  # noqa: N812

from optgptq.kernels.paged_attention import ScoreRule
from optgptq.models.rope import RopeTable, rotate_in_place
from optgptq.native.joint_attention import JointAttention, JointStep
from optgptq.native.library import load_library
from optgptq.native.paged_attention import paged_attention, store_tokens

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

PARTS: list[Part] = [(0, 0, 1), (1, 4, 5), (2, 3, 40), (3, 16, 17)]
LENGTHS = (1, 5, 40, 17)
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
NUM_HEADS, NUM_KV_HEADS = 6, 2


class Case:
    """A step of some texts, and the joint projection of its tokens."""

    def __init__(self, dtype: torch.dtype, *, head_dim: int, rotated: int, norms: bool, window: int | None) -> None:
        generator = torch.Generator().manual_seed(head_dim)
        sizes = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": head_dim, "page_size": 16}
        step = paged_texts(LENGTHS, dtype=dtype, window=window, **sizes).step(PARTS)
        self.batch = step.batch
        self.pages = step.keys_ZKDY, step.values_ZKYD
        self.rule = ScoreRule(scale=0.2, window=window)
        tokens = len(self.batch.slot_T)
        columns = (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim
        self.joint = torch.randn(1, tokens, columns, generator=generator).to(dtype)
        self.norms = None
        if norms:
            self.norms = tuple((1 + torch.rand(head_dim, generator=generator)).to(dtype) for _ in range(2))
        angles = torch.rand(tokens, rotated // 2, generator=generator) * 6
        self.cosine, self.sine = (part.to(dtype).float() for part in (angles.cos(), angles.sin()))
        self.rotated, self.head_dim = rotated, head_dim

    def joined(self, path: str | None = None, pages: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        layer = JointAttention(*(pages or self.pages), self.rule, NUM_HEADS, norms=self.norms, eps=1e-5, path=path)
        tables = (self.cosine, self.sine) if self.rotated else (None, None)
        step = JointStep(self.batch, *tables, layer.work_space(len(self.batch.slot_T) + 3))
        return layer(self.joint, step)

    def apart(self, path: str | None = None) -> torch.Tensor:
        """Return the same in steps: in float32, rounded once to the type of the pages."""
        heads = self.joint[0].float().view(len(self.batch.slot_T), -1, self.head_dim)
        query, key, value = (part.clone() for part in heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1))
        if self.norms is not None:
            query, key = (
                F.rms_norm(part, (self.head_dim,), weight.float(), 1e-5)
                for part, weight in zip((query, key), self.norms, strict=True)
            )
        if self.rotated:
            table = RopeTable(cosine=self.cosine.unsqueeze(1), sine=self.sine.unsqueeze(1))
            rotate_in_place(query, table)
            rotate_in_place(key, table)
        store_tokens(key, value, *self.pages, self.batch.slot_T, path=path)
        return paged_attention(query, *self.pages, self.batch, self.rule, path=path).flatten(1).unsqueeze(0)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(
    ("head_dim", "rotated", "norms", "window"),
    [(16, 16, False, None), (24, 10, True, None), (64, 0, True, 9), (80, 32, False, 9), (7, 6, True, None)],
)
def test_one_call_gives_what_the_steps_give(path, dtype, head_dim, rotated, norms, window) -> None:
    case = Case(dtype, head_dim=head_dim, rotated=rotated, norms=norms, window=window)
    pages = tuple(part.clone() for part in case.pages)
    found, expected = case.joined(path, pages), case.apart(path)
    assert found.dtype == dtype
    error = ERRORS[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=error, atol=error)
    for mine, theirs in zip(pages, case.pages, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=error, atol=error, equal_nan=True)


@pytest.mark.parametrize("path", native_paths())
def test_values_of_a_plain_head_are_the_same_bits(path) -> None:
    """Nothing normed and nothing rotated: there is nothing to be rounded otherwise."""
    case = Case(torch.float32, head_dim=32, rotated=0, norms=False, window=None)
    pages = tuple(part.clone() for part in case.pages)
    assert torch.equal(case.joined(path, pages), case.apart(path))
    for mine, theirs in zip(pages, case.pages, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_threads_change_no_bit() -> None:
    case = Case(torch.bfloat16, head_dim=64, rotated=64, norms=True, window=None)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(case.joined())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case(torch.float32, head_dim=16, rotated=0, norms=False, window=None)
    layer = JointAttention(*case.pages, case.rule, NUM_HEADS)
    work = layer.work_space(len(case.batch.slot_T))
    step = JointStep(case.batch, None, None, work)
    with pytest.raises(AssertionError):
        layer(case.joint[:, 1:].contiguous(), step)
    with pytest.raises(AssertionError):
        JointStep(case.batch, None, None, tuple(part[1:] for part in work))
