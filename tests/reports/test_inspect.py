"""What `inspect` reads from a checkpoint."""

from __future__ import annotations

import json

import pytest
from support.checkpoints import mixed_story_layouts, quantize_all, story_layouts, write_checkpoint

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats import format_named
from optgptq.reports.inspect import inspect_checkpoint

STORY = bundled_path("bundled:story-llama")


def checkpoint(folder, layouts, *, format_name: str) -> CheckpointFolder:
    source = CheckpointFolder.open(STORY)
    weights = quantize_all(source, layouts, format_name=format_name)
    return write_checkpoint(source, folder, layouts, weights, format_name=format_name)


@pytest.mark.parametrize(
    ("format_name", "bits", "group_size", "symmetric", "expected"),
    [
        ("gptq", 4, 128, True, 4 + 16 / 128 + 4 / 128),
        ("gptq", 4, 64, False, 4 + 16 / 64 + 4 / 64),
        ("compressed-tensors", 4, 128, True, 4 + 16 / 128),
        ("compressed-tensors", 3, 64, False, 3 + 16 / 64 + 3 / 64),
    ],
)
def test_bits_per_weight_count_codes_scales_and_stored_zero_points(
    tmp_path, format_name, bits, group_size, symmetric, expected
):
    layouts = story_layouts(bits=bits, group_size=group_size, symmetric=symmetric)
    report = inspect_checkpoint(checkpoint(tmp_path / "out", layouts, format_name=format_name))
    assert report.bits_per_weight == pytest.approx(expected)
    assert report.format == format_name
    assert len(report.layers) == 42
    assert report.num_quantized_weights == sum(item.out_features * item.in_features for item in layouts)


def test_the_figure_is_that_of_the_decoded_weights(tmp_path):
    layouts = mixed_story_layouts()
    folder = checkpoint(tmp_path / "out", layouts, format_name="gptq")
    form, stored, count = format_named("gptq"), 0, 0
    for layout in form.read_layouts(folder):
        if layout.bits is not None:
            weight = form.decode(folder, layout)
            stored += weight.stored_bits(zero_points_stored=True)
            count += weight.codes_OI.numel()
    report = inspect_checkpoint(folder)
    assert report.bits_per_weight == pytest.approx(stored / count)
    assert {layer.bits for layer in report.layers} == {4, 8}
    assert [entry["name"] for entry in report.dense] == ["model.layers.2.mlp.down_proj"]


def test_sizes_are_those_of_the_tensors(tmp_path):
    folder = checkpoint(tmp_path / "out", story_layouts(), format_name="compressed-tensors")
    report = inspect_checkpoint(folder)
    dense = sum(info.num_bytes for name, info in folder.tensors.items() if name.endswith("weight"))
    assert report.tensor_bytes == report.quantized_bytes + dense
    assert report.num_tensors == len(folder.tensors)


def test_a_dense_model_has_no_bits_per_quantized_weight():
    report = inspect_checkpoint(CheckpointFolder.open(STORY))
    assert report.format == "dense"
    assert report.architecture == "LlamaForCausalLM"
    assert report.bits_per_weight is None
    assert report.layers == ()
    assert report.made_by is None


def test_the_manifest_gives_losses_order_and_reasons(tmp_path):
    folder = checkpoint(tmp_path / "out", mixed_story_layouts(), format_name="gptq")
    manifest = {
        "optgptq": "9.9",
        "recipe": {"name": "mine"},
        "layers": [
            {
                "name": "model.layers.5.mlp.up_proj",
                "loss": 0.25,
                "rtn_loss": 0.5,
                "damp_ratio_used": 0.1,
                "notes": ["n"],
            }
        ],
        "dense": [{"name": "model.layers.2.mlp.down_proj", "reason": "too sensitive"}],
        "decoder_layers": [{"index": 0, "output_error": 0.125}],
        "warnings": ["careful"],
    }
    (folder.path / "optgptq_manifest.json").write_text(json.dumps(manifest))
    report = inspect_checkpoint(folder)
    first = report.layers[0]
    assert (first.name, first.loss, first.rtn_loss) == ("model.layers.5.mlp.up_proj", 0.25, 0.5)
    assert (first.damp_ratio_used, first.notes) == (0.1, ("n",))
    assert report.layers[1].loss is None
    assert report.dense == ({"name": "model.layers.2.mlp.down_proj", "reason": "too sensitive"},)
    assert report.decoder_layers == ({"index": 0, "output_error": 0.125},)
    assert (report.recipe, report.made_by, report.warnings) == ("mine", "9.9", ("careful",))


def test_a_manifest_that_somebody_edited_does_not_break_the_report(tmp_path):
    folder = checkpoint(tmp_path / "out", mixed_story_layouts(), format_name="gptq")
    (folder.path / "optgptq_manifest.json").write_text('{"layers": {"a": 1}, "dense": [3], "recipe": [], "optgptq": 1}')
    report = inspect_checkpoint(folder)
    assert len(report.layers) == 41
    assert (report.recipe, report.made_by) == ("", None)
