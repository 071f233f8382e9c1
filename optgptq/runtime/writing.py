"""The texts of a request while they are written: tokens become text, and it is seen when a text has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from optgptq.data.tokenizer import Tokenizer
from optgptq.errors import OptGPTQError
from optgptq.runtime.detokenizer import Detokenizer
from optgptq.runtime.results import Completion, GenerationResult, Piece
from optgptq.runtime.sampling_records import SampledToken, SamplingRow
from optgptq.runtime.stop import StopChecker
from optgptq.scheduling.request import Request
from optgptq.scheduling.request import Sequence as Text


@dataclass(slots=True, eq=False, kw_only=True)
class TextState:
    """One text of a request.

    Attributes:
        text: what the scheduler knows of it.
        detokenizer: None where no text is wanted.
        stops: looks for stop strings.
        streams: pieces are given out as they come.
        max_length: tokens at which it ends, prompt included.
        written: the text so far. Made at the end alone where it is neither streamed nor searched for stop strings.
        stop_reason, logprobs: see `Completion`.
        hides_last: the last token is the end of the text and not a part of it.
        is_closed: nothing more comes.
        pieces: not given out yet.
    """

    text: Text
    detokenizer: Detokenizer | None
    stops: StopChecker
    streams: bool
    max_length: int
    written: list[str] = field(default_factory=list)
    stop_reason: str | int | None = None
    logprobs: list[Mapping[int, float]] = field(default_factory=list)
    hides_last: bool = False
    is_closed: bool = False
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def start(cls, text: Text, tokenizer: Tokenizer | None, *, max_length: int, stream: bool) -> TextState:
        """Return the state before the first token.

        The end of the prompt is given to the detokenizer first: some tokenizers leave out a space at the beginning.
        """
        params = text.request.params
        detokenizer = None
        if tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=text.request.prompt_ids
            )
        return cls(
            text=text,
            detokenizer=detokenizer,
            stops=StopChecker(params.stop_strings, include=params.include_stop_str_in_output),
            streams=stream,
            max_length=max_length,
        )

    def add(self, sampled: SampledToken, eos_token_ids: tuple[int, ...]) -> str | None:
        """Take the token that was just appended to the text; return why the text ends with it, None if it goes on."""
        params, token = self.text.request.params, sampled.token_id
        if params.logprobs is not None:
            self.logprobs.append({top.token_id: top.logprob for top in sampled.top_logprobs})
        num_new = len(self.text.token_ids) - self.text.num_prompt_tokens
        may_stop = num_new >= params.min_tokens
        if may_stop and (token in params.stop_ids or (token in eos_token_ids and not params.ignore_eos)):
            self.stop_reason = token if token in params.stop_ids else None
            self.hides_last = self.stop_reason is None or not params.include_stop_str_in_output
            self._give("" if self.hides_last else self._eager_text(token), token)
            return "stop"
        self._give(self._eager_text(token, may_stop=may_stop), token)
        if self.is_closed:
            return "stop"
        is_full = num_new == params.max_tokens or len(self.text.token_ids) >= self.max_length
        return "length" if is_full else None

    def take_pieces(self) -> list[Piece]:
        """Return what was not given out yet; the last piece of a text that has ended says why."""
        reason = self.text.finish_reason
        if reason is not None and (self.streams or not self.is_closed):
            rest = self._rest()
            self.written.append(rest)
            if self.streams:
                self.pieces.append(self._piece([], rest, reason))
                self.streams = False
        pieces, self.pieces = self.pieces, []
        return pieces

    def completion(self) -> Completion:
        """Return the text, which has ended and whose pieces were taken."""
        assert self.text.finish_reason is not None
        return Completion(
            index=self.text.index,
            token_ids=self.text.output_ids,
            text="".join(self.written),
            finish_reason=self.text.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self.text.request.params.logprobs is None else self.logprobs,
        )

    @property
    def _is_eager(self) -> bool:
        return self.streams or bool(self.text.request.params.stop_strings)

    def _eager_text(self, token: int, *, may_stop: bool = False) -> str:
        """Return what the token adds to the text; nothing where the text is made at the end."""
        if self.detokenizer is None or not self._is_eager:
            return ""
        found = self.stops.add(self.detokenizer.add([token]), may_stop=may_stop)
        if found.stop is not None:
            self.stop_reason, self.is_closed = found.stop, True
        return found.text

    def _rest(self) -> str:
        """Return the text that is not written yet."""
        was_closed, self.is_closed = self.is_closed, True
        if was_closed or self.detokenizer is None:
            return ""
        if self._is_eager:
            return self.stops.add(self.detokenizer.finish(), may_stop=False).text + self.stops.finish()
        ids = self.text.output_ids
        shown = self.detokenizer.add(ids[:-1] if self.hides_last else ids)
        return shown + self.detokenizer.finish()

    def _give(self, shown: str, token: int) -> None:
        self.written.append(shown)
        if self.streams:
            self.pieces.append(self._piece([token], shown, None))

    def _piece(self, token_ids: list[int], shown: str, reason: str | None) -> Piece:
        return Piece(
            request_id=self.text.request.request_id,
            index=self.text.index,
            token_ids=token_ids,
            text=shown,
            finish_reason=reason,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class RequestState:
    """A request that has not ended.

    Attributes:
        request: what was asked.
        prompt: as text, where it was given as text.
        seed: of its sampling.
        texts: in order.
        error: why it failed, once it has.
        first_token: when its first token came, by the engine's clock.
    """

    request: Request
    prompt: str | None
    seed: int
    texts: Sequence[TextState]
    error: OptGPTQError | None = None
    first_token: float | None = None
    _rows: dict[int, SamplingRow] = field(default_factory=dict, init=False)

    @property
    def is_finished(self) -> bool:
        """Whether all texts have ended."""
        return all(text.text.is_finished for text in self.texts)

    def sampling_row(self, text: Text, eos_token_ids: tuple[int, ...]) -> SamplingRow:
        """Return what the sampler has to know for the next token of a text, the same for all its tokens."""
        row = self._rows.get(text.index)
        if row is None:
            row = self._rows[text.index] = SamplingRow(
                params=self.request.params,
                prompt_ids=self.request.prompt_ids,
                token_ids=text.token_ids,
                seed=self.seed,
                fork=text.index,
                eos_token_ids=eos_token_ids,
            )
        return row

    def result(self, now: float) -> GenerationResult:
        """Return what the request came to; all its texts have ended."""
        arrival, first = self.request.arrival, self.first_token
        return GenerationResult(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.request.prompt_ids),
            outputs=tuple(text.completion() for text in self.texts),
            error=self.error,
            num_cached_tokens=self.texts[0].text.num_cached_tokens,
            seconds_to_first_token=None if first is None else first - arrival,
            seconds=now - arrival,
        )
