"""What it takes to write a text: more of everything takes longer, and few texts take longer each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec
from optgptq.planning.machine import MachineRates
from optgptq.planning.writing_time import TEXTS_AT_A_TIME, writing_seconds
from optgptq.runtime import self_text

RATES = MachineRates(
    products=1e11, moment_products=1e11, factor_products=1e11, attention_products=1e10, numbers=1e9, hashed_bytes=1e9
)
SPEC = model_spec(CheckpointFolder.open(bundled_path("bundled:story-llama")))


def seconds(spec: DecoderSpec = SPEC, *, num_windows: int = 128, window_size: int = 1024) -> float:
    return writing_seconds(spec, RATES, num_windows=num_windows, window_size=window_size)


def test_as_many_texts_are_written_at_a_time_as_planned() -> None:
    assert self_text._RUNNING == TEXTS_AT_A_TIME


def test_more_windows_take_as_much_longer() -> None:
    assert seconds(num_windows=512) == pytest.approx(4 * seconds(num_windows=128))


def test_few_texts_share_a_step_among_fewer() -> None:
    assert seconds(num_windows=8) > 2 * seconds(num_windows=128) / 16


@pytest.mark.parametrize("field", ["layers", "vocab_size", "intermediate_size"])
def test_a_larger_model_takes_longer(field: str) -> None:
    assert seconds(replace(SPEC, **{field: 2 * getattr(SPEC, field)})) > 1.01 * seconds()


def test_a_large_model_is_bound_by_its_weights() -> None:
    large = replace(SPEC, hidden_size=8192, intermediate_size=28672, layers=SPEC.layers * 10)
    weights = 10 * SPEC.num_layers * 3 * 8192 * 28672
    assert seconds(large) > 128 * 1024 * weights / RATES.products
