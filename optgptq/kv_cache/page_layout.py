"""Where the bytes of a page of codes lie. Needs no torch; the layout is written down in `docs/math/kv-cache-pages.md`.

A page holds `page_size` tokens of one decoder layer, head after head. Of a head: codes of keys, codes of values,
parameters of keys, parameters of values; each of these planes begins at a multiple of 16 bytes.

    codes        `[Y, row_bytes]`: one row for each token. Exact sides hold their numbers `[Y, D]` here.
    parameters   float16 pairs (scale, minimum): `[Y, D / group_size, 2]` for groups along channels,
                 `[Y / group_size, D, 2]` for groups along tokens; none for exact sides.

A row of codes, with `split` packing: 8 bits: byte `d` is channel `d`. 4 bits: byte `d < D / 2` holds channel `d` in its
low half and channel `d + D / 2` in its high half. 2 bits: byte `d < D / 4` holds channels `d`, `d + D / 4`,
`d + D / 2`, `d + 3 D / 4` from its lowest bits up. 3 bits: the lower two bits of all codes packed so, then their third
bits, byte `d < D / 8` holding channels `d`, `d + D / 8` and so on from its lowest bit up. Rows are filled up to 4
bytes; those of 3 bits are filled up after each of their two planes.
"""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.errors import OptGPTQError
from optgptq.kv_cache.scheme import LayerScheme, SideScheme

_ALIGNMENT = 16
_ROW_ALIGNMENT = 4
_PARAMETER_BYTES = 4
# Channels that every packing splits evenly.
CHANNEL_MULTIPLE = 8
PAGE_MULTIPLE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """One page of one decoder layer.

    Attributes:
        num_kv_heads, head_dim: of the model.
        page_size: tokens of a page, a multiple of 16.
        scheme: what is stored.
        exact_bytes: bytes of a number of an exact side.
    """

    num_kv_heads: int
    head_dim: int
    page_size: int
    scheme: LayerScheme
    exact_bytes: int

    @property
    def key_row_bytes(self) -> int:
        """Codes of the key of one token and head."""
        return row_bytes(self.scheme.keys, self.head_dim, self.exact_bytes)

    @property
    def value_row_bytes(self) -> int:
        """Codes of the value of one token and head."""
        return row_bytes(self.scheme.values, self.head_dim, self.exact_bytes)

    @property
    def value_codes(self) -> int:
        """Where the codes of values begin in a head; those of keys begin at 0."""
        return _aligned(self.page_size * self.key_row_bytes)

    @property
    def key_parameters(self) -> int:
        """Where the parameters of keys begin in a head."""
        return self.value_codes + _aligned(self.page_size * self.value_row_bytes)

    @property
    def value_parameters(self) -> int:
        """Where the parameters of values begin in a head."""
        return self.key_parameters + _aligned(self._parameter_bytes(self.scheme.keys))

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a page."""
        return self.value_parameters + _aligned(self._parameter_bytes(self.scheme.values))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.num_kv_heads * self.head_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token takes in this layer, its share of padding and of parameters included."""
        return self.page_bytes / self.page_size

    def _parameter_bytes(self, side: SideScheme) -> int:
        if side.is_exact:
            return 0
        return self.page_size * self.head_dim // side.group_size * _PARAMETER_BYTES


def require_head_size(head_dim: int, *, error: type[OptGPTQError], where: str, action: str) -> None:
    """Raise `error` where the channels of a head do not split into codes."""
    if head_dim % CHANNEL_MULTIPLE:
        raise error(
            where,
            expected=f"heads whose channels are a multiple of {CHANNEL_MULTIPLE}, which codes are packed from",
            found=f"{head_dim} channels",
            action=action,
        )


def row_bytes(side: SideScheme, head_dim: int, exact_bytes: int) -> int:
    """Return the bytes of the codes of one token and head."""
    if side.is_exact:
        return head_dim * exact_bytes
    if side.bits == 3:
        return _aligned(head_dim // 4, _ROW_ALIGNMENT) + _aligned(head_dim // 8, _ROW_ALIGNMENT)
    return _aligned(head_dim * side.bits // 8, _ROW_ALIGNMENT)


def bits_per_value(side: SideScheme, head_dim: int) -> float:
    """Return the bits of a number: its code, and its share of a scale and a minimum and of what fills up rows."""
    if side.is_exact:
        return float(side.bits)
    return 8 * row_bytes(side, head_dim, 0) / head_dim + 8 * _PARAMETER_BYTES / side.group_size


def _aligned(num_bytes: int, alignment: int = _ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment
