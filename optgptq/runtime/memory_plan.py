"""How many pages of keys and values fit into a budget, and what that means in texts. Numbers only, no tensors.

Decoder layers with the same attention window form a group: they share page numbers, since they keep the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optgptq.errors import CapacityError
from optgptq.models.spec import DecoderSpec

# The model promises no length (ALiBi): what a text may have unless the user says more.
DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Decoder layers that share page numbers.

    Attributes:
        window: keys a query sees in these layers, None for all before it.
        layers: their indices.
        page_bytes: of one page in all these layers together.
        pages_per_text: pages that a text of the greatest length holds at most.
    """

    window: int | None
    layers: tuple[int, ...]
    page_bytes: int
    pages_per_text: int


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
        return min(
            (pages - 1) // group.pages_per_text for group, pages in zip(self.groups, self.num_pages, strict=True)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that fit in the group that holds the fewest."""
        return (min(self.num_pages) - 1) * self.page_size

    def sentence(self) -> str:
        """Return the plan for a log."""
        return (
            f"{self.num_bytes / 2**20:.1f} MiB for keys and values: {self.num_tokens:,} tokens in pages of "
            f"{self.page_size}; {self.longest_texts} texts of {self.max_length:,} tokens at once"
        )


def layer_groups(
    spec: DecoderSpec, *, page_size: int, number_bytes: int, max_length: int, max_step_tokens: int
) -> tuple[LayerGroup, ...]:
    """Return the groups of layers, whole attention first, then by width of the window."""
    layer_bytes = 2 * spec.num_kv_heads * spec.head_dim * page_size * number_bytes
    windows = {layer.sliding_window for layer in spec.layers}
    groups = []
    for window in sorted(windows, key=lambda window: (window is not None, window or 0)):
        layers = tuple(index for index, layer in enumerate(spec.layers) if layer.sliding_window == window)
        pages = -(-max_length // page_size)
        if window is not None:
            # What the first new token still sees, the new tokens, and the two pages that both ends stand in.
            pages = min(pages, -(-(window - 1 + max_step_tokens) // page_size) + 1)
        groups.append(
            LayerGroup(window=window, layers=layers, page_bytes=layer_bytes * len(layers), pages_per_text=pages)
        )
    return tuple(groups)


def plan_memory(
    spec: DecoderSpec,
    *,
    page_size: int,
    number_bytes: int,
    budget_bytes: int,
    max_length: int | None,
    max_running: int,
    max_step_tokens: int,
) -> MemoryPlan:
    """Return the most pages that the budget holds, but no more than `max_running` texts can use.

    Args:
        spec: the model.
        page_size: tokens of a page.
        number_bytes: bytes of one number in a page.
        budget_bytes: for all pages.
        max_length: positions of a text; None: what the model promises, or less where that does not fit.
        max_running: texts at the same time.
        max_step_tokens: tokens of one step.

    Raises:
        CapacityError: not even one text of `max_length` fits.
    """
    wanted = max_length or spec.position_limit or spec.max_position or DEFAULT_LENGTH

    def groups_for(length: int) -> tuple[LayerGroup, ...]:
        return layer_groups(
            spec,
            page_size=page_size,
            number_bytes=number_bytes,
            max_length=length,
            max_step_tokens=max_step_tokens,
        )

    def fits(length: int) -> bool:
        return _bytes_of_texts(groups_for(length), 1) <= budget_bytes

    length = wanted if fits(wanted) else _longest(fits, wanted)
    if length < 2 or (max_length is not None and length < max_length):
        # Where nobody asked for a length, a page is enough to begin with.
        needed = max_length or min(wanted, page_size)
        raise _no_room(needed, _bytes_of_texts(groups_for(needed), 1), budget_bytes=budget_bytes, fitting=length)
    groups = groups_for(length)
    texts = min(max_running, _texts_that_fit(groups, budget_bytes))
    pages = [group.pages_per_text * texts + 1 for group in groups]
    if texts < max_running:
        # What is left beyond whole texts, in the same proportions.
        per_text = sum(group.page_bytes * group.pages_per_text for group in groups)
        left = budget_bytes - _bytes_of_texts(groups, texts)
        pages = [
            number + int(group.pages_per_text * left // per_text) for number, group in zip(pages, groups, strict=True)
        ]
    return MemoryPlan(groups=groups, num_pages=tuple(pages), page_size=page_size, max_length=length)


def _no_room(needed: int, needed_bytes: int, *, budget_bytes: int, fitting: int) -> CapacityError:
    other = f"set max_length to {fitting} or less" if fitting >= 2 else "use a smaller model"
    return CapacityError(
        "memory for keys and values",
        expected=f"{needed_bytes:,} bytes for one text of {needed:,} tokens",
        found=f"{budget_bytes:,} bytes",
        action=f"Give more memory (kv_cache_bytes), or {other}.",
    )


def _bytes_of_texts(groups: tuple[LayerGroup, ...], texts: int) -> int:
    """Return the bytes of so many texts of the greatest length, the reserved pages included."""
    return sum(group.page_bytes * (group.pages_per_text * texts + 1) for group in groups)


def _texts_that_fit(groups: tuple[LayerGroup, ...], budget_bytes: int) -> int:
    reserved = sum(group.page_bytes for group in groups)
    return (budget_bytes - reserved) // sum(group.page_bytes * group.pages_per_text for group in groups)


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the greatest length up to `limit` that fits, 0 for none; what fits is also enough for less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
