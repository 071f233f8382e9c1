"""The plan of a job beside the job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from support.large_folder import write_large_llama
from support.quantizable import tiny_recipe, wide_llama, write_model

from optgptq.bundled import bundled_path
from optgptq.errors import CapacityError, RecipeError
from optgptq.planning import MachineFile, essence, plan_job, require_fit
from optgptq.planning.fit import Machine
from optgptq.planning.job_plan import JobPlan
from optgptq.planning.words import told_bytes
from optgptq.quantize import quantize
from optgptq.recipe.loading import load_recipe
from optgptq.targets import parse_target

STORY = bundled_path("story-llama")
TEXT = "calibration.source=bundled:story-calibration"
GIGABYTE = 10**9


class Rates(MachineFile):
    """A machine of which everything is known."""

    def get(self, name: str, measure: object) -> Mapping[str, float]:
        del measure
        if name.startswith("rates"):
            rates = ("products", "moment_products", "factor_products", "attention_products", "numbers", "hashed_bytes")
            return dict.fromkeys(rates, 1e9)
        return {"bytes": 1e8} if name.startswith("disk") else {"per_weight": 1e-7, "per_product": 1e-11}


def plan(model: Path, recipe: str, folder: Path, *settings: str) -> JobPlan:
    return plan_job(model, load_recipe(recipe, [TEXT, *settings]), output=folder / "out", kept=Rates(folder))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_size_and_bits_are_those_of_the_output(tmp_path: Path, form: str, symmetric: bool) -> None:
    model = write_model(wide_llama(), tmp_path / "model")
    recipe = tiny_recipe(
        calibration={"source": "bundled:story-calibration"},
        export={"format": form},
        method="rtn",
        group_size=16,
        symmetric=symmetric,
    )
    planned = plan_job(model, recipe, output=tmp_path / "out", kept=Rates(tmp_path))
    result = quantize(model, recipe, tmp_path / "out")
    assert planned.bits_per_weight == result.bits_per_weight
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert planned.disk.output_bytes == pytest.approx(size, rel=0.35)
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert planned.disk.quantized_bytes + planned.disk.dense_bytes == pytest.approx(stored, rel=0.1)
    assert {entry["name"] for entry in planned.record()["dense"]} == {"lm_head"}


@pytest.mark.parametrize("coefficients", ["float", "int8", "steps"])
def test_bits_of_binary_codes_are_those_of_the_output(tmp_path: Path, coefficients: str) -> None:
    settings = [TEXT, "calibration.num_windows=4", "calibration.window_size=32", f"binary.coefficients={coefficients}"]
    settings += ["weights.target_shift=off", "binary.sweeps=0", "binary.refits=0", "weights.group_size=64"]
    recipe = load_recipe("binary-w3", settings)
    planned = plan_job(STORY, recipe, output=tmp_path / "out", kept=Rates(tmp_path))
    assert planned.bits_per_weight == pytest.approx(quantize(STORY, recipe, tmp_path / "out").bits_per_weight)


def test_a_model_of_70_billion_weights_is_planned_in_seconds(tmp_path: Path) -> None:
    model = write_large_llama(tmp_path / "model")
    began = time.process_time()
    planned = plan(model, "attention-aware-w3", tmp_path)
    assert time.process_time() - began < 3
    record = planned.record()
    assert record["bits_per_weight"] == pytest.approx(3 + 16 / 128)
    assert record["num_decoder_layers"] == 80
    assert record["disk"]["dense_bytes"] > 2 * 2 * 128256 * 8192
    # One moment of the widest linear alone has 3.3 GB.
    assert 15 * GIGABYTE < record["peak_memory_bytes"] < 80 * GIGABYTE
    assert planned.peak.name == "decoder layers"
    assert "28672 inputs" not in " ".join(planned.checks)


def test_too_little_text_is_said(tmp_path: Path) -> None:
    found = plan(STORY, "gptq-w4", tmp_path, "calibration.num_windows=2", "calibration.window_size=128").checks
    assert found == (
        "2 windows of 128 tokens cannot fill the Hessian of the widest linear, which has 384 inputs; "
        "use at least 1536 tokens.",
    )
    found = plan(STORY, "gptq-w4", tmp_path, "calibration.num_windows=4", "calibration.window_size=2000").checks
    assert found == ("Windows of 2000 tokens are longer than the 1024 positions the model allows.",)


def test_what_the_job_refuses_the_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(STORY, "gptq-w4", tmp_path, "weights.group_size=1000")
    assert "weights.group_size" in caught.value.where


def test_memory_that_is_short_puts_activations_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ("calibration.num_windows=2000", "calibration.window_size=1024")
    in_memory = plan(STORY, "gptq-w4", tmp_path, *wide)
    assert in_memory.activations == "memory"
    machine = replace(in_memory.machine, free_memory_bytes=in_memory.peak.cpu_bytes - 1)
    monkeypatch.setattr("optgptq.planning.job_plan.machine_now", lambda device, folder, *, kept_bytes=0: machine)
    on_disk = plan(STORY, "gptq-w4", tmp_path, *wide)
    assert on_disk.activations == "disk"
    assert on_disk.fits
    assert on_disk.peak.cpu_bytes < in_memory.peak.cpu_bytes
    assert on_disk.disk.spilled_bytes > in_memory.disk.spilled_bytes
    assert "activations on disk" in essence(on_disk)[0]


@pytest.mark.parametrize("recipe", ["kv4", "opt-gqa-w4"])
def test_walks_before_and_behind_keep_less_where_activations_are_on_disk(tmp_path: Path, recipe: str) -> None:
    settings = (
        ["gqa.group=2", "weights.group_size=16"]
        if recipe == "opt-gqa-w4"
        else ["kv_cache.num_windows=500", "kv_cache.fp8_scales=off"]
    )
    model = write_model(wide_llama(num_key_value_heads=4), tmp_path / "model") if "gqa" in recipe else STORY
    windows = ("calibration.num_windows=500", "calibration.window_size=512", *settings)
    loaded = load_recipe(recipe, [TEXT, *windows])
    in_memory, on_disk = (
        plan_job(model, loaded, output=tmp_path / "out", activations=place, kept=Rates(tmp_path))
        for place in ("memory", "disk")
    )
    name = "grouping heads" if "gqa" in recipe else "kv cache"
    held = [{phase.name: phase.cpu_bytes for phase in each.phases}[name] for each in (in_memory, on_disk)]
    assert held[1] < held[0]
    assert on_disk.disk.spilled_bytes > in_memory.disk.spilled_bytes


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0.00 MB"), (1_234_000, "1.23 MB"), (999_999_999, "1.00 GB"), (2_345_000_000, "2.35 GB")],
)
def test_small_sizes_are_told_in_megabytes(num_bytes: int, expected: str) -> None:
    assert told_bytes(num_bytes) == expected


def test_what_cannot_fit_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(free_memory_bytes=10**6, free_device_bytes=None, free_disk_bytes=10**3)
    monkeypatch.setattr("optgptq.planning.job_plan.machine_now", lambda device, folder, *, kept_bytes=0: machine)
    found = plan(STORY, "gptq-w4", tmp_path)
    assert not found.fits
    assert [shortage.what for shortage in found.shortages] == ["memory", "disk"]
    assert len(essence(found)) == 4
    with pytest.raises(CapacityError) as caught:
        require_fit(found)
    assert caught.value.where == f"plan: memory in phase {found.peak.name}"
    assert caught.value.found == "1.00 MB free"
    assert caught.value.action.endswith(".")


def test_text_that_the_model_writes_holds_the_whole_model(tmp_path: Path) -> None:
    model = write_large_llama(tmp_path / "model", num_hidden_layers=8)
    read, written = (plan(model, "gptq-w4", tmp_path, *settings) for settings in ((), ("calibration.source=self",)))
    phases = [{phase.name: phase.cpu_bytes for phase in each.phases}["calibration text"] for each in (read, written)]
    assert phases[1] - phases[0] > 8 * 2 * 850e6
    assert written.seconds > read.seconds


def test_targets_answer(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w3", [TEXT])
    targets = [parse_target("optgptq"), parse_target("vllm")]
    found = plan_job(STORY, recipe, output=tmp_path / "out", kept=Rates(tmp_path), targets=targets)
    assert found.targets[0].loads
    assert [answer["target"] for answer in found.record()["targets"]] == [
        answer.target.name for answer in found.targets
    ]


@pytest.mark.parametrize("recipe", ["kv4", "w4-kv4", "rtn-w4", "gptqt-w3", "binary-w3", "attention-aware-w2-rotated"])
def test_every_kind_of_job_has_a_plan(tmp_path: Path, recipe: str) -> None:
    found = plan(STORY, recipe, tmp_path)
    names = [phase.name for phase in found.phases]
    assert ("kv cache" in names) == ("kv" in recipe)
    assert ("decoder layers" in names) == (recipe != "kv4")
    assert found.seconds > 0
    assert all(phase.cpu_bytes > 0 and phase.seconds >= 0 for phase in found.phases)
    assert len(essence(found)) == 2
