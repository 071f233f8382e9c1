"""A small MPT (ALiBi, one key/value head for each query head) trained on the bundled stories.

No trained ALiBi model is small enough to come with the project; this one takes minutes on two cores and writes simple
stories, so a loss of quality shows in its perplexity.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from measure.random_mpt import finish_folder
from optgptq.bundled import bundled_path
from optgptq.data.tokenizer import load_tokenizer

CONFIG = {
    "vocab_size": 1024,
    "d_model": 128,
    "n_layers": 6,
    "n_heads": 4,
    "expansion_ratio": 4,
    "max_seq_len": 1024,
}
# More steps learn the text by heart: held-out perplexity rises after about these.
STEPS, BATCH, WINDOW = 450, 16, 256
PEAK_RATE, WARM_UP, CLIP = 3e-3, 60, 1.0


def story_mpt(folder: Path, *, steps: int = STEPS, seed: int = 0) -> Path:
    """Return the folder of the model, trained there unless it is complete already."""
    path = folder / f"story-mpt-{steps}-steps-seed-{seed}"
    if (path / "complete").is_file():
        return path
    source = bundled_path("bundled:story-llama")
    tokens = _tokens(source)
    model = _model(seed)
    _train(model, tokens, steps=steps, seed=seed)
    path.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(torch.bfloat16).save_pretrained(path)
    finish_folder(path)
    return path


def _tokens(source: Path) -> torch.Tensor:
    text = (bundled_path("bundled:story-calibration")).read_text("utf-8")
    return torch.tensor(load_tokenizer(source).encode(text))


def _model(seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.MptForCausalLM(transformers.MptConfig(**CONFIG)).train()


def _train(model: Any, tokens: torch.Tensor, *, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min((step + 1) / WARM_UP, 0.1 + 0.9 * cosine)
        starts = torch.randint(0, len(tokens) - WINDOW - 1, (BATCH,), generator=generator)
        window_BS = torch.stack([tokens[start : start + WINDOW + 1] for start in starts.tolist()])
        logits_BSV = model(window_BS[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), window_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
