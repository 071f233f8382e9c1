"""The engine: takes requests, and in each step schedules, runs the model, samples, and sees which texts have ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from math import isnan

import torch

from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import OptGPTQError, UsageError
from optgptq.models.decoder import Decoder
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.prompt_tokens import Prompt, prompt_token_ids
from optgptq.runtime.results import GenerationResult, Piece
from optgptq.runtime.sampler import sample
from optgptq.runtime.sampling_records import SampledToken
from optgptq.runtime.start import start_runner
from optgptq.runtime.writing import RequestState, TextState
from optgptq.scheduling.request import Request
from optgptq.scheduling.request import Sequence as Text
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.scheduler import Scheduler
from optgptq.scheduling.step import Step
from optgptq.scheduling.usage import Usage

logger = logging.getLogger(__name__)

# Odd, and far from any simple fraction of 2**64 (the golden ratio): neighbouring requests draw from distant streams.
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1


class Engine:
    """Many requests on one model. Not for several threads at once: `AsyncEngine` gives it one of its own.

    Attributes:
        decoder: the model, its linears fused.
        tokenizer: of the model; None: prompts and results are token ids only.
        settings: how requests share it.
        runner: runs steps.
        scheduler: decides what a step holds.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        settings: EngineSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Plan the memory and take it.

        Raises:
            CapacityError: not even one text fits.
        """
        self.settings = settings or EngineSettings()
        self.tokenizer = tokenizer
        self._clock = clock
        self.runner, scheduler_settings = start_runner(decoder, self.settings)
        self.decoder = self.runner.decoder
        self.scheduler = Scheduler(scheduler_settings)
        self._states: dict[str, RequestState] = {}
        self._results: list[tuple[str, GenerationResult]] = []
        self._num_submitted = 0

    @property
    def max_length(self) -> int:
        """Positions of a text at most, prompt included."""
        return self.scheduler.max_length

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._states)

    def usage(self) -> Usage:
        """Return how the pages are used, now and at most so far."""
        return self.scheduler.usage()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_seconds: float | None = None,
        salt: bytes = b"",
        stream: bool = False,
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt: text, which gets a BOS token where the model's tokenizer adds one, or token ids, taken as they are.
            params: how its texts are written.
            request_id: a name that no unfinished request has; None for one of the engine's own.
            priority: smaller numbers come first.
            timeout_seconds: after which the request ends with reason `timeout`.
            salt: prompts share cached pages only with prompts of the same salt.
            stream: pieces of its texts come from `step`.

        Raises:
            UsageError: an empty prompt, token ids that the model does not have, a prompt longer than the model, text
                without a tokenizer, an id in use, a timeout that is not a number.
            CapacityError: longer than the memory allows, or the queue is full.
        """
        number = self._num_submitted
        self._num_submitted += 1
        name = request_id if request_id is not None else f"request-{number}"
        if name in self._states:
            raise UsageError(
                f"request {name}", expected="a new id", found="one in use", action="Choose another request_id."
            )
        vocab_size = self.decoder.spec.vocab_size
        prompt_ids = prompt_token_ids(prompt, self.tokenizer, where=f"request {name}", vocab_size=vocab_size)
        params.check_against(vocab_size)
        now = self._clock()
        request = Request(
            request_id=name,
            prompt_ids=prompt_ids,
            params=params,
            priority=priority,
            arrival=now,
            deadline=None if timeout_seconds is None else now + _seconds(timeout_seconds, name),
            salt=salt + self.runner.prompt_salt(len(prompt_ids)),
        )
        texts = self.scheduler.submit(request)
        self._states[name] = RequestState(
            request=request,
            prompt=prompt if isinstance(prompt, str) else None,
            seed=self._seed(params, number),
            texts=self._start(texts, stream=stream),
        )
        return name

    def cancel(self, request_id: str) -> list[Piece]:
        """End a request with what it has written so far; nothing happens if it has ended already.

        Returns what is left to show of its texts, if it streams.
        """
        state = self._states.get(request_id)
        if state is None:
            return []
        self.scheduler.cancel(request_id, "cancelled")
        return self._settle(state)

    def step(self) -> list[Piece]:
        """Run one step and return what it adds to the texts of requests that stream.

        Raises:
            Exception: what the model raised; the requests of this step are gone, the others can go on.
        """
        step = self.scheduler.schedule(self._clock())
        pieces = self._settle_all(step.ended)
        if not step.parts:
            return pieces
        try:
            outcomes = self._sample(step, self.runner.run(step))
        except BaseException:
            self._abandon(step)
            raise
        # A logits processor may have cancelled requests of this very step.
        for text, outcome in zip(step.sampled, outcomes, strict=True):
            if outcome.error is not None and not text.is_finished:
                self._fail(text, outcome.error)
        self.scheduler.complete(step, [outcome.token_id for outcome in outcomes])
        now = self._clock()
        for text, outcome in zip(step.sampled, outcomes, strict=True):
            if not text.is_finished:
                self._add(text, outcome, now)
        return pieces + self._settle_all(step.sampled)

    def take_results(self) -> list[tuple[str, GenerationResult]]:
        """Return ids and results of the requests that have ended since the last call."""
        results, self._results = self._results, []
        return results

    def _start(self, texts: Sequence[Text], *, stream: bool) -> list[TextState]:
        try:
            return [TextState.start(text, self.tokenizer, max_length=self.max_length, stream=stream) for text in texts]
        except BaseException:
            # A tokenizer that cannot spell the prompt: nothing of the request is left behind.
            self.scheduler.cancel(texts[0].request.request_id, "error")
            raise

    def _seed(self, params: SamplingParams, number: int) -> int:
        if params.seed is not None:
            return params.seed
        return (self.settings.seed + 1 + number * _SEED_STEP) & _SEED_MASK

    def _sample(self, step: Step, logits_PV: torch.Tensor) -> list[SampledToken]:
        rows, wanted = [], []
        sampling_parts = [part for part in step.parts if part.samples]
        for index, part in enumerate(sampling_parts):
            for text in part.samples:
                state = self._states[text.request.request_id]
                rows.append(state.sampling_row(text, self._eos_token_ids))
                wanted.append(index)
        if len(wanted) != len(sampling_parts):
            logits_PV = logits_PV[torch.tensor(wanted, device=logits_PV.device)]
        return sample(logits_PV, rows) if rows else []

    @property
    def _eos_token_ids(self) -> tuple[int, ...]:
        return () if self.tokenizer is None else self.tokenizer.eos_token_ids

    def _add(self, text: Text, outcome: SampledToken, now: float) -> None:
        state = self._states[text.request.request_id]
        if state.first_token is None:
            state.first_token = now
        reason = state.texts[text.index].add(outcome, self._eos_token_ids)
        if reason is not None:
            self.scheduler.finish(text, reason)

    def _fail(self, text: Text, error: OptGPTQError) -> None:
        """End a request whose next token cannot be chosen; the others of the step go on."""
        name = text.request.request_id
        self._states[name].error = error
        self.scheduler.cancel(name, "error")

    def _abandon(self, step: Step) -> None:
        """Drop the requests of a step that failed, so that the scheduler can go on with the others."""
        for name in {part.sequence.request.request_id for part in step.parts}:
            self.scheduler.cancel(name, "error")
            self._states.pop(name, None)
        self.scheduler.complete(step, [0] * len(step.sampled))

    def _settle_all(self, texts: Iterable[Text]) -> list[Piece]:
        """Settle the requests of these texts, in order, but for those that are settled already."""
        names = dict.fromkeys(text.request.request_id for text in texts)
        return [piece for name in names if name in self._states for piece in self._settle(self._states[name])]

    def _settle(self, state: RequestState) -> list[Piece]:
        """Give out what a request's texts have to show; where all have ended, make its result."""
        pieces = [piece for text in state.texts for piece in text.take_pieces()]
        if all(text.text.is_finished for text in state.texts):
            name = state.request.request_id
            self._results.append((name, state.result(self._clock())))
            del self._states[name]
        return pieces


def _seconds(timeout: float, name: str) -> float:
    if isnan(timeout):
        raise UsageError(
            f"request {name}", expected="a timeout in seconds", found="NaN", action="Give timeout_seconds a number."
        )
    return timeout
