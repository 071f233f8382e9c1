"""Whether the gates of a recipe can be judged at all, found out before a long job."""

from __future__ import annotations

import math
from pathlib import Path

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.evaluation import evaluation_windows
from optgptq.data.tokenizer import load_tokenizer
from optgptq.data.windows import resolve_window_size
from optgptq.errors import CapacityError, RecipeError, UsageError
from optgptq.evaluation.decoding import CacheOptions
from optgptq.evaluation.run import EvaluationSettings
from optgptq.models.registry import model_spec
from optgptq.recipe.gates import GATES, GatesRecipe
from optgptq.recipe.records import Recipe

# Models are scored with decoded weights in float32: the checkpoint and the model that it was made from.
_BYTES_PER_WEIGHT, _NUM_MODELS = 4, 2


def evaluation_settings(gates: GatesRecipe, *, decoding: CacheOptions | None = None) -> EvaluationSettings:
    """Return the evaluation that a recipe's gates ask for; they must name a text."""
    assert gates.text is not None
    source = TextSource(
        source=gates.text, config=gates.config, split=gates.split, column=gates.column, revision=gates.revision
    )
    return EvaluationSettings(
        source=source, window_size=gates.window_size, max_tokens=gates.max_tokens, decoding=decoding
    )


def require_gates_possible(recipe: Recipe) -> None:
    """Check that the recipe's own settings leave each gate a figure.

    Raises:
        UsageError: no linear is quantized, or no output error is measured, and a gate looks at that.
    """
    recorded = [name for name in recipe.gates.limits if GATES[name].source == "record"]
    if recorded and recipe.weights.method == "none":
        raise UsageError(
            ", ".join(f"gates.{name}" for name in recorded),
            expected="a recipe that quantizes weights",
            found="weights.method none",
            action="Leave these gates out, or choose a method.",
        )
    measures_errors = recipe.calibration.full_precision_windows != 0 or recipe.weights.target_shift != "off"
    if recipe.gates.max_layer_error is not None and not measures_errors:
        raise UsageError(
            "gates.max_layer_error",
            expected="windows on which output errors are measured",
            found="calibration.full_precision_windows 0",
            action="Leave calibration.full_precision_windows out, or this gate.",
        )


def check_text(gates: GatesRecipe, source: Path) -> None:
    """Read the text of the gates as the evaluation will, with the tokenizer of the model in folder `source`.

    Raises:
        TextError: a text or a tokenizer that cannot be read, or a text that is shorter than a window.
        UsageError: numbers that cannot be obeyed.
        ModelError: the model is not known.
    """
    if gates.text is None and gates.sample_prompt is None:
        return
    tokenizer = load_tokenizer(source)
    if gates.text is None:
        return
    settings = evaluation_settings(gates)
    window_size = resolve_window_size(settings.window_size, model_spec(CheckpointFolder.open(source)).max_position)
    _require_a_window(gates, window_size)
    evaluation_windows(
        load_documents(settings.source, render_chat=tokenizer.render_chat),
        tokenizer,
        window_size=window_size,
        max_tokens=settings.max_tokens,
    )


def _require_a_window(gates: GatesRecipe, window_size: int) -> None:
    # Where the recipe names both numbers it has compared them itself.
    if gates.max_tokens is None or gates.max_tokens >= window_size:
        return
    raise RecipeError(
        "gates.max_tokens",
        expected=f"at least one window, {window_size} tokens (gates.window_size is not set)",
        found=str(gates.max_tokens),
        action="Set gates.max_tokens to a larger number, or gates.window_size to a smaller one.",
    )


def require_memory(source: Path, available: int | None, *, what: str) -> None:
    """Check that the two models of an evaluation fit.

    Args:
        source: folder of the dense model.
        available: bytes; None where nobody knows.
        what: who needs them, the beginning of a sentence.

    Raises:
        CapacityError: they do not; nothing was loaded.
    """
    num_weights = sum(math.prod(info.shape) for info in CheckpointFolder.open(source).tensors.values())
    needed = num_weights * _BYTES_PER_WEIGHT * _NUM_MODELS
    if available is not None and needed > available:
        raise CapacityError(
            what,
            expected=f"{needed / 2**30:,.1f} GiB of memory, for the checkpoint and its source model in float32",
            found=f"{available / 2**30:,.1f} GiB",
            action="Leave out the gates that are measured on a text, and run `optgptq eval` on a larger machine.",
        )
