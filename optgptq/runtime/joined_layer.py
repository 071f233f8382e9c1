"""Decoder layers of a running model in few calls: what lies between two products is one leaf.

The usual make-up is taken, as the spec states it: RMS norms that open both branches, sums one after the other, a gated
feed-forward. Other layers stay as they are. Numbers are those of `DecoderLayer` but for roundings: a leaf computes in
float32 and rounds once.

Shapes: `B` sequences, `S` positions, `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.kernels.leaves import RunningLeaves, SumNorm, running_leaves
from optgptq.models.attention import AttentionContext
from optgptq.models.decoder import Decoder
from optgptq.models.layer import DecoderLayer
from optgptq.models.norm import Norm


@dataclass(slots=True, eq=False, kw_only=True)
class JoinedLayer(DecoderLayer):
    """A decoder layer whose `forward` uses leaves; its stages are those of `DecoderLayer`.

    Attributes:
        leaves: of the device.
        open_attention, open_mlp: norms of what the branches read, and of the sum before that.
        close_attention, close_mlp: norms of what the branches give, or None.
        qkv: name of the linear whose output is heads of queries, of keys, of values; None: the heads are taken apart.
        gate_up: names of one or two linears.
    """

    leaves: RunningLeaves
    open_attention: SumNorm
    open_mlp: SumNorm
    close_attention: SumNorm | None
    close_mlp: SumNorm | None
    qkv: str | None
    gate_up: tuple[str, ...]

    def forward(self, hidden_BSM: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return the layer's output `[B, S, M]`; `hidden_BSM` is left as it is."""
        linears = self.linears
        normed_BSM = self.open_attention(hidden_BSM)
        if self.qkv is None or context.attend_joint is None:
            heads_BSI = self._attend(normed_BSM, context)
        else:
            heads_BSI = context.attend_joint(self.index, linears[self.qkv](normed_BSM))
        sum_BSM = linears[self.spec.stages[1].linears[0]](heads_BSI)
        if self.close_attention is not None:
            sum_BSM = self.close_attention(sum_BSM)
        normed_BSM = self.open_mlp(sum_BSM, hidden_BSM)
        if len(self.gate_up) == 1:
            inner_BSI = self.leaves.joint_gated(linears[self.gate_up[0]](normed_BSM), self.spec.activation)
        else:
            gate_BSI, up_BSI = (linears[name](normed_BSM) for name in self.gate_up)
            inner_BSI = self.leaves.gated(gate_BSI, up_BSI, self.spec.activation)
        output_BSM = linears[self.spec.stages[3].linears[0]](inner_BSI)
        if self.close_mlp is not None:
            output_BSM = self.close_mlp(output_BSM)
        return output_BSM.add_(sum_BSM)


def join_layers(decoder: Decoder) -> Decoder:
    """Return the model with all layers of the usual make-up joined, where its device has leaves.

    To be called when the linears are as they stay: fused, packed.
    """
    leaves = running_leaves(decoder.device, decoder.dtype)
    if leaves is None:
        return decoder
    return replace(decoder, layers=[_joined(layer, leaves) for layer in decoder.layers])


def _joined(layer: DecoderLayer, leaves: RunningLeaves) -> DecoderLayer:
    spec, norms = layer.spec, layer.norms
    sums_follow = spec.residual == "sequential" and not spec.norm_after and not spec.residual_after_norm
    is_gated = spec.gated and spec.activation in leaves.GATED_KINDS
    if spec.norm.kind != "rms" or norms.attention is None or norms.mlp is None or not (sums_follow and is_gated):
        return layer

    def prepared(norm: Norm | None) -> SumNorm | None:
        return None if norm is None else leaves.SumNorm(norm.weight, norm.size, norm.spec.eps)

    is_joint = spec.qkv_layout == "concatenated" and spec.clip_qkv is None
    return JoinedLayer(
        spec=spec,
        index=layer.index,
        linears=layer.linears,
        norms=norms,
        leaves=leaves,
        open_attention=leaves.SumNorm(norms.attention.weight, norms.attention.size, norms.attention.spec.eps),
        open_mlp=leaves.SumNorm(norms.mlp.weight, norms.mlp.size, norms.mlp.spec.eps),
        close_attention=prepared(norms.attention_output),
        close_mlp=prepared(norms.mlp_output),
        qkv=spec.stage("qkv").linears[0] if is_joint else None,
        gate_up=spec.stage("gate_up").linears,
    )
