"""What `optgptq generate` is asked for: prompts from its command line or a file, and how texts are shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optgptq.runtime.prompts import PromptRequest


def read_requests(
    texts: Sequence[str], path: Path | None, values: Mapping[str, Any], *, chat: bool, system: str | None
) -> list[PromptRequest]:
    """Return the prompts of the command line, or of a file; without any, one that is empty.

    Raises:
        UsageError: prompts from both, a message of the system without a chat, or sampling parameters that are wrong.
        TextError: a file that cannot be read, or a text that is not Unicode.
    """
    from optgptq.errors import UsageError
    from optgptq.runtime.field_values import sampling_params
    from optgptq.runtime.prompt_file import read_prompts
    from optgptq.runtime.prompts import PromptRequest, require_unicode

    params = sampling_params(values)
    if system is not None and not chat:
        raise UsageError("--system", expected="--chat beside it", found="no --chat", action="Add --chat.")
    if path is not None and texts:
        raise UsageError(
            "prompts", expected="them in the command, or in a file", found="both", action="Leave out one of the two."
        )
    for number, text in enumerate([*texts, system or ""], start=1):
        require_unicode(text, f"prompt {number}" if number <= len(texts) else "--system")
    if path is not None:
        requests = read_prompts(path, values)
    else:
        requests = [
            PromptRequest(where=f"prompt {number}", text=text, params=params)
            for number, text in enumerate(texts or [""], start=1)
        ]
    return [request.as_chat(system) for request in requests] if chat else requests


def require_place_for_logprobs(requests: Sequence[PromptRequest], *, has_place: bool) -> None:
    """Check that logprobs, where they are asked for, are not computed for nobody.

    Raises:
        UsageError: they are, and only text is printed.
    """
    from optgptq.errors import UsageError

    if not has_place and any(request.params.logprobs is not None for request in requests):
        raise UsageError(
            "--logprobs",
            expected="--json or --output beside it: printed text has no logprobs",
            found="neither",
            action="Add --json, or --output FILE.",
        )


def wants_stream(wanted: bool | None, requests: Sequence[PromptRequest], *, as_json: bool) -> bool:
    """Return whether text is printed as it is written.

    Raises:
        UsageError: that is wanted, and cannot be.
    """
    from optgptq.errors import UsageError

    can = len(requests) == 1 and requests[0].params.n == 1 and not as_json
    if wanted and not can:
        raise UsageError(
            "--stream",
            expected="one prompt, one text, and no --json",
            found="--json" if as_json else f"{sum(request.params.n for request in requests)} texts",
            action="Leave out --stream; --output has each text as soon as it ends.",
        )
    return can and sys.stdout.isatty() if wanted is None else wanted
