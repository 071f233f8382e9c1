"""`optgptq.__all__` is what the package offers: sorted, exact, and free until it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest
from support.source_tree import ROOT, read_source

import optgptq

PLACES = {
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


def test_all_is_exact() -> None:
    """Its order is checked by ruff."""
    assert sorted(optgptq.__all__) == sorted({*PLACES, "__version__"})


@pytest.mark.parametrize("name", PLACES)
def test_a_public_name_is_the_object_it_names(name: str) -> None:
    module, attribute = PLACES[name]
    assert getattr(optgptq, name) is getattr(importlib.import_module(module), attribute)


def test_dir_lists_every_public_name() -> None:
    assert set(optgptq.__all__) <= set(dir(optgptq))


def test_type_checkers_see_the_same_names() -> None:
    tree = read_source(ROOT / "optgptq" / "__init__.py").tree
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    assert seen == PLACES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'optgptq' has no attribute 'quantise'"):
        _ = optgptq.quantise


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, optgptq; print(sorted({'torch', 'pydantic', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
