"""Gates of a job: refused before any work where they can never be judged, and harmless once the result is safe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import mixed_story_layouts, quantize_all, write_checkpoint

from optgptq import gate_job
from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import CapacityError, GateError, InputError, Interrupted, RecipeError, TextError, UsageError
from optgptq.evaluation import sample as sample_module
from optgptq.evaluation.gate_checks import check_text
from optgptq.gate_job import GateReport, check_gates, run_gates
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import Recipe
from optgptq.reports.events import PhaseStarted, ProgressEvent, WarningRaised

STORY = bundled_path("bundled:story-llama")
TEXT = ["gates.text=bundled:story-evaluation", "gates.window_size=64", "gates.max_tokens=512"]


def recipe_of(*overrides: str, name: str = "gptq-w4") -> Recipe:
    return load_recipe(name, [*overrides])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized story model."""
    source, layouts = CheckpointFolder.open(STORY), mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    folder = tmp_path_factory.mktemp("gates") / "out"
    return write_checkpoint(source, folder, layouts, weights, format_name="compressed-tensors").path


def record_of(folder: Path, **values: Any) -> dict[str, Any]:
    """Return what a job would have recorded of the checkpoint."""
    linears = gate_job.stored_linears(CheckpointFolder.open(folder))
    facts = {"method": "gptq", "loss": 0.1, "clip_fraction": 0.0, "damp_ratio_used": 0.01, "num_dead_inputs": 0}
    return {
        "recipe": {"weights": {"method": "gptq"}},
        "layers": [{"name": each.name, **facts, "num_tokens": 64, **values} for each in linears if not each.is_dense],
        "decoder_layers": [{"index": 0, "output_error": 0.2}],
    }


def run(output: Path, *overrides: str, record: dict[str, Any] | None = None) -> tuple[GateReport, list[ProgressEvent]]:
    told: list[ProgressEvent] = []
    content = record_of(output) if record is None else record
    return run_gates(output, STORY, recipe_of(*overrides), content, progress=told.append), told


def names(events: Sequence[ProgressEvent]) -> list[str]:
    """Return the names of the phases, each once."""
    return list(dict.fromkeys(event.name for event in events if isinstance(event, PhaseStarted)))


def test_without_gates_nothing_is_done(output: Path) -> None:
    report, told = run(output)
    assert report == GateReport()
    assert told == []
    report.require_passed()
    assert report.record() == {"gates": [], "evaluation": None, "sample": None}


def test_all_kinds_of_gates_are_judged_and_a_sample_is_written(output: Path) -> None:
    limits = ["gates.max_kl=5", "gates.min_top1=0.01", "gates.max_layer_error=0.25", "gates.min_tokens_per_linear=65"]
    report, told = run(output, *TEXT, *limits, "gates.sample_prompt=Once upon a time", "gates.sample_tokens=6")
    assert names(told) == ["evaluation", "sample"]
    assert [(each.name, each.passed) for each in report.outcomes] == [
        ("max_kl", True),
        ("min_top1", True),
        ("max_layer_error", True),
        ("min_tokens_per_linear", False),
    ]
    assert report.evaluation is not None
    assert report.evaluation["num_windows"] == 8
    assert report.evaluation["mean_kl"] == report.outcomes[0].value > 0
    assert report.evaluation["baseline_perplexity"] < 10
    assert report.outcomes[0].seconds == pytest.approx(report.evaluation["seconds"] / 2)
    assert report.sample is not None
    assert len(report.sample.token_ids) == 6
    assert report.failure is None
    record = json.loads(json.dumps(report.record()))
    assert record["sample"]["prompt"] == "Once upon a time"
    assert [each["name"] for each in record["gates"]] == [each.name for each in report.outcomes]
    with pytest.raises(GateError) as caught:
        report.require_passed()
    assert caught.value.where == "quality gate gates.min_tokens_per_linear"
    assert "(missed by 1)" in caught.value.found


def test_fewer_tokens_than_a_window_of_the_model_are_named_as_the_recipe_has_them() -> None:
    with pytest.raises(RecipeError) as caught:
        check_text(recipe_of(TEXT[0], "gates.max_tokens=100").gates, STORY)
    assert caught.value.where == "gates.max_tokens"
    assert caught.value.expected == "at least one window, 1024 tokens (gates.window_size is not set)"
    assert "gates.window_size" in caught.value.action


def test_a_text_alone_is_evaluated_for_the_record(output: Path) -> None:
    report, told = run(output, *TEXT, "gates.max_tokens=6400")
    assert report.outcomes == ()
    assert report.evaluation is not None
    details = [event.detail for event in told if isinstance(event, PhaseStarted)]
    # 64 windows go through the model together.
    assert details == ["bundled:story-evaluation", "window 64/100", "window 100/100"]
    report.require_passed()


def test_a_quantized_cache_is_scored_through_its_codes() -> None:
    recipe = recipe_of(*TEXT, "gates.max_kl=0", "kv_cache.fp8_scales=off", name="kv4")
    told: list[ProgressEvent] = []
    report = run_gates(STORY, STORY, recipe, {}, progress=told.append)
    assert report.evaluation is not None
    assert report.evaluation["decode"] is True


def test_a_figure_that_is_missing_never_passes(output: Path) -> None:
    report, _ = run(output, "gates.max_linear_loss=1", record=record_of(output, loss=None))
    assert not report.outcomes[0].passed
    assert report.outcomes[0].problem is not None
    with pytest.raises(InputError, match="loss"):
        report.require_passed()


def test_a_missed_gate_comes_before_one_without_a_figure(output: Path) -> None:
    record = record_of(output, loss=None)
    report, _ = run(output, "gates.max_linear_loss=1", "gates.max_layer_error=0.1", record=record)
    with pytest.raises(GateError) as caught:
        report.require_passed()
    assert caught.value.where == "quality gate gates.max_layer_error, gates.max_linear_loss"
    assert "no figure" in caught.value.found


def test_an_evaluation_that_fails_leaves_the_other_outcomes(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(gate_job, "evaluate_folders", fail)
    report, _ = run(output, *TEXT, "gates.max_kl=5", "gates.max_layer_error=1", "gates.sample_prompt=Once")
    assert [each.passed for each in report.outcomes] == [False, True]
    assert report.evaluation is None
    assert report.sample is not None
    with pytest.raises(CapacityError, match="optgptq eval"):
        report.require_passed()


def test_too_little_memory_is_told_and_nothing_is_loaded(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_job, "available_memory_bytes", lambda: 1000)
    monkeypatch.setattr(gate_job, "evaluate_folders", lambda *_, **__: pytest.fail("loaded"))
    report, _ = run(output, *TEXT, "gates.max_kl=5")
    with pytest.raises(CapacityError, match="float32"):
        report.require_passed()


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), KeyError("x"), InputError("a", expected="b", found="c", action="D.")]
)
def test_a_sample_that_crashes_is_a_warning(output: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(sample_module, "LLM", fail)
    report, told = run(output, "gates.sample_prompt=Once", "gates.max_layer_error=1")
    assert report.sample is None
    assert [event.message for event in told if isinstance(event, WarningRaised)] == list(report.warnings)
    assert "wrote no text" in report.warnings[0]
    report.require_passed()


def test_a_request_to_stop_is_no_crash(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop in (Interrupted("job", expected="a", found="b", action="C."), KeyboardInterrupt()):

        def ask(*arguments: object, stop: BaseException = stop, **named: object) -> None:
            raise stop

        monkeypatch.setattr(sample_module, "LLM", ask)
        monkeypatch.setattr(gate_job, "evaluate_folders", ask)
        for overrides in (["gates.sample_prompt=Once"], TEXT):
            with pytest.raises(type(stop)):
                run(output, *overrides)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["gates.max_layer_error=1", "calibration.full_precision_windows=0"], "gates.max_layer_error"),
        (
            ["weights.method=none", "weights.grid_search=walk", "kv_cache.bits=4", "gates.max_linear_loss=1"],
            "gates.max_linear_loss",
        ),
    ],
)
def test_gates_that_can_never_be_judged_are_refused(overrides: list[str], where: str, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("{}")
    with pytest.raises(UsageError) as caught:
        check_gates(recipe_of(*overrides, name=str(base)))
    assert caught.value.where == where


def test_gates_that_can_be_judged_are_let_through() -> None:
    limits = ["gates.max_kl=5", "gates.max_layer_error=1", "gates.max_dense_share=0", "gates.sample_prompt=Once"]
    check_gates(recipe_of(*TEXT, *limits), STORY)
    check_gates(recipe_of(), STORY)
    shifted = ["weights.target_shift=exact", "calibration.full_precision_windows=0", "gates.max_layer_error=1"]
    check_gates(recipe_of(*shifted), STORY)


def test_the_text_is_read_before_any_work(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    with pytest.raises(TextError, match="64 tokens"):
        check_gates(recipe_of(*TEXT, f"gates.text={short}", "gates.max_kl=1"), STORY)
    with pytest.raises(TextError, match="missing"):
        check_gates(recipe_of(*TEXT, f"gates.text={tmp_path / 'missing.txt'}", "gates.max_kl=1"), STORY)
    with pytest.raises(RecipeError, match=r"gates\.text"):
        recipe_of("gates.max_kl=1")


def test_a_model_without_a_tokenizer_can_write_no_sample(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(STORY, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(TextError, match="tokenizer"):
        check_gates(recipe_of("gates.sample_prompt=Once"), folder)


def test_a_machine_that_is_too_small_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_job, "total_memory_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match="gates ask for"):
        check_gates(recipe_of(*TEXT, "gates.max_kl=1"), STORY)
    check_gates(recipe_of("gates.max_layer_error=1"), STORY)
