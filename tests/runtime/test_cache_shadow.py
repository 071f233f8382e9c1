"""Random requests on an engine with a quantized cache. After each step every page that a text holds is compared with
a fresh encoding of the keys and values that its tokens have: nothing is lost, mixed up, or encoded twice.

Shapes: `T` tokens, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cached_engines import TORCH, cached_engine, random_setup, write_cached_model

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.codec import decode, encode
from optgptq.kv_cache.page_planes import read_vectors
from optgptq.kv_cache.scheme import PastRule
from optgptq.models.registry import model_spec
from optgptq.runtime import start
from optgptq.runtime.engine import Engine
from optgptq.runtime.step_batch import StepTables
from optgptq.scheduling.sampling_params import SamplingParams

CASES = {
    "token": (["4", "K3V16"], PastRule(mode="token"), "chosen"),
    "sinks": (["K16V2", "4/2"], PastRule(mode="off", sink_tokens=18), "chosen"),
    "window": (["4", "16"], PastRule(mode="window", window=24, sink_tokens=3), "chosen"),
    "groups": (["t16", "8"], PastRule(mode="token", recent_tokens=5), "chosen"),
}
NUM_STEPS = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_cached_model("gemma3text-local_global", tmp_path_factory.mktemp("tiny"))


class Shadow:
    """What each token of each text has stored, by the tokens before it; the same tokens must give the same numbers."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.truth: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: list[tuple[int, ...] | None] = []
        self._next: dict[int, int] = {}
        self._layers = {id(storage): index for index, storage in enumerate(engine.runner.attend.pool.layers)}
        attend = engine.runner.attend.cache
        self._store = attend.choice.store
        attend.choice = replace(attend.choice, store=self.store)
        batch = StepTables.batch

        def noting(tables: StepTables, parts: Any, *, fill_to: int = 0) -> Any:
            texts = [(part.sequence.token_ids, place) for part in parts for place in range(part.begin, part.end)]
            self._rows = [tuple(tokens[: place + 1]) for tokens, place in texts]
            self._rows += [None] * (fill_to - len(self._rows))
            self._next = {}
            return batch(tables, parts, fill_to=fill_to)

        patch.setattr(StepTables, "batch", noting)

    def store(self, key_TKD: torch.Tensor, value_TKD: torch.Tensor, storage: CacheStorage, batch: CacheBatch) -> None:
        layer = self._layers[id(storage)]
        for key_KD, value_KD in zip(key_TKD, value_TKD, strict=True):
            row = self._next.get(layer, 0)
            self._next[layer] = row + 1
            tokens = self._rows[row]
            if tokens is not None:
                known = self.truth.setdefault((layer, tokens), (key_KD.clone(), value_KD.clone()))
                assert torch.equal(known[0], key_KD)
                assert torch.equal(known[1], value_KD)
        self._store(key_TKD, value_TKD, storage, batch)

    def check(self) -> int:
        """Compare the pages of all texts that run; return how many vectors were compared."""
        count = 0
        for layer, storage in enumerate(self.engine.runner.attend.pool.layers):
            if isinstance(storage, CacheStorage):
                for text in list(self.engine.scheduler._running):
                    count += self._check_text(layer, storage, text)
        return count

    def _check_text(self, layer: int, storage: CacheStorage, text: Any) -> int:
        pool, past = self.engine.runner.attend.pool, self.engine.cache.past
        size = storage.layout.page_size
        known = [self.truth[layer, tuple(text.token_ids[: place + 1])] for place in range(text.num_computed)]
        if not known:
            return 0
        count = 0
        table = text.page_tables[pool.group_of_layer[layer]]
        sides = (("keys", storage.key_codec), ("values", storage.value_codec))
        for number, (side, codec) in enumerate(sides):
            true_TKD = torch.stack([pair[number] for pair in known])
            granule = codec.scheme.group_size if codec is not None and codec.scheme.axis == "token" else 1
            whole = len(true_TKD) - len(true_TKD) % granule
            wanted_TKD = true_TKD[:whole] if codec is None else decode(encode(true_TKD[:whole], codec), codec.scheme)
            for column, page in enumerate(table):
                if page:
                    found = read_vectors(
                        storage.pages_ZB[page : page + 1],
                        layout=storage.layout,
                        side=side,
                        exact_dtype=true_TKD.dtype,
                    )
                    expected = wanted_TKD[column * size : (column + 1) * size]
                    assert torch.equal(found[: len(expected)], expected)
                    count += len(expected)
            if pool.exact_group is not None:
                exact = text.page_tables[pool.exact_group]
                pages = storage.exact_keys_ZKDY.transpose(2, 3) if side == "keys" else storage.exact_values_ZKYD
                window = range(max(0, len(known) + 1 - past.kept_window), len(known))
                for place in {*window, *range(min(past.sink_tokens, len(known)))}:
                    page = exact[place // size]
                    assert page
                    assert torch.equal(pages[page, :, place % size], true_TKD[place])
                    count += 1
        return count


@pytest.mark.parametrize("name", CASES)
def test_every_page_holds_what_its_tokens_say(folder, name, monkeypatch) -> None:
    kinds, past, kernel = CASES[name]
    if kernel == "torch":
        monkeypatch.setattr(start, "choose_cache_attention", lambda *what: TORCH)
    spec = model_spec(CheckpointFolder.open(folder))
    setup = random_setup(spec, kinds, past)
    generator = random.Random(3)
    sizes = {"deterministic": True, "max_length": 64, "max_step_tokens": 24, "watermark_ratio": 0.0}
    room = cached_engine(folder, setup, max_running=1, **sizes).runner.attend.pool.plan.num_bytes
    engine = cached_engine(folder, setup, kv_cache_bytes=int(1.7 * room), **sizes)
    shadow = Shadow(engine, monkeypatch)
    names: list[str] = []
    num_compared = 0
    for _ in range(NUM_STEPS):
        if generator.random() < 0.3:
            # Two different beginnings of two pages, so that pages are found again.
            shared = [5 + generator.randrange(2)] * generator.choice((0, 20, 34))
            prompt = shared + [generator.randrange(2, 4) for _ in range(generator.randrange(1, 11))]
            params = SamplingParams(
                n=generator.randrange(1, 4),
                max_tokens=26,
                temperature=1.5,
                seed=generator.randrange(9),
                ignore_eos=True,
            )
            names.append(engine.submit(prompt, params))
        if names and generator.random() < 0.1:
            engine.cancel(generator.choice(names))
        engine.step()
        num_compared += shadow.check()
    usage = engine.usage()
    assert num_compared > 2000
    assert usage.prefix_hit_tokens > 0
    assert usage.num_preemptions > 0
