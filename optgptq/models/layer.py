"""One decoder layer as a walk through four stages, so that quantization can stop before each.

    qkv      input: normed hidden state     advancing runs attention
    o        input: heads' output           advancing adds attention to the residual
    gate_up  input: normed hidden state     advancing does nothing (its output is made again in `down`)
    down     input: feed-forward hidden     advancing gives the layer's output

Shapes: `B` sequences, `S` positions, `M` model width, `I` input columns of a stage, `N` query heads, `K` key/value
heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.kernels.leaves import leaves_for
from optgptq.models.activations import ACTIVATIONS
from optgptq.models.attention import AttentionContext
from optgptq.models.linear import LinearLike
from optgptq.models.norm import Norm
from optgptq.models.rope import rotate_both
from optgptq.models.spec import STAGE_NAMES, DecoderSpec, StageName
from optgptq.native.leaves import gated, takes_activations


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerState:
    """Activations between two stages of a decoder layer.

    Attributes:
        hidden_BSM: the residual stream as it stands.
        heads_BSI: `[B, S, N * D]` output of all heads; only between `qkv` and `o`.
        attention_BSM: output of `o` that is not yet added; only for parallel residuals, after `o`.
    """

    hidden_BSM: torch.Tensor
    heads_BSI: torch.Tensor | None = None
    attention_BSM: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerNorms:
    """The norms of a decoder layer; None where the family has none."""

    attention: Norm | None = None
    mlp: Norm | None = None
    attention_output: Norm | None = None
    mlp_output: Norm | None = None
    query: Norm | None = None
    key: Norm | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class DecoderLayer:
    """A decoder layer with its weights.

    Attributes:
        spec: the model.
        index: which layer this is.
        linears: by name relative to the layer; entries may be replaced by anything with the same call.
        norms: all norms.
    """

    spec: DecoderSpec
    index: int
    linears: dict[str, LinearLike]
    norms: LayerNorms

    def copy(self) -> DecoderLayer:
        """Return a layer with the same weights; replacing a linear in one leaves the other as it is."""
        return replace(self, linears=dict(self.linears))

    def forward(self, hidden_BSM: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return the layer's output `[B, S, M]`; `hidden_BSM` is left as it is."""
        state = LayerState(hidden_BSM=hidden_BSM)
        for stage in STAGE_NAMES:
            state = self.advance(stage, state, context)
        return state.hidden_BSM

    def stage_input(self, stage: StageName, state: LayerState, context: AttentionContext) -> torch.Tensor:
        """Return what the linears of `stage` read, `[B, S, I]`; not to be written to."""
        del context
        if stage == "o":
            if state.heads_BSI is None:
                raise ValueError("stage o needs the state that stage qkv returned")
            return state.heads_BSI
        if stage == "qkv":
            return self._branch_input(self.norms.attention, state.hidden_BSM)
        shared = self.spec.residual == "parallel_shared_norm"
        mlp_input_BSM = self._branch_input(self.norms.attention if shared else self.norms.mlp, state.hidden_BSM)
        return mlp_input_BSM if stage == "gate_up" else self._mlp_hidden(mlp_input_BSM)

    def advance(
        self,
        stage: StageName,
        state: LayerState,
        context: AttentionContext,
        *,
        stage_input_BSI: torch.Tensor | None = None,
    ) -> LayerState:
        """Apply the linears of `stage` and return the state after it.

        `stage_input_BSI`, where given, is what `stage_input` returned for the same stage and state.
        """
        if stage == "gate_up":
            return state
        inputs_BSI = self.stage_input(stage, state, context) if stage_input_BSI is None else stage_input_BSI
        if stage == "qkv":
            return LayerState(hidden_BSM=state.hidden_BSM, heads_BSI=self._attend(inputs_BSI, context))
        (name,) = self.spec.stage(stage).linears
        output_BSM = self.linears[name](inputs_BSI)
        return self._after_attention(state, output_BSM) if stage == "o" else self._after_mlp(state, output_BSM)

    def residual(self, stage: StageName, state: LayerState) -> torch.Tensor | None:
        """Return what the output of `stage` is added to, `[B, S, M]`; None where it is normed first, or not added."""
        norms = self.norms
        if stage == "o" and norms.attention_output is None:
            return self._residual(norms.attention, state.hidden_BSM)
        if stage == "down" and norms.mlp_output is None:
            residual_BSM = self._residual(norms.mlp, state.hidden_BSM)
            return residual_BSM if state.attention_BSM is None else residual_BSM + state.attention_BSM
        return None

    def project_heads(
        self, inputs_BSM: torch.Tensor, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query `[B, N, S, D]`, key and value `[B, K, S, D]` as attention uses them: normed and rotated."""
        query_BSND, key_BSKD, value_BSKD = self._split_heads(inputs_BSM)
        if self.norms.query is not None and self.norms.key is not None:
            query_BSND, key_BSKD = self.norms.query(query_BSND), self.norms.key(key_BSKD)
        rope = self.spec.layers[self.index].rope
        if rope is not None:
            query_BSND, key_BSKD = rotate_both(query_BSND, key_BSKD, context.rope_tables[rope])
        return query_BSND.transpose(1, 2), key_BSKD.transpose(1, 2), value_BSKD.transpose(1, 2)

    def _split_heads(self, inputs_BSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec = self.spec
        batch, positions = inputs_BSM.shape[:2]
        projected = [self.linears[name](inputs_BSM) for name in spec.stage("qkv").linears]
        if spec.clip_qkv is not None:
            projected = [output.clamp_(-spec.clip_qkv, spec.clip_qkv) for output in projected]
        if spec.qkv_layout == "split":
            query, key, value = (output.view(batch, positions, -1, spec.head_dim) for output in projected)
            return query, key, value
        (fused,) = projected
        if spec.qkv_layout == "concatenated":
            heads = fused.view(batch, positions, -1, spec.head_dim)
            query, key, value = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=2)
            return query, key, value
        if spec.qkv_layout == "per_head_interleaved":
            query, key, value = fused.view(batch, positions, spec.num_heads, 3, spec.head_dim).unbind(3)
            return query, key, value
        # Falcon: each key/value head is stored behind the query heads that share it.
        group = spec.num_heads // spec.num_kv_heads
        heads = fused.view(batch, positions, spec.num_kv_heads, group + 2, spec.head_dim)
        query_BSND = heads[:, :, :, :group].reshape(batch, positions, spec.num_heads, spec.head_dim)
        return query_BSND, heads[:, :, :, group], heads[:, :, :, group + 1]

    def _attend(self, inputs_BSM: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        heads = self.project_heads(inputs_BSM, context)
        output_BNSD = context.attend(self.index, *heads, self.spec)
        # The fused CPU kernel returns [B, S, N, D] memory seen as [B, N, S, D]: this reshape copies nothing there.
        return output_BNSD.transpose(1, 2).flatten(2)

    def _mlp_hidden(self, mlp_input_BSM: torch.Tensor) -> torch.Tensor:
        activation = ACTIVATIONS[self.spec.activation]
        outputs = [self.linears[name](mlp_input_BSM) for name in self.spec.stage("gate_up").linears]
        if not self.spec.gated:
            return activation(outputs[0])
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        leaves = leaves_for(gate)
        if leaves is not None:
            return leaves.gated(gate, up, self.spec.activation)
        if takes_activations(gate):
            return gated(gate, up, self.spec.activation)
        activated = activation(gate)
        return activated * up if activated.requires_grad else activated.mul_(up)

    def _branch_input(self, norm: Norm | None, hidden_BSM: torch.Tensor) -> torch.Tensor:
        return hidden_BSM if norm is None or self.spec.norm_after else norm(hidden_BSM)

    def _residual(self, norm: Norm | None, hidden_BSM: torch.Tensor) -> torch.Tensor:
        return norm(hidden_BSM) if self.spec.residual_after_norm and norm is not None else hidden_BSM

    def _after_attention(self, state: LayerState, output_BSM: torch.Tensor) -> LayerState:
        if self.norms.attention_output is not None:
            output_BSM = self.norms.attention_output(output_BSM)
        if self.spec.residual != "sequential":
            return LayerState(hidden_BSM=state.hidden_BSM, attention_BSM=output_BSM)
        hidden_BSM = output_BSM.add_(self._residual(self.norms.attention, state.hidden_BSM))
        if self.spec.norm_after and self.norms.attention is not None:
            hidden_BSM = self.norms.attention(hidden_BSM)
        return LayerState(hidden_BSM=hidden_BSM)

    def _after_mlp(self, state: LayerState, output_BSM: torch.Tensor) -> LayerState:
        if self.norms.mlp_output is not None:
            output_BSM = self.norms.mlp_output(output_BSM)
        if state.attention_BSM is not None:
            output_BSM = output_BSM.add_(state.attention_BSM)
        hidden_BSM = output_BSM.add_(self._residual(self.norms.mlp, state.hidden_BSM))
        if self.spec.norm_after and self.norms.mlp is not None:
            hidden_BSM = self.norms.mlp(hidden_BSM)
        return LayerState(hidden_BSM=hidden_BSM)
