"""Decoder layers that share page numbers: what a page of them takes, and how many pages a text holds. Numbers only.

Layers with the same attention window form a group, since they keep the same tokens. Quantized layers form one more
together, the last one: the exact pages of tokens that are also read as they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactPages:
    """Tokens that quantized layers keep as they were computed, besides their codes.

    Attributes:
        num_sinks: first tokens of a text; 0 for none.
        window: tokens before the next one; 0 for none.
        layers: indices of the quantized layers.
        page_bytes: of one page in all these layers together.
        forgets_window: a step takes pages for what is seen after it alone.
    """

    num_sinks: int
    window: int
    layers: tuple[int, ...]
    page_bytes: int
    forgets_window: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Decoder layers that share page numbers.

    Attributes:
        window: keys a query sees in these layers, None for all before it.
        layers: their indices.
        page_bytes: of one page in all these layers together.
        pages_per_text: pages that a text of the greatest length holds at most.
        num_sinks: first tokens of a text that are kept whatever the window.
        step_pages: pages that the tokens of a step take besides, once for all texts.
        is_exact: the exact pages of quantized layers; their codes are in other groups.
        forgets_window: as the scheduler's groups.
    """

    window: int | None
    layers: tuple[int, ...]
    page_bytes: int
    pages_per_text: int
    num_sinks: int = 0
    step_pages: int = 0
    is_exact: bool = False
    forgets_window: bool = False

    @property
    def text_bytes(self) -> int:
        """Bytes of the pages of one text."""
        return self.page_bytes * self.pages_per_text

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the reserved page 0 and of the pages of a step."""
        return self.page_bytes * (1 + self.step_pages)

    def texts_in(self, num_pages: int) -> int:
        """Return how many texts of the greatest length so many pages hold."""
        return (num_pages - 1 - self.step_pages) // self.pages_per_text


def plain_page_bytes(spec: DecoderSpec, *, page_size: int, number_bytes: int) -> tuple[int, ...]:
    """Return the bytes of a page in each decoder layer where keys and values are kept as they were computed."""
    return (2 * spec.num_kv_heads * spec.head_dim * page_size * number_bytes,) * spec.num_layers


def layer_groups(
    spec: DecoderSpec,
    *,
    page_size: int,
    layer_page_bytes: Sequence[int],
    max_length: int,
    max_step_tokens: int,
    exact: ExactPages | None = None,
) -> tuple[LayerGroup, ...]:
    """Return the groups of layers: whole attention first, then by width of the window, exact pages last."""
    windows = {layer.sliding_window for layer in spec.layers}
    whole = -(-max_length // page_size)
    groups = []
    for window in sorted(windows, key=lambda window: (window is not None, window or 0)):
        layers = tuple(index for index, layer in enumerate(spec.layers) if layer.sliding_window == window)
        pages = whole
        if window is not None:
            # What the first new token still sees, the new tokens, and the two pages that both ends stand in.
            pages = min(whole, -(-(window - 1 + max_step_tokens) // page_size) + 1)
        page_bytes = sum(layer_page_bytes[index] for index in layers)
        groups.append(LayerGroup(window=window, layers=layers, page_bytes=page_bytes, pages_per_text=pages))
    if exact is not None:
        groups.append(_exact_group(exact, page_size=page_size, whole=whole, max_step_tokens=max_step_tokens))
    return tuple(groups)


def _exact_group(exact: ExactPages, *, page_size: int, whole: int, max_step_tokens: int) -> LayerGroup:
    """Return the group of exact pages; `whole` pages hold a text of the greatest length.

    A window is narrow beside a step, so that the pages of a step's tokens are counted once: those that its last tokens
    do not see come back when it is done. Without a window no page but those of the first tokens is ever taken, with one
    that is forgotten no page that the step leaves unseen.
    """
    pages = -(-exact.num_sinks // page_size)
    if exact.window:
        pages += (exact.window + page_size - 2) // page_size + 1
    pages = min(whole, pages)
    takes_steps = exact.window > 0 and not exact.forgets_window
    return LayerGroup(
        window=exact.window,
        layers=exact.layers,
        page_bytes=exact.page_bytes,
        pages_per_text=pages,
        num_sinks=exact.num_sinks,
        step_pages=min(whole - pages, -(-max_step_tokens // page_size)) if takes_steps else 0,
        is_exact=True,
        forgets_window=exact.forgets_window,
    )
