"""One step of the model: tokens of many texts at once, keys and values in pages.

Shapes: `T` tokens, `N` query heads, `K` key/value heads, `S = T` positions of the one packed sequence (`B = 1`),
`D` head dimension, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.kernels.attention_choice import AttentionChoice
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.models.attention import AttentionContext, context_at
from optgptq.models.decoder import Decoder
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.page_pool import PagePool
from optgptq.runtime.row_blocks import block_parts, find_block_size
from optgptq.runtime.step_batch import StepBatch, StepTables
from optgptq.scheduling.step import Step, StepPart


@dataclass(slots=True, eq=False, kw_only=True)
class PagedAttend:
    """The `Attend` of a step: stores the new keys and values, then attends over the pages.

    Attributes:
        pool: the pages.
        rules: how scores are made, for each decoder layer.
        attention: the kernels.
        groups: the step's batches, one for each group of pages; set before each step.
    """

    pool: PagePool
    rules: tuple[ScoreRule, ...]
    attention: AttentionChoice
    groups: tuple[PagedBatch, ...] = ()

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
        pages = self.pool.layers[layer_index]
        batch = self.groups[self.pool.group_of_layer[layer_index]]
        storages = (pages.keys_ZKDY, pages.values_ZKYD)
        self.attention.store(key_BKSD[0].transpose(0, 1), value_BKSD[0].transpose(0, 1), *storages, batch.slot_T)
        output_TND = self.attention.attend(query_BNSD[0].transpose(0, 1), *storages, batch, self.rules[layer_index])
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
        block_size: tokens that go through the model together, for texts that do not depend on each other to the bit;
            None for all of a step.
    """

    decoder: Decoder
    attend: PagedAttend
    tables: StepTables
    block_size: int | None = None

    @classmethod
    def start(cls, decoder: Decoder, pool: PagePool, attention: AttentionChoice, *, deterministic: bool) -> Runner:
        """Return a runner; a deterministic one first looks for a block size that the machine's products allow."""
        tables = StepTables(
            spec=decoder.spec,
            num_groups=len(pool.plan.groups),
            page_size=pool.plan.page_size,
            device=decoder.device,
        )
        rules = score_rules(decoder.spec, decoder.device)
        return cls(
            decoder=decoder,
            attend=PagedAttend(pool=pool, rules=rules, attention=attention),
            tables=tables,
            block_size=find_block_size(decoder) if deterministic else None,
        )

    def prompt_salt(self, num_prompt_tokens: int) -> bytes:
        """Return what cached pages of a prompt depend on besides its tokens.

        With `dynamic` rotary frequencies that is its length, once it exceeds what the model was made for.
        """
        limits = [rope.max_position for rope in self.decoder.spec.ropes if rope.kind == "dynamic"]
        return num_prompt_tokens.to_bytes(8, "little") if limits and num_prompt_tokens > min(limits) else b""

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """Run a step and return float32 logits `[parts that sample, V]`."""
        self.attend.pool.copy(step.copies)
        if self.block_size is None:
            batch = self.tables.batch(step.parts)
            hidden_BSM = self._hidden(batch)
            return self.decoder.head.logits(hidden_BSM[0, batch.last_rows])
        return self._in_blocks(step.parts, self.block_size)

    def _hidden(self, batch: StepBatch) -> torch.Tensor:
        self.attend.groups = batch.groups
        return self.decoder.hidden(batch.token_T.unsqueeze(0), self._context(batch))

    def _context(self, batch: StepBatch) -> AttentionContext:
        return context_at(
            self.decoder.spec,
            batch.position_T,
            dtype=self.decoder.dtype,
            attend=self.attend,
            lengths=batch.length_T,
        )

    def _in_blocks(self, parts: Sequence[StepPart], size: int) -> torch.Tensor:
        """Run a step in blocks of `size` tokens, the last one filled up; blocks of one text follow each other."""
        logits = []
        for block in block_parts(parts, size):
            batch = self.tables.batch(block, fill_to=size)
            hidden_BSM = self._hidden(batch)
            if len(batch.last_rows):
                logits.append(self.decoder.head.logits(hidden_BSM[0])[batch.last_rows])
        return torch.cat(logits) if logits else torch.empty(0, self.decoder.spec.vocab_size)
