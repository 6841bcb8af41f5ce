"""vLLM on the CPU, in its own Python: run as a file, `python vllm_peer.py MODEL_DIR OPTIONS_JSON`. Speaks child.py's protocol.

Only the standard library, child.py beside it and vLLM are imported, so that no other package of this project is needed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from child import Generate, serve


def load(model_dir: str, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """`options`: dtype, context_tokens, max_batch_tokens, max_running, eager, model_impl."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model_dir,
        dtype=options["dtype"],
        skip_tokenizer_init=True,
        max_model_len=options["context_tokens"],
        max_num_seqs=options["max_running"],
        max_num_batched_tokens=options["max_batch_tokens"],
        enable_prefix_caching=False,
        enforce_eager=options["eager"],
        model_impl=options["model_impl"],
        seed=0,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(requests, sampling, use_tqdm=False)]

    return generate, {"version": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], json.loads(sys.argv[2])))
