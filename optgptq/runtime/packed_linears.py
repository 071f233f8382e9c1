"""Dense linears of a running model in the layout that multiplies fastest on its device."""

from __future__ import annotations

from optgptq.kernels.packed_dense import pack_dense, packs, pays_to_pack
from optgptq.models.decoder import Decoder
from optgptq.models.linear import Linear

# A head that shares its weight with the embedding is packed as a copy, if the copy is no larger.
_LARGEST_COPY_BYTES = 256 << 20


def pack_linears(decoder: Decoder) -> None:
    """Pack in place all dense linears for which that pays, so that only one weight at a time is held twice."""
    if not packs(decoder.device, decoder.dtype):
        return
    for layer in decoder.layers:
        for name, linear in layer.linears.items():
            if isinstance(linear, Linear) and pays_to_pack(linear.weight_OI):
                layer.linears[name] = pack_dense(linear.weight_OI, linear.bias_O)
    project = decoder.head.project
    if isinstance(project, Linear) and pays_to_pack(project.weight_OI):
        is_shared = project.weight_OI is decoder.embedding.tokens_VE
        if not is_shared or project.weight_OI.nbytes <= _LARGEST_COPY_BYTES:
            decoder.head.project = pack_dense(project.weight_OI, project.bias_O)
