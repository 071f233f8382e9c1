"""A model family is a record: which architectures it covers and how its config becomes a `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optgptq.models.config_reader import ConfigReader
from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """How to read one family of models.

    Attributes:
        name: `model_type` of its configs.
        architectures: entries of `architectures` in config.json that this record describes.
        build_spec: makes the spec; reads every key that changes the arithmetic, refuses values it does not implement.
        optional_prefix: start of the tensor names that some checkpoints leave out; empty where none does.
        other_head: another name of the head in some checkpoints; empty where there is none.
        with_kv_heads: returns the config of the same model with another number of key/value heads; None where configs
            of the family cannot say that query heads share them.
    """

    name: str
    architectures: tuple[str, ...]
    build_spec: Callable[[ConfigReader], DecoderSpec]
    optional_prefix: str = ""
    other_head: str = ""
    with_kv_heads: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
