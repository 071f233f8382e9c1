"""Training norms: gradients against finite differences, what is kept, and that the checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizable import padded_windows, tiny_model, tiny_recipe, wide_llama, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.norm_tweaking import NormTweakSettings, set_norms, tweak_norms
from optgptq.calibration.start import num_held_out
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import ReplacedTensors
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.errors import FormatError, RecipeError
from optgptq.formats import detect
from optgptq.formats.verify import same_bytes, verify_folder, verify_written, weight_digest
from optgptq.models.attention import attention_context
from optgptq.models.inventory import layer_tensors
from optgptq.models.layer import DecoderLayer, LayerState
from optgptq.models.linear import Linear
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.quantize import quantize
from optgptq.recipe.records import NormTweakingRecipe, Recipe, TransformRecipe

MODELS = (
    "llama-grouped_query",
    "gpt2-conv1d",
    "gpt2-inverse_layer",
    "gemma-plain",
    "gemma2-softcaps",
    "qwen3-norms",
    "phi3-longrope",
    "gptneox-parallel",
    "opt-post_norm_projected",
    "bloom-residual_after_norm",
    "mpt-six_heads_clipped",
    "falcon-grouped",
    "falcon-grouped_one_norm",
)
HELD_OUT = 2


def width_norms(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """Return weights and biases of the norms over the model width by full name, as the layer uses them."""
    spec, norms = layer.spec, layer.norms
    prefix = spec.names.layer_prefix(layer.index)
    found = {}
    for local, norm in (
        (spec.names.attention_norm, norms.attention),
        (spec.names.mlp_norm, norms.mlp),
        (spec.names.attention_output_norm, norms.attention_output),
        (spec.names.mlp_output_norm, norms.mlp_output),
    ):
        if norm is not None and norm.weight is not None:
            found[f"{prefix}.{local}.weight"] = norm.weight
            if norm.bias is not None:
                found[f"{prefix}.{local}.bias"] = norm.bias
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_differences_of_the_forward_pass(name: str, tmp_path: Path) -> None:
    source = CheckpointFolder.open(write_model(tiny_model(name), tmp_path / "model"))
    spec = model_spec(source)
    # Gemma's norms and capped scores are float32 whatever the dtype.
    dtype, step, tolerance = (torch.float32, 1e-2, 1e-2) if spec.norm.weight_offset else (torch.float64, 1e-5, 1e-6)
    layer = load_layer(source, spec, 1, dtype=dtype)
    context = attention_context(spec, 9, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    hidden_BSM = torch.randn(2, 9, spec.hidden_size, generator=generator, dtype=dtype)
    weights_BSM = torch.randn(hidden_BSM.shape, generator=generator, dtype=torch.float64)
    values = width_norms(layer)

    def result(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        copy = layer.copy()
        set_norms(copy, changed)
        return (copy.forward(hidden_BSM, context) * weights_BSM).sum()

    leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
    with_gradient = result(leaves)
    gradients = torch.autograd.grad(with_gradient, list(leaves.values()))
    torch.testing.assert_close(with_gradient.detach(), result(values), rtol=1e-5, atol=1e-5)
    for key, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(gradient.shape, generator=generator, dtype=dtype)
        ahead = result({**values, key: values[key] + step * direction})
        behind = result({**values, key: values[key] - step * direction})
        slope = float(ahead - behind) / (2 * step)
        size = float(gradient.norm() * direction.norm())
        assert float((gradient * direction).sum()) == pytest.approx(slope, abs=tolerance * size + 1e-9), key


@dataclass
class Place:
    """One decoder layer behind which both streams stand."""

    source: CheckpointFolder
    layer: DecoderLayer
    start: ActivationStream
    quantized: ActivationStream
    full_precision: ActivationStream

    def settings(self, *, steps: int, learning_rate: float = 0.01) -> NormTweakSettings:
        return NormTweakSettings(
            steps=steps, learning_rate=learning_rate, stored_dtype=lambda name: self.source.info(name).torch_dtype
        )

    def tweak(self, settings: NormTweakSettings) -> Any:
        with torch.no_grad():
            return tweak_norms(self.layer, self.start, self.quantized, self.full_precision, settings)

    def held_out_error(self) -> float:
        """Return the relative error of the streams where they stand, in float64."""
        difference = energy = 0.0
        for batch, reference in zip(self.quantized.batches, self.full_precision.batches, strict=True):
            if not batch.held_out:
                continue
            valid_BS = torch.ones(batch.state.hidden_BSM.shape[:2], dtype=torch.bool)
            valid_BS = valid_BS if batch.valid_BS is None else batch.valid_BS
            found, wanted = batch.state.hidden_BSM[valid_BS].double(), reference.state.hidden_BSM[valid_BS].double()
            difference += float((found - wanted).square().sum())
            energy += float(wanted.square().sum())
        return difference / energy


def rounded(weight_OI: torch.Tensor, *, levels: int = 3) -> torch.Tensor:
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / levels
    return (weight_OI / scale_O1).round() * scale_O1


def place(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, windows: Windows | None = None) -> Place:
    """Return the second layer of a model, its linears rounded, and streams that have run through it."""
    tiny = wide_llama() if name == "wide" else tiny_model(name)
    source = CheckpointFolder.open(write_model(tiny, folder, dtype=dtype))
    spec = model_spec(source)
    windows = windows or windows_from_tokens(random_tokens(10, 16, vocab_size=spec.vocab_size, seed=3))
    context = attention_context(spec, windows.window_size, dtype=dtype)
    embedding = load_embedding(source, spec, dtype=dtype)
    streams = [embed(windows, embedding, context, windows_per_batch=3, num_held_out=HELD_OUT) for _ in range(2)]
    original = load_layer(source, spec, 1, dtype=dtype)
    layer = original.copy()
    for local, linear in original.linears.items():
        assert isinstance(linear, Linear)
        layer.linears[local] = Linear(rounded(linear.weight_OI), linear.bias_O)
    start = streams[0].snapshot()
    with torch.no_grad():
        for stream, through in zip(streams, (layer, original), strict=True):
            for batch in stream.batches:
                batch.state = LayerState(hidden_BSM=through.forward(batch.state.hidden_BSM, context))
    return Place(source, layer, start, *streams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["wide", "gpt2-conv1d", "gemma-plain", "gemma2-softcaps", "qwen3-norms", "falcon-grouped_one_norm"]
)
def test_the_error_on_held_out_windows_falls(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    here = place(name, tmp_path / "model", dtype=dtype)
    query_norm, before = here.layer.norms.query, here.held_out_error()
    tweak = here.tweak(here.settings(steps=40))
    assert 0 < tweak.steps <= 40
    assert tweak.loss_after < 0.99 * tweak.loss_before
    # bfloat16 streams round every product; the losses are of float32 ones.
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert tweak.loss_before == pytest.approx(before, rel=tolerance)
    assert tweak.loss_after == pytest.approx(here.held_out_error(), rel=tolerance)
    assert tweak.tensors.keys() == width_norms(here.layer).keys()
    assert here.layer.norms.query is query_norm


@pytest.mark.parametrize(
    ("name", "dtype"), [("wide", torch.bfloat16), ("gemma-plain", torch.bfloat16), ("gpt2-conv1d", torch.float32)]
)
def test_a_checkpoint_with_the_new_tensors_loads_as_the_layer_that_was_judged(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    here = place(name, tmp_path / "model", dtype=dtype)
    tweak = here.tweak(here.settings(steps=16))
    view = ReplacedTensors(source=here.source, replacements=tweak.tensors)
    loaded = load_layer(view, here.layer.spec, 1, dtype=dtype)
    found = width_norms(loaded)
    assert tweak.tensors
    for key, value in width_norms(here.layer).items():
        assert tweak.tensors[key].dtype == dtype
        assert torch.equal(found[key], value)
        assert found[key].dtype == value.dtype
    others = layer_tensors(here.layer.spec, 1).keys() - tweak.tensors.keys()
    assert all(same_bytes(view, here.source, key) for key in others)


def test_norms_stay_where_training_does_not_help(tmp_path: Path) -> None:
    here = place("wide", tmp_path / "model")
    norms, states = here.layer.norms, [batch.state for batch in here.quantized.batches]
    tweak = here.tweak(here.settings(steps=3, learning_rate=1.0))
    assert tweak.tensors == {}
    assert (tweak.steps, tweak.loss_after) == (0, tweak.loss_before)
    assert here.layer.norms is norms
    assert all(batch.state is state for batch, state in zip(here.quantized.batches, states, strict=True))


def test_padding_counts_neither_in_training_nor_in_the_judgement(tmp_path: Path) -> None:
    tokens_WS = random_tokens(10, 16, vocab_size=258, seed=3)
    lengths = [16, 9, 16, 16, 4, 16, 16, 12, 7, 16]
    tweaks = []
    for folder, padding in (("first", 0), ("second", 97)):
        windows = padded_windows(tokens_WS, lengths)
        beyond_WS = torch.arange(16) >= windows.lengths_W[:, None]
        windows = replace(windows, tokens_WS=windows.tokens_WS.masked_fill(beyond_WS, padding))
        here = place("wide", tmp_path / folder, windows=windows)
        tweaks.append(here.tweak(here.settings(steps=16)))
        assert tweaks[-1].loss_after == pytest.approx(here.held_out_error(), rel=1e-4)
    assert tweaks[0].loss_after == pytest.approx(tweaks[1].loss_after, rel=1e-6)
    for key, tensor in tweaks[0].tensors.items():
        torch.testing.assert_close(tensor, tweaks[1].tensors[key], rtol=1e-5, atol=1e-6)


def job_recipe(*, steps: int, learning_rate: float = 0.01, transform: TransformRecipe | None = None) -> Recipe:
    recipe = tiny_recipe(bits=2, group_size=16, calibration={"num_windows": 8}, export={"format": "compressed-tensors"})
    return recipe.model_copy(
        update={
            "norm_tweaking": NormTweakingRecipe(steps=steps, learning_rate=learning_rate),
            "transform": transform or TransformRecipe(),
        }
    )


def norm_names(folder: Path) -> list[str]:
    source = CheckpointFolder.open(folder)
    return [name for name in source.tensors if "layernorm" in name]


@pytest.mark.parametrize("transform", [TransformRecipe(), TransformRecipe(residual_rotation="random")])
def test_the_checkpoint_holds_the_trained_norms(transform: TransformRecipe, tmp_path: Path) -> None:
    model, outputs = write_model(wide_llama(), tmp_path / "model"), [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        result = quantize(model, job_recipe(steps=24, transform=transform), output)
    plain = quantize(model, job_recipe(steps=0, transform=transform), tmp_path / "plain").output
    source, written = CheckpointFolder.open(plain), CheckpointFolder.open(outputs[0])
    tweaks = [layer["norm_tweaking"] for layer in result.record["decoder_layers"]]
    assert [tweak["loss_after"] < tweak["loss_before"] and tweak["steps"] > 0 for tweak in tweaks] == [True, True]
    assert len(norm_names(model)) == 4
    assert not any(same_bytes(written, source, name) for name in norm_names(model))
    assert verify_folder(written).problems == ()
    assert all(same_bytes(written, CheckpointFolder.open(outputs[1]), name) for name in written.tensors)


def test_off_is_the_default_and_changes_no_dense_tensor_and_records_nothing(tmp_path: Path) -> None:
    assert Recipe().norm_tweaking.steps == 0
    model = write_model(wide_llama(), tmp_path / "model")
    result = quantize(model, job_recipe(steps=0), tmp_path / "out")
    source, written = CheckpointFolder.open(model), CheckpointFolder.open(result.output)
    assert all(same_bytes(written, source, name) for name in norm_names(model))
    assert [list(layer) for layer in result.record["decoder_layers"]] == [["index", "output_error"]] * 2


def test_verification_compares_with_the_trained_norms(tmp_path: Path) -> None:
    model = write_model(wide_llama(), tmp_path / "model")
    quantize(model, job_recipe(steps=16), tmp_path / "out")
    written, source = CheckpointFolder.open(tmp_path / "out"), CheckpointFolder.open(model)
    form = detect(written)
    assert form is not None
    layouts = form.read_layouts(written)
    digests = {layout.name: weight_digest(form.decode(written, layout)) for layout in layouts if layout.bits}
    trained = {name: written.read(name) for name in norm_names(model)}
    verify_written(written, ReplacedTensors(source=source, replacements=trained), layouts, digests)
    with pytest.raises(FormatError, match="norm") as caught:
        verify_written(written, source, layouts, digests)
    assert caught.value.expected == "the bytes of the source"


def test_a_layer_whose_norms_stay_is_a_warning(tmp_path: Path) -> None:
    model = write_model(wide_llama(), tmp_path / "model")
    result = quantize(model, job_recipe(steps=1, learning_rate=1.0), tmp_path / "out")
    stay = [layer["index"] for layer in result.record["decoder_layers"] if layer["norm_tweaking"]["steps"] == 0]
    assert stay
    assert [warning for warning in result.warnings if "norms" in warning] == [
        f"decoder layer {index}: its norms stay, since training them did not lower the held-out error" for index in stay
    ]


def test_norms_without_weights_are_refused(tmp_path: Path) -> None:
    model = write_model(tiny_model("opt-no_biases"), tmp_path / "model")
    with pytest.raises(RecipeError) as caught:
        quantize(model, job_recipe(steps=5), tmp_path / "out")
    error = caught.value
    assert (error.where, error.found) == ("norm_tweaking.steps", "5")
    assert error.expected == "0 for this model, whose norms have no weights"
    assert error.action == "Set norm_tweaking.steps=0."


def test_too_few_windows_to_hold_one_out_are_refused() -> None:
    recipe = job_recipe(steps=5)
    assert (num_held_out(recipe, 4), num_held_out(recipe, 400)) == (1, 8)
    assert num_held_out(job_recipe(steps=0), 3) == 0
    with pytest.raises(RecipeError) as caught:
        num_held_out(recipe, 3)
    assert (caught.value.where, caught.value.found) == ("norm_tweaking.steps", "3")
    assert caught.value.action.endswith("or set norm_tweaking.steps to 0.")
