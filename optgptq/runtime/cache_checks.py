"""Whether a quantized cache goes with a model."""

from __future__ import annotations

from optgptq.errors import ModelError
from optgptq.kv_cache.page_layout import require_head_size
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.spec import DecoderSpec


def require_heads_of_codes(spec: DecoderSpec) -> None:
    """Raise ModelError for heads that do not split into codes."""
    require_head_size(spec.head_dim, error=ModelError, where="config.json", action="Set kv_cache to 16.")


def require_fit(setup: CacheSetup, spec: DecoderSpec) -> None:
    """Raise ModelError for a setup of another model, and for one that would change the scores of this one."""
    require_heads_of_codes(spec)
    for found, wanted, what in (
        (len(setup.scheme.layers), spec.num_layers, "decoder layers in the scheme"),
        (len(setup.layers), spec.num_layers, "decoder layers in the parameters"),
    ):
        if found != wanted:
            raise _refusal(setup, expected=f"{wanted} {what}", found=str(found))
    shape = (spec.num_kv_heads, spec.head_dim)
    for index, layer in enumerate(setup.layers):
        for name, side in (("keys", layer.keys), ("values", layer.values)):
            for part in (side.shift_KD, side.scale_KD, side.rotation_KDD, side.metric_KDD):
                if part is not None and tuple(part.shape[:2]) != shape:
                    expected = f"{shape[0]} heads of {shape[1]} features in the {name} of layer {index}"
                    raise _refusal(setup, expected=expected, found=f"shape {list(part.shape)}")
        if layer.keys.shift_KD is not None and spec.attention_softcap is not None:
            raise _refusal(
                setup,
                expected="no shift of keys: the model's scores are capped, so that a shift would change them",
                found=f"one in layer {index}",
            )


def _refusal(setup: CacheSetup, *, expected: str, found: str) -> ModelError:
    return ModelError(
        f"KV cache scheme, {setup.source}",
        expected=expected,
        found=found,
        action="Calibrate the cache for this model, or set kv_cache to 16.",
    )
