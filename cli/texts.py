"""Results of `optgptq generate` as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .failures import failure_record
from .output import human_seconds

if TYPE_CHECKING:
    from optgptq.runtime.prompts import PromptRequest
    from optgptq.runtime.results import GenerationResult


def text_records(number: int, request: PromptRequest, result: GenerationResult) -> list[dict[str, Any]]:
    """Return an object for each text of a result, one with `error` where there is none; `number` counts from 0."""
    shared = {
        "id": number + 1 if request.name is None else request.name,
        "prompt": request.text,
        "num_prompt_tokens": len(result.prompt_token_ids),
    }
    failed = {} if result.error is None else {"error": failure_record(result.error)}
    if not result.outputs:
        return [{**shared, "index": 0, "text": "", "token_ids": [], "finish_reason": "error", **failed}]
    return [
        {
            **shared,
            "index": completion.index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **({} if completion.logprobs is None else {"logprobs": completion.logprobs}),
            **failed,
        }
        for completion in result.outputs
    ]


def json_record(
    requests: Sequence[PromptRequest], results: Sequence[GenerationResult], *, seconds: float
) -> dict[str, Any]:
    """Return all texts, and how fast they were written."""
    num_tokens = _num_tokens(results)
    pairs = enumerate(zip(requests, results, strict=True))
    return {
        "texts": [record for number, (request, result) in pairs for record in text_records(number, request, result)],
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds if seconds > 0 else None,
    }


def shown_prompt(request: PromptRequest) -> str:
    """Return the prompt where a text continues it to the eye: an answer in a chat does not."""
    return "" if request.messages is not None else request.text or ""


def page(requests: Sequence[PromptRequest], results: Sequence[GenerationResult]) -> str:
    """Return the texts with their prompts, a blank line between them; those of failed requests are left out."""
    return "\n\n".join(
        shown_prompt(request) + completion.text
        for request, result in zip(requests, results, strict=True)
        if result.error is None
        for completion in result.outputs
    )


def summary(results: Sequence[GenerationResult], *, seconds: float) -> str:
    """Return in a few words what was written."""
    num_texts = sum(len(result.outputs) for result in results if result.error is None)
    num_tokens = _num_tokens(results)
    speed = f", {num_tokens / seconds:,.1f} tokens/s" if seconds > 0 else ""
    return f"{num_texts} texts, {num_tokens:,} tokens in {human_seconds(seconds)}{speed}"


def _num_tokens(results: Sequence[GenerationResult]) -> int:
    return sum(len(completion.token_ids) for result in results for completion in result.outputs)
