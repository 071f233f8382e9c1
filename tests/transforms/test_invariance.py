"""The one promise: a transformed model computes what the model computed, here and in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.quantizable import tiny_model
from support.tiny_models import (
    TINY_MODELS,
    TinyModel,
    random_tokens,
    reference_logits,
    reference_model,
    save_reference,
)
from support.transformed import (
    EVERYTHING,
    FOLD,
    REFUSED,
    RESIDUAL,
    SETTINGS,
    VALUES,
    exact_logits,
    relative_error,
    rewritten,
    saved,
    transformed,
    write_dense,
)

from optgptq.calibration.moments import InputMoment
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError
from optgptq.models.decoder import load_decoder
from optgptq.models.layer import LayerState
from optgptq.models.registry import model_spec
from optgptq.models.spec import StageName
from optgptq.transforms.source import transformed_source


@pytest.fixture(scope="module", params=TINY_MODELS, ids=lambda tiny: tiny.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CheckpointFolder]:
    return request.param.name, saved(request.param, tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_family_computes_the_same_or_is_refused(model: tuple[str, CheckpointFolder], name: str) -> None:
    tiny, folder = model
    if tiny in REFUSED[name]:
        with pytest.raises(ModelError, match=r"^transform\."):
            transformed(folder, SETTINGS[name])
        return
    tokens_BS = random_tokens(2, 19)
    before = load_decoder(folder, dtype=torch.float64)
    after = load_decoder(transformed(folder, SETTINGS[name]), dtype=torch.float64)
    # Gemma's norms and soft caps run in float32 whatever the dtype.
    tolerance = 1e-5 if "gemma" in tiny else 1e-10
    assert relative_error(exact_logits(after, tokens_BS), exact_logits(before, tokens_BS)) < tolerance


@pytest.mark.parametrize(
    "tiny",
    ["llama-grouped_query", "qwen2-biases", "qwen3-biases_tied", "gemma-plain", "gpt2-conv1d", "falcon-multi_query"],
)
def test_float32_models_agree_to_float32(tiny: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model", dtype=torch.float32)
    tokens_BS = random_tokens(2, 19)
    view = transformed(folder, EVERYTHING)
    assert {name: info.dtype for name, info in view.tensors.items()} == dict.fromkeys(view.tensors, "F32")
    assert relative_error(load_decoder(view).logits(tokens_BS), load_decoder(folder).logits(tokens_BS)) < 1e-5


@pytest.mark.parametrize(
    "tiny", [tiny for tiny in TINY_MODELS if tiny.name not in REFUSED["everything"]], ids=lambda tiny: tiny.name
)
def test_the_written_model_is_an_ordinary_one(tiny: TinyModel, tmp_path: Path) -> None:
    """transformers loads it, with every tensor used, and computes the same."""
    import transformers

    reference = reference_model(tiny)
    folder = CheckpointFolder.open(save_reference(reference, tmp_path / "model"))
    written = write_dense(transformed(folder, EVERYTHING), tmp_path / "written")
    implementation = "sdpa" if tiny.architecture.startswith("Falcon") else "eager"
    loaded, report = getattr(transformers, tiny.architecture).from_pretrained(
        written.path, output_loading_info=True, attn_implementation=implementation
    )
    assert {key: value for key, value in report.items() if value} == {}
    tokens_BS = random_tokens(2, 19)
    expected = reference_logits(reference, tokens_BS)
    assert relative_error(reference_logits(loaded.eval(), tokens_BS), expected) < 2e-5
    assert relative_error(load_decoder(written).logits(tokens_BS), expected) < 2e-5


@pytest.mark.parametrize(("tiny", "head_only"), [("llama-tied", False), ("gpt2-conv1d", False), ("llama-tied", True)])
def test_tied_embeddings_are_untied(tiny: str, head_only: bool, tmp_path: Path) -> None:
    folder = saved(tiny_model(tiny), tmp_path / "model")
    spec = model_spec(folder)
    embedding, head = f"{spec.names.embedding}.weight", f"{spec.names.head}.weight"
    if head_only:
        tensors = {name: folder.read(name) for name in folder.tensors}
        tensors[head] = tensors.pop(embedding)
        folder = rewritten(folder, tensors, tmp_path / "head-only")
    view = transformed(folder, EVERYTHING)
    assert not model_spec(view).tied_head
    assert view.config["tie_word_embeddings"] is False
    assert not torch.equal(view.read(embedding), view.read(head))
    assert list(view.tensors) == sorted(view.tensors)
    for settings in (FOLD, VALUES):
        unchanged, same_spec = transformed_source(folder, spec, settings)
        assert unchanged.config == folder.config
        assert same_spec == spec
        assert set(unchanged.tensors) == set(folder.tensors)
    tokens_BS = random_tokens(1, 9)
    before, after = (load_decoder(source, dtype=torch.float64) for source in (folder, view))
    assert relative_error(exact_logits(after, tokens_BS), exact_logits(before, tokens_BS)) < 1e-10


def test_a_head_beside_a_tied_embedding_is_used(tmp_path: Path) -> None:
    """What the loader uses is what is transformed, although the config calls the pair tied."""
    folder = saved(tiny_model("llama-tied"), tmp_path / "model")
    tensors = {name: folder.read(name) for name in folder.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2 + 1
    folder = rewritten(folder, tensors, tmp_path / "both")
    tokens_BS = random_tokens(1, 9)
    before = load_decoder(folder, dtype=torch.float64)
    after = load_decoder(transformed(folder, RESIDUAL), dtype=torch.float64)
    assert relative_error(exact_logits(after, tokens_BS), exact_logits(before, tokens_BS)) < 1e-10


def test_projected_embeddings_stay_tied(tmp_path: Path) -> None:
    folder = saved(tiny_model("opt-pre_norm_projected"), tmp_path / "model")
    view = transformed(folder, EVERYTHING)
    assert view.config is folder.config
    assert model_spec(view).tied_head
    assert set(view.tensors) == set(folder.tensors)


def test_checkpoints_without_the_usual_prefix(tmp_path: Path) -> None:
    folder = saved(tiny_model("gpt2-conv1d"), tmp_path / "model")
    tensors = {name.removeprefix("transformer."): folder.read(name) for name in folder.tensors}
    bare = rewritten(folder, tensors, tmp_path / "bare")
    view = transformed(bare, EVERYTHING)
    assert set(view.tensors) == {*tensors, "lm_head.weight"}
    tokens_BS = random_tokens(1, 9)
    before, after = (load_decoder(source, dtype=torch.float64) for source in (folder, view))
    assert relative_error(exact_logits(after, tokens_BS), exact_logits(before, tokens_BS)) < 1e-10


@pytest.mark.parametrize("stage", ["qkv", "gate_up", "o", "down"])
def test_input_moments_are_rotated(stage: StageName, tmp_path: Path) -> None:
    """H' = R^T H R, where H is the moment of the normed input without the norm's weight."""
    folder = saved(tiny_model("llama-explicit_head_dim"), tmp_path / "model")
    view = transformed(folder, EVERYTHING)
    moments = []
    for source in (folder, view):
        decoder = load_decoder(source, dtype=torch.float64)
        context = decoder.context(19)
        layer, state = decoder.layers[0], LayerState(hidden_BSM=decoder.embedding.embed(random_tokens(3, 19), context))
        for earlier in ("qkv", "o", "gate_up", "down"):
            inputs = layer.stage_input(earlier, state, context)
            if earlier == stage:
                break
            state = layer.advance(earlier, state, context)
        moment = InputMoment(inputs.shape[-1], dtype=torch.float64)
        moment.add(inputs)
        moments.append(moment.mean())
    before_II, after_II = moments
    assert view.residual is not None
    rotation_II = torch.eye(before_II.shape[0], dtype=torch.float64)
    if stage in ("qkv", "gate_up"):
        name = "input_layernorm" if stage == "qkv" else "post_attention_layernorm"
        scale_M = view.norms[f"model.layers.0.{name}"].scale_M
        before_II = before_II / torch.outer(scale_M, scale_M)
        rotation_II = view.residual.apply(rotation_II)
    elif stage == "o":
        values = view.linears["model.layers.0.self_attn.o_proj"].value_rotations
        assert values is not None
        rotation_II = torch.block_diag(*values.matrices(0).repeat_interleave(3, dim=0))
    assert torch.allclose(after_II, rotation_II.T @ before_II @ rotation_II, rtol=0, atol=1e-10)


def test_layer_norm_models_lose_the_mean_of_their_residual(tmp_path: Path) -> None:
    view = transformed(saved(tiny_model("gpt2-conv1d"), tmp_path / "model"), RESIDUAL)
    decoder = load_decoder(view, dtype=torch.float64)
    assert float(decoder.hidden(random_tokens(2, 9)).mean(dim=-1).abs().max()) < 1e-10
