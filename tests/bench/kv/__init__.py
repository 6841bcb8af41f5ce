"""Measures of the KV plane between two processes, without an engine."""
