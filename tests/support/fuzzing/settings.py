"""Boundaries of what people write: recipes, `--set`, config.json of every family."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.fuzzing.case import Boundary, CaseFolder
from support.fuzzing.mutate import CANARY, TEXTS, damaged_bytes, damaged_json, damaged_value, interesting
from support.tiny_models import TINY_MODELS

from optgptq.checkpoint.folder import read_json_object
from optgptq.formats import format_named
from optgptq.models.inventory import expected_tensors, model_linears
from optgptq.models.registry import config_spec
from optgptq.plan import plan_linears
from optgptq.recipe.loading import load_recipe, recipe_for_record, recipe_schema, recipe_to_yaml, shipped_recipes
from optgptq.recipe.records import Recipe

RECIPE = "recipe.yaml"


def recipe_boundaries(home: Path) -> list[Boundary]:
    """Return the boundaries of recipes: text of the file, values in it, overrides, and a plan for a model."""
    shipped = [recipe.path for recipe in shipped_recipes()]
    fields = _fields()
    corpus = [path.read_bytes() for path in shipped]
    corpus += [recipe_to_yaml(load_recipe(path.stem)).encode() for path in shipped]
    values = [yaml.safe_load(data) for data in corpus]
    folder = _folder(home / "recipes", {RECIPE: corpus[0]})
    path = folder.path / RECIPE
    spec = config_spec(_configs()["llama-grouped_query"])

    def bytes_damage(rng: random.Random) -> Callable[[], object]:
        folder.put(RECIPE, damaged_bytes(rng, rng.choice(corpus), corpus=corpus))
        return lambda: load_recipe(str(path))

    def values_damage(rng: random.Random) -> Callable[[], object]:
        damaged = damaged_value(rng, rng.choice(values))
        folder.put(RECIPE, yaml.safe_dump(damaged, allow_unicode=rng.random() < 0.5).encode(errors="replace"))
        return lambda: _load_and_write(path)

    def overrides_damage(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(shipped).stem
        overrides = [_override(rng, fields) for _ in range(rng.choice((1, 1, 2, 4)))]
        return lambda: load_recipe(name, overrides)

    def plan_damage(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(shipped).stem
        overrides = [f"{field}={json.dumps(_valid(rng, schema))}" for field, schema in rng.sample(fields, 3)]
        return lambda: _plan(load_recipe(name, overrides), spec)

    damages = {
        "recipe text": bytes_damage,
        "recipe values": values_damage,
        "--set": overrides_damage,
        "recipe and model": plan_damage,
    }
    return [Boundary(name=name, folder=folder, damage=damage) for name, damage in damages.items()]


def _folder(path: Path, files: dict[str, bytes]) -> CaseFolder:
    folder = CaseFolder(path / "given", files)
    (path / CANARY).write_text("outside")
    return folder


def _load_and_write(path: Path) -> None:
    recipe = load_recipe(str(path))
    recipe_for_record(recipe)
    again = recipe_to_yaml(recipe)
    path.write_bytes(again.encode())
    assert recipe_to_yaml(load_recipe(str(path))) == again


def _plan(recipe: Recipe, spec: Any) -> None:
    form = format_named(recipe.export.format)
    plans = plan_linears(spec, recipe, form)
    if recipe.weights.method != "none":
        import torch

        form.check([plan.layout for plan in plans], scale_dtype=torch.float16)


def _fields() -> list[tuple[str, dict[str, Any]]]:
    """Return every field of a recipe with its schema, by dotted name."""

    def walk(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "$ref" in schema:
            schema = recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        for name, inner in schema.get("properties", {}).items():
            dotted = f"{path}.{name}" if path else name
            found = list(walk(inner, dotted))
            yield from found or [(dotted, inner)]

    return list(walk(recipe_schema(), ""))


def _valid(rng: random.Random, schema: dict[str, Any]) -> Any:
    """Return a value that the schema of a field most likely allows."""
    schema = rng.choice(schema["anyOf"]) if "anyOf" in schema else schema
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "integer":
        low = schema.get("minimum", 0)
        return rng.choice((low, low + 1, 4, 16, 64, 128, schema.get("maximum", 1000)))
    if kind == "number":
        return rng.choice((0.0, 0.01, 0.5, 1.0, 8.0, schema.get("minimum", 0.1)))
    if kind == "array":
        return rng.choice(([], ["down_proj"], [{"match": "q_proj", "bits": 8}], [{"match": "mlp", "keep_dense": True}]))
    return rng.choice((None, "down_proj", "1", "0-1", "self", schema.get("default")))


def _override(rng: random.Random, fields: list[tuple[str, dict[str, Any]]]) -> str:
    field, schema = rng.choice(fields)
    value: Any = rng.choice((_valid(rng, schema), interesting(rng), rng.choice(TEXTS)))
    text = f"{field}={json.dumps(value, ensure_ascii=False)}"
    if rng.random() < 0.3:
        parts = field.split(".")
        text = ".".join([*parts[: rng.randrange(len(parts) + 1)], rng.choice(("0", "x", "", "-1", "9" * 30))]) + "=1"
    if rng.random() < 0.4:
        text = damaged_bytes(rng, text.encode(errors="replace")).decode(errors="replace")
    return text[:5000]


def _configs() -> dict[str, dict[str, Any]]:
    """Return a config.json of every variant of every family, by name."""
    import transformers

    found = {}
    for tiny in TINY_MODELS:
        config = getattr(transformers, tiny.config)(**tiny.values, architectures=[tiny.architecture])
        found[tiny.name] = json.loads(config.to_json_string(use_diff=False))
    return found


def config_boundaries(home: Path) -> list[Boundary]:
    """Return the boundary of config.json: a damaged one of any family, up to every tensor that it asks for."""
    configs = list(_configs().values())
    folder = _folder(home / "configs", {"config.json": json.dumps(configs[0]).encode()})

    def damage(rng: random.Random) -> Callable[[], object]:
        folder.put("config.json", damaged_json(rng, rng.choice(configs)))
        return lambda: _read_config(folder.path)

    return [Boundary(name="config.json", folder=folder, damage=damage)]


def _read_config(folder: Path) -> None:
    spec = config_spec(read_json_object(folder, "config.json"))
    model_linears(spec)
    expected_tensors(spec)
