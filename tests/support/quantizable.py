"""Tiny models with a tokenizer, ready to be quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.texts import write_tokenizer
from support.tiny_models import TINY_MODELS, TinyModel, reference_model, save_reference

from optgptq.data.reading import tokens_sha256
from optgptq.data.windows import Windows, windows_from_tokens
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.records import ExportRecipe, Recipe
from optgptq.recipe.weights import WeightRecipe

# Every byte, begin and end of text.
VOCAB_SIZE = 258


def tiny_model(name: str, **values: Any) -> TinyModel:
    """Return a tiny model whose vocabulary is that of the byte tokenizer."""
    tiny = next(tiny for tiny in TINY_MODELS if tiny.name == name)
    return replace(tiny, values={**tiny.values, "vocab_size": VOCAB_SIZE, **values})


def write_model(tiny: TinyModel, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model with its tokenizer and return the folder."""
    save_reference(reference_model(tiny).to(dtype), folder)
    return write_tokenizer(folder)


def wide_llama(**values: Any) -> TinyModel:
    """Return a Llama whose widths are multiples of 16, for groups."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny_model("llama-grouped_query", **{**sizes, **values})


def tiny_recipe(
    *, calibration: dict[str, Any] | None = None, export: dict[str, Any] | None = None, **weights: Any
) -> Recipe:
    """Return a recipe with one group per row, four windows of 24 tokens and float64 solves."""
    return Recipe(
        weights=WeightRecipe(**{"group_size": -1, "solver_dtype": "float64", **weights}),
        calibration=CalibrationRecipe(
            **{"num_windows": 4, "window_size": 24, "full_precision_windows": 2, **(calibration or {})}
        ),
        export=ExportRecipe(**(export or {})),
    )


def padded_windows(tokens_WS: torch.Tensor, lengths: Sequence[int]) -> Windows:
    """Return windows of which only the first `lengths` tokens count."""
    lengths_W = torch.tensor(lengths)
    padding_WS = torch.arange(tokens_WS.shape[1]) >= lengths_W[:, None]
    tokens_WS = tokens_WS.masked_fill(padding_WS, 0)
    windows = windows_from_tokens(tokens_WS)
    return replace(windows, lengths_W=lengths_W, sha256=tokens_sha256(tokens_WS, lengths_W))


@contextmanager
def recorded_inputs(model: Any, names: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record what the modules of a transformers model read while the context is open, as float64 `[T, I]`."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def record(name: str) -> Any:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
            del module, output
            inputs[name].append(arguments[0].reshape(-1, arguments[0].shape[-1]).double())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
