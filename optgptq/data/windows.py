"""Documents to windows of a fixed number of tokens; what does not fill a window is stated.

Shapes: `W` windows, `S` positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from optgptq.data.reading import TokenizedText, read_tokens, tokens_sha256
from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import RecipeError, TextError
from optgptq.recipe.calibration import BosPolicy, CalibrationRecipe, WindowLayout

DEFAULT_WINDOW_SIZE = 2048
# Text read beyond what is asked for, so that windows are a choice and not the beginning of the text. The bound makes
# the time spent on a data set of terabytes the same as on one of megabytes.
READ_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """How documents become windows; the fields mean what they mean in `CalibrationRecipe`."""

    window_size: int
    num_windows: int = 128
    seed: int = 0
    bos: BosPolicy = "none"
    layout: WindowLayout = "packed"

    @classmethod
    def of(cls, calibration: CalibrationRecipe, *, window_size: int) -> WindowSettings:
        """Return the settings of a recipe; `window_size` comes from `resolve_window_size`."""
        return cls(
            window_size=window_size,
            num_windows=calibration.num_windows,
            seed=calibration.seed,
            bos=calibration.bos,
            layout=calibration.layout,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Windows:
    """Token windows.

    Attributes:
        tokens_WS: int64 `[W, S]`; positions from a window's length on are padding (id 0).
        lengths_W: int64 `[W]`, valid tokens of each window.
        num_windows_requested: windows asked for; fewer are here when the text ended first.
        num_tokens_available: tokens of the text that was read.
        remainder_tokens: tokens that filled no window, or were cut from long documents.
        num_duplicate_documents: documents equal to an earlier one.
        sha256: of `tokens_WS` and then `lengths_W`, as little-endian int64.
        notes: what was done with the text, in plain sentences.
    """

    tokens_WS: torch.Tensor
    lengths_W: torch.Tensor
    num_windows_requested: int
    num_tokens_available: int
    remainder_tokens: int
    num_duplicate_documents: int
    sha256: str
    notes: tuple[str, ...]

    @property
    def num_windows(self) -> int:
        return self.tokens_WS.shape[0]

    @property
    def window_size(self) -> int:
        return self.tokens_WS.shape[1]

    @property
    def num_tokens(self) -> int:
        """Valid tokens in all windows."""
        return int(self.lengths_W.sum())

    def first(self, count: int) -> Windows:
        """Return the first `count` windows, or all where there are fewer."""
        return replace(self, tokens_WS=self.tokens_WS[:count], lengths_W=self.lengths_W[:count])


def resolve_window_size(recipe_value: int | None, max_position: int | None) -> int:
    """Return the tokens per window: the recipe's number as it is, else the smaller of 2048 and the model's maximum."""
    if recipe_value is not None:
        return recipe_value
    return DEFAULT_WINDOW_SIZE if max_position is None else min(DEFAULT_WINDOW_SIZE, max_position)


def windows_from_tokens(tokens_WS: torch.Tensor, *, notes: tuple[str, ...] = ()) -> Windows:
    """Return windows that are full as they stand, such as text the model wrote itself."""
    num_windows, window_size = tokens_WS.shape
    tokens_WS = tokens_WS.to(torch.int64)
    lengths_W = torch.full((num_windows,), window_size, dtype=torch.int64)
    return Windows(
        tokens_WS=tokens_WS,
        lengths_W=lengths_W,
        num_windows_requested=num_windows,
        num_tokens_available=tokens_WS.numel(),
        remainder_tokens=0,
        num_duplicate_documents=0,
        sha256=tokens_sha256(tokens_WS, lengths_W),
        notes=notes,
    )


def require_bos(tokenizer: Tokenizer, bos: BosPolicy) -> int | None:
    """Return the BOS id that the policy needs, None where it needs none.

    Raises:
        RecipeError: the policy needs a BOS and the model has none.
    """
    if bos == "none":
        return None
    if tokenizer.bos_token_id is None:
        raise RecipeError(
            "calibration.bos",
            expected="none, because the model's tokenizer has no begin-of-sequence token",
            found=bos,
            action="Set calibration.bos=none.",
        )
    return tokenizer.bos_token_id


def _chosen(num_available: int, settings: WindowSettings) -> torch.Tensor:
    """Return the indices of the windows to keep: a seeded permutation, cut off. The global generator is not touched."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randperm(num_available, generator=generator)[: settings.num_windows]


def build_windows(documents: Iterable[str], tokenizer: Tokenizer, settings: WindowSettings) -> Windows:
    """Return the windows of a text.

    `packed`: all documents are joined and cut into consecutive windows; what is left at the end is dropped. A BOS is
    put before each window or each document where the policy says so, and counts as a token of the window.
    `documents`: each document fills one window, cut or padded on the right.
    Of all windows a seeded permutation picks `num_windows`; if there are fewer, all are taken and `lint` warns. At
    most 4 times as many tokens (or documents) as asked for are read, rounded up to a whole document.

    Raises:
        TextError: the text does not fill one window.
        RecipeError: a BOS policy for a tokenizer that has none, or no room for text beside the BOS.
    """
    bos_token_id = require_bos(tokenizer, settings.bos)
    if bos_token_id is not None and settings.window_size < 2:
        raise RecipeError(
            "calibration.window_size",
            expected="at least 2, since each window begins with a BOS",
            found=str(settings.window_size),
            action="Set calibration.window_size to 2 or more, or calibration.bos=none.",
        )
    if settings.layout == "documents":
        return _document_windows(documents, tokenizer, settings, bos_token_id)
    return _packed_windows(documents, tokenizer, settings, bos_token_id)


def _packed_windows(
    documents: Iterable[str], tokenizer: Tokenizer, settings: WindowSettings, bos_token_id: int | None
) -> Windows:
    size = settings.window_size
    text = read_tokens(
        documents,
        tokenizer,
        bos_before_document=bos_token_id if settings.bos == "document" else None,
        max_tokens=READ_RATIO * settings.num_windows * size,
    )
    text_size = size - 1 if settings.bos == "window" else size
    stream_T = torch.tensor(text.joined(), dtype=torch.int64)
    num_available = stream_T.numel() // text_size
    if num_available == 0:
        raise _too_short(text.num_tokens, text_size)
    remainder = stream_T.numel() - num_available * text_size
    all_WS = stream_T[: num_available * text_size].view(num_available, text_size)
    tokens_WS = all_WS[_chosen(num_available, settings)]
    if settings.bos == "window" and bos_token_id is not None:
        tokens_WS = torch.cat([torch.full((tokens_WS.shape[0], 1), bos_token_id), tokens_WS], dim=1)
    notes = (
        f"{tokens_WS.shape[0]} of {num_available} windows of {size} tokens, chosen with seed {settings.seed}; "
        f"{remainder} tokens at the end fill no window.",
        *_read_notes(text),
    )
    lengths_W = torch.full((tokens_WS.shape[0],), size, dtype=torch.int64)
    return _windows(tokens_WS, lengths_W, text=text, settings=settings, remainder=remainder, notes=notes)


def _document_windows(
    documents: Iterable[str], tokenizer: Tokenizer, settings: WindowSettings, bos_token_id: int | None
) -> Windows:
    size = settings.window_size
    text = read_tokens(
        documents, tokenizer, bos_before_document=bos_token_id, max_documents=READ_RATIO * settings.num_windows
    )
    if not text.documents:
        raise _too_short(0, 1)
    chosen = [text.documents[index] for index in _chosen(len(text.documents), settings).tolist()]
    tokens_WS = torch.zeros((len(chosen), size), dtype=torch.int64)
    for row, ids in enumerate(chosen):
        kept = ids[:size]
        tokens_WS[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    lengths_W = torch.tensor([min(len(ids), size) for ids in chosen], dtype=torch.int64)
    cut = sum(max(0, len(ids) - size) for ids in chosen)
    notes = (
        f"{len(chosen)} of {len(text.documents)} documents, chosen with seed {settings.seed}, one per window of {size} "
        f"tokens; {cut} tokens of longer documents are cut off.",
        *_read_notes(text),
    )
    return _windows(tokens_WS, lengths_W, text=text, settings=settings, remainder=cut, notes=notes)


def _windows(
    tokens_WS: torch.Tensor,
    lengths_W: torch.Tensor,
    *,
    text: TokenizedText,
    settings: WindowSettings,
    remainder: int,
    notes: tuple[str, ...],
) -> Windows:
    return Windows(
        tokens_WS=tokens_WS,
        lengths_W=lengths_W,
        num_windows_requested=settings.num_windows,
        num_tokens_available=text.num_tokens,
        remainder_tokens=remainder,
        num_duplicate_documents=text.num_duplicates,
        sha256=tokens_sha256(tokens_WS, lengths_W),
        notes=notes,
    )


def _read_notes(text: TokenizedText) -> tuple[str, ...]:
    if not text.cut_short:
        return ()
    return (
        f"Reading stopped after {len(text.documents)} documents with {text.num_tokens} tokens, "
        f"{READ_RATIO} times what is needed; the rest of the text was not looked at.",
    )


def _too_short(num_tokens: int, window_size: int) -> TextError:
    return TextError(
        "text",
        expected=f"at least {window_size} tokens, one window",
        found=f"{num_tokens} tokens",
        action="Name a longer text, or set a smaller window size.",
    )
