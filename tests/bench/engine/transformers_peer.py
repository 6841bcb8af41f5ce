"""`transformers` as a measured child: `python -m tests.bench.engine.transformers_peer MODEL_DIR OPTIONS_JSON`.

A plain greedy loop over `forward` with its own dynamic cache: the work of `generate` without its per-token bookkeeping.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.bench.engine.child import Generate, serve


def load(model_dir: str, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """`options`: dtype, threads. Prompts of one call have equal lengths, so that nothing is padded."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    # By the name in the configuration: the automatic classes do not list Mistral Small 4's text model.
    architecture = transformers.AutoConfig.from_pretrained(model_dir).architectures[0]
    model = (
        getattr(transformers, architecture)
        .from_pretrained(model_dir, dtype=getattr(torch, options["dtype"]), attn_implementation="sdpa")
        .eval()
    )

    @torch.inference_mode()
    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids, cache, drawn = torch.tensor(prompts), None, []
        for _ in range(max_tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            drawn.append(ids)
        outputs: list[list[int]] = torch.cat(drawn, dim=1).tolist()
        return outputs

    facts = {"version": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return generate, facts


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], json.loads(sys.argv[2])))
