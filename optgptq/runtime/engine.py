"""The engine: takes requests, and in each step schedules, runs the model, samples, and sees which texts have ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import OptGPTQError, UsageError
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.decoder import Decoder
from optgptq.runtime.cache_plan import CachePlan
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.prompt_tokens import Prompt, prompt_token_ids
from optgptq.runtime.request_options import check_options, check_request_id, request_seed
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


class Engine:
    """Many requests on one model. Not for several threads at once: `AsyncEngine` gives it one of its own.

    Ctrl-C may come at any time, and leaves an engine that can be used: what it interrupts half-way is thrown away with
    all requests, see `reset`.

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
        cache: CacheSetup | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Plan the memory and take it.

        Args:
            decoder: the model; its linears are fused in place.
            tokenizer: of the model, or None.
            settings: how requests share it.
            cache: of the model's folder; `settings.kv_cache` says whether it is used.
            clock: seconds, for deadlines and times.

        Raises:
            CapacityError: not even one text fits.
            ModelError, UsageError: the quantized cache does not go with the model, or with the settings.
        """
        self.settings = settings or EngineSettings()
        self.tokenizer = tokenizer
        self._clock = clock
        self.runner, scheduler_settings = start_runner(decoder, self.settings, cache)
        self.decoder = self.runner.decoder
        self.scheduler = Scheduler(scheduler_settings)
        self._states: dict[str, RequestState] = {}
        self._results: list[tuple[str, GenerationResult]] = []
        self._num_submitted = 0
        # An exception has left a change half-way, and what there was is not thrown away yet.
        self._is_torn = False

    @property
    def cache(self) -> CachePlan | None:
        """The quantized cache; None with a plain one."""
        attend = self.runner.attend.cache
        return None if attend is None else attend.plan

    @property
    def max_length(self) -> int:
        """Positions of a text at most, prompt included."""
        return self.scheduler.max_length

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._states)

    @property
    def has_room(self) -> bool:
        """False while the queue is full: a request would be refused."""
        return self.scheduler.has_room

    def usage(self) -> Usage:
        """Return how the pages are used, now and at most so far."""
        return self.scheduler.usage()

    def reset(self) -> None:
        """Drop all requests, results that nobody took, cached prefixes and counts; all pages are free again.

        `submit`, `cancel` and `step` do so themselves after an exception that came in the middle of their work.
        """
        self._is_torn = True
        scheduler = Scheduler(self.scheduler.settings)
        # Python looks for signals at calls, so that one falls before all of these or after them.
        self.scheduler, self._states, self._results, self._is_torn = scheduler, {}, [], False

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
                without a tokenizer, an id in use, an argument of a wrong type, a timeout or priority that is no number.
            CapacityError: longer than the memory allows, or the queue is full.
        """
        self._mend()
        number = self._num_submitted
        self._num_submitted += 1
        name = f"request-{number}" if request_id is None else request_id
        check_request_id(name)
        where = f"request {name}"
        check_options(where, params=params, priority=priority, timeout_seconds=timeout_seconds, salt=salt)
        if name in self._states:
            raise UsageError(where, expected="a new id", found="one in use", action="Choose another request_id.")
        vocab_size = self.decoder.spec.vocab_size
        prompt_ids = prompt_token_ids(prompt, self.tokenizer, where=where, vocab_size=vocab_size)
        params.check_against(vocab_size)
        now = self._clock()
        request = Request(
            request_id=name,
            prompt_ids=prompt_ids,
            params=params,
            priority=priority,
            arrival=now,
            deadline=None if timeout_seconds is None else now + timeout_seconds,
            salt=salt + self.runner.prompt_salt(len(prompt_ids)),
        )
        seed = request_seed(params, engine_seed=self.settings.seed, number=number)
        self._take(request, prompt if isinstance(prompt, str) else None, seed=seed, stream=stream)
        return name

    def cancel(self, request_id: str) -> list[Piece]:
        """End a request with what it has written so far; nothing happens if it has ended already.

        Returns what is left to show of its texts, if it streams.
        """
        self._mend()
        state = self._states.get(request_id)
        if state is None:
            return []
        try:
            self.scheduler.cancel(request_id, "cancelled")
            return self._settle(state)
        except BaseException:
            self._is_torn = True
            self.reset()
            raise

    def step(self) -> list[Piece]:
        """Run one step and return what it adds to the texts of requests that stream.

        Raises:
            Exception: what the model raised; the requests of this step are gone, the others can go on. After any other
                exception, Ctrl-C included, all requests are gone.
        """
        self._mend()
        try:
            step = self.scheduler.schedule(self._clock())
            pieces = self._settle_all(step.ended)
            outcomes = self._outcomes(step)
            if not isinstance(outcomes, Exception):
                return pieces + self._finish(step, outcomes)
        except BaseException:
            # No call before this: a second Ctrl-C finds it noted.
            self._is_torn = True
            self.reset()
            raise
        raise outcomes

    def take_results(self) -> list[tuple[str, GenerationResult]]:
        """Return ids and results of the requests that have ended since the last call."""
        results, self._results = self._results, []
        return results

    def _mend(self) -> None:
        """Begin anew where an exception left a change half-way and another one came while that was thrown away."""
        if self._is_torn:
            self.reset()

    def _take(self, request: Request, prompt: str | None, *, seed: int, stream: bool) -> None:
        """Put a request into the queue; after an exception nothing of it is left behind."""
        try:
            texts = self._start(self.scheduler.submit(request), stream=stream)
            self._states[request.request_id] = RequestState(request=request, prompt=prompt, seed=seed, texts=texts)
        except Exception:
            raise  # It was refused, or `_start` has taken it back.
        except BaseException:
            self._is_torn = True
            self.reset()
            raise

    def _start(self, texts: Sequence[Text], *, stream: bool) -> list[TextState]:
        try:
            return [TextState.start(text, self.tokenizer, max_length=self.max_length, stream=stream) for text in texts]
        except Exception:
            # A tokenizer that cannot spell the prompt.
            self.scheduler.cancel(texts[0].request.request_id, "error")
            raise

    def _outcomes(self, step: Step) -> list[SampledToken] | Exception:
        """Return the next tokens, or what the model raised; then the requests of the step are gone."""
        if not step.parts:
            return []
        try:
            return self._sample(step, self.runner.run(step))
        except Exception as error:  # noqa: BLE001 - the model may raise anything; `step` raises it again
            self._abandon(step)
            return error

    def _finish(self, step: Step, outcomes: Sequence[SampledToken]) -> list[Piece]:
        """Add a step's tokens to its texts and return what can be shown."""
        # A logits processor may have cancelled requests of this very step.
        for text, outcome in zip(step.sampled, outcomes, strict=True):
            if outcome.error is not None and not text.is_finished:
                self._fail(text, outcome.error)
        self.scheduler.complete(step, [outcome.token_id for outcome in outcomes])
        now = self._clock()
        for text, outcome in zip(step.sampled, outcomes, strict=True):
            if not text.is_finished:
                self._add(text, outcome, now)
        return self._settle_all(step.sampled)

    def _sample(self, step: Step, logits_PV: torch.Tensor) -> list[SampledToken]:
        rows, wanted, eos_token_ids = [], [], self._eos_token_ids
        sampling_parts = [part for part in step.parts if part.samples]
        for index, part in enumerate(sampling_parts):
            for text in part.samples:
                state = self._states[text.request.request_id]
                rows.append(state.sampling_row(text, eos_token_ids))
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
        if state.is_finished:
            name = state.request.request_id
            self._results.append((name, state.result(self._clock())))
            del self._states[name]
        return pieces
