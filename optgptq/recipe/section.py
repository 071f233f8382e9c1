"""What all sections of a recipe share: a frozen record, the values that fields take, and the error of a combination."""

from __future__ import annotations

from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr
from pydantic_core import PydanticCustomError

LONGEST_PATTERN = 1000
FloatDtype = Literal["float32", "float64"]


def impossible(field: str, *, expected: str, found: str, action: str) -> PydanticCustomError:
    """Return the error for a combination of valid values that no run can obey; `field` is local to its section."""
    parts = {"field": field, "expected": expected, "found": found, "action": action}
    return PydanticCustomError("impossible_combination", "expected {expected}, found {found}. {action}", parts)


def _checked_pattern(pattern: str) -> str:
    if len(pattern) > LONGEST_PATTERN:
        raise PydanticCustomError(
            "bad_pattern",
            "{problem}",
            {"problem": f"a pattern of {len(pattern)} characters; {LONGEST_PATTERN} are allowed"},
        )
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise PydanticCustomError("bad_pattern", "{problem}", {"problem": f"{pattern!r} ({error})"}) from error
    return pattern


SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _size_in_bytes(value: object) -> object:
    """Turn `5GB` or `1.5 GiB` into bytes; anything else is left for the type check."""
    match = regex.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMG]i?B)", value) if isinstance(value, str) else None
    return value if match is None else int(float(match[1]) * SIZE_UNITS[match[2]])


Pattern = Annotated[StrictStr, AfterValidator(_checked_pattern), Field(json_schema_extra={"format": "regex"})]
GroupSize = Literal[-1] | Annotated[int, Field(strict=True, ge=16, le=1024)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SizeText = Annotated[str, Field(title="a size", examples=["5GB"])]
ByteCount = Annotated[
    int,
    Field(strict=True, ge=1),
    BeforeValidator(_size_in_bytes, json_schema_input_type=PositiveInt | SizeText),
]


class Section(BaseModel):
    """Base of all records: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)
