"""How many pages of keys and values fit into a budget, and what that means in texts. Numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optgptq.errors import CapacityError
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.layer_groups import ExactPages, LayerGroup, layer_groups

# The model promises no length (ALiBi): what a text may have unless the user says more.
DEFAULT_LENGTH = 2048
# One part in so many of the memory may go to exact pages even if texts of the greatest length need fewer: shorter texts
# are more texts, and each of them has first tokens of its own.
_EXACT_PART = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The storage of keys and values.

    Attributes:
        groups: of layers.
        num_pages: of each group, the reserved page 0 included.
        page_size: tokens of a page.
        max_length: positions of a text.
    """

    groups: tuple[LayerGroup, ...]
    num_pages: tuple[int, ...]
    page_size: int
    max_length: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages."""
        return sum(group.page_bytes * pages for group, pages in zip(self.groups, self.num_pages, strict=True))

    @property
    def longest_texts(self) -> int:
        """Texts of the greatest length that fit at the same time."""
        return min(group.texts_in(pages) for group, pages in zip(self.groups, self.num_pages, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens that fit in the group that holds the fewest; exact pages of quantized layers do not count."""
        fewest = min(pages for group, pages in zip(self.groups, self.num_pages, strict=True) if not group.is_exact)
        return (fewest - 1) * self.page_size

    def sentence(self) -> str:
        """Return the plan for a log."""
        return (
            f"{self.num_bytes / 2**20:.1f} MiB for keys and values: {self.num_tokens:,} tokens in pages of "
            f"{self.page_size}; {self.longest_texts} texts of {self.max_length:,} tokens at once"
        ) + "".join(
            _exact_sentence(group, pages)
            for group, pages in zip(self.groups, self.num_pages, strict=True)
            if group.is_exact
        )


def _exact_sentence(group: LayerGroup, pages: int) -> str:
    kept = [f"the first {group.num_sinks}"] if group.num_sinks else []
    kept += [f"the last {group.window}"] if group.window else []
    return (
        f"; {pages * group.page_bytes / 2**20:.1f} MiB of it for {' and '.join(kept)} tokens of a text in full "
        f"precision, enough for {group.texts_in(pages)} texts"
    )


def plan_memory(
    spec: DecoderSpec,
    *,
    page_size: int,
    layer_page_bytes: Sequence[int],
    budget_bytes: int,
    max_length: int | None,
    max_running: int,
    max_step_tokens: int,
    exact: ExactPages | None = None,
) -> MemoryPlan:
    """Return the most pages that the budget holds, but no more than `max_running` texts can use.

    Args:
        spec: the model.
        page_size: tokens of a page.
        layer_page_bytes: bytes of a page in each decoder layer; of codes where the layer is quantized.
        budget_bytes: for all pages.
        max_length: positions of a text; None: what the model promises, or less where that does not fit.
        max_running: texts at the same time.
        max_step_tokens: tokens of one step.
        exact: what quantized layers keep besides; None for nothing.

    Raises:
        CapacityError: not even one text of `max_length` fits.
    """
    wanted = max_length or spec.position_limit or spec.max_position or DEFAULT_LENGTH

    def groups_for(length: int) -> tuple[LayerGroup, ...]:
        return layer_groups(
            spec,
            page_size=page_size,
            layer_page_bytes=layer_page_bytes,
            max_length=length,
            max_step_tokens=max_step_tokens,
            exact=exact,
        )

    def fits(length: int) -> bool:
        return _bytes_of_one_text(groups_for(length)) <= budget_bytes

    length = wanted if fits(wanted) else _longest(fits, wanted)
    if length < 2 or (max_length is not None and length < max_length):
        # Where nobody asked for a length, a page is enough to begin with.
        needed = max_length or min(wanted, page_size)
        raise _no_room(needed, _bytes_of_one_text(groups_for(needed)), budget_bytes=budget_bytes, fitting=length)
    groups = groups_for(length)
    pages = _share_out(groups, budget_bytes, max_running=max_running)
    return MemoryPlan(groups=groups, num_pages=pages, page_size=page_size, max_length=length)


def _share_out(groups: tuple[LayerGroup, ...], budget_bytes: int, *, max_running: int) -> tuple[int, ...]:
    """Return the pages of each group; at least one text fits.

    Each group gets its part of a text, so that all of them are full at the same time; whole texts or not. Exact pages
    get more where that is little (`_EXACT_PART`), up to what `max_running` texts need. More memory never means fewer
    pages of any group.
    """
    left = budget_bytes - sum(group.fixed_bytes for group in groups)
    exact_text = sum(group.text_bytes for group in groups if group.is_exact)
    code_text = sum(group.text_bytes for group in groups if not group.is_exact)
    exact_bytes = max(left * exact_text // (exact_text + code_text), min(left // _EXACT_PART, exact_text * max_running))
    exact_bytes = min(exact_bytes, left - code_text, exact_text * max_running)
    code_bytes = min(left - exact_bytes, code_text * max_running)

    def pages_of(group: LayerGroup) -> int:
        used, text = (exact_bytes, exact_text) if group.is_exact else (code_bytes, code_text)
        return 1 + group.step_pages + group.pages_per_text * used // text

    return tuple(pages_of(group) for group in groups)


def _no_room(needed: int, needed_bytes: int, *, budget_bytes: int, fitting: int) -> CapacityError:
    other = f"set max_length to {fitting} or less" if fitting >= 2 else "use a smaller model"
    return CapacityError(
        "memory for keys and values",
        expected=f"{needed_bytes:,} bytes for one text of {needed:,} tokens",
        found=f"{budget_bytes:,} bytes",
        action=f"Give more memory (kv_cache_bytes), or {other}.",
    )


def _bytes_of_one_text(groups: tuple[LayerGroup, ...]) -> int:
    """Return the bytes of one text of the greatest length, with those that are always there."""
    return sum(group.fixed_bytes + group.text_bytes for group in groups)


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the greatest length up to `limit` that fits, 0 for none; what fits is also enough for less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
