"""An MPT (ALiBi) with random weights, for figures that depend on sizes and not on what a model knows."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch

from optgptq.bundled import bundled_path

WIDTH, NUM_HEADS, VOCABULARY = 1024, 16, 1024


def random_mpt(folder: Path, *, num_layers: int, seed: int = 0) -> Path:
    """Return the folder of the model, made there unless it is complete already; bfloat16, story-llama's tokenizer."""
    path = folder / f"random-mpt-{WIDTH}-{num_layers}-layers-seed-{seed}"
    if (path / "complete").is_file():
        return path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = transformers.MptConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, n_layers=num_layers, n_heads=NUM_HEADS, max_seq_len=1024
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.MptForCausalLM(config)
        path.mkdir(parents=True, exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(path)
    finish_folder(path)
    return path


def finish_folder(path: Path) -> None:
    """Add the bundled model's tokenizer and its end tokens, and mark the folder as complete."""
    source = bundled_path("bundled:story-llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, path / name)
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"bos_token_id": 0, "eos_token_id": 1}, indent=2), "utf-8")
    (path / "complete").touch()
