"""Both ends of a decoder: tokens to hidden states, hidden states to logits.

Shapes: `B` sequences, `S` positions, `M` model width, `E` embedding width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.models.attention import AttentionContext
from optgptq.models.linear import LinearLike
from optgptq.models.norm import Norm
from optgptq.models.spec import DecoderSpec


@dataclass(slots=True, eq=False, kw_only=True)
class Embedding:
    """Token embedding, and position table, projection and norm where the model has them.

    Attributes:
        spec: the model.
        tokens_VE: `[V, E]`.
        positions_PM: `[positions, M]` or None.
        project_in_ME: `[M, E]` or None.
        norm: or None.
    """

    spec: DecoderSpec
    tokens_VE: torch.Tensor
    positions_PM: torch.Tensor | None = None
    project_in_ME: torch.Tensor | None = None
    norm: Norm | None = None

    def embed(self, tokens_BS: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return hidden states `[B, S, M]` in the dtype of the embedding."""
        hidden_BSM = F.embedding(tokens_BS, self.tokens_VE)
        if self.project_in_ME is not None:
            hidden_BSM = F.linear(hidden_BSM, self.project_in_ME)
        if self.spec.embedding_scale is not None:
            # Rounded to the embedding's dtype first, as the models were trained.
            hidden_BSM = hidden_BSM.mul_(float(torch.tensor(self.spec.embedding_scale).to(hidden_BSM.dtype)))
        if self.positions_PM is not None:
            hidden_BSM = hidden_BSM.add_(self.positions_PM[context.positions + self.spec.learned_offset])
        return hidden_BSM if self.norm is None else self.norm(hidden_BSM)


@dataclass(slots=True, eq=False, kw_only=True)
class Head:
    """Final norm and output projection.

    Attributes:
        spec: the model.
        project: `[..., E] -> [..., V]`; its weight is the embedding's own tensor where it is tied.
        norm: or None.
        project_out_EM: `[E, M]` or None.
    """

    spec: DecoderSpec
    project: LinearLike
    norm: Norm | None = None
    project_out_EM: torch.Tensor | None = None

    def project_input(self, hidden_BSM: torch.Tensor) -> torch.Tensor:
        """Return what `project` reads, `[..., E]`."""
        hidden = hidden_BSM if self.norm is None else self.norm(hidden_BSM)
        return hidden if self.project_out_EM is None else F.linear(hidden, self.project_out_EM)

    def logits(self, hidden_BSM: torch.Tensor) -> torch.Tensor:
        """Return float32 logits `[B, S, V]`; any number of leading dimensions works."""
        logits = self.project(self.project_input(hidden_BSM)).float()
        if self.spec.logit_scale is not None:
            logits = logits.mul_(self.spec.logit_scale)
        if self.spec.logit_softcap is not None:
            logits = logits.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return logits
