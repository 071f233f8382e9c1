"""A whole causal language model in memory: embedding, decoder layers, head.

Shapes: `B` sequences, `S` positions, `M` model width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.memory import return_free_memory
from optgptq.models.attention import AttentionContext, attention_context
from optgptq.models.checks import check_inventory
from optgptq.models.ends import Embedding, Head
from optgptq.models.layer import DecoderLayer
from optgptq.models.loading import SupplyLinear, load_embedding, load_head, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import DecoderSpec


@dataclass(slots=True, eq=False, kw_only=True)
class Decoder:
    """A model that can be run.

    Attributes:
        spec: what it computes.
        embedding, layers, head: its parts in order.
        dtype: dtype of the activations.
        device: where all parts are.
    """

    spec: DecoderSpec
    embedding: Embedding
    layers: list[DecoderLayer]
    head: Head
    dtype: torch.dtype
    device: torch.device

    def context(self, num_positions: int) -> AttentionContext:
        """Return the context of a forward pass over positions `0 .. num_positions - 1` without a cache."""
        return attention_context(self.spec, num_positions, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def hidden(self, tokens_BS: torch.Tensor, context: AttentionContext | None = None) -> torch.Tensor:
        """Return the last hidden states `[B, S, M]`, before the final norm."""
        context = self.context(tokens_BS.shape[1]) if context is None else context
        hidden_BSM = self.embedding.embed(tokens_BS, context)
        for layer in self.layers:
            hidden_BSM = layer.forward(hidden_BSM, context)
        return hidden_BSM

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor, context: AttentionContext | None = None) -> torch.Tensor:
        """Return float32 logits `[B, S, V]` for int64 tokens `[B, S]`."""
        return self.head.logits(self.hidden(tokens_BS, context))


def load_decoder(
    folder: TensorSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    supply_linear: SupplyLinear | None = None,
    supplied: tuple[str, ...] = (),
) -> Decoder:
    """Read a whole model.

    Args:
        folder: the checkpoint.
        dtype: dtype of weights and activations.
        device: where to put them.
        supply_linear: gives linears that the checkpoint does not store as dense weights.
        supplied: full names of those linears; their tensors are not looked at.

    Raises:
        ModelError: the architecture or its config is not implemented, or weights are missing, unknown, misshapen
            or not finite.
    """
    spec = model_spec(folder)
    check_inventory(folder, spec, supplied=supplied)
    embedding = load_embedding(folder, spec, dtype=dtype, device=device)
    # Before the layers: what is in memory only while it is read is gone when they come.
    head = load_head(folder, spec, embedding=embedding, dtype=dtype, device=device, supply_linear=supply_linear)
    layers = []
    for index in range(spec.num_layers):
        layers.append(load_layer(folder, spec, index, dtype=dtype, device=device, supply_linear=supply_linear))
        if supply_linear is not None:
            return_free_memory()
    return Decoder(
        spec=spec,
        embedding=embedding,
        layers=layers,
        head=head,
        dtype=dtype,
        device=torch.device(device),
    )
