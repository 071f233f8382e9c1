"""The draft of a model card: Markdown with the metadata that model hubs read."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import yaml

import optgptq
from optgptq.reports.findings import alike
from optgptq.reports.run_data import Loading, RunData
from optgptq.reports.summary_sections import evaluation_facts, model_words, source_bytes
from optgptq.reports.wording import clean, count, digits, num_bytes, plain_value, showable, table_of

# Source: naming rules of hub repositories, https://huggingface.co/docs/huggingface_hub (validate_repo_id).
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9_][\w-]*(?:\.[\w-]+)*", re.ASCII)
_MAX_HUB_ID = 96
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENSE_KEYS = ("license", "license_name", "license_link")
_MARKS = re.compile(r"([\\`*_\[\]<>|#$~])")
_ENGINE_FORMATS = ("gptq", "gptq_v2", "compressed-tensors")
_MAX_WARNINGS = 20
_OPTIONAL_KERNELS = "humming"
_FOLDER = "PATH_OR_HUB_ID"
_TRANSFORMERS = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{_FOLDER}")
model = AutoModelForCausalLM.from_pretrained("{_FOLDER}", device_map="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"""
_GPTQMODEL = f"""\
from gptqmodel import GPTQModel

model = GPTQModel.load("{_FOLDER}")
print(model.tokenizer.decode(model.generate("Once upon a time")[0]))"""
_COMMANDS = {
    "vllm": ("bash", f"vllm serve {_FOLDER}"),
    "sglang": ("bash", f"python -m sglang.launch_server --model-path {_FOLDER}"),
    "transformers": ("python", _TRANSFORMERS),
    "gptqmodel": ("python", _GPTQMODEL),
    "optgptq": ("bash", f'optgptq generate {_FOLDER} "Once upon a time" --max-tokens 100'),
}


def model_card(data: RunData) -> str:
    """Return the card: front matter, what it is, how to run it, figures, recipe, limits. It is a draft to be read."""
    template = _templates().get_template("card.md.jinja")
    return template.render(
        front_matter=yaml.safe_dump(front_matter(data), sort_keys=False, allow_unicode=True, width=1000),
        name=data.name,
        base_model=base_model(data),
        model=model_words(data),
        format=data.checkpoint.format,
        facts=_facts(data),
        commands=_commands(data),
        refused=[_escaped(answer.title) for answer in data.loading if not answer.loads],
        quality=evaluation_facts(data.evaluation) if data.evaluation else [],
        recipe=_recipe(data),
        limits=_limits(data),
        version=optgptq.__version__,
    )


def front_matter(data: RunData) -> dict[str, Any]:
    """Return the metadata: only what is known, nothing guessed."""
    base = base_model(data)
    return {
        "library_name": "transformers" if data.checkpoint.format in _ENGINE_FORMATS else "optgptq",
        "pipeline_tag": "text-generation",
        **({} if base is None else {"base_model": base, "base_model_relation": "quantized"}),
        **_license(data.card),
        **_datasets(data),
        "tags": _tags(data),
        "quantized_by": "optgptq",
    }


def base_model(data: RunData) -> str | None:
    """Return the hub id that `config.json` names; None where that is a path or nothing."""
    name = data.config.get("_name_or_path")
    if not isinstance(name, str) or len(name) > _MAX_HUB_ID or "--" in name:
        return None
    return name if _HUB_ID.fullmatch(name) else None


def _license(card: str) -> dict[str, str]:
    """Return what the source's card says of its licence."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}
    try:
        told = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(told, dict):
        return {}
    return {key: clean(told[key], limit=300) for key in _LICENSE_KEYS if isinstance(told.get(key), str)}


def _tags(data: RunData) -> list[str]:
    bits = sorted({linear.bits for linear in data.linears})
    methods = sorted({linear.method for linear in data.linears if linear.method})
    cache = ["quantized-kv-cache"] if data.checkpoint.kv_cache is not None else []
    formats = [data.checkpoint.format] if data.checkpoint.layers else []
    return list(dict.fromkeys(["optgptq", *formats, *(f"{width}-bit" for width in bits), *methods, *cache]))


def _facts(data: RunData) -> list[tuple[str, str]]:
    checkpoint = data.checkpoint
    before = source_bytes(data.manifest)
    rows = [
        ("bits per weight", digits(checkpoint.bits_per_weight, precision=5)),
        ("quantized weights", f"{count(checkpoint.num_quantized_weights)} in {len(checkpoint.layers):,} linears"),
        ("linears left dense", f"{len(checkpoint.dense):,}"),
        ("size of all tensors", num_bytes(checkpoint.tensor_bytes)),
        ("size before", num_bytes(before) if before else "-"),
    ]
    cache = checkpoint.kv_cache
    if cache is not None:
        bits = f"keys {digits(cache.key_bits_per_value)}, values {digits(cache.value_bits_per_value)} bits"
        rows.append(("KV cache", bits))
    return [(name, _escaped(value)) for name, value in rows]


def _commands(data: RunData) -> list[tuple[str, str, str]]:
    """Return title, language and command of each engine that loads the checkpoint.

    Where it does so only through optional kernels, which it must be told to use, that is a command of its own.
    """
    named: dict[tuple[str, bool], list[Loading]] = {}
    for answer in data.loading:
        if answer.loads and answer.engine in _COMMANDS:
            named.setdefault((answer.engine, answer.platform == _OPTIONAL_KERNELS), []).append(answer)
    commands = []
    for (engine, is_optional), answers in named.items():
        language, command = _COMMANDS[engine]
        command += f" --quantization {_OPTIONAL_KERNELS}" if is_optional else ""
        commands.append((", ".join(answer.title for answer in answers), language, command))
    return commands


def _datasets(data: RunData) -> dict[str, list[str]]:
    """Return the hub id of the calibration text, where it came from a hub."""
    source = table_of(table_of(data.manifest, "recipe"), "calibration").get("source")
    is_hub = isinstance(source, str) and _HUB_ID.fullmatch(source) is not None and "--" not in source
    return {"datasets": [str(source)]} if is_hub else {}


def _recipe(data: RunData) -> str:
    recipe = table_of(data.manifest, "recipe")
    if not recipe:
        return ""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=1000)
    # A fence in a value would end the block.
    return clean(text, limit=50_000).replace("```", "'''")


def _limits(data: RunData) -> list[str]:
    told = [f"{text} ({times} times)" if times > 1 else text for text, times in alike(data.warnings)]
    dense = [plain_value(entry["name"]) for entry in data.checkpoint.dense]
    if dense:
        told.append(f"Kept in full precision: {', '.join(dense[:8])}" + (", and more." if len(dense) > 8 else "."))
    notes: dict[str, list[str]] = {}
    for answer in data.loading:
        if answer.loads and answer.told:
            notes.setdefault(answer.told, []).append(answer.title)
    told += [f"{', '.join(titles)}: {note}" for note, titles in notes.items()]
    if not data.evaluation:
        told.append("Its quality was not measured.")
    return [_escaped(text) for text in told[:_MAX_WARNINGS]]


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optgptq.reports", "templates"),
        autoescape=False,  # Markdown: values are escaped by `_escaped`.
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _escaped
    return environment


def _finalize(value: object) -> object:
    return showable(value) if isinstance(value, str) else value
