"""Trials of an ablation: quantized in this process, scored beside one dense model, kept line by line in a file.

A trial costs little more than its quantization: the text is cut and the dense model run once per model.
Shapes: `W` windows, `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from measure.cases import Case
from measure.process import BenchmarkError
from measure.score import stored_bits_per_weight
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.evaluation import evaluation_windows
from optgptq.data.tokenizer import load_tokenizer
from optgptq.evaluation.perplexity import LanguageModel, ScoringHead, evaluate
from optgptq.quantize import quantize
from optgptq.recipe.records import Recipe
from optgptq.runtime.load import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One recipe on one model with one seed.

    Attributes:
        key: hash of all that was asked; the same key is the same trial.
        commit: of the code that ran it.
        model, grid, variant, seed: its place in the table.
        layer_loss: sum over linears of the share of its output's energy that each loses.
        mean_kl, perplexity: on held-out text; `mean_kl` in nats per token from the dense model.
        seconds: of the quantization, from the model's folder to the checked checkpoint.
        bits_per_weight, num_quantized_weights: as `stored_bits_per_weight` counts them.
        warnings: what the job told its user.
    """

    key: str
    commit: str
    model: str
    grid: str
    variant: str
    seed: int
    layer_loss: float
    mean_kl: float
    perplexity: float
    seconds: float
    bits_per_weight: float
    num_quantized_weights: int
    warnings: tuple[str, ...]


class RememberedModel:
    """A model that runs once on each batch: its last hidden states are kept."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._hidden: dict[bytes, torch.Tensor] = {}

    @property
    def head(self) -> ScoringHead:
        return self._model.head

    @property
    def device(self) -> torch.device:
        return self._model.device

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        """Return hidden states `[B, S, M]`."""
        name = tokens_BS.numpy().tobytes()
        if name not in self._hidden:
            self._hidden[name] = self._model.hidden(tokens_BS)
        return self._hidden[name]


class HeldOutText:
    """The text that a case is scored on, and what the dense model makes of it."""

    def __init__(self, case: Case, *, max_tokens: int) -> None:
        documents = list(load_documents(TextSource(source=case.evaluation)))
        if not set(documents).isdisjoint(load_documents(TextSource(source=case.calibration))):
            raise BenchmarkError(f"{case.name}: documents are in the calibration text and in the text that is scored")
        windows = evaluation_windows(
            documents, load_tokenizer(case.model), window_size=case.window_size, max_tokens=max_tokens
        )
        self.case = case
        self.sha256 = windows.sha256
        self._tokens_WS = windows.tokens_WS
        self._dense = RememberedModel(load_model(case.model))
        self.dense_perplexity = evaluate(self._dense, self._tokens_WS).perplexity

    def run(self, recipe: Recipe, *, key: str, commit: str, grid: str, variant: str) -> Trial:
        """Quantize the model by `recipe` into a folder that is removed again, and score it.

        Raises:
            OptGPTQError: the recipe does not fit the model.
        """
        with tempfile.TemporaryDirectory() as folder:
            result = quantize(self.case.model, recipe, Path(folder) / "out")
            bits_per_weight, num_weights = stored_bits_per_weight(result.output)
            scored = evaluate(load_model(result.output), self._tokens_WS, baseline=self._dense)
        if scored.mean_kl is None:
            raise BenchmarkError(f"{self.case.name}, {variant}: the evaluation has no divergence")
        return Trial(
            key=key,
            commit=commit,
            model=self.case.name,
            grid=grid,
            variant=variant,
            seed=recipe.calibration.seed,
            layer_loss=sum(layer["loss"] for layer in result.record["layers"]),
            mean_kl=scored.mean_kl,
            perplexity=scored.perplexity,
            seconds=result.seconds,
            bits_per_weight=bits_per_weight,
            num_quantized_weights=num_weights,
            warnings=result.warnings,
        )


class TrialStore:
    """Trials that were run, one JSON object per line: what was finished outlives a killed run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trials: dict[str, Trial] = {}
        if not path.is_file():
            return
        for line in path.read_text("utf-8").splitlines(keepends=True):
            # A run that was killed while it wrote leaves half a line at the end.
            if line.endswith("\n"):
                values = json.loads(line)
                trial = Trial(**{**values, "warnings": tuple(values["warnings"])})
                self._trials[trial.key] = trial
        path.write_text("".join(map(_line, self._trials.values())), "utf-8")

    def find(self, key: str) -> Trial | None:
        """Return the trial with this key; None where it was not run."""
        return self._trials.get(key)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self._trials[trial.key] = trial
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(trial))


def trial_key(recipe: Recipe, held_out_sha256: str, model: str) -> str:
    """Return the hash of the recipe, the model's name and the tokens it is scored on."""
    text = f"{model}\n{held_out_sha256}\n{recipe.model_dump_json()}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _line(trial: Trial) -> str:
    return json.dumps(dataclasses.asdict(trial)) + "\n"
