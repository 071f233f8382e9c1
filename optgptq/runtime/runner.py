"""One step of the model: tokens of many texts at once, keys and values in pages.

Shapes: `T` tokens, `N` query heads, `K` key/value heads, `S = T` positions of the one packed sequence (`B = 1`),
`D` head dimension, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optgptq.kernels.attention_choice import AttentionChoice
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kernels.quantized_attention import CacheStorage
from optgptq.models.attention import AttentionContext
from optgptq.models.decoder import Decoder
from optgptq.models.rope import LENGTH_DEPENDENT, inverse_frequencies, rope_table, table_of
from optgptq.models.spec import DecoderSpec, RopeSpec
from optgptq.runtime.cache_attend import CacheAttend
from optgptq.runtime.graphs import Capture, DecodeGraphs
from optgptq.runtime.joint_attend import JointAttend, start_joint_attend
from optgptq.runtime.page_pool import PagePool
from optgptq.runtime.row_blocks import block_parts, find_block_size
from optgptq.runtime.step_batch import StepBatch, StepTables, token_batches
from optgptq.scheduling.step import Step, StepPart

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


@dataclass(slots=True, eq=False, kw_only=True)
class PagedAttend:
    """The `Attend` of a step: stores the new keys and values, then attends over the pages.

    Attributes:
        pool: the pages.
        rules: how scores are made, for each decoder layer.
        attention: the kernels.
        by_token: attend for each token alone, as kernels need whose rows depend on each other.
        groups: the step's batches, one for each group of pages; see `take`.
        tokens: with `by_token`, each of these as one batch for each token.
        cache: the attention of quantized layers; None where there are none.
    """

    pool: PagePool
    rules: tuple[ScoreRule, ...]
    attention: AttentionChoice
    by_token: bool = False
    groups: tuple[PagedBatch, ...] = ()
    tokens: tuple[tuple[PagedBatch, ...], ...] = ()
    cache: CacheAttend | None = None

    def take(self, batch: StepBatch) -> None:
        """Attend to this step from now on."""
        self.groups = batch.groups
        self.tokens = tuple(token_batches(group) for group in batch.groups) if self.by_token else ()
        if self.cache is not None:
            self.cache.take(batch)

    def __call__(
        self,
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor:
        """Return attention `[1, N, T, D]` of the step's new tokens."""
        pages, rule = self.pool.layers[layer_index], self.rules[layer_index]
        number = self.pool.group_of_layer[layer_index]
        query_TND = query_BNSD[0].transpose(0, 1)
        key_TKD, value_TKD = key_BKSD[0].transpose(0, 1), value_BKSD[0].transpose(0, 1)
        if isinstance(pages, CacheStorage):
            assert self.cache is not None
            output_TND = self.cache(layer_index, query_TND, key_TKD, value_TKD, pages, group=number, rule=rule)
            return output_TND.transpose(0, 1).unsqueeze(0)
        batch = self.groups[number]
        storages = (pages.keys_ZKDY, pages.values_ZKYD)
        self.attention.store(key_TKD, value_TKD, *storages, batch.slot_T)
        if self.by_token:
            alone = enumerate(self.tokens[number])
            output_TND = torch.cat(
                [self.attention.attend(query_TND[row : row + 1], *storages, token, rule) for row, token in alone]
            )
        else:
            output_TND = self.attention.attend(query_TND, *storages, batch, rule)
        return output_TND.transpose(0, 1).unsqueeze(0)


def score_rules(spec: DecoderSpec, device: torch.device) -> tuple[ScoreRule, ...]:
    """Return how each decoder layer makes its scores; layers that do it alike share one record."""
    alibi = spec.alibi
    slopes_N = None if alibi is None else torch.tensor(alibi.slopes, dtype=torch.float32, device=device)
    rules: dict[tuple[float, int | None], ScoreRule] = {}
    for layer in spec.layers:
        key = (layer.attention_scale, layer.sliding_window)
        if key not in rules:
            rules[key] = ScoreRule(
                scale=layer.attention_scale,
                window=layer.sliding_window,
                softcap=spec.attention_softcap,
                slopes_N=slopes_N,
                alibi_scale=1.0 if alibi is None else alibi.scale,
                round_alibi=alibi is not None and alibi.bfloat16_bias,
            )
    return tuple(rules[layer.attention_scale, layer.sliding_window] for layer in spec.layers)


@dataclass(slots=True, eq=False, kw_only=True)
class Runner:
    """Runs steps.

    Attributes:
        decoder: the model.
        attend: the attention over pages.
        tables: makes the tensors of a step.
        frequencies: rotary frequencies on the model's device, of the tables that do not depend on the text's length.
        block_size: tokens that go through the model together, for texts that do not depend on each other to the bit;
            None for all of a step.
        graphs: recorded decode steps, where the device has them.
        joint: attention of layers with a joint projection, where the kernels have it.
    """

    decoder: Decoder
    attend: PagedAttend
    tables: StepTables
    frequencies: Mapping[RopeSpec, torch.Tensor]
    block_size: int | None = None
    graphs: DecodeGraphs | None = None
    joint: JointAttend | None = None

    @classmethod
    def start(
        cls,
        decoder: Decoder,
        pool: PagePool,
        attention: AttentionChoice,
        *,
        cache: CacheAttend | None = None,
        deterministic: bool = False,
        capture: Capture | None = None,
    ) -> Runner:
        """Return a runner.

        Args:
            decoder: the model.
            pool: the pages.
            attention: the kernels.
            cache: the attention of quantized layers; None where there are none.
            deterministic: look for a block size that the machine's products allow.
            capture: records decode steps; None to run each as it comes.
        """
        spec, device, plan = decoder.spec, decoder.device, pool.plan
        rules = score_rules(spec, device)
        runner = cls(
            decoder=decoder,
            attend=PagedAttend(
                pool=pool,
                rules=rules,
                attention=attention,
                by_token=deterministic and not attention.rows_are_independent,
                cache=cache,
            ),
            tables=StepTables(
                spec=spec,
                num_groups=len(plan.groups),
                page_size=plan.page_size,
                device=device,
                past=None if cache is None else cache.plan.past,
            ),
            frequencies={
                rope: inverse_frequencies(rope, num_positions=1).to(device)
                for rope in spec.ropes
                if rope.kind not in LENGTH_DEPENDENT
            },
            block_size=find_block_size(decoder, () if cache is None else cache.transforms) if deterministic else None,
            joint=start_joint_attend(decoder, pool, attention, rules),
        )
        has_fixed_frequencies = len(runner.frequencies) == len(spec.ropes)
        if capture is not None and not deterministic and not has_fixed_frequencies:
            logger.warning("decode steps are not recorded: the model's rotary frequencies depend on the text's length")
        if capture is not None and not deterministic and has_fixed_frequencies:
            runner.graphs = DecodeGraphs(
                run=runner.logits_of,
                capture=capture,
                page_size=plan.page_size,
                max_length=plan.max_length,
                device=device,
                has_codes=cache is not None,
            )
        return runner

    def prompt_salt(self, num_prompt_tokens: int) -> bytes:
        """Return what cached pages of a prompt depend on besides its tokens, always 40 bytes.

        That is the quantized cache, and with `dynamic` rotary frequencies its length, once it exceeds what the model
        was made for.
        """
        cache = self.attend.cache
        digest = bytes(_DIGEST_BYTES) if cache is None else cache.plan.digest
        limits = [rope.max_position for rope in self.decoder.spec.ropes if rope.kind == "dynamic"]
        length = num_prompt_tokens if limits and num_prompt_tokens > min(limits) else 0
        return digest + length.to_bytes(8, "little")

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """Run a step and return float32 logits `[parts that sample, V]`; the next step may overwrite them."""
        self.attend.pool.copy(step.copies)
        if self.block_size is not None:
            return self._in_blocks(step.parts, self.block_size)
        batch = self.tables.batch(step.parts)
        if self.graphs is not None and len(batch.last_rows) == len(batch.token_T):
            return self.graphs.logits(batch)
        return self.logits_of(batch)

    def logits_of(self, batch: StepBatch) -> torch.Tensor:
        """Return the logits of a batch's last rows; nothing is read back from the device."""
        return self.decoder.head.logits(self.hidden_of(batch)[0, batch.last_rows])

    def hidden_of(self, batch: StepBatch) -> torch.Tensor:
        """Return hidden states `[1, T, M]` of a batch, before the head; keys and values are stored."""
        self.attend.take(batch)
        positions, dtype = batch.position_T, self.decoder.dtype
        tables = {
            rope: table_of(rope, positions, self.frequencies[rope], dtype=dtype)
            if rope in self.frequencies
            else rope_table(rope, positions, dtype=dtype, lengths=batch.length_T)
            for rope in self.decoder.spec.ropes
        }
        if self.joint is not None:
            self.joint.take(batch, tables)
        context = AttentionContext(positions=positions, rope_tables=tables, attend=self.attend, attend_joint=self.joint)
        return self.decoder.hidden(batch.token_T.unsqueeze(0), context)

    def _in_blocks(self, parts: Sequence[StepPart], size: int) -> torch.Tensor:
        """Run a step in blocks of `size` tokens, the last one filled up; blocks of one text follow each other."""
        logits = []
        for block in block_parts(parts, size):
            batch = self.tables.batch(block, fill_to=size)
            hidden_BSM = self.hidden_of(batch)
            if len(batch.last_rows):
                logits.append(self.decoder.head.logits(hidden_BSM[0])[batch.last_rows])
        return torch.cat(logits) if logits else torch.empty(0, self.decoder.spec.vocab_size)
