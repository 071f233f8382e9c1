"""Which models can be transformed without changing what they compute."""

from __future__ import annotations

from optgptq.errors import ModelError
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.settings import TransformSettings


def check_transform(spec: DecoderSpec, settings: TransformSettings, *, family: str) -> None:
    """Raise ModelError, naming `family` and the reason, unless the model computes the same after `settings`."""
    if settings.folds and (reason := _folding_refusal(spec)):
        if settings.rotates_residual:
            raise _refusal("residual_rotation", family, reason, off="none")
        raise _refusal("fold_norms", family, reason, off="false")
    if settings.rotates_residual and (reason := _residual_refusal(spec)):
        raise _refusal("residual_rotation", family, reason, off="none")
    if settings.rotates_values and spec.clip_qkv is not None:
        reason = f"its values are clipped at {spec.clip_qkv}, number by number, and a rotation mixes the numbers"
        raise _refusal("value_rotation", family, reason, off="none")


def transform_warnings(spec: DecoderSpec, settings: TransformSettings) -> tuple[str, ...]:
    """Return what a user must hear about a transform that is exact."""
    tied = spec.tied_head and spec.names.project_in is None
    if not (tied and settings.rotates_residual):
        return ()
    size = spec.vocab_size * spec.embedding_size
    return (
        f"transform.residual_rotation unties the head from the embedding: {size} weights more, and config.json says "
        "tie_word_embeddings false. An engine that ties them all the same, as vLLM did for Gemma, computes nonsense.",
    )


def _folding_refusal(spec: DecoderSpec) -> str | None:
    if spec.norm_after:
        return "its norms follow the residual sums, so their weights belong to the residual stream as well"
    if spec.residual_after_norm:
        return "its residual stream is taken behind the norms, so their weights belong to it as well"
    return None


def _residual_refusal(spec: DecoderSpec) -> str | None:
    if spec.names.attention_output_norm is not None or spec.names.mlp_output_norm is not None:
        return "norms with weights stand between its linears and the residual sums, where a rotation cannot pass"
    if spec.names.embedding_norm is not None:
        return "a norm with weights stands between its embedding and the residual stream, where a rotation cannot pass"
    return None


def _refusal(field: str, family: str, reason: str, *, off: str) -> ModelError:
    return ModelError(
        f"transform.{field}",
        expected="a model that computes the same with it",
        found=f"{family}: {reason}",
        action=f"Set transform.{field}={off} for this model.",
    )
