"""Attention as decoding sees it, over whole windows: each query reads its past from codes and the rest as computed.

What the paged kernels do, in plain torch, for scores and figures. Differentiable.

Shapes: `B` windows, `S` positions (queries), `T` positions (keys), `N` query heads, `K` key/value heads, `G` query
heads of a group, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from optgptq.kernels.through_codes import through_codes
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_cache.transform import transform_vectors
from optgptq.models.attention import alibi_bias, self_attention
from optgptq.models.spec import DecoderSpec

# Queries per step: bounds scores to N * 256 * T numbers.
_QUERY_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SideQuantizer:
    """Keys, or values, of one decoder layer through their codes and back.

    Attributes:
        scheme: not exact.
        parameters: what is done before and after.
        codec: of both.
    """

    scheme: SideScheme
    parameters: SideParameters
    codec: SideCodec

    @classmethod
    def of(cls, scheme: SideScheme, parameters: SideParameters, device: torch.device) -> SideQuantizer | None:
        """Return the quantizer of a side on a device; None for an exact one."""
        if scheme.is_exact:
            return None
        parameters = on_device(parameters, device)
        return cls(scheme=scheme, parameters=parameters, codec=SideCodec.of(scheme, parameters, device))

    def __call__(self, x_BKSD: torch.Tensor) -> torch.Tensor:
        """Return what codes stand for, in the dtype that came, shift, scale and rotation undone.

        With groups along tokens, the tokens behind the last whole group of a window come back as they are.
        """
        batch, _, length, _ = x_BKSD.shape
        granule = self.scheme.group_size if self.scheme.axis == "token" else 1
        whole = length - length % granule
        x_TKD = x_BKSD[:, :, :whole].transpose(1, 2).flatten(0, 1).float()
        y_TKD = through_codes(transform_vectors(x_TKD, self.parameters), self.codec)
        y_BKSD = restore_vectors(y_TKD, self.parameters).view(batch, whole, *x_TKD.shape[1:]).transpose(1, 2)
        y_BKSD = y_BKSD.to(x_BKSD.dtype)
        return y_BKSD if whole == length else torch.cat((y_BKSD, x_BKSD[:, :, whole:]), dim=2)


def on_device(parameters: SideParameters, device: torch.device) -> SideParameters:
    """Return the same parameters on a device."""
    return SideParameters(
        shift_KD=_moved(parameters.shift_KD, device),
        scale_KD=_moved(parameters.scale_KD, device),
        rotation_KDD=_moved(parameters.rotation_KDD, device),
        metric_KDD=_moved(parameters.metric_KDD, device),
        ranges_C2=_moved(parameters.ranges_C2, device),
    )


def restore_vectors(y_TKD: torch.Tensor, side: SideParameters) -> torch.Tensor:
    """Return the vectors whose stored form is `y_TKD`: the inverse of `transform_vectors`."""
    if side.rotation_KDD is not None:
        y_TKD = torch.matmul(y_TKD.unsqueeze(2), side.rotation_KDD.transpose(1, 2)).squeeze(2)
    if side.scale_KD is not None:
        y_TKD = y_TKD * side.scale_KD
    return y_TKD if side.shift_KD is None else y_TKD + side.shift_KD


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerQuantizer:
    """Both sides of one decoder layer: what codes make of `[B, K, S, D]`; None where a side is exact."""

    keys: Callable[[torch.Tensor], torch.Tensor] | None
    values: Callable[[torch.Tensor], torch.Tensor] | None

    @classmethod
    def of(cls, scheme: LayerScheme, parameters: LayerParameters, device: torch.device) -> LayerQuantizer:
        """Return the quantizer of a layer on a device."""
        return cls(
            keys=SideQuantizer.of(scheme.keys, parameters.keys, device),
            values=SideQuantizer.of(scheme.values, parameters.values, device),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheAttend:
    """The `Attend` of whole windows with a quantized cache.

    Attributes:
        layers: quantizers by layer index; other layers are exact.
        past: which keys are exact; `chunk` counts as `token`, what decoding one token at a time sees.
    """

    layers: Mapping[int, LayerQuantizer]
    past: PastRule = field(default_factory=lambda: PastRule(mode="token"))

    def __call__(
        self,
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor:
        layer = self.layers.get(layer_index, LayerQuantizer(keys=None, values=None))
        if layer.keys is None and layer.values is None:
            return self_attention(layer_index, query_BNSD, key_BKSD, value_BKSD, spec)
        coded_key = key_BKSD if layer.keys is None else layer.keys(key_BKSD)
        coded_value = value_BKSD if layer.values is None else layer.values(value_BKSD)
        return mixed_attention(
            query_BNSD,
            (key_BKSD, value_BKSD),
            (coded_key, coded_value),
            spec=spec,
            layer_index=layer_index,
            past=self.past,
        )


def decoding_rule(past: PastRule) -> PastRule:
    """Return the rule of a decoding that takes one token a step."""
    return replace(past, mode="token") if past.mode == "chunk" else past


def exact_keys(past: PastRule, num_positions: int, device: torch.device) -> torch.Tensor:
    """Return bool `[S, T]`: the query reads the key as it was computed."""
    rule = decoding_rule(past)
    first = [rule.first_exact(position, position) for position in range(num_positions)]
    key_T = torch.arange(num_positions, device=device)
    first_S1 = torch.tensor(first, device=device).unsqueeze(1)
    return (key_T >= first_S1) | (key_T < past.sink_tokens)


def mixed_attention(
    query_BNSD: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    coded: tuple[torch.Tensor, torch.Tensor],
    *,
    spec: DecoderSpec,
    layer_index: int,
    past: PastRule,
) -> torch.Tensor:
    """Return attention `[B, N, S, D]` over keys and values `[B, K, S, D]` that are there twice.

    A side that is exact is the same tensor in both.
    """
    batch, num_heads, length, head_dim = query_BNSD.shape
    num_kv_heads = exact[0].shape[1]
    query = query_BNSD.reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    is_exact_ST = exact_keys(past, length, query.device)
    outputs = []
    for begin in range(0, length, _QUERY_CHUNK):
        end = min(begin + _QUERY_CHUNK, length)
        chosen_ST = is_exact_ST[begin:end, :end]
        scores = torch.matmul(query[..., begin:end, :], coded[0][:, :, None, :end].transpose(-1, -2))
        if coded[0] is not exact[0]:
            exact_scores = torch.matmul(query[..., begin:end, :], exact[0][:, :, None, :end].transpose(-1, -2))
            scores = torch.where(chosen_ST, exact_scores, scores)
        position_S = torch.arange(begin, end, device=query.device)
        weights = score_weights(scores, position_S, spec=spec, layer_index=layer_index).to(query.dtype)
        if coded[1] is exact[1]:
            output = torch.matmul(weights, exact[1][:, :, None, :end])
        else:
            output = torch.matmul(weights * chosen_ST, exact[1][:, :, None, :end])
            output = output + torch.matmul(weights * ~chosen_ST, coded[1][:, :, None, :end])
        outputs.append(output.flatten(1, 2))
    return torch.cat(outputs, dim=2)


def score_weights(
    scores: torch.Tensor, position_S: torch.Tensor, *, spec: DecoderSpec, layer_index: int
) -> torch.Tensor:
    """Return float32 softmax weights of products `[..., K, G, S, T]` of queries at `position_S` with all keys.

    Scale, soft-cap, ALiBi, sliding window and causality are those of the layer.
    """
    layer = spec.layers[layer_index]
    scores = scores.float() * layer.attention_scale
    if spec.attention_softcap is not None:
        scores = torch.tanh(scores / spec.attention_softcap) * spec.attention_softcap
    position_T, position_S1 = torch.arange(scores.shape[-1], device=scores.device), position_S.unsqueeze(1)
    hidden_ST = position_T > position_S1
    if layer.sliding_window is not None:
        hidden_ST |= position_T <= position_S1 - layer.sliding_window
    if spec.alibi is not None:
        bias_NT = alibi_bias(spec.alibi, position_T)
        scores = scores + bias_NT.view(*scores.shape[-4:-2], 1, -1)
    return torch.softmax(scores.masked_fill(hidden_ST, float("-inf")), dim=-1)


def _moved(part: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if part is None else part.float().to(device)
