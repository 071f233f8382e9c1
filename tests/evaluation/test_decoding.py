"""Models that are scored through the pages of an engine, beside engines that are fed one token at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import median

import pytest
import torch
from support.cached_engines import FAMILIES, VOCAB_SIZE, cached_engine, random_setup, write_cached_model
from support.tiny_models import random_tokens

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.data.corpora import TextSource
from optgptq.errors import FormatError, UsageError
from optgptq.evaluation.decoding import CacheOptions, DecodingModel
from optgptq.evaluation.perplexity import evaluate
from optgptq.evaluation.run import EvaluationReport, EvaluationSettings, evaluate_folders
from optgptq.formats.kv_cache_config import data_free_setup, write_cache_setup
from optgptq.formats.kv_cache_keys import PARAMS_FILE
from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_cache.setup import CacheSetup
from optgptq.models.decoder import load_decoder
from optgptq.models.registry import model_spec
from optgptq.scheduling.sampling_params import SamplingParams

STORY = bundled_path("bundled:story-llama")
SIZE = 75
PASTS = {
    "off": PastRule(mode="off"),
    "token": PastRule(mode="token", sink_tokens=2),
    "chunk": PastRule(mode="chunk", sink_tokens=2),
    "window": PastRule(mode="window", window=24, sink_tokens=5),
    "recent": PastRule(mode="token", recent_tokens=9),
}
# Texts of these models depend on the length of the prompt, which is one token where tokens are fed one at a time.
GROWING = {"llama-rope_dynamic", "phi3-longrope"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def folder(name: str):
        return write_cached_model(name, tmp_path_factory.mktemp("tiny"))

    return folder


def decoding_model(folder, setup: CacheSetup | None, *, step_tokens: int = 20, **options: str) -> DecodingModel:
    decoder = load_decoder(CheckpointFolder.open(folder))
    model = DecodingModel.start(decoder, setup, CacheOptions(**options), window_size=SIZE)
    return replace(model, step_tokens=step_tokens)


def logprobs(model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return log probabilities `[B, S, V]`."""
    with torch.inference_mode():
        return torch.log_softmax(model.head.logits(model.hidden(tokens_BS)).double(), dim=-1)


@dataclass
class Following:
    """A logits processor that writes down the logits and makes the text what it is."""

    tokens: Sequence[int]
    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.log_softmax(logits_V.double(), dim=-1))
        return torch.zeros_like(logits_V).index_fill_(0, torch.tensor([self.tokens[len(output_ids) + 1]]), 100.0)


def fed_one_by_one(folder, setup: CacheSetup, tokens: list[int], page_size: int) -> torch.Tensor:
    """Return the log probabilities `[S - 1, V]` of an engine whose prompt is the first token."""
    engine = cached_engine(folder, setup, page_size=page_size)
    following = Following(tokens)
    engine.submit(
        tokens[:1],
        SamplingParams(max_tokens=len(tokens) - 1, temperature=0.0, ignore_eos=True, logits_processors=[following]),
    )
    while engine.has_work:
        engine.step()
    ((_, result),) = engine.take_results()
    assert result.error is None
    assert result.token_ids == tokens[1:]
    return torch.stack(following.seen)


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether figures are alike but for rounding, which moves a number to the next code now and then."""
    errors = (found - expected).abs().amax(-1).flatten().tolist()
    return median(errors) < 1e-3 and max(errors) < 0.1


CASES = [(name, "token") for name in FAMILIES if name not in GROWING]
CASES += [("gemma3text-local_global", mode) for mode in PASTS if mode != "token"]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_it_scores_as_an_engine_that_is_fed_one_token_at_a_time(models, name: str, mode: str) -> None:
    spec = model_spec(CheckpointFolder.open(models(name)))
    setup = random_setup(spec, ["4", "16", "K3V16", "4/2"], PASTS[mode])
    tokens_BS = random_tokens(1, SIZE, vocab_size=VOCAB_SIZE, seed=3)
    model = decoding_model(models(name), setup)
    found = logprobs(model, tokens_BS)
    for row, tokens in zip(found, tokens_BS.tolist(), strict=True):
        assert agree(row[:-1], fed_one_by_one(models(name), setup, tokens, 16))
    assert model.cache.mode == {"chunk": "token", "window": "window:24", "recent": "token"}.get(mode, mode)
    assert model.cache.num_exact == {"token": 2, "chunk": 2, "window": 28, "recent": 8, "off": 0}[mode]
    # It is the cache that is scored: without one the figures are others.
    assert not agree(found, logprobs(decoding_model(models(name), setup, kv_cache="16"), tokens_BS))


def test_groups_along_tokens_get_pages_of_their_size(models) -> None:
    folder = models("llama-grouped_query")
    setup = random_setup(model_spec(CheckpointFolder.open(folder)), ["t16", "4"], PASTS["token"])
    tokens_BS = random_tokens(1, SIZE, vocab_size=VOCAB_SIZE, seed=4)
    found = logprobs(decoding_model(folder, setup), tokens_BS)
    assert agree(found[0, :-1], fed_one_by_one(folder, setup, tokens_BS[0].tolist(), 16))


@pytest.mark.parametrize("name", FAMILIES)
def test_with_sixteen_bits_it_is_a_full_forward(models, name: str) -> None:
    tokens_BS = random_tokens(3, SIZE, vocab_size=VOCAB_SIZE, seed=5)
    plain = load_decoder(CheckpointFolder.open(models(name)))
    model = decoding_model(models(name), None)
    assert (logprobs(model, tokens_BS) - logprobs(plain, tokens_BS)).abs().max() < 1e-4
    assert (model.cache.mode, model.cache.bits, model.cache.num_exact) == ("plain", 16, 0)
    result = evaluate(model, tokens_BS, baseline=plain)
    assert abs(result.mean_kl) < 1e-6
    assert result.top1_agreement == 1


@pytest.mark.parametrize("mode", list(PASTS))
def test_it_does_not_matter_how_a_window_is_cut(models, mode: str) -> None:
    folder = models("mistral-short_window")
    setup = random_setup(model_spec(CheckpointFolder.open(folder)), ["4", "K3V16"], PASTS[mode])
    tokens_BS = random_tokens(2, SIZE, vocab_size=VOCAB_SIZE, seed=6)
    first, *others = (
        logprobs(decoding_model(folder, setup, step_tokens=step), tokens_BS) for step in (7, 32, SIZE, 500)
    )
    assert all(agree(other, first) for other in others)


def test_pages_hold_one_window_and_come_back(models) -> None:
    folder = models("llama-grouped_query")
    setup = random_setup(model_spec(CheckpointFolder.open(folder)), ["4"], PASTS["window"])
    model = decoding_model(folder, setup)
    pages = [allocator.num_pages - 1 for allocator in model.tables.allocators]
    assert max(pages) == -(-SIZE // 16)
    tokens_BS = random_tokens(3, SIZE, vocab_size=VOCAB_SIZE, seed=7)
    found = logprobs(model, tokens_BS)
    assert list(model.tables.num_free) == pages
    # What the windows before have left in the pages is not read.
    assert torch.equal(logprobs(model, tokens_BS.flip(0)).flip(0), found)


def test_the_mode_can_be_chosen(models) -> None:
    folder = models("llama-grouped_query")
    setup = random_setup(model_spec(CheckpointFolder.open(folder)), ["4"], PASTS["token"])
    assert decoding_model(folder, setup, past_only="window:8").cache.mode == "window:8"
    assert decoding_model(folder, setup, past_only="chunk").cache.mode == "token"
    free = decoding_model(folder, setup, kv_cache="8", past_only="off").cache
    assert (free.mode, free.bits, free.num_exact) == ("off", 8 + 32 / 16, 0)
    assert free.source != decoding_model(folder, setup).cache.source
    with pytest.raises(UsageError, match="kv_cache"):
        decoding_model(folder, setup, kv_cache="5")


def story(**values) -> EvaluationSettings:
    source = TextSource(source="bundled:story-evaluation")
    return EvaluationSettings(source=source, window_size=128, max_tokens=1024, **values)


def with_cache_of(tmp_path, past: PastRule):
    """Return a copy of the bundled model with a cache of four bits."""
    folder = shutil.copytree(STORY, tmp_path / "quantized")
    spec = model_spec(CheckpointFolder.open(folder))
    setup = data_free_setup(
        4, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, past=past
    )
    write_cache_setup(folder, setup.scheme, setup.layers, folded={}, calibration={})
    return folder


def test_the_folder_says_which_cache(tmp_path) -> None:
    folder = with_cache_of(tmp_path, PastRule(mode="chunk", sink_tokens=4))
    report = evaluate_folders(folder, story(decoding=CacheOptions(), against_plain_cache=True))
    other = evaluate_folders(folder, story(decoding=CacheOptions()), baseline=STORY)
    assert report.cache is not None
    # Six layers, two sides of two heads of 32 numbers: five bits each.
    assert (report.cache.bits, report.cache.bytes_per_token, report.cache.mode) == (5.0, 480.0, "token")
    assert 1e-4 < report.result.mean_kl < 0.05
    assert _close(report, other)
    plain = evaluate_folders(folder, story())
    assert plain.cache is None
    assert report.result.baseline_perplexity == pytest.approx(plain.result.perplexity, rel=1e-6)
    exact = evaluate_folders(folder, story(decoding=CacheOptions(kv_cache="16")))
    assert exact.result.perplexity == pytest.approx(plain.result.perplexity, rel=1e-6)


def _close(report: EvaluationReport, other: EvaluationReport) -> bool:
    pairs = (
        (report.result.perplexity, other.result.perplexity),
        (report.result.baseline_perplexity, other.result.baseline_perplexity),
        (report.result.mean_kl, other.result.mean_kl),
    )
    return all(first == pytest.approx(second, rel=1e-3) for first, second in pairs)


def test_windows_that_hardly_read_codes_are_a_warning() -> None:
    report = evaluate_folders(STORY, story(decoding=CacheOptions(kv_cache="2")))
    assert len(report.warnings) == 1
    assert "128 tokens" in report.warnings[0]
    assert "up to 191 in full precision" in report.warnings[0]
    assert evaluate_folders(STORY, story(decoding=CacheOptions(kv_cache="4"))).warnings == ()


@pytest.mark.parametrize(("decoding", "baseline"), [(None, None), (CacheOptions(), STORY)])
def test_a_model_is_compared_with_itself_only_through_pages_and_alone(decoding, baseline) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate_folders(STORY, story(decoding=decoding, against_plain_cache=True), baseline=baseline)
    assert caught.value.where == "--baseline-cache"
    assert caught.value.found == ("no --decode" if decoding is None else f"the baseline {STORY}")


def test_figures_and_record_of_a_folder_agree(tmp_path) -> None:
    folder = with_cache_of(tmp_path, PastRule(mode="window", window=16))
    assert "kv_cache_quantization" in json.loads((folder / "config.json").read_text())
    report = evaluate_folders(folder, story(decoding=CacheOptions(past_only="token")))
    assert report.cache is not None
    assert (report.cache.mode, report.cache.num_exact) == ("token", 0)


@pytest.mark.parametrize("kv_cache", ["4", "16"])
def test_a_cache_that_is_named_needs_none_of_the_folder(tmp_path, kv_cache: str) -> None:
    folder = with_cache_of(tmp_path, PastRule(mode="token"))
    (folder / PARAMS_FILE).unlink()
    with pytest.raises(FormatError, match="no such file") as caught:
        evaluate_folders(folder, story(decoding=CacheOptions()))
    assert "--kv-cache 4" in caught.value.action
    report = evaluate_folders(folder, story(decoding=CacheOptions(kv_cache=kv_cache)))
    assert report.cache is not None
    assert report.cache.bits == (16.0 if kv_cache == "16" else 5.0)
