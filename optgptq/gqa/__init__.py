"""Fewer key/value heads: a multi-head model becomes a grouped-query one before it is quantized."""
