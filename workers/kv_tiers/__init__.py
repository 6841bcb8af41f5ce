"""Blocks of KV cache in files of this machine."""
