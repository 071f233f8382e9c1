"""Reads config.json key by key, so that no key which changes the arithmetic can go unnoticed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from optgptq.errors import ModelError
from optgptq.plain_numbers import is_number

# A key that no family read and whose name speaks of arithmetic is refused: ignoring it could give another model.
_SUSPICIOUS = re.compile(
    r"attention|attn|expert|moe|router|rope|rotary|norm|scal|multipl|softcap|window|head|layer|mlp|act|"
    r"residual|alibi|bias|qk|logit|position|sparse|cross|mup|mamba|ssm|conv|clip|embed|parallel|lora|adapter"
)
# Keys that change training, generation or bookkeeping only.
_NEUTRAL = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_implementation",
        "attn_pdrop",
        "classifier_dropout",
        "emb_pdrop",
        "embd_pdrop",
        "embedding_fraction",
        "hidden_dropout",
        "layerdrop",
        "output_attentions",
        "output_hidden_states",
        "resid_pdrop",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    }
)


# What a config may ask for. Layers and heads become records, so a wrong count would fill the memory.
_LARGEST_COUNT = 100_000
_LARGEST_INTEGER = 2**40
_COUNTS = frozenset(
    {
        "attention_heads",
        "n_head",
        "n_heads",
        "n_layer",
        "n_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_kv_heads",
    }
)


class ConfigReader:
    """Typed access to a parsed config.json that remembers which keys were read.

    A key that is absent or null gives the default; without a default that is a ModelError.
    """

    def __init__(self, config: Mapping[str, Any], *, where: str = "config.json") -> None:
        self._config = config
        self._where = where
        self._seen: set[str] = set()

    def raw(self, key: str) -> Any:
        """Return the value as it is, None when absent."""
        self._seen.add(key)
        return self._config.get(key)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Return the first key that has a value."""
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(keys[0], value, expected=f"a whole number of at least {minimum}")
        largest = _LARGEST_INTEGER if _COUNTS.isdisjoint(keys) else _LARGEST_COUNT
        if value > largest:
            raise self.refusal(keys[0], value, expected=f"a whole number of at most {largest}")
        return value

    def optional_integer(self, *keys: str, absent: int | None = None) -> int | None:
        """Return the first key that has a value, None for null, `absent` when no key is there."""
        if any(self.raw(key) is not None for key in keys):
            return self.integer(*keys)
        return None if any(key in self._config for key in keys) else absent

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return the first key that has a value."""
        value = self._first(keys, default)
        if not is_number(value):
            raise self.refusal(keys[0], value, expected="a number")
        return float(value)

    def optional_number(self, *keys: str, absent: float | None = None) -> float | None:
        """Return the first key that has a value, None for null, `absent` when no key is there."""
        if any(self.raw(key) is not None for key in keys):
            return self.number(*keys)
        return None if any(key in self._config for key in keys) else absent

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._first((key,), default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, expected="true or false")
        return value

    def choice(self, *keys: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Return the first key that has a value, which must be one of `allowed`."""
        value = self._first(keys, default)
        if value not in allowed:
            raise self.refusal(keys[0], value, expected="one of " + ", ".join(sorted(allowed)))
        return str(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse every value of `key` but `allowed`; an absent key passes."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise self.refusal(key, value, expected=" or ".join(repr(value) for value in allowed) or "no value")

    def section(self, key: str) -> ConfigReader | None:
        """Return a reader of a nested object, None when it is absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, expected="an object")
        return ConfigReader(value, where=f"{self._where}: {key}")

    def finish(self, *ignored: str) -> None:
        """Refuse keys that nobody read, are set, and by their name could change the arithmetic."""
        for key in sorted(set(self._config) - self._seen - _NEUTRAL - set(ignored)):
            if self._config[key] and _SUSPICIOUS.search(key.lower()):
                raise self.refusal(key, self._config[key], expected="only keys this family implements")

    def finish_strictly(self, *ignored: str) -> None:
        """Refuse every key that nobody read and that is set."""
        for key in sorted(set(self._config) - self._seen - set(ignored)):
            if self._config[key] is not None:
                raise self.refusal(key, self._config[key], expected="only keys this family implements")

    def refusal(self, key: str, value: Any, *, expected: str) -> ModelError:
        """Return the error for a value that cannot be used."""
        return ModelError(
            f"{self._where}: {key}",
            expected=expected,
            found="no value" if value is None else repr(value)[:200],
            action="The model would compute something else than this tool; it cannot be used as it is.",
        )

    def _first(self, keys: tuple[str, ...], default: Any) -> Any:
        # All spellings count as read, so that two spellings of one value are not called unknown.
        values = [self.raw(key) for key in keys]
        return next((value for value in values if value is not None), default)
