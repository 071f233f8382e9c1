"""The windows a model is calibrated on: read from a source, or written by the model itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource, load_documents, source_warnings
from optgptq.data.lint import lint
from optgptq.data.tokenizer import Tokenizer, load_tokenizer
from optgptq.data.windows import (
    Windows,
    WindowSettings,
    build_windows,
    require_bos,
    resolve_window_size,
    windows_from_tokens,
)
from optgptq.journal.store import NothingKept, Steps
from optgptq.models.decoder import load_decoder
from optgptq.models.inventory import model_linears
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.runtime.kept_texts import KeptTexts
from optgptq.runtime.self_text import SelfWriting, write_windows

# The step that keeps a text that the model wrote; those that keep parts of it begin with it and a dot.
_WINDOWS = "windows"


def calibration_windows(
    folder: CheckpointFolder,
    spec: DecoderSpec,
    calibration: CalibrationRecipe,
    *,
    dtype: torch.dtype,
    device: str,
    for_linears: bool = True,
    steps: Steps | None = None,
) -> tuple[Windows, tuple[str, ...]]:
    """Return the windows that the recipe asks for, and warnings about them.

    Args:
        folder, spec: the model.
        calibration: what is asked for.
        dtype, device: of the computation, where the model writes the text.
        for_linears: second moments of the inputs of linears are measured on them.
        steps: keep a text that the model wrote; None to keep nothing.

    Raises:
        TextError: no tokenizer, or a text that cannot be used.
        RecipeError: a BOS policy that the tokenizer cannot follow.
    """
    tokenizer = load_tokenizer(folder.path)
    window_size = resolve_window_size(calibration.window_size, spec.max_position)
    if calibration.source == "self":
        steps = NothingKept() if steps is None else steps
        known = steps.get(_WINDOWS)
        if known is not None:
            windows = windows_from_tokens(known.tensors["tokens"], notes=tuple(known.facts["notes"]))
            told = list(known.facts["warnings"])
        else:
            told = []
            kept = KeptTexts(steps.scope(_WINDOWS))
            windows = _self_text(
                folder,
                tokenizer,
                calibration,
                window_size=window_size,
                dtype=dtype,
                device=device,
                kept=kept,
                warn=told.append,
            )
            steps.put(_WINDOWS, {"tokens": windows.tokens_WS}, {"notes": list(windows.notes), "warnings": told})
            steps.sync()
            kept.forget()
        warnings = tuple(told)
    else:
        source = TextSource.of(calibration)
        documents = load_documents(source, render_chat=tokenizer.render_chat)
        windows = build_windows(documents, tokenizer, WindowSettings.of(calibration, window_size=window_size))
        warnings = source_warnings(source)
    widest = max(linear.in_features for linear in model_linears(spec)) if for_linears else None
    return windows, warnings + lint(windows, tokenizer, widest_input=widest, max_position=spec.max_position)


def _self_text(
    folder: CheckpointFolder,
    tokenizer: Tokenizer,
    calibration: CalibrationRecipe,
    *,
    window_size: int,
    dtype: torch.dtype,
    device: str,
    kept: KeptTexts,
    warn: Callable[[str], None],
) -> Windows:
    """Sample windows from the dense model, which is in memory as a whole while it writes."""
    bos_token_id = require_bos(tokenizer, calibration.bos) if calibration.bos == "window" else None
    writing = SelfWriting(
        temperature=calibration.self_temperature,
        seed=calibration.seed,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    text_size = window_size - (bos_token_id is not None)
    tokens_WS = write_windows(
        load_decoder(folder, dtype=dtype, device=device),
        calibration.num_windows,
        text_size,
        writing=writing,
        bos_token_id=tokenizer.bos_token_id,
        kept=kept,
        warn=warn,
    )
    if bos_token_id is not None:
        tokens_WS = torch.cat([torch.full((tokens_WS.shape[0], 1), bos_token_id), tokens_WS], dim=1)
    note = (
        f"{calibration.num_windows} windows of {window_size} tokens written by the model itself at temperature "
        f"{calibration.self_temperature:g} with seed {calibration.seed}."
    )
    return windows_from_tokens(tokens_WS, notes=(note,))
