"""What is wrong with a calibration text although it can be used; every sentence goes to the log and to the record."""

from __future__ import annotations

from optgptq.data.tokenizer import Tokenizer
from optgptq.data.windows import Windows

# A second moment of I inputs has rank at most the number of tokens; four times that number makes it well conditioned.
ADVISED_TOKEN_RATIO = 4
SMALLEST_VOCABULARY_SHARE = 0.01
FEWEST_DISTINCT_TOKENS = 16


def lint(
    windows: Windows, tokenizer: Tokenizer, *, widest_input: int | None, max_position: int | None
) -> tuple[str, ...]:
    """Return warnings about a calibration text, in plain sentences.

    Args:
        windows: the text.
        tokenizer: of the model.
        widest_input: input columns of the widest linear, the size of its Hessian; None where none is measured.
        max_position: positions the model was made for, None where it has no limit.
    """
    return (
        *_quantity(windows, widest_input),
        *_duplicates(windows),
        *_missing_bos(windows, tokenizer),
        *_too_long(windows, max_position),
        *_spread(windows, tokenizer),
    )


def _quantity(windows: Windows, widest_input: int | None) -> list[str]:
    warnings = []
    if windows.num_windows < windows.num_windows_requested:
        warnings.append(
            f"The text fills {windows.num_windows} windows of {windows.window_size} tokens; "
            f"{windows.num_windows_requested} were asked for."
        )
    if widest_input is None:
        return warnings
    num_tokens = windows.num_tokens
    if num_tokens < widest_input:
        warnings.append(
            f"{num_tokens} calibration tokens cannot fill the Hessian of the widest linear, which has {widest_input} "
            f"inputs; use at least {ADVISED_TOKEN_RATIO * widest_input}."
        )
    elif num_tokens < ADVISED_TOKEN_RATIO * widest_input:
        warnings.append(
            f"{num_tokens} calibration tokens are few for the Hessian of the widest linear, which has {widest_input} "
            f"inputs; {ADVISED_TOKEN_RATIO * widest_input} or more are advised."
        )
    return warnings


def _duplicates(windows: Windows) -> list[str]:
    rows = {row.numpy().tobytes() for row in windows.tokens_WS}
    warnings = []
    if len(rows) < windows.num_windows:
        warnings.append(f"{windows.num_windows - len(rows)} of {windows.num_windows} windows repeat an earlier window.")
    if windows.num_duplicate_documents:
        warnings.append(f"{windows.num_duplicate_documents} documents repeat an earlier document.")
    return warnings


def _missing_bos(windows: Windows, tokenizer: Tokenizer) -> list[str]:
    bos_token_id = tokenizer.bos_token_id
    if bos_token_id is None or not tokenizer.adds_bos or bool(windows.tokens_WS.eq(bos_token_id).any()):
        return []
    return [
        "The model's tokenizer puts a BOS before every text and no window holds one; "
        "set calibration.bos=window or document to measure what the model sees in use."
    ]


def _too_long(windows: Windows, max_position: int | None) -> list[str]:
    if max_position is None or windows.window_size <= max_position:
        return []
    return [f"Windows of {windows.window_size} tokens are longer than the {max_position} positions the model allows."]


def _spread(windows: Windows, tokenizer: Tokenizer) -> list[str]:
    positions_WS = windows.tokens_WS.new_tensor(range(windows.window_size))[None, :]
    valid_T = windows.tokens_WS[positions_WS < windows.lengths_W[:, None]]
    num_distinct = int(valid_T.bincount().count_nonzero())
    wanted = max(
        min(FEWEST_DISTINCT_TOKENS, tokenizer.vocab_size), int(SMALLEST_VOCABULARY_SHARE * tokenizer.vocab_size)
    )
    if num_distinct >= wanted:
        return []
    return [
        f"The text uses {num_distinct} of {tokenizer.vocab_size} tokens of the vocabulary; "
        "text this uniform measures little of the model."
    ]
