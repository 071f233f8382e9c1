"""From a config or checkpoint folder to the spec of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optgptq.checkpoint.source import TensorSource
from optgptq.errors import ModelError
from optgptq.models.config_reader import ConfigReader
from optgptq.models.families.bloom import BLOOM
from optgptq.models.families.falcon import FALCON
from optgptq.models.families.gemma import GEMMA_FAMILIES
from optgptq.models.families.gpt2 import GPT2
from optgptq.models.families.gpt_neox import GPT_NEOX
from optgptq.models.families.llama import LLAMA_FAMILIES
from optgptq.models.families.mpt import MPT
from optgptq.models.families.opt import OPT
from optgptq.models.families.phi3 import PHI3
from optgptq.models.family import ModelFamily
from optgptq.models.spec import DecoderSpec

FAMILIES: tuple[ModelFamily, ...] = (*LLAMA_FAMILIES, *GEMMA_FAMILIES, PHI3, GPT2, GPT_NEOX, OPT, BLOOM, MPT, FALCON)


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a parsed config.json: by `architectures`, or by `model_type` where that is absent.

    Raises:
        ModelError: no family implements the architecture.
    """
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        architectures = (architectures,)
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
        if not architectures and config.get("model_type") == family.name:
            return family
    found = ", ".join(map(str, architectures)) or f"model_type {config.get('model_type')!r} without architectures"
    known = sorted(name for family in FAMILIES for name in family.architectures)
    raise ModelError(
        "config.json: architectures",
        expected="one of " + ", ".join(known),
        found=found,
        action="Use a model of a known architecture, or add a family record (docs/adding/family.md).",
    )


def config_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return what the model of `config` computes, with the tensor names that transformers writes today.

    Raises:
        ModelError: the architecture, or a value in the config, is not implemented.
    """
    return family_of(config).build_spec(ConfigReader(config))


def model_spec(folder: TensorSource) -> DecoderSpec:
    """Return what the model in `folder` computes, with the tensor names that its checkpoint uses.

    Raises:
        ModelError: the architecture, or a value in its config, is not implemented.
    """
    family = family_of(folder.config)
    spec = config_spec(folder.config)
    names, prefix = spec.names, family.optional_prefix
    if prefix and not any(name.startswith(prefix) for name in folder.tensors):
        names = names.without_prefix(prefix)
    # Also where it is quantized and has no weight of its own.
    if family.other_head and any(name.startswith(f"{family.other_head}.") for name in folder.tensors):
        names = replace(names, head=family.other_head)
    return replace(spec, names=names)
