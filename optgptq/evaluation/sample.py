"""A few words from a finished checkpoint, through the engine that serves it: a look that no figure replaces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import LLM
from optgptq.scheduling.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and how a model goes on, greedily.

    Attributes:
        prompt: as it was given.
        text: what was written, without end tokens.
        token_ids: the new tokens.
        finish_reason: `stop` or `length`.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the text as far as a program can see."""
        if not self.text.strip():
            return ("sample: the checkpoint wrote no text after the prompt",)
        if len(self.token_ids) > 1 and len(set(self.token_ids)) == 1:
            return (f"sample: the checkpoint wrote the same token {len(self.token_ids)} times",)
        return ()

    def record(self) -> dict[str, object]:
        """Return it as plain values."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "num_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
        }


def write_sample(folder: Path, prompt: str, num_tokens: int, *, device: str = "cpu") -> Sample:
    """Return how the model in `folder` continues `prompt`, greedily and with its own KV cache.

    Raises:
        OptGPTQError: the checkpoint cannot be loaded, or refuses the prompt.
    """
    model = LLM(folder, device=device, settings=EngineSettings(max_running=1))
    (result,) = model.generate(prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0))
    if result.error is not None:
        raise result.error
    (written,) = result.outputs
    return Sample(
        prompt=prompt,
        text=written.text,
        token_ids=tuple(written.token_ids),
        finish_reason=written.finish_reason,
    )
