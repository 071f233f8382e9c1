"""Windows on their way through the model: batches, padding, and which window is named."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import padded_windows, tiny_model, write_model
from support.tiny_models import random_tokens

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import TOKENS_PER_BATCH, ActivationStream, embed, output_error
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.errors import NumericalError
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    path = tmp_path_factory.mktemp("llama") / "model"
    return CheckpointFolder.open(write_model(tiny_model("llama-grouped_query"), path))


def stream_of(folder: CheckpointFolder, windows: Windows, *, windows_per_batch: int | None = None) -> ActivationStream:
    spec = model_spec(folder)
    context = attention_context(spec, windows.window_size)
    embedding = load_embedding(folder, spec, dtype=torch.float32)
    return embed(windows, embedding, context, windows_per_batch=windows_per_batch)


def first_layer(folder: CheckpointFolder) -> DecoderLayer:
    return load_layer(folder, model_spec(folder), 0, dtype=torch.float32)


def test_batches_hold_all_windows_in_order(folder: CheckpointFolder) -> None:
    windows = padded_windows(random_tokens(5, 6, vocab_size=258), [6, 6, 3, 6, 6])
    stream = stream_of(folder, windows, windows_per_batch=2)
    assert [batch.first_window for batch in stream.batches] == [0, 2, 4]
    assert [batch.valid_BS is None for batch in stream.batches] == [True, False, True]
    valid_BS = stream.batches[1].valid_BS
    assert valid_BS is not None
    assert valid_BS.sum(dim=1).tolist() == [3, 6]
    whole = stream_of(folder, windows, windows_per_batch=5)
    hidden = torch.cat([batch.state.hidden_BSM for batch in stream.batches])
    assert torch.equal(hidden, whole.batches[0].state.hidden_BSM)


def test_batches_are_bounded_by_their_tokens(folder: CheckpointFolder) -> None:
    windows = windows_from_tokens(random_tokens(70, 128, vocab_size=258))
    sizes = [batch.state.hidden_BSM.shape[0] for batch in stream_of(folder, windows).batches]
    assert sizes == [TOKENS_PER_BATCH // 128, TOKENS_PER_BATCH // 128, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_window_whose_values_do_not_fit_is_named(folder: CheckpointFolder, dtype: torch.dtype) -> None:
    """The square of the first window's value fits into float64 only."""
    stream = stream_of(folder, windows_from_tokens(random_tokens(3, 4, vocab_size=258)))
    layer = first_layer(folder)
    layer.norms.attention.weight[0] = 1e25  # type: ignore[union-attr,index]
    stream.batches[0].state.hidden_BSM[:, :, 0] = 0
    stream.batches[0].state.hidden_BSM[0, 1, 0] = 1.0
    stream.batches[0].state.hidden_BSM[2, 3, 5] = float("nan")
    with pytest.raises(NumericalError) as caught:
        stream.measure(layer, "qkv", InputMoment(24, dtype=dtype), reads="q_proj")
    window = 0 if dtype == torch.float32 else 2
    assert caught.value.where == f"input of q_proj, calibration window {window}"
    assert caught.value.found == f"NaN, infinity or a square beyond {str(dtype).removeprefix('torch.')}"


def test_measuring_leaves_the_stream_where_it_is(folder: CheckpointFolder) -> None:
    stream = stream_of(folder, windows_from_tokens(random_tokens(3, 8, vocab_size=258)), windows_per_batch=2)
    before = [batch.state.hidden_BSM.clone() for batch in stream.batches]
    layer = first_layer(folder)
    moment = InputMoment(24, dtype=torch.float64)
    stream.measure(layer, "qkv", moment, reads="q_proj")
    moments = {stage: InputMoment(38 if stage == "down" else 24, dtype=torch.float64) for stage in STAGE_NAMES}
    stream.measure_whole_layer(layer, moments, reads=dict.fromkeys(STAGE_NAMES, "linear"))
    assert torch.equal(moments["qkv"].mean(), moment.mean())
    assert all(found.num_tokens == 24 for found in moments.values())
    for batch, hidden_BSM in zip(stream.batches, before, strict=True):
        assert torch.equal(batch.state.hidden_BSM, hidden_BSM)


def test_kept_inputs_are_used_once(folder: CheckpointFolder) -> None:
    stream = stream_of(folder, windows_from_tokens(random_tokens(3, 8, vocab_size=258)), windows_per_batch=2)
    layer = first_layer(folder)
    expected = [layer.forward(batch.state.hidden_BSM, stream.context) for batch in stream.batches]
    for stage in STAGE_NAMES[:-1]:
        stream.advance(layer, stage)
    stream.measure(layer, "down", InputMoment(38, dtype=torch.float32), reads="down_proj", keep=True)
    assert stream.kept_bytes == 3 * 8 * 38 * 4
    assert all(batch.kept_input_BSI is not None for batch in stream.batches)
    stream.advance(layer, "down")
    assert stream.kept_bytes == 0
    assert all(batch.kept_input_BSI is None for batch in stream.batches)
    for batch, hidden_BSM in zip(stream.batches, expected, strict=True):
        torch.testing.assert_close(batch.state.hidden_BSM, hidden_BSM)


def test_the_output_error_leaves_out_padding(folder: CheckpointFolder) -> None:
    windows = padded_windows(random_tokens(4, 6, vocab_size=258), [6, 2, 6, 6])
    stream = stream_of(folder, windows, windows_per_batch=3)
    reference = stream_of(folder, windows.first(2), windows_per_batch=1)
    assert output_error(stream, reference) == 0.0
    stream.batches[0].state.hidden_BSM[1, 2:] += 5.0
    stream.batches[1].state.hidden_BSM.add_(5.0)
    assert output_error(stream, reference) == 0.0
    expected_TM = torch.cat([reference.batches[0].state.hidden_BSM[0], reference.batches[1].state.hidden_BSM[0, :2]])
    stream.batches[0].state.hidden_BSM[1, 1] += 1.0
    assert output_error(stream, reference) == pytest.approx(24 / float(expected_TM.square().sum()), rel=1e-5)
