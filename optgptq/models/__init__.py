"""Causal language models as data: one generic decoder, described by a spec that a family makes from config.json."""
