"""Query projections fitted once more, to the scores that the original heads gave: weighted least squares per head.

The maps of the shared keys treat queries and keys as strangers. Here they meet as attention lets them meet: with `a_ij`
the original attention weights and `s_ij` the original scores, the new query `q_i` of a head should make

    sum over i, j of a_ij (q_i k_j - s_ij - m_i)^2

small, where the mean `m_i` is free since a softmax does not see it (with a soft cap it does, and is zero). For each
query that is a quadratic form in `q_i`, whose matrix is the covariance of the shared keys under its attention. The new
query is the old one plus `T f`, with `f` the original queries of the whole group before rotation (`score_form.py` finds
`T`). A head keeps its query where that does not lower the sum on held-out windows.

Shapes: `W` windows, `S` positions, `T` chosen queries, `N` query heads, `K` key/value heads, `D` head dimension,
`I` features that a query is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.calibration.attention_map import attention_weights
from optgptq.calibration.stream import ActivationStream
from optgptq.gqa.heads import HeadWeights
from optgptq.gqa.merge import query_order
from optgptq.gqa.score_form import ScoreForm
from optgptq.gqa.statistics import Groups
from optgptq.models.layer import DecoderLayer
from optgptq.models.rope import rotate
from optgptq.numerics import exact_float32_products

# Windows that are measured, and numbers in the matrices of all chosen queries of a head (128 MiB in float32).
_WINDOWS = 16
_HELD_OUT_WINDOWS = 4
_METRIC_NUMBERS = 1 << 25
_QUERIES_PER_CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QueryRefit:
    """What a refit brought.

    Attributes:
        heads: with the new queries.
        num_accepted: query heads that changed.
        error_before, error_after: weighted score error on held-out windows, as a share of the scores' variance.
    """

    heads: HeadWeights
    num_accepted: int
    error_before: float
    error_after: float


def refit_queries(
    stream: ActivationStream,
    layers: tuple[DecoderLayer, DecoderLayer],
    heads: tuple[HeadWeights, HeadWeights],
    groups: Groups,
) -> QueryRefit:
    """Return the new heads with better queries.

    Args:
        stream: before the layer.
        layers: the converted one and the original.
        heads: their weights, in this order.
        groups: key/value heads of each group.
    """
    new, old = heads
    order = query_order(groups, len(old.query_NDI), len(old.key_KDI))
    shared = len(order) // len(groups)
    fitted, judged = (_Windows.of(stream, layers, held_out=held_out) for held_out in (False, True))
    query_NDI, bias_ND = new.query_NDI.clone(), None if new.query_bias_ND is None else new.query_bias_ND.clone()
    accepted, before, after, variance = 0, 0.0, 0.0, 0.0
    for place, head in enumerate(order):
        group = place // shared
        members = order[group * shared : (group + 1) * shared]
        with exact_float32_products():
            change_DI = fitted.form(heads, (place, head), members, group).solve()
            form = judged.form(heads, (place, head), members, group)
            errors = form.error(), form.error(change_DI)
        before, after, variance = before + errors[0], after + min(errors), variance + form.variance
        if errors[1] < errors[0]:
            accepted, change = accepted + 1, change_DI.double()
            query_NDI[place] += change @ old.query_NDI[members].flatten(0, 1)
            if bias_ND is not None and old.query_bias_ND is not None:
                bias_ND[place] += change @ old.query_bias_ND[members].flatten()
    scale = 1 / variance if variance > 0 else 0.0
    return QueryRefit(
        heads=replace(new, query_NDI=query_NDI, query_bias_ND=bias_ND),
        num_accepted=accepted,
        error_before=before * scale,
        error_after=after * scale,
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Windows:
    """Some windows before a layer: what both layers make of them, float32 or more."""

    layer: DecoderLayer
    inputs_WSI: torch.Tensor
    query_WNSD: torch.Tensor
    key_WKSD: torch.Tensor
    new_key_WKSD: torch.Tensor
    turn_SDD: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(cls, stream: ActivationStream, layers: tuple[DecoderLayer, DecoderLayer], *, held_out: bool) -> _Windows:
        """Take windows that are spread evenly over the stream's, those that are held out or the others."""
        inputs_WSI, lengths = _chosen_inputs(stream, layers[1], held_out=held_out)
        context = stream.context
        exact = torch.promote_types(inputs_WSI.dtype, torch.float32)
        query_WNSD, key_WKSD, _ = (each.to(exact) for each in layers[1].project_heads(inputs_WSI, context))
        _, new_key_WKSD, _ = layers[0].project_heads(inputs_WSI, context)
        return cls(
            layer=layers[1],
            inputs_WSI=inputs_WSI.to(exact),
            query_WNSD=query_WNSD,
            key_WKSD=key_WKSD,
            new_key_WKSD=new_key_WKSD.to(exact),
            turn_SDD=_turns(stream, layers[1]).to(exact),
            lengths=lengths,
        )

    def form(
        self, heads: tuple[HeadWeights, HeadWeights], head: tuple[int, int], members: list[int], group: int
    ) -> ScoreForm:
        """Return the error of query head `head` (its new and its old place) as a form of its queries."""
        new, old = heads
        stride = self._stride()
        metrics, targets, chosen, variance = [], [], [], 0.0
        for window, length in enumerate(self.lengths):
            positions_S = torch.arange(0, length, stride, device=self.inputs_WSI.device)
            for chunk_S in torch.split(positions_S, _QUERIES_PER_CHUNK):
                metric_SDD, target_SD, spread = self._weighted(window, head[1], group, chunk_S)
                turn_SDD = self.turn_SDD[chunk_S]
                metrics.append(turn_SDD @ metric_SDD @ turn_SDD.mT)
                targets.append((turn_SDD @ target_SD.unsqueeze(2)).squeeze(2))
                variance += spread
            chosen.append(self.inputs_WSI[window, positions_S])
        inputs_TI = torch.cat(chosen)
        features = [_projected(inputs_TI, old, member) for member in members]
        return ScoreForm(
            metric_TDD=torch.cat(metrics),
            target_TD=torch.cat(targets),
            variance=variance,
            feature_TI=torch.cat(features, dim=1),
            query_TD=_projected(inputs_TI, new, head[0]),
        )

    def _stride(self) -> int:
        allowed = max(_METRIC_NUMBERS // self.layer.spec.head_dim**2, 1)
        return -(-sum(self.lengths) // allowed)

    def _weighted(
        self, window: int, head: int, group: int, positions_S: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return moments under the attention of some queries: of shared keys, with the scores, and of the scores."""
        spec = self.layer.spec
        kv_head = head // (spec.num_heads // spec.num_kv_heads)
        query_SD, key_TD = self.query_WNSD[window, head, positions_S], self.key_WKSD[window, kv_head]
        shared_TD = self.new_key_WKSD[window, group]
        (weights_ST,) = attention_weights(
            query_SD.unsqueeze(0), key_TD, positions_S, spec=spec, layer_index=self.layer.index, first_head=head
        )
        weights_ST = weights_ST.to(key_TD.dtype)
        scores_ST = query_SD @ key_TD.T
        weighted_ST = weights_ST * scores_ST
        metric_SDD = (weights_ST.unsqueeze(1) * shared_TD.T) @ shared_TD
        target_SD = weighted_ST @ shared_TD
        spread = (weighted_ST * scores_ST).sum(1)
        if spec.attention_softcap is None:
            mean_SD, mean_S = weights_ST @ shared_TD, weighted_ST.sum(1)
            metric_SDD = metric_SDD - mean_SD.unsqueeze(2) * mean_SD.unsqueeze(1)
            target_SD = target_SD - mean_S.unsqueeze(1) * mean_SD
            spread = spread - mean_S.square()
        return metric_SDD, target_SD, float(spread.sum(dtype=torch.float64))


def _chosen_inputs(stream: ActivationStream, layer: DecoderLayer, *, held_out: bool) -> tuple[torch.Tensor, list[int]]:
    """Return the inputs `[W, S, I]` of some windows, spread evenly over the stream, and the lengths of the windows."""
    batches = [batch for batch in stream.batches if batch.held_out == held_out]
    rows = [(batch, row) for batch in batches for row in range(batch.num_windows)]
    count = _HELD_OUT_WINDOWS if held_out else _WINDOWS
    inputs, lengths = [], []
    for batch, row in rows[:: max(1, len(rows) // count)][:count]:
        state = batch.state
        state = replace(state, hidden_BSM=state.hidden_BSM[row : row + 1])
        inputs.append(layer.stage_input("qkv", state, stream.context))
        lengths.append(inputs[-1].shape[1] if batch.valid_BS is None else int(batch.valid_BS[row].sum()))
    return torch.cat(inputs), lengths


def _turns(stream: ActivationStream, layer: DecoderLayer) -> torch.Tensor:
    """Return `[S, D, D]`: by position, the rows that the rotation makes of the features of a query."""
    turn_SDD = torch.eye(layer.spec.head_dim, dtype=stream.dtype, device=stream.device)
    turn_SDD = turn_SDD.repeat(stream.window_size, 1, 1)
    rope = layer.spec.layers[layer.index].rope
    return turn_SDD if rope is None else rotate(turn_SDD.unsqueeze(0), stream.context.rope_tables[rope])[0]


def _projected(inputs_TI: torch.Tensor, heads: HeadWeights, head: int) -> torch.Tensor:
    query_TD = inputs_TI @ heads.query_NDI[head].to(inputs_TI.dtype).T
    return query_TD if heads.query_bias_ND is None else query_TD + heads.query_bias_ND[head].to(inputs_TI.dtype)
