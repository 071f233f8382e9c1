"""Does an engine write what the model says? Its greedy tokens beside full forwards of the same model, without pages.

Shapes: `B` sequences (one), `S` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.errors import GateError
from optgptq.models.decoder import Decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.llm import generate
from optgptq.scheduling.sampling_params import SamplingParams

# Both ways add up the same products in another order. A token counts as right if its logit is this close to the largest
# one, as a share of the largest magnitude: more than the rounding of whole models, far less than a wrong key changes.
_TIE_RATIOS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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

    Where the two differ in a tie, the forwards go on with the engine's token.

    Raises:
        GateError: the engine writes a token that is not the likeliest.
        OptGPTQError: the engine refuses a prompt.
    """
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    num_tokens = num_ties = 0
    for number, (prompt, result) in enumerate(zip(prompts, generate(engine, prompts, params), strict=True), start=1):
        if result.error is not None:
            raise result.error
        text = list(prompt)
        for place, token in enumerate(result.token_ids, start=1):
            num_ties += _is_tie(engine.decoder, text, token, where=f"token {place} of prompt {number}")
            text.append(token)
        num_tokens += len(result.token_ids)
    return EngineCheck(num_prompts=len(prompts), num_tokens=num_tokens, num_ties=num_ties)


def _is_tie(decoder: Decoder, text: list[int], token: int, *, where: str) -> bool:
    """Return False if `token` is the likeliest after `text`, True if another one is as likely up to rounding."""
    tokens_BS = torch.tensor([text], device=decoder.device)
    with torch.inference_mode():
        logits_V = decoder.head.logits(decoder.hidden(tokens_BS)[0, -1:])[0]
    best = int(logits_V.argmax())
    if token == best:
        return False
    gap, size = float(logits_V[best] - logits_V[token]), float(logits_V.abs().max())
    # Not `gap > limit`: a comparison with NaN is false.
    if gap <= _TIE_RATIOS[decoder.dtype] * size:
        return True
    raise GateError(
        f"engine, {where}",
        expected=f"token {best}, the likeliest by a full forward",
        found=f"token {token}, whose logit is {gap:.4g} lower",
        action="Do not use these figures. Report it with the command; --skip-check measures all the same.",
    )
