"""Whatever scheme there is, the key says it and is read back as it was."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.formats.kv_cache_content import cache_content
from optgptq.formats.kv_cache_keys import TRANSFORMS, parse_cache_keys
from optgptq.kv_cache.scheme import CODE_BITS, CacheScheme, LayerScheme, PastRule, SideScheme

HEAD_DIM = 48
DIGEST = "0" * 64

along_channels = st.builds(
    SideScheme, bits=st.sampled_from(CODE_BITS), group_size=st.sampled_from([1, 6, 16, 24, HEAD_DIM])
)
along_tokens = st.builds(
    SideScheme, bits=st.sampled_from(CODE_BITS), group_size=st.sampled_from([1, 16, 24, 64]), axis=st.just("token")
)
exact = st.just(SideScheme())
layers = st.builds(
    LayerScheme, keys=st.one_of(exact, along_channels, along_tokens), values=st.one_of(exact, along_channels)
)
pasts = st.builds(
    PastRule,
    mode=st.sampled_from(["off", "token", "chunk"]),
    sink_tokens=st.integers(0, 100),
    recent_tokens=st.integers(0, 300),
) | st.builds(PastRule, mode=st.just("window"), window=st.integers(1, 100))


@settings(max_examples=150, deadline=None)
@given(said=st.lists(layers, min_size=1, max_size=6), past=pasts, data=st.data())
def test_schemes_are_read_back(said: list[LayerScheme], past: PastRule, data: st.DataObject) -> None:
    names = st.tuples(st.sampled_from(TRANSFORMS), st.sampled_from(TRANSFORMS))
    transforms = [data.draw(names) for _ in said]
    scheme = CacheScheme(layers=tuple(said), past=past)
    content = cache_content(scheme, transforms, params_sha256=DIGEST, folded={"k_scale": True}, calibration={"a": [1]})
    content = json.loads(json.dumps(content))
    keys = parse_cache_keys(content, where="key", num_layers=len(said), head_dim=HEAD_DIM)
    assert keys.scheme.layers == scheme.layers
    granule = keys.past.granule
    tokens = [layer.keys.group_size for layer in said if layer.keys.axis == "token"]
    assert all(granule % size == 0 for size in tokens)
    assert content["page_tokens_multiple"] % 16 == content["page_tokens_multiple"] % granule == 0
    assert keys.past == PastRule(
        mode=past.mode,
        window=past.window,
        sink_tokens=past.sink_tokens,
        recent_tokens=past.recent_tokens,
        granule=granule,
    )
    for layer, found, names_of_layer in zip(said, keys.layers, transforms, strict=True):
        assert found.is_skipped is layer.is_exact
        assert layer.is_exact or found.transforms == names_of_layer
    assert (keys.params_sha256, keys.folded, keys.calibration) == (DIGEST, {"k_scale": True}, {"a": [1]})
