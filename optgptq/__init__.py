"""optgptq: low-bit checkpoints of causal language models, made without backpropagation.

Public names are imported when they are first asked for (PEP 562): `import optgptq` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optgptq.affine_weight import AffineWeight
    from optgptq.errors import OptGPTQError
    from optgptq.quantize import QuantizeResult
    from optgptq.quantize import quantize as quantize_model
    from optgptq.recipe.loading import load_recipe
    from optgptq.recipe.records import Recipe
    from optgptq.runtime.async_engine import AsyncEngine
    from optgptq.runtime.engine_settings import EngineSettings
    from optgptq.runtime.llm import LLM
    from optgptq.runtime.load import load_model
    from optgptq.runtime.results import GenerationResult
    from optgptq.scheduling.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AffineWeight",
    "AsyncEngine",
    "EngineSettings",
    "GenerationResult",
    "OptGPTQError",
    "QuantizeResult",
    "Recipe",
    "SamplingParams",
    "__version__",
    "load_model",
    "load_recipe",
    "quantize_model",
]

# `quantize_model` is `optgptq.quantize.quantize`: the name `optgptq.quantize` belongs to the module, which Python binds
# to it as soon as anyone imports that module.
_PLACES = {
    "LLM": ("optgptq.runtime.llm", "LLM"),
    "AffineWeight": ("optgptq.affine_weight", "AffineWeight"),
    "AsyncEngine": ("optgptq.runtime.async_engine", "AsyncEngine"),
    "EngineSettings": ("optgptq.runtime.engine_settings", "EngineSettings"),
    "GenerationResult": ("optgptq.runtime.results", "GenerationResult"),
    "OptGPTQError": ("optgptq.errors", "OptGPTQError"),
    "QuantizeResult": ("optgptq.quantize", "QuantizeResult"),
    "Recipe": ("optgptq.recipe.records", "Recipe"),
    "SamplingParams": ("optgptq.scheduling.sampling_params", "SamplingParams"),
    "load_model": ("optgptq.runtime.load", "load_model"),
    "load_recipe": ("optgptq.recipe.loading", "load_recipe"),
    "quantize_model": ("optgptq.quantize", "quantize"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'optgptq' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
