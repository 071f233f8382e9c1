"""An engine for coroutines: a thread of its own runs the steps, and each request hears what concerns it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Literal

from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.engine_thread import EngineThread
from optgptq.runtime.listener import Answer, Listener, Submission
from optgptq.runtime.llm import load_for_engine, with_cache
from optgptq.runtime.load import HeldWeights
from optgptq.runtime.prompt_tokens import Prompt
from optgptq.runtime.results import GenerationResult, Piece
from optgptq.scheduling.sampling_params import SamplingParams


class AsyncEngine:
    """Many requests at a time on one model, each a coroutine.

    From now on nobody else may use the engine. Close it, or use it as an asynchronous context manager.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the thread."""
        self._thread = EngineThread(engine)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        weights: HeldWeights | Literal["auto"] = "auto",
        revision: str | None = None,
        settings: EngineSettings | None = None,
        kv_cache: str | None = None,
        past_only: str | None = None,
    ) -> AsyncEngine:
        """Load a model; arguments and errors are those of `optgptq.LLM`. Returns when it is ready."""
        chosen = with_cache(settings, kv_cache, past_only)
        loaded = load_for_engine(model, device=device, dtype=dtype, weights=weights, revision=revision, settings=chosen)
        return cls(Engine(loaded.decoder, loaded.tokenizer, chosen, loaded.cache))

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_seconds: float | None = None,
        salt: bytes = b"",
    ) -> AsyncGenerator[Piece, None]:
        """Yield what is added to the texts of a request, until all of them have ended.

        Closing the generator early cancels the request. A consumer that is slow finds the pieces waiting.

        Args:
            prompt: text or token ids, as in `Engine.submit`.
            params: how its texts are written; None for the defaults.
            request_id: a name that no unfinished request has, to cancel it by; None for one of the engine's own.
            priority: smaller numbers come first.
            timeout_seconds: after which the request ends with reason `timeout`.
            salt: prompts share cached pages only with prompts of the same salt.

        Raises:
            UsageError, CapacityError: this request is refused; the others go on. UsageError also if this is closed, or
                if a logits processor has called `sys.exit()`, which ends the engine.
            NumericalError: the model's logits are not numbers.
            Exception: what the model raised, if it did, to every request.
        """
        submission = Submission(
            prompt=prompt,
            params=params or SamplingParams(),
            request_id=request_id,
            priority=priority,
            timeout_seconds=timeout_seconds,
            salt=salt,
            stream=True,
            listener=Listener(asyncio.get_running_loop()),
        )
        async with aclosing(self._answers(submission)) as answers:
            async for answer in answers:
                if isinstance(answer, Piece):
                    yield answer

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_seconds: float | None = None,
        salt: bytes = b"",
    ) -> GenerationResult:
        """Return the texts of a request when all of them have ended; cancelling the coroutine cancels the request.

        Arguments and errors are those of `stream`.
        """
        submission = Submission(
            prompt=prompt,
            params=params or SamplingParams(),
            request_id=request_id,
            priority=priority,
            timeout_seconds=timeout_seconds,
            salt=salt,
            stream=False,
            listener=Listener(asyncio.get_running_loop()),
        )
        async with aclosing(self._answers(submission)) as answers:
            async for answer in answers:
                if isinstance(answer, GenerationResult):
                    return answer
        raise AssertionError("the last answer to a request is its result")

    def cancel(self, request_id: str) -> None:
        """End a request with what it has written so far; nothing happens if it has ended already. Returns at once.

        Raises:
            UsageError: the name is no text.
        """
        self._thread.cancel(request_id)

    async def close(self) -> None:
        """End all requests with what they have written so far, and the thread."""
        self._thread.close()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _answers(self, submission: Submission) -> AsyncGenerator[Answer, None]:
        """Send a request and yield what comes back; its result is the last."""
        self._thread.submit(submission)
        is_waiting = True
        try:
            while is_waiting:
                answer = await submission.listener.get()
                is_waiting = isinstance(answer, Piece)
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, GenerationResult) and answer.error is not None:
                    raise answer.error
                yield answer
        finally:
            if is_waiting:
                self._thread.withdraw(submission)
