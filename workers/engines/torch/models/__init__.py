"""Decoders: a stack of layers over a batch of rows and a paged KV cache."""
