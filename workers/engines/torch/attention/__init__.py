"""Attention over the paged pool: one interface, one file for each way to compute it."""
