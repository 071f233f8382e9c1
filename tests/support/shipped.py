"""Names of the recipes that are shipped, in the order in which they are listed."""

from __future__ import annotations

SHIPPED = (
    "attention-aware-binary-w2",
    "attention-aware-binary-w3",
    "attention-aware-w2",
    "attention-aware-w2-channel",
    "attention-aware-w2-rotated",
    "attention-aware-w3",
    "attention-aware-w3-channel",
    "attention-aware-w3-rotated",
    "attention-aware-w4",
    "attention-aware-w4-channel",
    "attention-aware-w4-rotated",
    "binary-w2",
    "binary-w3",
    "gptq-w2",
    "gptq-w3",
    "gptq-w4",
    "gptq-w8",
    "gptqt-w2",
    "gptqt-w3",
    "kv2",
    "kv3",
    "kv4",
    "opt-gqa-w4",
    "rtn-w4",
    "w4-kv4",
)
