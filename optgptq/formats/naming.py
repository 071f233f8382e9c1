"""Names of modules: exact patterns for the configuration files of engines, bounded matching of patterns found there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import regex

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import FormatError
from optgptq.layout import LinearLayout

MAX_PATTERN_LENGTH = 100_000
MATCH_TIMEOUT_SECONDS = 1.0

# What engines load as one linear, by the last part of the name. Only to read files that do not say it themselves.
ENGINE_FUSED_LINEARS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings", "tokens_embed")
# These models store linears as transformers' Conv1D, `[I, O]`.
CONV1D_MODEL_TYPES = ("gpt2", "openai-gpt")


def exact_patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Return anchored, escaped regular expressions that match exactly `names`.

    Names that differ only in the number of the decoder layer share a pattern, and so do linears that are wanted in the
    same decoder layers.
    """
    numbers_by_template: dict[tuple[str, str], list[str]] = {}
    plain = []
    for name in sorted(set(names)):
        parts = name.split(".")
        position = next((place for place, part in enumerate(parts) if part.isascii() and part.isdecimal()), None)
        # A name that ends with its number shares its pattern with no other.
        if position is None or position == len(parts) - 1:
            plain.append(name)
            continue
        template = (".".join(parts[:position]), ".".join(parts[position + 1 :]))
        numbers_by_template.setdefault(template, []).append(parts[position])
    tails_by_layers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), numbers in numbers_by_template.items():
        ordered = tuple(sorted(numbers, key=lambda number: (len(number), number)))
        tails_by_layers.setdefault((head, ordered), []).append(tail)
    patterns = [
        rf"^{_dotted(head)}{_any_of(numbers)}\.{_any_of(sorted(tails))}$"
        for (head, numbers), tails in tails_by_layers.items()
    ]
    return (*patterns, *(f"^{re.escape(name)}$" for name in plain))


def engine_names(layouts: Iterable[LinearLayout]) -> list[str]:
    """Return the names of the linears and those that engines give to the linears they are fused into."""
    return sorted({name for layout in layouts for name in (layout.name, layout.fused_name or layout.name)})


def is_outer(name: str) -> bool:
    """True if linear `name` is in no decoder layer: quantized ones there are output heads."""
    return not any(part.isascii() and part.isdecimal() for part in name.split("."))


def matches(pattern: str, name: str, *, where: str) -> bool:
    """True if `pattern`, taken from a foreign file, matches from the start of `name`.

    Raises:
        FormatError: not a regular expression, far too long, or one that backtracks without end.
    """
    found = f"{len(pattern)} characters"
    if len(pattern) <= MAX_PATTERN_LENGTH:
        try:
            return regex.match(pattern, name, timeout=MATCH_TIMEOUT_SECONDS) is not None
        except regex.error as error:
            found = f"{pattern[:200]!r}: {error}"
        except TimeoutError:
            found = f"{pattern[:200]!r}, which backtracks without end"
    raise FormatError(
        where,
        expected=f"a regular expression of at most {MAX_PATTERN_LENGTH} characters that can be matched",
        found=found,
        action="Correct the rule in the checkpoint's configuration, if you trust the checkpoint.",
    )


def with_engine_names(folder: CheckpointFolder, layouts: Sequence[LinearLayout]) -> tuple[LinearLayout, ...]:
    """Return read `layouts` and those of the dense linears of `folder`, fused names filled in, sorted by name."""
    quantized = {layout.name for layout in layouts}
    every = [*layouts, *_dense_layouts(folder, quantized)]
    names = {layout.name for layout in every}
    transposed = folder.config.get("model_type") in CONV1D_MODEL_TYPES
    return tuple(
        _with_fused_names(layout, names, transposed=transposed and layout.name != "lm_head")
        for layout in sorted(every, key=lambda layout: layout.name)
    )


def _dense_layouts(folder: CheckpointFolder, quantized: set[str]) -> list[LinearLayout]:
    """Layouts of all dense matrices but embeddings: files do not say which are linears, and naming too many is safe."""
    layouts = []
    for info in folder.tensors.values():
        name = info.name.removesuffix(".weight")
        is_matrix = info.name.endswith(".weight") and len(info.shape) == 2 and info.torch_dtype.is_floating_point
        if is_matrix and name not in quantized and name.rpartition(".")[2] not in EMBEDDINGS:
            layouts.append(
                LinearLayout(
                    name=name,
                    out_features=info.shape[0],
                    in_features=info.shape[1],
                    bits=None,
                    dense_reason="stored dense in the checkpoint",
                )
            )
    return layouts


def _with_fused_names(layout: LinearLayout, names: set[str], *, transposed: bool) -> LinearLayout:
    parent, dot, leaf = layout.name.rpartition(".")
    fused_names: tuple[str, ...] = (layout.name,)
    fused_name = layout.name
    for fused_leaf, leaves in ENGINE_FUSED_LINEARS.items():
        members = tuple(f"{parent}{dot}{member}" for member in leaves)
        if leaf in leaves and names.issuperset(members):
            fused_names, fused_name = members, f"{parent}{dot}{fused_leaf}"
    return replace(layout, stored_transposed=transposed, fused_names=fused_names, fused_name=fused_name)


def _dotted(head: str) -> str:
    return re.escape(f"{head}.") if head else ""


def _any_of(parts: Iterable[str]) -> str:
    escaped = [re.escape(part) for part in parts]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"
