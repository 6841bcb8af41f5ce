"""Layers as functions and small frozen records of weights. Shapes: T rows of a batch, H hidden, N heads, D head width."""
