"""What a scheduler refuses before it begins: requests that could never end, or that nobody has room for."""

from __future__ import annotations

from optgptq.errors import CapacityError, UsageError
from optgptq.scheduling.request import Request
from optgptq.scheduling.settings import SchedulerSettings


def check_request(request: Request, settings: SchedulerSettings) -> None:
    """Refuse a request that this scheduler cannot bring to its end even when it is alone.

    Raises:
        UsageError: an empty prompt, one that leaves no room for a new token, or more texts than can run together.
        CapacityError: more tokens than the pages hold.
    """
    where = f"request {request.request_id}"
    num_prompt_tokens = len(request.prompt_ids)
    if num_prompt_tokens == 0:
        raise UsageError(
            where, expected="a prompt of 1 token or more", found="an empty prompt", action="Give at least one token."
        )
    if num_prompt_tokens > settings.max_length - 1:
        raise UsageError(
            where,
            expected=f"a prompt of at most {settings.max_length - 1} tokens, so that one can be added",
            found=f"{num_prompt_tokens} tokens",
            action="Shorten the prompt, or raise max_length if the model allows it.",
        )
    if request.params.n > settings.max_running:
        raise UsageError(
            where,
            expected=f"n of at most max_running = {settings.max_running}",
            found=f"n = {request.params.n}",
            action="Ask for fewer texts, or raise max_running.",
        )
    # Without max_tokens a text may use what there is.
    num_new_tokens = request.params.max_tokens or 1
    wanted = min(num_prompt_tokens + num_new_tokens, settings.max_length)
    if wanted > settings.longest:
        raise CapacityError(
            where,
            expected=f"at most {settings.longest} tokens, which is what the pages hold",
            found=f"{num_prompt_tokens} tokens in the prompt and {num_new_tokens} to write",
            action="Shorten the prompt, lower max_tokens, or give the cache more memory.",
        )


def check_queue(request: Request, settings: SchedulerSettings, *, num_waiting: int) -> None:
    """Raise CapacityError if the queue is full."""
    if num_waiting >= settings.max_waiting:
        raise CapacityError(
            f"request {request.request_id}",
            expected=f"fewer than max_waiting = {settings.max_waiting} waiting sequences",
            found=f"{num_waiting} of them",
            action="Send the request again when others have ended, or raise max_waiting.",
        )
