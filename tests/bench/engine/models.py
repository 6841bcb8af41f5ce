"""The checkpoints that every engine reads, made once below `bench/models`, and the work that one token costs in them."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("smollm2", "tiny4")
CONTEXT_TOKENS = 8448  # the longest prompt and what follows it

_TINY4: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 16384,
}
_TINY4_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    # With the published mscale of 1, transformers >= 5.15 multiplies the softmax scale by 4.87; 0 keeps it at head_dim^-0.5.
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "attention_factor": 1.0,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes of weights that one decoded token reads at batch 1, and the FLOPs of prefilling [T] tokens of one prompt."""

    decode_bytes: int
    token_flops: int
    head_flops: int  # of the last position only
    attention_flops: int  # times T * T, causal

    def prefill_flops(self, tokens: int) -> int:
        """Products of the linear layers and of causal attention."""
        return tokens * self.token_flops + tokens * tokens * self.attention_flops + self.head_flops


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M in bf16. Its configuration allows the longest prompt plus a token, which 8,192 positions do not."""

    def write(staging: Path) -> None:
        from configs.env import model_cache_dir
        from workers.engines.torch.demo_model import ensure_demo_model

        source = ensure_demo_model(model_cache_dir())
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 16384}
        (staging / "config.json").write_text(json.dumps(config, indent=1))
        (staging / "model.safetensors").symlink_to((source / "model.safetensors").resolve())

    return _once(folder / "smollm2", write)


def tiny4(folder: Path) -> Path:
    """A tiny Mistral Small 4 in bf16 with random weights: the text model alone, as all three engines read it."""

    def write(staging: Path) -> None:
        from safetensors.torch import load_file, save_file

        from workers.engines.torch.tiny import write_tiny

        made = write_tiny("mistral-small-4", staging / "made", 7, encoding="bf16", **_TINY4, rope_parameters=_TINY4_ROPE)
        tensors = load_file(made / "model.safetensors")
        text = json.loads((made / "config.json").read_text())["text_config"]
        config = {**text, "architectures": ["Mistral4ForCausalLM"], "torch_dtype": "bfloat16"}
        (staging / "config.json").write_text(json.dumps(config, indent=1))
        flat = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
        save_file(flat, staging / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(made)

    return _once(folder / "tiny4", write)


def int8_of(source: Path) -> Path:
    """The checkpoint in this project's weight-only int8, beside it."""

    def write(staging: Path) -> None:
        from safetensors.torch import load_file

        from workers.engines.torch.tiny_files import encode_tensors, quantization_config, write_weights

        write_weights(staging, encode_tensors(load_file(source / "model.safetensors"), "hf", "int8"), "hf", 1)
        config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization_config("int8")}
        (staging / "config.json").write_text(json.dumps(config, indent=1))

    return _once(source.with_name(source.name + "-int8"), write)


MAKERS: dict[str, Callable[[Path], Path]] = {"smollm2": smollm2, "tiny4": tiny4}


def work_of(model_dir: Path) -> Work:
    """From the shapes in the file and the configuration."""
    config = json.loads((model_dir / "config.json").read_text())
    share = config.get("num_experts_per_tok", 1) / config.get("n_routed_experts", 1)
    with (model_dir / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tied, read, flops, head = "lm_head.weight" not in header, 0.0, 0.0, 0
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        size, part = 1, share if ".experts." in name else 1.0
        for length in tensor["shape"]:
            size *= length
        is_embedding = name.endswith("embed_tokens.weight")
        if not is_embedding or tied:
            read += part * (end - begin)
        if name == "lm_head.weight" or (is_embedding and tied):
            head = 2 * size
        elif not is_embedding and len(tensor["shape"]) > 1:
            flops += 2 * part * size
    queries = config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0) or config["head_dim"]
    values = config.get("v_head_dim") or config["head_dim"]
    attention = config["num_hidden_layers"] * config["num_attention_heads"] * (queries + values)
    return Work(decode_bytes=int(read), token_flops=int(flops), head_flops=head, attention_flops=attention)


def _once(target: Path, write: Callable[[Path], None]) -> Path:
    """The folder, written to a staging folder and renamed when it is not there yet."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
