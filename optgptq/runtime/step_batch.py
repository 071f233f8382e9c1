"""From a step of the scheduler to the tensors that the model and the attention read.

Shapes: `T` tokens of the step, `R` texts in it, `P` pages in a row of a table.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np
import torch

from optgptq.kernels.paged_attention import PagedBatch
from optgptq.kv_cache.scheme import PastRule
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_positions import Numbers, first_exact_keys
from optgptq.scheduling.step import StepPart


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepBatch:
    """One step, or a block of one, as tensors.

    Attributes:
        token_T: int64 tokens.
        position_T: int64 positions.
        length_T: int64, the length of text that decides each token's rotary frequencies; None where none does.
        groups: the attention's view, one for each group of pages.
        last_rows: int64, the rows whose logits are wanted.
        first_exact_T: int32, the first key that each token reads exactly from a quantized cache; None with a plain one.
    """

    token_T: torch.Tensor
    position_T: torch.Tensor
    length_T: torch.Tensor | None
    groups: tuple[PagedBatch, ...]
    last_rows: torch.Tensor
    first_exact_T: torch.Tensor | None = None


@dataclass(slots=True, kw_only=True)
class _TableRow:
    """A copy of a page table that grows with it.

    Attributes:
        table: the scheduler's own list. A text that is set back and let in again gets a new one.
        pages: the copy; it has room for more than `count` entries.
        count: entries copied.
    """

    table: ListLike[int]
    pages: np.ndarray[tuple[int], np.dtype[np.int32]]
    count: int = 0


@dataclass(slots=True, kw_only=True)
class StepTables:
    """Makes `StepBatch`es; remembers the page tables of the texts of the last step, so that it copies new pages only.

    Attributes:
        spec: the model.
        num_groups: groups of pages.
        page_size: tokens of a page.
        device: where the tensors are put.
        past: which keys a token reads exactly; None with a plain cache.
    """

    spec: DecoderSpec
    num_groups: int
    page_size: int
    device: torch.device
    past: PastRule | None = None
    _rows: dict[int, _TableRow] = field(default_factory=dict)

    def batch(self, parts: ListLike[StepPart], *, fill_to: int = 0) -> StepBatch:
        """Return the tensors of one step, or of a block of one.

        Rows up to `fill_to` are filled with a text of their own, which writes to the reserved page 0 and reads it.
        """
        begins, contexts = [part.begin for part in parts], [part.end for part in parts]
        tokens = [token for part in parts for token in part.sequence.token_ids[part.begin : part.end]]
        lengths = rope_lengths(self.spec, parts)
        missing = fill_to - len(tokens)
        if missing > 0:
            tokens += [0] * missing
            begins.append(0)
            contexts.append(missing)
            lengths = None if lengths is None else np.concatenate((lengths, np.ones(missing, dtype=np.int64)))
        counts = [end - begin for begin, end in zip(begins, contexts, strict=True)]
        ends = np.cumsum(counts, dtype=np.int64)
        last = ends[: len(parts)][[bool(part.samples) for part in parts]] - 1
        rows = self._remember(parts)
        flat = np.arange(len(tokens)) + np.repeat(np.array(contexts, dtype=np.int64) - ends, counts)
        return StepBatch(
            token_T=self._put(np.array(tokens, dtype=np.int64)),
            position_T=self._put(flat),
            length_T=None if lengths is None else self._put(lengths),
            groups=tuple(
                self._group([row[group] for row in rows], counts, flat, contexts) for group in range(self.num_groups)
            ),
            last_rows=self._put(last),
            first_exact_T=self._first_exact(parts, counts, flat),
        )

    def _first_exact(self, parts: ListLike[StepPart], counts: ListLike[int], positions: Numbers) -> torch.Tensor | None:
        if self.past is None:
            return None
        begins, seen_from = (
            np.repeat(np.array(numbers, dtype=np.int64), counts[: len(parts)])
            for numbers in ([part.begin for part in parts], [part.sequence.seen_from for part in parts])
        )
        first_T = np.zeros(len(positions), dtype=np.int32)
        # Tokens that fill up read nothing but each other's own keys: codes of the reserved page may be anything.
        first_T[: len(begins)] = np.maximum(first_exact_keys(self.past, positions[: len(begins)], begins), seen_from)
        return self._put(first_T)

    def _group(
        self, rows: ListLike[_TableRow], counts: ListLike[int], positions: Numbers, contexts: ListLike[int]
    ) -> PagedBatch:
        # A row more than there are texts belongs to the tokens that fill up: all its entries are the reserved page.
        widest = max(*(row.count for row in rows), -(-contexts[-1] // self.page_size))
        table = np.zeros((len(counts), widest), dtype=np.int32)
        for index, row in enumerate(rows):
            table[index, : row.count] = row.pages[: row.count]
        owner = np.repeat(np.arange(len(counts)), counts)
        pages = table[owner, positions // self.page_size].astype(np.int64)
        return PagedBatch(
            query_start_R1=self._put(np.concatenate(([0], np.cumsum(counts))).astype(np.int32)),
            context_R=self._put(np.array(contexts, dtype=np.int32)),
            page_table_RP=self._put(table),
            slot_T=self._put(pages * self.page_size + positions % self.page_size),
            max_query=max(counts),
            max_context=max(contexts),
        )

    def _remember(self, parts: ListLike[StepPart]) -> list[list[_TableRow]]:
        """Return up-to-date rows of all parts; rows of texts that are not in this step are forgotten."""
        remembered, rows = {}, []
        for part in parts:
            own = []
            for table in part.sequence.page_tables:
                # The row keeps its list alive, so no other list has its id.
                row = self._rows.get(id(table)) or _TableRow(table=table, pages=np.zeros(64, dtype=np.int32))
                _update(row, first=part.begin // self.page_size)
                remembered[id(table)] = row
                own.append(row)
            rows.append(own)
        self._rows = remembered
        return rows

    def _put(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)


def _update(row: _TableRow, *, first: int) -> None:
    """Copy entries from page `first`, that of the next new token, on: one before it changes only by being freed."""
    size = len(row.table)
    if len(row.pages) < size:
        grown = np.zeros(2 * size, dtype=np.int32)
        grown[: row.count] = row.pages[: row.count]
        row.pages = grown
    begin = min(row.count, first)
    row.pages[begin:size] = row.table[begin:]
    row.count = size


def token_batches(batch: PagedBatch) -> tuple[PagedBatch, ...]:
    """Return a batch of one token for each token of a batch; each sees the keys up to its own."""
    starts, contexts = batch.query_start_R1.tolist(), batch.context_R.tolist()
    device, tokens = batch.slot_T.device, []
    for row, (begin, end, context) in enumerate(zip(starts[:-1], starts[1:], contexts, strict=True)):
        for token in range(begin, end):
            length = context - (end - 1 - token)
            single = PagedBatch(
                query_start_R1=torch.tensor([0, 1], dtype=torch.int32, device=device),
                context_R=torch.tensor([length], dtype=torch.int32, device=device),
                page_table_RP=batch.page_table_RP[row : row + 1],
                slot_T=batch.slot_T[token : token + 1],
                max_query=1,
                max_context=length,
            )
            tokens.append(single)
    return tuple(tokens)


def rope_lengths(spec: DecoderSpec, parts: ListLike[StepPart]) -> Numbers | None:
    """Return for each token the length of text that its rotary frequencies depend on; None where they depend on none.

    `longrope` takes those of the whole text, which is read again when it outgrows the short frequencies. `dynamic`
    takes the prompt's length for the prompt and the length so far for each new token, as transformers does.
    """
    kinds = {rope.kind for rope in spec.ropes}
    if "longrope" in kinds:
        return np.concatenate([np.full(part.end - part.begin, len(part.sequence.token_ids)) for part in parts])
    if "dynamic" not in kinds:
        return None
    return np.concatenate(
        [np.maximum(np.arange(part.begin, part.end) + 1, part.sequence.num_prompt_tokens) for part in parts]
    )
