from __future__ import annotations

import pytest
from support.tiny_models import TINY_MODELS, reference_model
from support.transformed import EVERYTHING, FOLD, RESIDUAL, VALUES

from optgptq.errors import ExitCode, ModelError
from optgptq.models.registry import config_spec
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.checks import check_transform, transform_warnings
from optgptq.transforms.settings import TransformSettings


def spec_of(name: str) -> DecoderSpec:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    return config_spec({**reference_model(tiny).config.to_dict(), "architectures": [tiny.architecture]})


@pytest.mark.parametrize(
    ("name", "settings", "field", "reason"),
    [
        ("opt-post_norm_projected", FOLD, "fold_norms", "its norms follow the residual sums"),
        ("opt-post_norm_projected", RESIDUAL, "residual_rotation", "its norms follow the residual sums"),
        ("bloom-residual_after_norm", FOLD, "fold_norms", "its residual stream is taken behind the norms"),
        ("gemma2-softcaps", RESIDUAL, "residual_rotation", "between its linears and the residual sums"),
        ("gemma3text-local_global", EVERYTHING, "residual_rotation", "between its linears and the residual sums"),
        ("bloom-alibi", RESIDUAL, "residual_rotation", "between its embedding and the residual stream"),
        ("mpt-six_heads_clipped", VALUES, "value_rotation", "its values are clipped at 0.4"),
    ],
)
def test_models_that_would_change_are_refused(name: str, settings: TransformSettings, field: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_transform(spec_of(name), settings, family="some-family")
    error = caught.value
    assert error.exit_code == ExitCode.INPUT
    assert error.where == f"transform.{field}"
    assert error.found.startswith("some-family: ")
    assert reason in error.found
    off = "false" if field == "fold_norms" else "none"
    assert error.action == f"Set transform.{field}={off} for this model."


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("opt-post_norm_projected", VALUES),
        ("bloom-residual_after_norm", VALUES),
        ("bloom-alibi", FOLD),
        ("gemma2-softcaps", FOLD),
        ("gemma2-softcaps", VALUES),
        ("mpt-six_heads_clipped", RESIDUAL),
        ("falcon-grouped_one_norm", EVERYTHING),
        ("opt-pre_norm_projected", EVERYTHING),
        ("gemma-plain", EVERYTHING),
    ],
)
def test_what_is_exact_is_allowed(name: str, settings: TransformSettings) -> None:
    check_transform(spec_of(name), settings, family="some-family")


def test_untying_is_said() -> None:
    (warning,) = transform_warnings(spec_of("gemma-plain"), EVERYTHING)
    assert f"{61 * 24} weights more" in warning
    assert "tie_word_embeddings false" in warning
    assert transform_warnings(spec_of("gemma-plain"), FOLD) == ()
    assert transform_warnings(spec_of("llama-grouped_query"), RESIDUAL) == ()
    assert transform_warnings(spec_of("opt-pre_norm_projected"), RESIDUAL) == ()


def test_a_residual_rotation_implies_folding() -> None:
    assert RESIDUAL.folds
    assert not RESIDUAL.fold_norms
    assert not VALUES.folds
    assert TransformSettings().changes_nothing
    assert not VALUES.changes_nothing
