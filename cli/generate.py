"""`optgptq generate`: let a model continue prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .display import plain_log, step_display
from .lines import LineWriter, line_writer, require_new
from .options import (
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    EngineSetOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    PastOnlyOption,
    QuietOption,
    RevisionOption,
    WeightsOption,
)
from .output import write_json, write_note, write_piece, write_result
from .record import require_writable
from .requests import read_requests, require_place_for_logprobs, wants_stream
from .texts import json_record, page, shown_prompt, summary, text_records

if TYPE_CHECKING:
    from optgptq.runtime.engine import Engine
    from optgptq.runtime.prompts import PromptRequest
    from optgptq.runtime.results import GenerationResult, Piece


def generate(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Text to continue; none: the model starts.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="A .txt file, a prompt on each line, or .jsonl.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write each text to this file as JSON, a line each.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="New tokens at most.")] = 64,
    min_tokens: Annotated[int, typer.Option("--min-tokens", help="New tokens before a text may stop.")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens of this share.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Least probability, as a share of the greatest.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens of prompt and text become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Taken off the logits of tokens of the text.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, for each time that the text has the token.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a text. Repeatable.", show_default=False)
    ] = None,
    num_texts: Annotated[int, typer.Option("-n", help="Texts for each prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json or --output: so many likeliest tokens.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="Any other parameter of docs/sampling.md. Repeatable.",
            show_default=False,
        ),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin with the BOS token; default: the model's habit.", show_default=False
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages for the chat template.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="With --chat: the message of the system.", show_default=False)
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it is written; default: one text on a terminal.",
            show_default=False,
        ),
    ] = None,
    engine_set: EngineSetOption = None,
    deterministic: DeterministicOption = False,
    kv_cache: KvCacheOption = None,
    past_only: PastOnlyOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write text with a dense or quantized checkpoint."""
    from optgptq.runtime.field_values import SAMPLING_FIELDS, SETTING_FIELDS, engine_settings, field_values
    from optgptq.runtime.llm import LLM

    values = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": stop,
        "n": num_texts,
        "logprobs": logprobs,
        "seed": seed,
        "ignore_eos": ignore_eos,
        **field_values(param or (), SAMPLING_FIELDS, option="--param"),
    }
    given = {"kv_cache": kv_cache, "past_only": past_only}
    settings = {
        "deterministic": deterministic,
        **field_values(engine_set or (), SETTING_FIELDS, option="--set"),
        **{name: value for name, value in given.items() if value is not None},
    }
    requests = read_requests(prompts or [], prompt_file, values, chat=chat, system=system)
    require_place_for_logprobs(requests, has_place=as_json or output is not None)
    streams = wants_stream(stream, requests, as_json=as_json)
    if output is not None:
        require_writable(output, option="--output")
        require_new(output, option="--output", overwrite=overwrite)
    checked = engine_settings(settings)
    with plain_log(quiet=quiet):
        llm = LLM(model, device=device, dtype=dtype, weights=weights, revision=revision, settings=checked)
        with line_writer(output) as lines, step_display("texts", quiet=quiet or streams) as progress:
            run = Run(requests=requests, lines=lines, output=output, streams=streams, progress=progress)
            results, seconds = run.start(llm.engine, bos=bos)
    if as_json:
        write_json(json_record(requests, results, seconds=seconds))
    elif streams:
        write_piece("\n" if run.has_shown else "")
    elif output is not None:
        if not quiet:
            write_result(f"{output}: {summary(results, seconds=seconds)}")
    elif any(result.error is None for result in results):
        write_result(page(requests, results))
    _raise_first(results)


@dataclass(slots=True, kw_only=True)
class Run:
    """The prompts of a command on their way through an engine.

    Attributes:
        requests: the prompts.
        lines: where each text goes when its prompt is done; None for nowhere.
        output: the file of `lines`.
        streams: the one text goes to stdout as it is written.
        progress: takes prompts done and prompts in all.
        num_done: prompts whose texts have ended.
        has_shown: the one text has begun on stdout.
    """

    requests: Sequence[PromptRequest]
    lines: LineWriter | None
    output: Path | None
    streams: bool
    progress: Callable[[int, int], None]
    num_done: int = 0
    has_shown: bool = False

    def start(self, engine: Engine, *, bos: bool | None) -> tuple[list[GenerationResult], float]:
        """Return the results, and the seconds that they took.

        Raises:
            Interrupted: a request to stop, where finished texts are in a file.
        """
        from optgptq.errors import Interrupted
        from optgptq.runtime.prompts import run_requests

        began = time.perf_counter()
        try:
            results = run_requests(
                engine,
                self.requests,
                bos=bos,
                on_result=self._take,
                on_piece=self._show if self.streams else None,
            )
        except KeyboardInterrupt as stopped:
            if self.lines is None:
                raise
            raise Interrupted(
                "optgptq generate",
                expected=f"to finish {len(self.requests)} prompts",
                found=f"a request to stop after {self.num_done}",
                action=f"Their texts are in {self.output}, {self.lines.num_lines} lines. Run the others again.",
            ) from stopped
        return results, time.perf_counter() - began

    def _take(self, number: int, result: GenerationResult) -> None:
        if self.lines is not None:
            for record in text_records(number, self.requests[number], result):
                self.lines.write(record)
        self.num_done += 1
        self.progress(self.num_done, len(self.requests))

    def _show(self, number: int, piece: Piece) -> None:
        # Not before the first piece: where the prompt is refused, nothing is printed.
        write_piece(piece.text if self.has_shown else shown_prompt(self.requests[number]) + piece.text)
        self.has_shown = True


def _raise_first(results: Sequence[GenerationResult]) -> None:
    """End the command with the first error of a prompt, the others told before it."""
    errors = [result.error for result in results if result.error is not None]
    for error in errors[1:]:
        write_note(f"error: {error}")
    if errors:
        raise errors[0]
