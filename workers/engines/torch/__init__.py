"""The torch engine: real weights, paged KV, chunked prefill and batched decode on a CPU or a GPU.

`build.create_engine` is the way in. torch is imported inside this package only.
"""
