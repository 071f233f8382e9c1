"""What goes between coroutines and the thread of an engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from optgptq.runtime.prompt_tokens import Prompt
from optgptq.runtime.results import GenerationResult, Piece
from optgptq.scheduling.sampling_params import SamplingParams

Answer = Piece | GenerationResult | Exception
"""What a request hears: pieces if it streams, then its result, or at any time why it has failed."""


class Listener:
    """Brings answers from a thread into an event loop. Without a limit: the thread never waits for whoever listens."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen in a loop, which is the running one."""
        self._loop = loop
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()

    def put(self, answer: Answer) -> bool:
        """Give an answer, in any thread; return False if the loop is closed, so that nobody can hear it."""
        try:
            self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)
        except RuntimeError:
            return False
        return True

    async def get(self) -> Answer:
        """Return the next answer, in the loop."""
        return await self._answers.get()


@dataclass(slots=True, eq=False, kw_only=True)
class Submission:
    """A request on its way to the engine: the arguments of `Engine.submit`.

    Attributes:
        listener: who hears of it.
        name: its id, once the engine has taken it; the thread alone sets and reads it.
    """

    prompt: Prompt
    params: SamplingParams
    request_id: str | None
    priority: int
    timeout_seconds: float | None
    salt: bytes
    stream: bool
    listener: Listener
    name: str | None = None
