"""Typed access to a JSON object of config.json that remembers which fields were read: the others may mean anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from optgptq.errors import FormatError
from optgptq.plain_numbers import is_number

_Text = TypeVar("_Text", bound=str)
_ACTION = (
    "Use the optgptq that made this checkpoint, correct config.json, or pass --kv-cache 16 to leave the cache as it is."
)


class Fields:
    """Fields of one object; FormatError where a value is of another kind or missing without a default."""

    def __init__(self, content: object, where: str) -> None:
        self.where = where
        if not isinstance(content, Mapping):
            raise FormatError(where, expected="an object", found=repr(content)[:200], action=_ACTION)
        self.content: Mapping[str, Any] = content
        self._seen: set[str] = set()

    def raw(self, field: str) -> Any:
        """Return the value as it is, None when absent."""
        self._seen.add(field)
        return self.content.get(field)

    def ignore(self, *fields: str) -> None:
        """Count `fields` as read."""
        self._seen.update(fields)

    def text(self, field: str, *, default: str | None = None) -> str:
        """Return a string."""
        value = self.raw(field)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.refusal(field, value, expected="a text")
        return value

    def choice(self, field: str, choices: Sequence[_Text], *, default: _Text) -> _Text:
        """Return the one of `choices` that the value is."""
        value = self.raw(field)
        value = default if value is None else value
        for choice in choices:
            if value == choice:
                return choice
        raise self.refusal(field, value, expected="one of " + ", ".join(choices))

    def integer(self, field: str, *, default: int | None, minimum: int) -> int:
        """Return a whole number."""
        value = self.raw(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(field, value, expected=f"a whole number of at least {minimum}")
        return value

    def number(self, field: str, *, default: float) -> float:
        """Return a number."""
        value = self.raw(field)
        value = default if value is None else value
        if not is_number(value):
            raise self.refusal(field, value, expected="a number")
        return float(value)

    def fixed(self, field: str, value: str | bool) -> None:
        """Refuse every value but `value`; an absent field passes."""
        found = self.raw(field)
        # By identity for booleans: 0 is equal to False.
        if found is not None and (found is not value if isinstance(value, bool) else found != value):
            raise self.refusal(field, found, expected=repr(value))

    def table(self, field: str) -> Mapping[str, Any]:
        """Return an object as it is, an empty one when absent."""
        value = self.raw(field)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.refusal(field, value, expected="an object")
        return value

    def section(self, field: str) -> Fields:
        """Return the fields of an object that must be there."""
        return Fields(self.raw(field), f"{self.where}.{field}")

    def finish(self) -> None:
        """Refuse fields that nobody read."""
        unknown = sorted(set(self.content) - self._seen)
        if unknown:
            raise self.refusal(unknown[0], self.content[unknown[0]], expected="only fields of this version")

    def refusal(self, field: str, value: object, *, expected: str) -> FormatError:
        """Return the error for a value that cannot be used."""
        found = "no value" if value is None else repr(value)[:200]
        return FormatError(f"{self.where}.{field}", expected=expected, found=found, action=_ACTION)
