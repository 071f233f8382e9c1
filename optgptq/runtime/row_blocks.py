"""Steps in blocks of a fixed number of tokens, so that a text does not depend to the bit on what runs beside it.

A product of matrices sums in an order that depends on its shape. If every operation of the model sees the same shape
in every step, and treats each row alike, a token's numbers depend on that token and on its own past only.

Shapes: `R` rows of a block, one sequence (`B = 1`), `M` model width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from optgptq.kernels.packed_dense import PackedDense, TiledDense
from optgptq.kv_cache.transform import HeadTransform
from optgptq.models.attention import Attend, AttentionContext, context_at
from optgptq.models.decoder import Decoder
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.linear import QuantLinear
from optgptq.scheduling.step import StepPart

logger = logging.getLogger(__name__)

# The largest comes first; 1 always works.
BLOCK_SIZES = (16, 1)


def block_parts(parts: Sequence[StepPart], size: int) -> Iterator[list[StepPart]]:
    """Cut the tokens of a step into blocks of `size`, the last one shorter; only the end of a part samples."""
    block: list[StepPart] = []
    room = size
    for part in parts:
        begin = part.begin
        while begin < part.end:
            end = min(begin + room, part.end)
            samples = part.samples if end == part.end else ()
            block.append(StepPart(sequence=part.sequence, begin=begin, end=end, samples=samples))
            room -= end - begin
            begin = end
            if room == 0:
                yield block
                block, room = [], size
    if block:
        yield block


def find_block_size(decoder: Decoder, transforms: Sequence[HeadTransform] = ()) -> int:
    """Return the largest block whose rows do not touch each other on this machine, tried with the model itself.

    `transforms` are those of a quantized cache around the attention of each decoder layer.
    """
    found = next(size for size in BLOCK_SIZES if size == 1 or rows_are_independent(decoder, size, transforms))
    if found == 1:
        logger.warning(
            "deterministic steps compute one token at a time, which is slow: this machine's products do not treat the "
            "rows of %d tokens alike",
            BLOCK_SIZES[0],
        )
    return found


@torch.inference_mode()
def rows_are_independent(
    decoder: Decoder, size: int, transforms: Sequence[HeadTransform] = (), *, seed: int = 0
) -> bool:
    """True if a row's numbers are the same to the bit at every place of a block, whatever the other rows hold.

    Looks at the embedding, at the first of all decoder layers with the same make-up, with attention left out, and at
    the head.
    """
    generator = torch.Generator().manual_seed(seed)
    mine_R, other_R = torch.randint(decoder.spec.vocab_size, (2, size), generator=generator).to(decoder.device)
    positions = torch.arange(size, device=decoder.device) % (decoder.spec.position_limit or size)
    layers = _distinct_layers(decoder, transforms)
    attend = _transformed(transforms)
    expected = _outputs(decoder, layers, mine_R, positions, attend)
    for shift in range(1, size):
        turned = _outputs(decoder, layers, mine_R.roll(shift), positions.roll(shift), attend)
        if not all(torch.equal(one.roll(shift, 0), two) for one, two in zip(expected, turned, strict=True)):
            return False
    mixed = _outputs(decoder, layers, torch.cat((mine_R[:1], other_R[1:])), positions, attend)
    return all(torch.equal(one[0], two[0]) for one, two in zip(expected, mixed, strict=True))


def _distinct_layers(decoder: Decoder, transforms: Sequence[HeadTransform]) -> list[DecoderLayer]:
    """Return the first of all decoder layers whose products are computed alike."""
    distinct: dict[tuple[object, ...], DecoderLayer] = {}
    for index, layer in enumerate(decoder.layers):
        around = tuple(
            None if part is None else part.shape
            for transform in transforms[index : index + 1]
            for side in (transform.keys, transform.values)
            for part in (side.shift_KD, side.scale_KD, side.rotation_KDD)
        )
        distinct.setdefault((_make_up(layer), around), layer)
    return list(distinct.values())


def _make_up(layer: DecoderLayer) -> tuple[object, ...]:
    """Return what decides how the products of a layer are computed."""
    return tuple((name, *_shape(linear)) for name, linear in layer.linears.items())


def _shape(linear: LinearLike) -> tuple[object, ...]:
    if isinstance(linear, Linear):
        return (Linear, linear.weight_OI.shape, linear.weight_OI.stride())
    if isinstance(linear, PackedDense):
        return (PackedDense, linear.weight.shape)
    if isinstance(linear, TiledDense):
        return (TiledDense, linear.weight.num_rows, linear.weight.num_columns)
    if isinstance(linear, QuantLinear):
        weight = linear.weight
        return (type(weight), weight.bits, weight.out_features, weight.in_features, weight.group_size)
    return (id(linear),)


def _outputs(
    decoder: Decoder,
    layers: Sequence[DecoderLayer],
    token_R: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
) -> list[torch.Tensor]:
    """Return what each part of the model makes of the rows."""
    context: AttentionContext = context_at(
        decoder.spec, positions, dtype=decoder.dtype, attend=attend, lengths=torch.full_like(positions, 1)
    )
    hidden_BRM = decoder.embedding.embed(token_R.unsqueeze(0), context)
    outputs = [hidden_BRM[0]]
    for layer in layers:
        hidden_BRM = layer.forward(hidden_BRM, context)
        outputs.append(hidden_BRM[0])
    return [*outputs, decoder.head.logits(hidden_BRM[0])]


def _transformed(transforms: Sequence[HeadTransform]) -> Attend:
    """Return `_own_query` inside the transforms of a quantized cache."""
    if not transforms:
        return _own_query

    def attend(
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor:
        transform = transforms[layer_index]
        query = _by_token(transform.query, query_BNSD)
        key, value = _by_token(transform.key, key_BKSD), _by_token(transform.value, value_BKSD)
        return _by_token(transform.output, _own_query(layer_index, query, key, value, spec))

    return attend


def _by_token(change: Callable[[torch.Tensor], torch.Tensor], heads_BNSD: torch.Tensor) -> torch.Tensor:
    """Apply to the one sequence a function of heads in the order of tokens."""
    return change(heads_BNSD[0].transpose(0, 1)).transpose(0, 1).unsqueeze(0)


def _own_query(
    layer_index: int,
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    spec: DecoderSpec,
    /,
) -> torch.Tensor:
    """Stand in for attention with something that works row by row and depends on keys and values too."""
    del layer_index
    group = spec.num_heads // spec.num_kv_heads
    past_BNSD = (key_BKSD + value_BKSD).repeat_interleave(group, dim=1)
    return (query_BNSD + past_BNSD).transpose(1, 2).contiguous().transpose(1, 2)
