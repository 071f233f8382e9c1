"""What a quantized cache means, without pages or kernels: attention of a whole text in which each query reads some keys
and values as they were computed and the others decoded from their codes.

Shapes: `B` sequences (one), `S` positions, `N` query heads, `K` key/value heads, `D` head dimension. Scores are `NSS`:
head, query, key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.setup import SideParameters
from optgptq.kv_cache.transform import HeadTransform
from optgptq.models.attention import alibi_bias, self_attention
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_plan import CachePlan


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ReferenceAttend:
    """The `Attend` of one text from its first position on.

    Attributes:
        plan: the quantized cache.
        begins: of each position, where the step that computed it began; only mode `chunk` depends on it.
        seen_from: tokens of a prefix that was found in the cache, where only their codes and the sinks are kept.
    """

    plan: CachePlan
    begins: Sequence[int]
    seen_from: int = 0

    def __call__(
        self,
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor:
        """Return attention `[1, N, S, D]`; scores and sums in float64."""
        layout = self.plan.layouts[layer_index]
        if layout is None:
            return self_attention(layer_index, query_BNSD, key_BKSD, value_BKSD, spec)
        parameters = self.plan.setup.layers[layer_index]
        transform = HeadTransform.of(parameters)
        query_SND = transform.query(query_BNSD[0].transpose(0, 1))
        key_SKD = transform.key(key_BKSD[0].transpose(0, 1))
        value_SKD = transform.value(value_BKSD[0].transpose(0, 1))
        keys = (key_SKD, _through_codes(key_SKD, layout.scheme.keys, parameters.keys))
        values = (value_SKD, _through_codes(value_SKD, layout.scheme.values, parameters.values))
        is_exact_SS = self._is_exact(query_SND.device)
        weight_NSS = torch.softmax(_scores(query_SND, keys, is_exact_SS, spec, layer_index), dim=-1)
        group = spec.num_heads // spec.num_kv_heads
        exact_NSD, code_NSD = (part.double().repeat_interleave(group, 1).transpose(0, 1) for part in values)
        output_NSD = (weight_NSS * is_exact_SS) @ exact_NSD + (weight_NSS * ~is_exact_SS) @ code_NSD
        output_SND = transform.output(output_NSD.transpose(0, 1).to(query_BNSD.dtype).contiguous())
        return output_SND.transpose(0, 1).unsqueeze(0)

    def _is_exact(self, device: torch.device) -> torch.Tensor:
        """Return which keys each query reads as they were computed, `[S, S]`."""
        past = self.plan.past
        firsts = [past.first_exact(position, begin) for position, begin in enumerate(self.begins)]
        firsts = [
            max(first, self.seen_from) if place >= self.seen_from else first for place, first in enumerate(firsts)
        ]
        key_S = torch.arange(len(firsts), device=device)
        first_S1 = torch.tensor(firsts, device=device).unsqueeze(1)
        return (key_S >= first_S1) | (key_S < past.sink_tokens)


def _scores(
    query_SND: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    is_exact_SS: torch.Tensor,
    spec: DecoderSpec,
    layer_index: int,
) -> torch.Tensor:
    """Return scores `[N, S, S]`, minus infinity where a key is not seen."""
    layer, group = spec.layers[layer_index], spec.num_heads // spec.num_kv_heads
    query_NSD = query_SND.double().transpose(0, 1)
    exact_NSS, code_NSS = (
        query_NSD @ part.double().repeat_interleave(group, 1).permute(1, 2, 0) * layer.attention_scale for part in keys
    )
    scores_NSS = torch.where(is_exact_SS, exact_NSS, code_NSS)
    if spec.attention_softcap is not None:
        scores_NSS = torch.tanh(scores_NSS / spec.attention_softcap) * spec.attention_softcap
    position_S = torch.arange(len(query_SND), device=query_SND.device)
    if spec.alibi is not None:
        scores_NSS = scores_NSS + alibi_bias(spec.alibi, position_S).double().unsqueeze(1)
    distance_SS = position_S.unsqueeze(1) - position_S
    hidden_SS = distance_SS < 0
    if layer.sliding_window is not None:
        hidden_SS = hidden_SS | (distance_SS >= layer.sliding_window)
    return scores_NSS.masked_fill(hidden_SS, -inf)


def _through_codes(x_SKD: torch.Tensor, scheme: SideScheme, parameters: SideParameters) -> torch.Tensor:
    """Return vectors encoded and decoded. The last ones may not fill a group along tokens: nobody reads their codes."""
    if scheme.is_exact:
        return x_SKD
    granule = scheme.group_size if scheme.axis == "token" else 1
    whole = len(x_SKD) - len(x_SKD) % granule
    codec = SideCodec.of(scheme, parameters, x_SKD.device)
    return torch.cat((decode(encode(x_SKD[:whole], codec), scheme), x_SKD[whole:].float()))
