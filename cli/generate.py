"""`optgptq generate`: let a model continue a prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import plain_log
from .options import DeviceOption, JsonOption, ModelArgument, QuietOption, RevisionOption
from .output import write_json, write_result

if TYPE_CHECKING:
    from optgptq.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """One finished text; `token_ids` are the new tokens, `text` is what they spell without the end token."""

    prompt: str
    num_prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str


def generate(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Text to continue; none: the model starts.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin with the BOS token; default: the model's habit.", show_default=False
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message for the chat template.")] = False,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write text with a dense or quantized checkpoint."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.data.tokenizer import load_tokenizer
    from optgptq.runtime.device import require_device
    from optgptq.runtime.generation import generate as generate_tokens
    from optgptq.runtime.load import load_model
    from optgptq.runtime.sampling import SamplingSettings

    folder, torch_device = resolve_model(model, revision), require_device(device)
    tokenizer = load_tokenizer(folder)
    settings = SamplingSettings(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_ids=tokenizer.eos_token_ids,
        ignore_eos=ignore_eos,
    )
    texts = prompts or [""]
    prompt_ids = [prompt_tokens(tokenizer, text, bos=bos, chat=chat) for text in texts]
    with plain_log(quiet=quiet):
        decoder = load_model(folder, device=torch_device, weights="quantized")
        began = time.perf_counter()
        new_ids = generate_tokens(decoder, prompt_ids, settings)
        seconds = time.perf_counter() - began
    results = [
        _continuation(tokenizer, text, prompt=prompt, new=new, settings_eos=settings.eos_token_ids)
        for text, prompt, new in zip(texts, prompt_ids, new_ids, strict=True)
    ]
    if as_json:
        write_json(_record(results, seconds))
    else:
        write_result("\n\n".join(result.prompt + result.text for result in results))


def prompt_tokens(tokenizer: Tokenizer, text: str, *, bos: bool | None, chat: bool) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        TextError: an empty prompt for a model without a BOS token.
    """
    from optgptq.errors import TextError

    if chat:
        # A chat template writes the special tokens itself.
        text, bos = tokenizer.render_chat([{"role": "user", "content": text}]), bool(bos)
    ids = tokenizer.encode(text)
    wanted = tokenizer.adds_bos or not ids if bos is None else bos
    if wanted and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise TextError(
            "prompt",
            expected="at least one token to start from",
            found="an empty prompt, and no BOS token to begin with",
            action="Give a prompt.",
        )
    return ids


def _continuation(
    tokenizer: Tokenizer, text: str, *, prompt: list[int], new: list[int], settings_eos: tuple[int, ...]
) -> Continuation:
    ended = bool(new) and new[-1] in settings_eos
    return Continuation(
        prompt=text,
        num_prompt_tokens=len(prompt),
        token_ids=new,
        text=tokenizer.decode(new[:-1] if ended else new),
        finish_reason="end" if ended else "length",
    )


def _record(results: list[Continuation], seconds: float) -> dict[str, Any]:
    num_tokens = sum(len(result.token_ids) for result in results)
    return {
        "texts": [
            {
                "prompt": result.prompt,
                "text": result.text,
                "token_ids": result.token_ids,
                "num_prompt_tokens": result.num_prompt_tokens,
                "finish_reason": result.finish_reason,
            }
            for result in results
        ],
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds if seconds > 0 else None,
    }
