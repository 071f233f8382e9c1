"""Attention of quantized layers inside a step: transforms around the kernels, and the batches that the kernels read.

Shapes: `T` tokens of the step, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optgptq.kernels.cache_choice import CacheChoice
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_cache.transform import HeadTransform
from optgptq.runtime.cache_plan import CachePlan
from optgptq.runtime.step_batch import StepBatch, token_batches


@dataclass(slots=True, eq=False, kw_only=True)
class CacheAttend:
    """Stores the new keys and values of quantized layers, and attends over them.

    Attributes:
        choice: the kernels.
        plan: what is stored, and who reads what.
        transforms: of each decoder layer, on the model's device.
        exact_group: index of the group of exact pages; None where there are none.
        by_token: store and attend for each token alone, as kernels need whose rows depend on each other.
        batches: the step's, one for each group of codes; see `take`.
        tokens: with `by_token`, each of these as one batch for each token.
    """

    choice: CacheChoice
    plan: CachePlan
    transforms: tuple[HeadTransform, ...]
    exact_group: int | None
    by_token: bool = False
    batches: tuple[CacheBatch, ...] = ()
    tokens: tuple[tuple[CacheBatch, ...], ...] = ()

    @classmethod
    def start(
        cls,
        choice: CacheChoice,
        plan: CachePlan,
        device: torch.device,
        *,
        exact_group: int | None,
        by_token: bool,
    ) -> CacheAttend:
        """Return the attention of a model's quantized layers."""
        transforms = tuple(HeadTransform.of(_on_device(layer, device)) for layer in plan.setup.layers)
        return cls(choice=choice, plan=plan, transforms=transforms, exact_group=exact_group, by_token=by_token)

    def take(self, batch: StepBatch) -> None:
        """Attend to this step from now on."""
        assert batch.first_exact_T is not None
        first_exact_T, past = batch.first_exact_T, self.plan.past
        exact = None if self.exact_group is None else batch.groups[self.exact_group]
        self.batches = tuple(
            CacheBatch(
                pages=pages,
                exact=exact,
                first_exact_T=first_exact_T,
                num_sinks=past.sink_tokens,
                granule=past.granule,
            )
            for number, pages in enumerate(batch.groups)
            if number != self.exact_group
        )
        self.tokens = tuple(tuple(_one_by_one(batch)) for batch in self.batches) if self.by_token else ()

    def __call__(
        self,
        layer_index: int,
        query_TND: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        storage: CacheStorage,
        *,
        group: int,
        rule: ScoreRule,
    ) -> torch.Tensor:
        """Return attention `[T, N, D]` of the step's new tokens in a layer whose codes are in `group`."""
        transform = self.transforms[layer_index]
        query_TND, key_TKD = transform.query(query_TND), transform.key(key_TKD)
        value_TKD = transform.value(value_TKD)
        if self.by_token:
            outputs = []
            for row, token in enumerate(self.tokens[group]):
                only = slice(row, row + 1)
                self.choice.store(key_TKD[only], value_TKD[only], storage, token)
                outputs.append(
                    self.choice.attend(query_TND[only], key_TKD[only], value_TKD[only], storage, token, rule)
                )
            output_TND = torch.cat(outputs)
        else:
            batch = self.batches[group]
            self.choice.store(key_TKD, value_TKD, storage, batch)
            output_TND = self.choice.attend(query_TND, key_TKD, value_TKD, storage, batch, rule)
        return transform.output(output_TND)


def _one_by_one(batch: CacheBatch) -> Iterator[CacheBatch]:
    """Yield a batch of one token for each token. Those before it in the step are in pages then.

    Only for modes in which that is no difference. Tokens that fill up a block read what they have stored themselves.
    """
    pages = token_batches(batch.pages)
    exact = [None] * len(pages) if batch.exact is None else token_batches(batch.exact)
    for row, (single, kept) in enumerate(zip(pages, exact, strict=True)):
        first_exact_T = batch.first_exact_T[row : row + 1]
        if kept is None:
            first_exact_T = first_exact_T.clamp(min=single.max_context - 1)
        yield CacheBatch(
            pages=single,
            exact=kept,
            first_exact_T=first_exact_T,
            num_sinks=batch.num_sinks,
            granule=batch.granule,
        )


def _on_device(layer: LayerParameters, device: torch.device) -> LayerParameters:
    return LayerParameters(keys=_side_on(layer.keys, device), values=_side_on(layer.values, device))


def _side_on(side: SideParameters, device: torch.device) -> SideParameters:
    """Return the parameters that transform vectors, in float32; codecs hold the others."""
    shift, scale, rotation = side.shift_KD, side.scale_KD, side.rotation_KDD
    return SideParameters(
        shift_KD=None if shift is None else shift.float().to(device),
        scale_KD=None if scale is None else scale.float().to(device),
        rotation_KDD=None if rotation is None else rotation.float().to(device).contiguous(),
    )
