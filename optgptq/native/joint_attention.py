"""Calls of the compiled attention that begins at a joint projection: norms of heads, rotary positions, the new keys and
values into their pages, and attention, in one call.

Shapes: `T` tokens of a step, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages, `Y` slots of a page,
`R` rotated features.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from optgptq.native.library import check_done
from optgptq.native.paged_attention import (
    TYPES,
    Pages,
    Rule,
    Sequences,
    numbered_path,
    pages_fields,
    rule_fields,
    sequences_fields,
)

if TYPE_CHECKING:
    from optgptq.kernels.paged_attention import PagedBatch, ScoreRule


class _JointStep(ctypes.Structure):
    """`JointStep` of `source/leaves.hpp`, field by field."""

    _fields_ = (
        ("sequences", Sequences),
        *((name, ctypes.c_void_p) for name in ("slot", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("half", "num_tokens")),
        *((name, ctypes.c_void_p) for name in ("heads", "attended")),
    )


class _JointCall(ctypes.Structure):
    """`JointCall`."""

    _fields_ = (
        ("step", ctypes.c_void_p),
        ("pages", Pages),
        ("rule", Rule),
        *((name, ctypes.c_void_p) for name in ("query_weight", "key_weight", "joint", "output")),
        *((name, ctypes.c_int64) for name in ("token_stride", "num_heads", "type", "weight_type")),
        ("epsilon", ctypes.c_double),
    )


class JointStep:
    """What the layers of a step share that have the same pages and the same rotary table, and their work space."""

    __slots__ = ("_kept", "address", "call", "num_tokens")

    def __init__(
        self,
        batch: PagedBatch,
        cosine_TR: torch.Tensor | None,
        sine_TR: torch.Tensor | None,
        work: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Take a step.

        Args:
            batch: its sequences.
            cosine_TR: float32 `[T, R / 2]` for the tokens in order, in the half-split layout; None: nothing is rotated.
            sine_TR: likewise.
            work: of `JointAttention.work_space`, overwritten by every call.
        """
        slot_T = batch.slot_T
        self.num_tokens = len(slot_T)
        assert slot_T.dtype == torch.int64
        tensors = [slot_T, *work]
        half = 0
        if cosine_TR is not None and sine_TR is not None:
            assert cosine_TR.dtype == sine_TR.dtype == torch.float32
            assert cosine_TR.shape == sine_TR.shape == (self.num_tokens, cosine_TR.shape[1])
            half = cosine_TR.shape[1]
            tensors += [cosine_TR, sine_TR]
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert all(len(space) >= self.num_tokens and space.dtype == torch.float32 for space in work)
        # The call holds addresses only.
        self._kept = (batch, *tensors)
        self.call = _JointStep(
            sequences_fields(batch),
            slot_T.data_ptr(),
            None if cosine_TR is None else cosine_TR.data_ptr(),
            None if sine_TR is None else sine_TR.data_ptr(),
            half,
            self.num_tokens,
            *(space.data_ptr() for space in work),
        )
        self.address = ctypes.addressof(self.call)


class JointAttention:
    """Attention of one layer; what does not change from step to step is prepared."""

    __slots__ = ("_call", "_columns", "_function", "_kept", "_path", "_reference", "_width")

    def __init__(
        self,
        keys_ZKDY: torch.Tensor,
        values_ZKYD: torch.Tensor,
        rule: ScoreRule,
        num_heads: int,
        *,
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        eps: float = 0.0,
        path: str | None = None,
    ) -> None:
        """Prepare.

        Args:
            keys_ZKDY: pages of the layer.
            values_ZKYD: likewise.
            rule: how its scores are made.
            num_heads: of queries.
            norms: weights `[D]` of the RMS norms of query and key heads, of one dtype; None where there are none.
            eps: of these norms.
            path: an instruction set, None for the fastest.
        """
        library, self._path = numbered_path(path)
        num_kv_heads, head_dim = keys_ZKDY.shape[1:3]
        assert num_heads % num_kv_heads == 0
        weights: tuple[int | None, int | None] = (None, None)
        weight_type = 0
        if norms is not None:
            query_D, key_D = norms
            assert query_D.shape == key_D.shape == (head_dim,)
            assert query_D.dtype == key_D.dtype
            assert query_D.is_contiguous()
            assert key_D.is_contiguous()
            weights, weight_type = (query_D.data_ptr(), key_D.data_ptr()), TYPES[query_D.dtype]
        self._kept = (keys_ZKDY, values_ZKYD, rule, norms)
        self._width, self._columns = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
        self._call = _JointCall(
            None,
            pages_fields(keys_ZKDY, values_ZKYD),
            rule_fields(rule, num_heads),
            *weights,
            None,
            None,
            self._columns,
            num_heads,
            0,
            weight_type,
            eps,
        )
        self._reference, self._function = ctypes.byref(self._call), library.shared.optgptq_attend_joint

    @property
    def step(self) -> type[JointStep]:
        """Makes what the layers of a step share."""
        return JointStep

    def work_space(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the work space of a step of so many tokens."""
        return torch.empty(num_tokens, self._columns), torch.empty(num_tokens, self._width)

    def __call__(self, joint: torch.Tensor, step: JointStep) -> torch.Tensor:
        """Return attention `[..., N D]` of a step's tokens in the dtype of `joint`; it is computed in float32.

        A row has the same bits in any step, however its sequence is cut into parts, on any number of threads.

        Args:
            joint: `[..., (N + 2 K) D]`, heads of queries, then of keys, then of values, rows one after the other.
            step: the step.
        """
        assert joint.is_contiguous()
        assert joint.shape[-1] == self._columns
        assert joint.numel() == step.num_tokens * self._columns
        output = torch.empty((*joint.shape[:-1], self._width), dtype=joint.dtype)
        call = self._call
        call.step, call.joint, call.output, call.type = (
            step.address,
            joint.data_ptr(),
            output.data_ptr(),
            TYPES[joint.dtype],
        )
        check_done(self._function(self._reference, self._path, torch.get_num_threads()))
        return output
