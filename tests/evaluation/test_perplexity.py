"""Evaluation figures against literal sums over a toy model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.errors import InputError, NumericalError, UsageError
from optgptq.evaluation import perplexity
from optgptq.evaluation.perplexity import evaluate


class ToyHead:
    def __init__(self, weight_VM: torch.Tensor) -> None:
        self.weight_VM = weight_VM

    def logits(self, hidden_BSM: torch.Tensor, /) -> torch.Tensor:
        return hidden_BSM @ self.weight_VM.T


class ToyModel:
    """Hidden state: running mean of token embeddings, so that earlier tokens of the window matter."""

    def __init__(self, vocabulary: int, *, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding_VM = torch.randn(vocabulary, 5, generator=generator)
        self.head = ToyHead(scale * torch.randn(vocabulary, 5, generator=generator))
        self.device = torch.device("cpu")
        self.largest_batch = 0

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        self.largest_batch = max(self.largest_batch, tokens_BS.shape[0])
        counts = torch.arange(1, tokens_BS.shape[1] + 1)[:, None]
        return self.embedding_VM[tokens_BS].cumsum(1) / counts


def slow_figures(candidate, baseline, tokens_WS, first_scored) -> tuple[float, float, float, float, int]:
    nll, base_nll, kl, same, count = 0.0, 0.0, 0.0, 0, 0
    for window, first in zip(tokens_WS, first_scored, strict=True):
        candidate_SV = candidate.head.logits(candidate.hidden(window[None]))[0].double().log_softmax(-1)
        baseline_SV = baseline.head.logits(baseline.hidden(window[None]))[0].double().log_softmax(-1)
        for position in range(first, len(window)):
            p, q = baseline_SV[position - 1], candidate_SV[position - 1]
            nll -= float(q[window[position]])
            base_nll -= float(p[window[position]])
            kl += sum(math.exp(p[v]) * float(p[v] - q[v]) for v in range(len(p)))
            same += int(p.argmax() == q.argmax())
            count += 1
    return math.exp(nll / count), math.exp(base_nll / count), kl / count, same / count, count


@settings(deadline=None, max_examples=25)
@given(
    num_windows=st.integers(1, 7),
    window_size=st.integers(2, 9),
    windows_per_batch=st.sampled_from([None, 1, 2, 5]),
    overlap=st.booleans(),
    chunk=st.sampled_from([11, 40, 10_000]),
    data=st.data(),
)
def test_figures_equal_the_literal_sums(num_windows, window_size, windows_per_batch, overlap, chunk, data):
    tokens_WS = torch.randint(0, 11, (num_windows, window_size), generator=torch.Generator().manual_seed(num_windows))
    first_scored = [1] * num_windows
    if overlap:
        first_scored = [data.draw(st.integers(1, window_size - 1)) for _ in range(num_windows)]
    candidate, baseline = ToyModel(11, seed=1), ToyModel(11, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "_LOGITS_PER_CHUNK", chunk)
        found = evaluate(
            candidate,
            tokens_WS,
            baseline=baseline,
            first_scored_W=torch.tensor(first_scored) if overlap else None,
            windows_per_batch=windows_per_batch,
        )
    expected = slow_figures(candidate, baseline, tokens_WS, first_scored)
    assert found.perplexity == pytest.approx(expected[0], rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(expected[1], rel=1e-5)
    assert found.mean_kl == pytest.approx(expected[2], rel=1e-4, abs=1e-6)
    assert found.top1_agreement == pytest.approx(expected[3])
    assert found.num_tokens == expected[4]
    assert candidate.largest_batch <= (windows_per_batch or num_windows)


def test_a_model_compared_with_itself():
    model = ToyModel(11, seed=1)
    result = evaluate(model, torch.arange(10).view(2, 5), baseline=model)
    assert result.mean_kl == 0.0
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.baseline_perplexity


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = evaluate(ToyModel(11, seed=1, scale=0.0), torch.arange(10).view(2, 5))
    assert result.perplexity == pytest.approx(11)
    assert (result.baseline_perplexity, result.mean_kl, result.top1_agreement) == (None, None, None)
    assert result.num_tokens == 8


def test_progress_counts_windows():
    seen = []
    evaluate(
        ToyModel(11, seed=1),
        torch.zeros(5, 3, dtype=torch.int64),
        windows_per_batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("broken", ["candidate", "baseline"])
def test_logits_that_are_not_finite_name_the_model(broken):
    models = {"candidate": ToyModel(11, seed=1), "baseline": ToyModel(11, seed=2)}
    models[broken].head.weight_VM[3, 0] = torch.nan
    with pytest.raises(NumericalError) as caught:
        evaluate(models["candidate"], torch.arange(10).view(2, 5), baseline=models["baseline"])
    assert caught.value.where == f"logits of the {broken} model"
    assert caught.value.found == "nan"


def test_different_vocabularies_are_refused():
    with pytest.raises(InputError) as caught:
        evaluate(ToyModel(11, seed=1), torch.arange(10).view(2, 5), baseline=ToyModel(12, seed=1))
    assert caught.value.found == "12"
    assert caught.value.expected == "11 entries in the baseline as in the candidate"


@pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
def test_nothing_to_score_is_refused(shape):
    with pytest.raises(UsageError, match=f"{shape[0]} windows of {shape[1]} tokens"):
        evaluate(ToyModel(11, seed=1), torch.zeros(shape, dtype=torch.int64))


def test_a_hopeless_model_is_reported_as_infinite():
    result = evaluate(ToyModel(11, seed=1, scale=1e6), torch.arange(10).view(2, 5))
    assert result.perplexity == math.inf


class SmallMemory(ToyModel):
    """A model that runs out of memory with more than `fitting` windows."""

    def __init__(self, vocabulary: int, *, seed: int, fitting: int) -> None:
        super().__init__(vocabulary, seed=seed)
        self.fitting = fitting
        self.asked: list[int] = []

    def hidden(self, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        self.asked.append(tokens_BS.shape[0])
        if tokens_BS.shape[0] > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().hidden(tokens_BS)


def test_batches_are_halved_until_they_fit_and_the_figures_stay() -> None:
    tokens_WS = torch.randint(0, 11, (13, 6), generator=torch.Generator().manual_seed(0))
    expected = evaluate(ToyModel(11, seed=1), tokens_WS, baseline=ToyModel(11, seed=2), windows_per_batch=2)
    candidate, told, seen = SmallMemory(11, seed=1, fitting=2), list[str](), list[tuple[int, int]]()
    found = evaluate(
        candidate,
        tokens_WS,
        baseline=ToyModel(11, seed=2),
        windows_per_batch=10,
        warn=told.append,
        progress=lambda *place: seen.append(place),
    )
    assert candidate.asked == [10, 5, 2, 2, 2, 2, 2, 2, 1]
    assert found == expected
    assert seen == [(2, 13), (4, 13), (6, 13), (8, 13), (10, 13), (12, 13), (13, 13)]
    assert told == [
        "memory ran out: 5 instead of 10 windows are scored at a time from window 0 on",
        "memory ran out: 2 instead of 5 windows are scored at a time from window 0 on",
    ]


def test_what_was_summed_before_memory_ran_out_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_LOGITS_PER_CHUNK", 11)
    tokens_WS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
    model = ToyModel(11, seed=1)
    expected = evaluate(model, tokens_WS, windows_per_batch=2)
    logits, calls = ToyHead.logits, list[int]()

    def failing(head: ToyHead, hidden_BSM: torch.Tensor, /) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return logits(head, hidden_BSM)

    monkeypatch.setattr(ToyHead, "logits", failing)
    assert evaluate(model, tokens_WS, windows_per_batch=4) == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug"), MemoryError()])
def test_what_smaller_batches_do_not_cure_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: ToyModel, tokens_BS: torch.Tensor, /) -> torch.Tensor:
        raise error

    monkeypatch.setattr(ToyModel, "hidden", failing)
    with pytest.raises(type(error)) as caught:
        evaluate(ToyModel(11, seed=1), torch.zeros(5, 4, dtype=torch.int64))
    assert caught.value is error
