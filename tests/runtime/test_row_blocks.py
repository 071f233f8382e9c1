"""Blocks of a fixed number of tokens: every token once and in order; tests/runtime/test_deterministic.py runs them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.scheduled import request
from support.tiny_models import TINY_MODELS, reference_model, save_reference

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.ends import Embedding
from optgptq.runtime.row_blocks import block_parts, find_block_size, rows_are_independent
from optgptq.scheduling.request import Sequence
from optgptq.scheduling.step import StepPart


def part(number: int, begin: int, size: int, *, samples: bool) -> StepPart:
    text = Sequence(request(f"text {number}", range(begin + size)), 0, rank=(0, 0.0, number, 0), num_groups=1)
    return StepPart(text, begin, begin + size, (text,) if samples else ())


PARTS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=6)


@given(sizes=PARTS, block_size=st.integers(1, 17))
def test_blocks_hold_all_tokens_in_order(sizes, block_size) -> None:
    parts = [part(number, begin, size, samples=last) for number, (begin, size, last) in enumerate(sizes)]
    blocks = list(block_parts(parts, block_size))
    expected = [(one.sequence, position) for one in parts for position in range(one.begin, one.end)]
    pieces = [piece for block in blocks for piece in block]
    found = [(piece.sequence, position) for piece in pieces for position in range(piece.begin, piece.end)]
    assert found == expected
    counts = [sum(piece.end - piece.begin for piece in block) for block in blocks]
    assert counts[:-1] == [block_size] * (len(blocks) - 1)
    assert 1 <= counts[-1] <= block_size
    ends = {one.sequence: one.end for one in parts if one.samples}
    assert all(
        piece.samples == ((piece.sequence,) if ends.get(piece.sequence) == piece.end else ()) for piece in pieces
    )
    assert [piece.sequence for piece in pieces if piece.samples] == [one.sequence for one in parts if one.samples]


@pytest.fixture(params=["opt-post_norm_projected", "gpt2-conv1d", "llama-grouped_query"])
def decoder(request: pytest.FixtureRequest, tmp_path) -> Decoder:
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == request.param)
    return load_decoder(CheckpointFolder.open(save_reference(reference_model(tiny), tmp_path)))


def disturbed(linear, place: int):
    """Return a linear that treats one row of a block otherwise than the others."""

    def call(x):
        output = linear(x)
        if output.shape[-2] > place:
            output[..., place, :] *= 1 + 2**-20
        return output

    return call


@pytest.mark.parametrize("place", [0, 7, 15])
@pytest.mark.parametrize("layer", [0, -1])
def test_one_row_that_is_treated_otherwise_is_found(decoder: Decoder, place: int, layer: int) -> None:
    for name, linear in decoder.layers[layer].linears.items():
        decoder.layers[layer].linears[name] = disturbed(linear, place)
        assert not rows_are_independent(decoder, 16), name
        decoder.layers[layer].linears[name] = linear


def test_the_ends_of_the_model_are_looked_at(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    project = decoder.head.project
    decoder.head.project = disturbed(project, 9)
    assert not rows_are_independent(decoder, 16)
    assert find_block_size(decoder) == 1
    assert "one token at a time" in caplog.text
    decoder.head.project = project
    embed = Embedding.embed

    def unequal(embedding, tokens_BS, context):
        return embed(embedding, tokens_BS, context) * torch.linspace(1, 1 + 2**-18, tokens_BS.shape[1])[:, None]

    monkeypatch.setattr(Embedding, "embed", unequal)
    assert not rows_are_independent(decoder, 16)
