"""RMS norm of bfloat16 activations in one pass; torch takes five, each through memory."""

from __future__ import annotations

import torch

from optgptq.native.library import check_done, load_library


def norms_rows(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Say whether `rms_norm` takes these: bfloat16 on a processor, rows one after the other, no gradient."""
    return (
        weight is not None
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and x.is_contiguous()
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and load_library() is not None
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32 and rounded once."""
    library = load_library()
    assert library is not None
    output = torch.empty_like(x)
    size = x.shape[-1]
    status = library.shared.optgptq_rms_norm_bfloat16(
        x.data_ptr(), weight.data_ptr(), output.data_ptr(), x.numel() // size, size, eps, torch.get_num_threads()
    )
    check_done(status)
    return output
