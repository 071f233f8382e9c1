"""What targets are asked about: made from recipes, and read from folders of any tool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import STORY_LLAMA, mixed_story_layouts, quantize_all, story_layouts, write_checkpoint

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import MANIFEST_FILE
from optgptq.models.registry import config_spec, model_spec
from optgptq.recipe.loading import load_recipe
from optgptq.target_subject import subject_of_folder, subject_of_plan
from optgptq.targets import TargetAnswer, TargetSubject, check_target, known_targets, parse_target

SMALL = "weights.group_size=64"


def planned(name: str, *settings: str) -> TargetSubject:
    source = CheckpointFolder.open(STORY_LLAMA)
    recipe = load_recipe(name, settings)
    return subject_of_plan(model_spec(source), recipe, config=source.config, weight_dtype=torch.bfloat16)


def written(tmp_path: Path, form: str, *, config: dict[str, Any] | None = None, **settings: Any) -> CheckpointFolder:
    """Write the bundled model in `form`, with keys of its quantization config changed."""
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts(**settings)
    folder = tmp_path / form
    weights = quantize_all(source, layouts, format_name=form)
    made = write_checkpoint(source, folder, layouts, weights, format_name=form)
    if config is None:
        return made
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"].update(config)
    (folder / "config.json").write_text(json.dumps(content))
    return CheckpointFolder.open(folder)


def ask(name: str, subject: TargetSubject, devices: int = 1) -> TargetAnswer:
    return check_target(parse_target(name), subject, devices)


def settings_of(answer: TargetAnswer) -> tuple[str, ...]:
    assert answer.suggestion is not None, answer.lines()
    return answer.suggestion.settings


def test_a_recipe_before_the_job() -> None:
    subject = planned("gptq-w4", SMALL)
    assert (subject.format, subject.model_type, subject.scale_dtype) == ("gptq", "llama", "float16")
    assert subject.splits["model.layers.0.mlp.down_proj"] == "columns"
    assert subject.splits["model.layers.0.mlp.up_proj"] == "rows"
    assert len(subject.quantized) == 42
    assert all(ask(target.name, subject).loads for target in known_targets())


def test_a_recipe_with_a_head_in_codes() -> None:
    subject = planned("gptq-w4", SMALL, "head.bits=8", "head.group_size=32", "head.symmetric=false")
    (head,) = [layout for layout in subject.quantized if layout.name == "lm_head"]
    assert (head.bits, head.group_size, head.symmetric) == (8, 32, False)
    assert ask("optgptq", subject).loads
    assert settings_of(ask("vllm", subject)) == ("head.symmetric=true",)
    expected = ("head.bits=null", "head.group_size=null", "head.symmetric=true")
    assert settings_of(ask("vllm:humming", subject)) == expected


def test_weights_that_stay_are_dense() -> None:
    subject = planned("kv4")
    assert subject.format == "dense"
    assert subject.own_cache
    assert ask("vllm", subject).loads
    assert "quantized KV cache" in "\n".join(ask("sglang", subject).warnings)
    assert ask("optgptq", subject).warnings == ()


@pytest.mark.parametrize("target", ["vllm", "vllm:rocm", "vllm:humming", "sglang", "sglang:cpu", "transformers"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq-w2", [SMALL, "weights.symmetric=false"]),
        ("gptq-w3", [SMALL]),
        ("gptq-w4", [SMALL, "weights.rules=[{match: down_proj, bits: 2}, {match: o_proj, keep_dense: true}]"]),
        ("gptq-w4", [SMALL, "weights.rules=[{match: down_proj, symmetric: false, group_size: 32}]"]),
        ("binary-w3", []),
        ("attention-aware-binary-w2", []),
        ("gptq-w4", ["weights.group_size=16"]),
    ],
)
def test_the_suggested_recipe_passes(target: str, name: str, settings: list[str]) -> None:
    devices = 2
    answer = ask(target, planned(name, *settings), devices)
    if answer.suggestion is not None:
        again = planned(name, *settings, *answer.suggestion.settings)
        assert ask(target, again, answer.suggestion.tensor_parallel or devices).loads
    else:
        assert answer.loads


def test_rules_of_a_recipe_are_changed_as_well() -> None:
    rules = "weights.rules=[{match: down_proj, bits: 3, symmetric: false}]"
    answer = ask("vllm:cpu", planned("gptq-w4", SMALL, rules))
    assert set(settings_of(answer)) == {"weights.rules.0.bits=4", "export.format=compressed-tensors"}
    assert settings_of(ask("sglang:cpu", planned("gptq-w4", SMALL, rules))) == ("weights.rules=[]",)


def test_fp8_scales_keep_the_format() -> None:
    subject = planned("gptq-w4", SMALL, "export.format=compressed-tensors", "kv_cache.fp8_scales=head")
    answer = ask("gptqmodel", subject)
    assert not answer.loads
    assert answer.suggestion is None


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_folder_says_what_the_recipe_said(tmp_path: Path, form: str) -> None:
    subject = subject_of_folder(written(tmp_path, form))
    assert subject.format == form
    assert not subject.act_order
    assert subject.words_version == 0
    assert not subject.loose_words
    assert subject.splits["model.layers.0.self_attn.o_proj"] == "columns"
    plan = planned("gptq-w4", SMALL, f"export.format={form}")
    for target in known_targets():
        assert check_target(target, subject).loads == check_target(target, plan).loads


def test_a_dense_folder_loads_anywhere() -> None:
    subject = subject_of_folder(CheckpointFolder.open(STORY_LLAMA))
    assert subject.format == "dense"
    assert all(check_target(target, subject).loads for target in known_targets())
    assert not ask("vllm", subject, 64).loads


def test_a_lossless_conversion_is_suggested_where_it_is_enough(tmp_path: Path) -> None:
    three = subject_of_folder(written(tmp_path, "gptq", bits=3))
    answer = ask("vllm", three)
    assert answer.suggestion is not None
    assert answer.suggestion.convert_to == "compressed-tensors"
    assert answer.advice == "It loads after optgptq convert --to compressed-tensors."
    assert settings_of(ask("sglang", three)) == (
        "export.format=gptq",
        "weights.bits=4",
        "weights.group_size=64",
        "weights.symmetric=true",
    )


def test_what_the_recipe_of_a_folder_says_is_not_suggested_again(tmp_path: Path) -> None:
    folder = written(tmp_path, "gptq", bits=3)
    weights = {"bits": 3, "group_size": 64, "symmetric": True}
    for section, expected in (
        ({"export": {"format": "gptq"}, "weights": weights}, ("weights.bits=4",)),
        ({"export": {"format": "planes"}, "weights": weights}, ("export.format=gptq", "weights.bits=4")),
        (7, ("export.format=gptq", "weights.bits=4", "weights.group_size=64", "weights.symmetric=true")),
    ):
        (folder.path / MANIFEST_FILE).write_text(json.dumps({"recipe": section, "files": {}}))
        assert settings_of(ask("sglang", subject_of_folder(CheckpointFolder.open(folder.path)))) == expected


def test_a_wrong_label_is_seen_in_the_words(tmp_path: Path) -> None:
    mislabelled = written(tmp_path, "gptq_v2", config={"checkpoint_format": "gptq", "format": "gptq"})
    subject = subject_of_folder(mislabelled)
    assert (subject.format, subject.words_version) == ("gptq", 2)
    assert ask("vllm", subject).loads
    answer = ask("gptqmodel", subject)
    assert [refusal.rule for refusal in answer.refusals] == ["zero_points"]
    assert answer.suggestion is not None
    assert answer.suggestion.convert_to == "gptq"


def test_act_order_in_the_configuration_and_in_the_index(tmp_path: Path) -> None:
    said = subject_of_folder(written(tmp_path, "gptq", config={"desc_act": True}))
    answer = ask("vllm", said)
    assert [refusal.rule for refusal in answer.refusals] == ["act_order"]
    assert answer.suggestion is not None
    assert answer.suggestion.convert_to == "gptq"
    assert ask("sglang", said).loads


def test_an_index_that_means_something_needs_another_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(tmp_path, "gptq")
    file = folder.path / folder.weight_files[0]
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    subject = subject_of_folder(CheckpointFolder.open(folder.path))
    assert subject.act_order
    answer = ask("vllm", subject)
    assert [refusal.rule for refusal in answer.refusals] == ["act_order"]
    assert "weights.group_size=64" in settings_of(answer)


def test_codes_with_gaps(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(tmp_path, "compressed-tensors", bits=3)
    file = folder.path / folder.weight_files[0]
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        columns = int(tensors[name.removesuffix("packed") + "shape"][1])
        tensors[name] = torch.zeros(tensors[name].shape[0], -(-columns // 10), dtype=torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    index = folder.path / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    subject = subject_of_folder(CheckpointFolder.open(folder.path))
    assert subject.loose_words
    assert [refusal.rule for refusal in ask("vllm", subject).refusals] == ["packing"]
    assert ask("transformers", subject).loads


def test_a_family_that_is_not_known_here(tmp_path: Path) -> None:
    folder = written(tmp_path, "gptq")
    copy = shutil.copytree(folder.path, tmp_path / "other")
    content = json.loads((copy / "config.json").read_text())
    content.update(architectures=["Mystery"], model_type="mystery")
    (copy / "config.json").write_text(json.dumps(content))
    subject = subject_of_folder(CheckpointFolder.open(copy))
    assert subject.model_type == "mystery"
    assert subject.splits["model.layers.0.mlp.down_proj"] == "columns"
    assert ask("vllm", subject).loads
    assert not ask("optgptq", subject).loads


def test_mixed_linears_of_a_folder_become_alike(tmp_path: Path) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    subject = subject_of_folder(write_checkpoint(source, tmp_path / "mixed", layouts, weights, format_name="gptq"))
    answer = ask("transformers", subject)
    assert {refusal.rule for refusal in answer.refusals} == {"mixed", "dense"}
    assert answer.suggestion is not None
    assert answer.suggestion.convert_to == "compressed-tensors"
    assert "weights.bits=4" in settings_of(ask("sglang:cpu", subject))


def test_models_that_no_engine_runs_as_they_are() -> None:
    config = {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 64,
        "no_bias": True,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi": True},
    }
    recipe = load_recipe("gptq-w4", ["weights.group_size=32"])
    subject = subject_of_plan(config_spec(config), recipe, config=config, weight_dtype=torch.float16)
    assert subject.traits == ("grouped-mpt",)
    for name, loads in (("vllm", False), ("sglang", False), ("transformers", False), ("optgptq", True)):
        answer = ask(name, subject)
        assert answer.loads is loads
        assert answer.suggestion is None
