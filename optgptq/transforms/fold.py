"""Norm weights moved into the linears that read the norm.

A norm gives `n * w + b` with `n` the normalized input, and its consumers compute `W (n * w + b)`. Folding makes that
`(W diag(w)) n + W b`, or `W diag(w) (n + b / w)` where they have no bias to take `W b`.

Shapes: `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.errors import ModelError
from optgptq.models.checks import require_finite
from optgptq.models.inventory import norm_shapes
from optgptq.models.spec import DecoderSpec, StageName

# A bias that stays in the norm grows to b / w and is rounded there. This bounds that rounding, in units of the
# normalized input: bfloat16 (2^-7) then allows b / w up to 8.
_LARGEST_BIAS_ROUNDING = 2.0**-4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FoldedNorm:
    """What is taken out of one norm, and what stays in it. All float64 `[M]`.

    Attributes:
        scale_M: factor on the input columns of every consumer.
        moved_bias_M: `b` where the consumers' biases take `W b`; None where they do not.
        kept_bias_M: `b / w` where the bias stays in the norm; None where it does not.
    """

    scale_M: torch.Tensor
    moved_bias_M: torch.Tensor | None
    kept_bias_M: torch.Tensor | None


def fold_norms(source: TensorSource, spec: DecoderSpec, *, final: bool) -> dict[str, FoldedNorm]:
    """Return what folding takes out of each norm that opens a branch, by full name.

    `final` adds the norm before the head. The head stays dense, so that serves a rotation only, and it unties the
    head from the embedding.

    Raises:
        ModelError: a weight so small that the bias beside it can neither be moved nor kept, or values that are not
            finite.
    """
    norms: dict[str, FoldedNorm] = {}
    for name, biased_consumers in _norms(spec, final=final).items():
        if norm_shapes(spec, name, spec.hidden_size):
            norms[name] = _fold(source, spec, name, biased_consumers=biased_consumers)
    return norms


def branch_norm(spec: DecoderSpec, index: int, stage: StageName) -> str | None:
    """Return the full name of the norm that `qkv` or `gate_up` of layer `index` reads, None where there is none."""
    shared = spec.residual == "parallel_shared_norm"
    local = spec.names.attention_norm if stage == "qkv" or shared else spec.names.mlp_norm
    return local and f"{spec.names.layer_prefix(index)}.{local}"


def identity_weight(spec: DecoderSpec) -> float:
    """Return the stored weight of a norm that multiplies by one."""
    return 1.0 - spec.norm.weight_offset


def _norms(spec: DecoderSpec, *, final: bool) -> dict[str, bool]:
    """Return by name of each norm whether all linears that read it have biases."""
    norms: dict[str, bool] = {}
    stages: tuple[StageName, ...] = ("qkv", "gate_up")
    for index in range(spec.num_layers):
        for stage in stages:
            name = branch_norm(spec, index, stage)
            if name is not None:
                norms[name] = norms.get(name, True) and stage in spec.biased_stages
    if final and spec.names.final_norm is not None:
        # Heads and projections have no biases.
        norms[spec.names.final_norm] = False
    return norms


def _fold(source: TensorSource, spec: DecoderSpec, name: str, *, biased_consumers: bool) -> FoldedNorm:
    scale_M = _read_vector(source, f"{name}.weight") + spec.norm.weight_offset
    if not spec.norm.has_bias:
        return FoldedNorm(scale_M=scale_M, moved_bias_M=None, kept_bias_M=None)
    bias_M = _read_vector(source, f"{name}.bias")
    if biased_consumers:
        return FoldedNorm(scale_M=scale_M, moved_bias_M=bias_M, kept_bias_M=None)
    kept_M = torch.where(bias_M == 0, 0.0, bias_M / scale_M)
    rounding = float(kept_M.square().mean().sqrt()) * torch.finfo(source.info(f"{name}.bias").torch_dtype).eps
    # Also false for the infinite ratio of a bias to a weight of zero.
    if not rounding <= _LARGEST_BIAS_ROUNDING:
        smallest = float(scale_M.abs().min())
        raise ModelError(
            f"{source.path}: {name}",
            expected="weights large enough to divide the bias by, as no linear that reads this norm has a bias",
            found=f"a smallest weight of {smallest:.3g} and a largest bias of {float(bias_M.abs().max()):.3g}",
            action="Set transform.fold_norms=false and transform.residual_rotation=none for this model.",
        )
    return FoldedNorm(scale_M=scale_M, moved_bias_M=None, kept_bias_M=kept_M)


def _read_vector(source: TensorSource, name: str) -> torch.Tensor:
    vector_M = source.read(name).to(torch.float64)
    require_finite(vector_M, where=f"{source.path}: {name}")
    return vector_M
