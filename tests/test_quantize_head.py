"""The output head in codes, end to end: every family, tied and not, both formats, stopped and gone on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
from support.checkpoints import STORY_LLAMA
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes, run_with_stops, stopped_at_linear
from support.tiny_models import random_tokens
from transformers import AutoModelForCausalLM

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.convert import convert
from optgptq.errors import RecipeError
from optgptq.formats import detect
from optgptq.formats.verify import verify_folder, weight_digest
from optgptq.models.linear import Linear
from optgptq.models.registry import model_spec
from optgptq.planning import plan_job
from optgptq.quantize import JobOptions, QuantizeResult, quantize
from optgptq.quantized_weight import QuantizedWeight
from optgptq.recipe.head import HeadRecipe
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.inspect import inspect_checkpoint
from optgptq.runtime.linear import QuantLinear
from optgptq.runtime.llm import LLM
from optgptq.runtime.load import load_model
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.solvers import METHODS, LayerProblem, LayerSolution

FAMILIES = (
    "llama-multi_head_biases",
    "mistral-short_window",
    "qwen2-biases",
    "qwen3-norms",
    "gemma2-softcaps",
    "gemma3text-local_global",
    "phi3-longrope",
    "gpt2-conv1d",
    "gptneox-parallel",
    "opt-pre_norm_projected",
    "bloom-six_heads",
    "mpt-alibi",
    "falcon-grouped",
)
# No multiple of what words, tiles or devices hold.
VOCABULARY = 271
TEXT = {"num_windows": 4, "window_size": 16}


def with_head(recipe: Recipe, **head: Any) -> Recipe:
    return recipe.model_copy(update={"head": HeadRecipe(**head)})


def head_of(folder: Path) -> QuantizedWeight:
    source = CheckpointFolder.open(folder)
    form, name = detect(source), model_spec(source).names.head
    assert form is not None
    (layout,) = [layout for layout in form.read_layouts(source) if layout.name == name]
    return form.decode(source, layout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name, written when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            family, _, ties = name.partition("/")
            tiny = wide_llama(num_attention_heads=6) if family == "wide" else tiny_model(family)
            values = {**tiny.values, "vocab_size": VOCABULARY}
            if ties:
                values["tie_word_embeddings"] = ties == "tied"
            tiny = replace(tiny, values=values)
            self[name] = write_model(tiny, tmp_path_factory.mktemp("models") / "model")
            return self[name]

    return Folders()


@pytest.fixture
def solutions(monkeypatch: pytest.MonkeyPatch) -> list[LayerSolution]:
    """What the head's solver answered while the job runs."""
    seen: list[LayerSolution] = []

    def recording(solver: Any) -> Any:
        def solve(problem: LayerProblem) -> LayerSolution:
            seen.append(solver(problem))
            return seen[-1]

        return solve

    recorded = {name: replace(method, solver=recording(method.solver)) for name, method in METHODS.items()}
    monkeypatch.setattr("optgptq.calibration.head.METHODS", recorded)
    return seen


GPTQ: tuple[str, dict[str, Any]] = ("gptq", {"bits": 8})
COMPRESSED: tuple[str, dict[str, Any]] = ("compressed-tensors", {"bits": 4, "symmetric": False})


@pytest.mark.parametrize(
    ("name", "form", "head"),
    [
        *((name, *GPTQ) for name in FAMILIES),
        *((name, *COMPRESSED) for name in FAMILIES if name != "gpt2-conv1d"),
        ("qwen3-norms", "gptq", {"bits": 4, "group_size": -1, "method": "rtn"}),
        ("qwen3-norms", "compressed-tensors", {"bits": 8, "method": "rtn"}),
    ],
)
def test_every_family_computes_with_what_the_solver_found(
    name: str, form: str, head: dict[str, Any], models: dict[str, Path], solutions: list[LayerSolution], tmp_path: Path
) -> None:
    recipe = with_head(tiny_recipe(calibration=TEXT, export={"format": form}), **head)
    result = quantize(models[name], recipe, tmp_path / "out")
    source, output = CheckpointFolder.open(models[name]), CheckpointFolder.open(tmp_path / "out")
    report = verify_folder(output)
    assert report.problems == ()
    assert report.num_quantized == len(result.record["layers"])
    (solution,) = solutions
    assert weight_digest(head_of(tmp_path / "out")) == weight_digest(solution.weight)
    spec = model_spec(output)
    assert not spec.tied_head
    assert f"{spec.names.head}.weight" not in output.tensors
    embedding = f"{spec.names.embedding}.weight"
    assert torch.equal(output.read(embedding), source.read(embedding))
    assert spec.names.head not in {entry["name"] for entry in result.record["dense"]}
    facts = result.record["layers"][-1]
    assert (facts["name"], facts["bits"], facts["num_tokens"]) == (spec.names.head, head["bits"], 64)
    decoded, held = load_model(tmp_path / "out"), load_model(tmp_path / "out", weights="exact")
    assert isinstance(decoded.head.project, Linear)
    assert torch.equal(decoded.head.project.weight_OI, solution.weight.dequantize())
    assert isinstance(held.head.project, QuantLinear)
    tokens_BS = random_tokens(2, 9, vocab_size=VOCABULARY)
    expected = decoded.logits(tokens_BS)
    assert expected.shape[-1] == VOCABULARY
    assert torch.allclose(held.logits(tokens_BS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ties", ["tied", "untied"])
@pytest.mark.parametrize("name", ["llama-grouped_query", "gptneox-parallel", "gemma2-softcaps"])
def test_a_tied_head_becomes_one_of_its_own(name: str, ties: str, models: dict[str, Path], tmp_path: Path) -> None:
    model = models[f"{name}/{ties}"]
    result = quantize(model, with_head(tiny_recipe(calibration=TEXT), bits=8), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    told = [warning for warning in result.warnings if warning.startswith("head.bits makes a head of its own")]
    assert len(told) == (ties == "tied")


def test_eight_bits_are_nearly_what_the_dense_head_is(models: dict[str, Path], tmp_path: Path) -> None:
    tokens_BS = random_tokens(4, 16, vocab_size=VOCABULARY)
    kls = {}
    for bits in (None, 8, 4):
        recipe = tiny_recipe(calibration=TEXT, bits=8)
        output = tmp_path / f"out-{bits}"
        quantize(models["wide"], recipe if bits is None else with_head(recipe, bits=bits, group_size=16), output)
        log_probabilities = load_model(output).logits(tokens_BS).double().log_softmax(-1)
        if bits is None:
            dense = log_probabilities
        kls[bits] = float((dense.exp() * (dense - log_probabilities)).sum(-1).mean())
    assert 0 < kls[8] < 1e-4
    assert kls[8] < kls[4] / 50


PARTS: dict[str, dict[str, Any]] = {
    "rtn": {"weights": {"method": "rtn"}},
    "shift": {"weights": {"target_shift": "exact", "shift_strength": "held_out"}},
    "full precision": {"calibration": {**TEXT, "moment_stream": "full_precision", "windows_per_batch": 1}},
    "norms": {"norm_tweaking": {"steps": 2, "learning_rate": 0.01}},
    "rotation": {"transform": {"fold_norms": True, "residual_rotation": "hadamard"}},
    "refined": {"weights": {"scale_refit": True, "code_sweeps": 1}, "head": {"bits": 4, "group_size": 16}},
    "cache": {"kv_cache": {"bits": 4, "num_windows": 2, "recent_tokens": 4}},
    "fp8": {"export": {"format": "compressed-tensors"}, "kv_cache": {"fp8_scales": "head"}},
}


def recipe_with(name: str) -> Recipe:
    values = with_head(tiny_recipe(calibration=TEXT), bits=8).model_dump(exclude_unset=True)
    for section, fields in PARTS[name].items():
        values[section] = {**values.get(section, {}), **fields}
    return Recipe.model_validate(values)


@pytest.mark.parametrize("name", PARTS)
def test_a_stopped_job_goes_on_to_the_same_bytes(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_with(name)
    whole = quantize(models["wide/tied"], recipe, tmp_path / "whole")
    result, steps = run_with_stops(models["wide/tied"], recipe, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert steps.index("head") == steps.index("layer-00001") + 1
    assert steps.count("head") == 1
    assert result.record["layers"] == whole.record["layers"]
    assert verify_folder(CheckpointFolder.open(tmp_path / "out")).problems == ()


@pytest.mark.parametrize("spill_share", [0.0, float("inf")])
def test_a_job_stopped_at_the_head_runs_little_again(
    spill_share: float, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = with_head(tiny_recipe(calibration=TEXT), bits=4)
    whole = quantize(models["wide"], recipe, tmp_path / "whole")
    options = JobOptions(spill_share=spill_share)
    stop_at = len(whole.record["layers"])
    with pytest.raises(StoppedError):
        quantize(models["wide"], recipe, tmp_path / "out", progress=stopped_at_linear(stop_at), options=options)
    told: list[events.ProgressEvent] = []
    quantize(models["wide"], recipe, tmp_path / "out", progress=told.append, options=options)
    phases = [event.name for event in told if isinstance(event, events.PhaseStarted)]
    assert phases.count("running finished layers") == (0 if spill_share else 2)
    assert phases.count("output head") == 1
    assert [event.name for event in told if isinstance(event, events.LinearFinished)] == ["lm_head"]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_memory_that_runs_out_at_the_head_is_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optgptq.weight_job import solve_head

    calls = []

    def failing_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return solve_head(*arguments)

    monkeypatch.setattr("optgptq.weight_job.solve_head", failing_once)
    result = quantize(models["wide"], with_head(tiny_recipe(calibration=TEXT), bits=8), tmp_path / "out")
    assert "output head: memory ran out with 4 calibration windows per batch, now 2" in result.warnings


def test_conversion_keeps_the_head(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = with_head(tiny_recipe(calibration=TEXT), bits=8)
    quantize(models["wide/tied"], recipe, tmp_path / "gptq")
    convert(tmp_path / "gptq", tmp_path / "compressed", to="compressed-tensors")
    convert(tmp_path / "compressed", tmp_path / "back", to="gptq")
    digests = {weight_digest(head_of(tmp_path / name)) for name in ("gptq", "compressed", "back")}
    assert len(digests) == 1
    config = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert config["lm_head"] is True
    assert config["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True}}


def test_plan_and_record_count_the_head(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = with_head(tiny_recipe(calibration=TEXT), bits=8, group_size=16)
    planned = plan_job(models["wide/tied"], recipe, output=tmp_path / "out")
    result = quantize(models["wide/tied"], recipe, tmp_path / "out")
    assert planned.bits_per_weight == result.bits_per_weight
    assert planned.record()["dense"] == []
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert planned.disk.quantized_bytes + planned.disk.dense_bytes == pytest.approx(stored, rel=0.1)
    names = [phase.name for phase in planned.phases]
    assert names == [phase["name"] for phase in result.record["phases"] if phase["name"] in names]
    assert "output head" in names
    assert [phase.seconds > 0 for phase in planned.phases if phase.name == "output head"] == [True]
    found = inspect_checkpoint(CheckpointFolder.open(tmp_path / "out"))
    assert "lm_head" in {layer.name for layer in found.layers}


def test_a_group_size_that_does_not_divide_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = with_head(tiny_recipe(calibration=TEXT), bits=8, group_size=32)
    with pytest.raises(RecipeError) as caught:
        plan_job(models["wide"], recipe, output=tmp_path / "out")
    assert (caught.value.where, caught.value.found) == ("head.group_size", "32")


@contextmanager
def others_may_warn() -> Iterator[None]:
    with catch_warnings():
        simplefilter("ignore")
        yield


def story(tmp_path: Path, *settings: str) -> QuantizeResult:
    common = ["calibration.source=bundled:story-calibration", "calibration.num_windows=4", "calibration.window_size=64"]
    return quantize(STORY_LLAMA, load_recipe("gptq-w4", [*common, *settings]), tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        ["head.bits=8"],
        ["head.bits=4"],
        ["head.bits=4", "head.group_size=-1", "weights.rules=[{match: down_proj, bits: 8}]"],
    ],
)
def test_transformers_reads_the_head(settings: list[str], tmp_path: Path) -> None:
    output = story(tmp_path, "export.format=compressed-tensors", *settings).output
    tokens_BS = torch.randint(2, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with others_may_warn(), torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(tokens_BS).logits
    assert float((theirs - load_model(output).logits(tokens_BS)).abs().max()) < 1e-3


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_the_engine_writes_the_same_with_codes_and_decoded(form: str, tmp_path: Path) -> None:
    output = story(tmp_path, f"export.format={form}", "head.bits=8").output
    sampling = SamplingParams(temperature=0.0, max_tokens=12)
    prompts = ["Once upon a time", "The little dog"]
    texts = [
        [result.outputs[0].text for result in LLM(output, weights=weights).generate(prompts, sampling)]
        for weights in ("dense", "exact")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])
