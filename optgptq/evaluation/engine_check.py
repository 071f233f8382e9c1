"""Does an engine write what the model says? Its greedy tokens beside full forwards of the same model, without pages.

With a quantized cache the forwards read keys and values as its scheme and mode say (`ReferenceAttend`).

Shapes: `B` sequences (one), `S` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.errors import GateError
from optgptq.evaluation.cache_reference import ReferenceAttend
from optgptq.models.attention import attention_context
from optgptq.models.decoder import Decoder
from optgptq.runtime.cache_plan import CachePlan
from optgptq.runtime.engine import Engine
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

# Both ways add up the same products in another order. A token counts as right if its logit is this close to the largest
# one, as a share of the largest magnitude: more than the rounding of whole models, far less than a wrong key changes.
_TIE_RATIOS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# With codes a difference of rounding may move a number across the border between two of them, which is a whole step.
_CODE_TIE_RATIO = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCheck:
    """What was compared.

    Attributes:
        num_prompts: texts.
        num_tokens: new tokens of all of them.
        num_ties: tokens that differ, where the two were equally likely up to rounding.
    """

    num_prompts: int
    num_tokens: int
    num_ties: int


def check_engine(engine: Engine, prompts: Sequence[Sequence[int]], *, num_new_tokens: int) -> EngineCheck:
    """Compare greedy texts of an engine, all prompts at once, with a full forward for each of their tokens.

    Where the two differ in a tie, the forwards go on with the engine's token. Texts that depend on how they are cut
    into steps are written one after the other, so that the steps are known.

    Raises:
        GateError: the engine writes a token that is not the likeliest.
        OptGPTQError: the engine refuses a prompt.
    """
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    is_cut = engine.cache is not None and engine.cache.past.depends_on_steps
    batches = [[prompt] for prompt in prompts] if is_cut else [list(prompts)]
    results = [result for batch in batches for result in generate(engine, batch, params)]
    num_tokens = num_ties = 0
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
        if result.error is not None:
            raise result.error
        text = list(prompt)
        for place, token in enumerate(result.token_ids, start=1):
            begins = _begins(len(text), len(prompt), engine.scheduler.settings.max_step_tokens)
            logits_V = _logits(engine.decoder, text, engine.cache, begins)
            num_ties += _is_tie(logits_V, token, _limit(engine), where=f"token {place} of prompt {number}")
            text.append(token)
        num_tokens += len(result.token_ids)
    return EngineCheck(num_prompts=len(prompts), num_tokens=num_tokens, num_ties=num_ties)


def _begins(num_tokens: int, num_prompt_tokens: int, step_tokens: int) -> list[int]:
    """Return where the step of each position begins, for a text that is written alone."""
    prompt = [position - position % step_tokens for position in range(num_prompt_tokens)]
    return prompt + list(range(num_prompt_tokens, num_tokens))


def _limit(engine: Engine) -> float:
    """Return how far below the largest logit a token may be, as a share of the largest magnitude."""
    ratio = _TIE_RATIOS[engine.decoder.dtype]
    return ratio if engine.cache is None else max(ratio, _CODE_TIE_RATIO)


@torch.inference_mode()
def _logits(decoder: Decoder, text: Sequence[int], cache: CachePlan | None, begins: Sequence[int]) -> torch.Tensor:
    """Return the logits `[V]` after a text."""
    tokens_BS = torch.tensor([text], device=decoder.device)
    context = None
    if cache is not None:
        attend = ReferenceAttend(plan=cache, begins=begins)
        context = attention_context(decoder.spec, len(text), dtype=decoder.dtype, device=decoder.device, attend=attend)
    logits_V: torch.Tensor = decoder.head.logits(decoder.hidden(tokens_BS, context)[0, -1:])[0]
    return logits_V


def _is_tie(logits_V: torch.Tensor, token: int, limit: float, *, where: str) -> bool:
    """Return False if `token` is the likeliest, True if another one is as likely up to rounding."""
    best = int(logits_V.argmax())
    if token == best:
        return False
    gap, size = float(logits_V[best] - logits_V[token]), float(logits_V.abs().max())
    # Not `gap > limit`: a comparison with NaN is false.
    if gap <= limit * size:
        return True
    raise GateError(
        f"engine, {where}",
        expected=f"token {best}, the likeliest by a full forward",
        found=f"token {token}, whose logit is {gap:.4g} lower",
        action="Do not use these figures. Report it with the command; --skip-check measures all the same.",
    )
