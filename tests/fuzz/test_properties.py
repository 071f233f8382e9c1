"""Any JSON at all, where a file of another tool is read: an answer or a refusal, nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.checkpoint.safetensors_header import TORCH_DTYPES, parse_header
from optgptq.errors import ModelError, RecipeError, TextError
from optgptq.models.inventory import expected_tensors
from optgptq.models.registry import FAMILIES, config_spec
from optgptq.recipe.loading import load_recipe, recipe_schema
from optgptq.recipe.yaml_text import parse_yaml

NUMBERS = st.integers() | st.integers(-3, 300) | st.floats()
TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(TORCH_DTYPES)) | JSON,
        "shape": st.lists(st.integers(0, 2**63) | st.integers(0, 8), max_size=6) | JSON,
        "data_offsets": st.lists(st.integers(0, 2**63) | st.integers(0, 64), max_size=3) | JSON,
    }
)
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
KEYS += ("vocab_size", "head_dim", "rope_scaling", "rope_theta", "layer_types", "sliding_window", "hidden_act")
KEYS += ("tie_word_embeddings", "attn_config", "d_model", "n_layers", "n_heads", "n_embd", "n_layer", "n_head")
SECTIONS = sorted(recipe_schema()["properties"])


@settings(max_examples=150)
@given(content=st.dictionaries(TEXT, ENTRIES | JSON, max_size=4) | JSON, size=st.integers(0, 100))
def test_headers(content: Any, size: int) -> None:
    header = json.dumps(content).encode()
    with contextlib.suppress(ModelError):
        infos = parse_header(header, file="model.safetensors", file_bytes=len(header) + 8 + size)
        assert sum(info.num_bytes for info in infos) == size


@settings(max_examples=150)
@given(
    family=st.sampled_from([name for family in FAMILIES for name in family.architectures]),
    values=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 8) | JSON),
)
def test_configs(family: str, values: dict[str, Any]) -> None:
    with contextlib.suppress(ModelError):
        expected_tensors(config_spec({"architectures": [family], **values}))


@settings(max_examples=100)
@given(section=st.sampled_from(SECTIONS), field=TEXT, value=JSON | TEXT)
def test_overrides(section: str, field: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with contextlib.suppress(RecipeError, TextError):
        load_recipe("gptq-w4", [f"{section}.{field}={text}"])


@settings(max_examples=100)
@given(text=st.text(alphabet="ab:-[]{}#&*!|>'\"%@` \n\t0123.eE\0\x85\ud800", max_size=40))
def test_yaml(text: str) -> None:
    with contextlib.suppress(RecipeError):
        parse_yaml(text, where="recipe")
