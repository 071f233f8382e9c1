"""States in a file: the same bits, one batch in memory at a time, no file left behind."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_bytes import LiveBytes
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.disk_states import DiskStore, open_store
from optgptq.calibration.start import start_calibration
from optgptq.calibration.states import ActivationStore, MemoryStore
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import windows_from_tokens
from optgptq.errors import CapacityError, OutputError
from optgptq.formats import format_named
from optgptq.models.attention import attention_context
from optgptq.models.layer import LayerState
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES
from optgptq.plan import plan_linears
from optgptq.recipe.records import AttentionRecipe, NormTweakingRecipe, Recipe

WINDOWS = {"windows_per_batch": 2}
ATTENTION = AttentionRecipe(values=True, value_rows=True, value_share=0.5)
RECIPES: dict[str, Recipe] = {
    "gptq": tiny_recipe(calibration=WINDOWS),
    "exact-shift": tiny_recipe(calibration=WINDOWS, target_shift="exact"),
    "gptaq": tiny_recipe(calibration=WINDOWS, target_shift="gptaq", shift_strength=0.5),
    "one-pass": tiny_recipe(calibration=WINDOWS, true_sequential=False),
    "full-precision": tiny_recipe(calibration={**WINDOWS, "moment_stream": "full_precision"}),
    "norms": tiny_recipe(calibration=WINDOWS, bits=2).model_copy(
        update={"norm_tweaking": NormTweakingRecipe(steps=8, learning_rate=0.01)}
    ),
    "attention": tiny_recipe(calibration=WINDOWS, method="attention_aware", target_shift="exact").model_copy(
        update={"attention": ATTENTION}
    ),
    "binary": tiny_recipe(calibration=WINDOWS, method="binary", bits=2),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(folder: CheckpointFolder, recipe: Recipe, store: ActivationStore) -> dict[str, Any]:
    """Return everything that a walk over all layers finds, and where its streams end."""
    spec = model_spec(folder)
    windows = windows_from_tokens(random_tokens(9, 13, vocab_size=spec.vocab_size, seed=2))
    plans = plan_linears(spec, recipe, format_named("optgptq" if "binary" in recipe.weights.method else "gptq_v2"))
    found: dict[str, Any] = {}
    with torch.no_grad():
        calibration = start_calibration(
            folder,
            spec,
            recipe,
            windows,
            dtype=torch.float32,
            device=torch.device("cpu"),
            stage_started=lambda index, stage: None,
            store=store,
        )
        for index in range(spec.num_layers):
            layer = load_layer(folder, spec, index, dtype=torch.float32)
            for solved in calibration.run(layer, [plan for plan in plans if plan.info.layer_index == index]):
                assert solved.solution is not None
                found[solved.plan.info.name] = solved.solution.weight.dequantize()
            found[f"error {index}"] = calibration.output_error()
            if calibration.norm_tweak is not None:
                found |= {f"{name} {index}": tensor for name, tensor in calibration.norm_tweak.tensors.items()}
        for place, batch in enumerate(calibration.quantized.batches):
            found[f"hidden {place}"] = batch.state.hidden_BSM
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    return CheckpointFolder.open(write_model(wide_llama(), tmp_path_factory.mktemp("wide") / "model"))


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_gives_the_same_bits_as_memory(name: str, folder: CheckpointFolder, tmp_path: Path) -> None:
    expected = walk(folder, RECIPES[name], MemoryStore())
    with DiskStore(tmp_path) as store:
        require_same(walk(folder, RECIPES[name], store), expected)
        assert store.most_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gptneox-parallel", "falcon-grouped", "gemma2-softcaps", "opt-post_norm_projected"])
def test_states_of_every_kind_of_residual_are_kept(family: str, tmp_path: Path) -> None:
    model = CheckpointFolder.open(write_model(tiny_model(family), tmp_path / "model"))
    expected = walk(model, RECIPES["exact-shift"], MemoryStore())
    with DiskStore(tmp_path) as store:
        require_same(walk(model, RECIPES["exact-shift"], store), expected)


def stream_of(folder: CheckpointFolder, store: ActivationStore, *, num_windows: int) -> ActivationStream:
    spec = model_spec(folder)
    windows = windows_from_tokens(random_tokens(num_windows, 32, vocab_size=spec.vocab_size))
    embedding = load_embedding(folder, spec, dtype=torch.float32)
    return embed(windows, embedding, attention_context(spec, 32), windows_per_batch=2, store=store)


def peak_of(folder: CheckpointFolder, store: ActivationStore, *, num_windows: int) -> int:
    """Return the most bytes of tensors while a stream is made and goes through a layer."""
    layer = load_layer(folder, model_spec(folder), 0, dtype=torch.float32)
    with torch.no_grad(), LiveBytes() as live:
        stream = stream_of(folder, store, num_windows=num_windows)
        start = stream.snapshot()
        for stage in STAGE_NAMES:
            stream.advance(layer, stage)
        assert start.batches[0].kept is not stream.batches[0].kept
    return live.peak


def test_memory_does_not_grow_with_the_number_of_batches(folder: CheckpointFolder, tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        few, many = (peak_of(folder, store, num_windows=number) for number in (4, 64))
    one_batch = 2 * 32 * 48 * 4
    assert many - few < one_batch
    in_memory = [peak_of(folder, MemoryStore(), num_windows=number) for number in (4, 64)]
    assert in_memory[1] - in_memory[0] >= 30 * one_batch


def test_the_file_does_not_grow_from_layer_to_layer(folder: CheckpointFolder, tmp_path: Path) -> None:
    layer = load_layer(folder, model_spec(folder), 0, dtype=torch.float32)
    with DiskStore(tmp_path) as store, torch.no_grad():
        stream = stream_of(folder, store, num_windows=8)
        sizes = []
        for _ in range(4):
            for stage in STAGE_NAMES:
                stream.advance(layer, stage)
            gc.collect()
            sizes.append(store.most_bytes)
    # Hidden states and outputs of the heads, and one batch on its way.
    one_batch = 2 * 32 * 48 * 4
    assert sizes == [sizes[0]] * 4
    assert sizes[0] <= (2 * 4 + 1) * one_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_state_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    hidden_BSM, heads_BSI = normal(3, 5, 7).to(dtype), normal(3, 11, 5, seed=1).to(dtype).transpose(1, 2)
    expected = hidden_BSM.clone(), heads_BSI.clone()
    with DiskStore(tmp_path) as store:
        kept = store.keep(LayerState(hidden_BSM=hidden_BSM, heads_BSI=heads_BSI))
        assert (kept.shape, kept.dtype, kept.device) == ((3, 5, 7), dtype, torch.device("cpu"))
        del hidden_BSM, heads_BSI
        state = kept.read()
    assert state.heads_BSI is not None
    assert torch.equal(state.hidden_BSM, expected[0])
    assert torch.equal(state.heads_BSI, expected[1])
    assert state.attention_BSM is None


def test_what_two_states_share_is_written_once(tmp_path: Path) -> None:
    hidden_BSM = normal(2, 64, 32)
    with DiskStore(tmp_path) as store:
        before = store.keep(LayerState(hidden_BSM=hidden_BSM))
        after = store.keep(LayerState(hidden_BSM=hidden_BSM, heads_BSI=hidden_BSM + 1), before=before)
        assert store.most_bytes == 2 * hidden_BSM.nbytes
        del before
        assert torch.equal(after.read().hidden_BSM, hidden_BSM)


def full(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def forbidden(*arguments: object) -> int:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("fault", "kind", "text"), [(full, CapacityError, "No space left"), (forbidden, OutputError, "Input/output error")]
)
def test_a_failed_write_is_told(
    fault: Callable[..., int], kind: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskStore(tmp_path) as store:
        monkeypatch.setattr(os, "pwrite", fault)
        with pytest.raises(kind, match=f"{tmp_path}.*{text}"):
            store.keep(LayerState(hidden_BSM=normal(1, 2, 3)))


def test_writes_and_reads_may_be_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda number, view, offset: write(number, view[:100], offset))
    monkeypatch.setattr(os, "preadv", lambda number, views, offset: read(number, [views[0][:77]], offset))
    with DiskStore(tmp_path) as store:
        kept = store.keep(LayerState(hidden_BSM=normal(4, 5, 6)))
        assert torch.equal(kept.read().hidden_BSM, normal(4, 5, 6))


def test_a_file_that_lost_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskStore(tmp_path) as store:
        kept = store.keep(LayerState(hidden_BSM=normal(1, 2, 3)))
        monkeypatch.setattr(os, "preadv", lambda number, views, offset: 0)
        with pytest.raises(OutputError, match="24 bytes are missing"):
            kept.read()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"missing.*No such file"):
        DiskStore(tmp_path / "missing")


def test_the_choice_of_a_store(tmp_path: Path) -> None:
    with open_store("memory", tmp_path) as store:
        assert isinstance(store, MemoryStore)
    with open_store("disk", tmp_path) as store:
        assert isinstance(store, DiskStore)
