"""optgptq: low-bit checkpoints of causal language models, made without backpropagation."""

__version__ = "0.1.0"
