"""Parameters of a quantized KV cache, found with forward passes only."""
