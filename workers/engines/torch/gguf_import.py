"""From a GGUF file of the Llama shape to a checkpoint folder: config.json, bf16 safetensors, tokenizer, chat template.

Reads numbers and strings only; nothing of the file is executed. The caller has checked the file's digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor

from protos.contract.errors import ModelError
from workers.engines.torch.config import DenseConfig, parse_config
from workers.engines.torch.models.dense_weights import dense_shapes
from workers.engines.torch.tokenizer_files import byte_level_bpe, write_json

_SPECIAL = 3  # token type of control tokens
_PRE_TOKENIZERS = ("smollm",)
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

Progress = Callable[[str, int, int], None]


def convert_gguf(source: Path, out_dir: Path, progress: Progress) -> None:
    """Writes the checkpoint into an existing empty folder.

    Calls `progress(what, done, total)` as it goes. Raises ModelError for a file of another architecture or tokenizer,
    or whose tensors do not fit its metadata.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{source}: is no readable GGUF file ({error}); fetch it again") from error
    metadata = _Metadata(reader, source)
    raw = _configuration(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    config = parse_config(raw, str(source))
    if not isinstance(config, DenseConfig):
        raise ModelError(f"{source}: only the dense Llama shape can be imported")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(reader, config, source):
        tensors[name] = tensor
        progress("tensors", len(tensors), len(reader.tensors))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = dense_shapes(config)
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ModelError(f"{source}: the tensors do not fit the metadata: {', '.join(wrong[:12])}")
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    write_json(out_dir / "config.json", raw)
    _write_tokenizer(metadata, raw, out_dir)
    progress("files", 1, 1)


class _Metadata:
    """Typed access to the key-value part. Raises ModelError for a missing key."""

    def __init__(self, reader: GGUFReader, source: Path) -> None:
        self._reader = reader
        self._source = source

    def get(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise ModelError(f"{self._source}: metadata {key} is missing")
        return field.contents()

    def expect(self, key: str, *values: str) -> None:
        found = self.get(key)
        if found not in values:
            raise ModelError(f"{self._source}: metadata {key} is {found!r}; only {', '.join(values)} can be imported")


def _configuration(metadata: _Metadata, *, tied: bool) -> dict[str, Any]:
    metadata.expect("general.architecture", "llama")
    heads, hidden = metadata.get("llama.attention.head_count"), metadata.get("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": metadata.get("llama.feed_forward_length"),
        "num_hidden_layers": metadata.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.get("llama.context_length"),
        # The file holds fp32; its shortest decimal form is the value that was meant.
        "rms_norm_eps": float(str(np.float32(metadata.get("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(metadata.get("llama.rope.freq_base")),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _tensors(reader: GGUFReader, config: DenseConfig, source: Path) -> Iterator[tuple[str, Tensor]]:
    for stored in reader.tensors:
        name = _checkpoint_name(stored.name)
        if name is None:
            raise ModelError(f"{source}: tensor {stored.name} is not part of the Llama shape")
        values: npt.NDArray[np.float32] = dequantize(stored.data, stored.tensor_type)
        values = values.reshape([int(size) for size in reversed(stored.shape)])
        if name.endswith("q_proj.weight"):
            values = half_split_rows(values, config.num_heads)
        elif name.endswith("k_proj.weight"):
            values = half_split_rows(values, config.num_kv_heads)
        yield name, torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)


def _checkpoint_name(gguf_name: str) -> str | None:
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    block, _, rest = gguf_name.partition(".")
    layer, _, kind = rest.partition(".")
    if block != "blk" or not layer.isdigit() or kind not in _LAYER_NAMES:
        return None
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}"


def half_split_rows(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undoes the row order of GGUF, which interleaves the two halves of every head for pairwise rotation."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(metadata: _Metadata, raw: dict[str, Any], out_dir: Path) -> None:
    metadata.expect("tokenizer.ggml.model", "gpt2")
    metadata.expect("tokenizer.ggml.pre", *_PRE_TOKENIZERS)
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens")
    types: list[int] = metadata.get("tokenizer.ggml.token_type")
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    special_ids = [index for index, kind in enumerate(types) if kind == _SPECIAL]
    byte_level_bpe(tokens, merges, special_ids).save(str(out_dir / "tokenizer.json"))
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key.removesuffix("_id"): tokens[token_id] for key, token_id in ids.items()},
            "unk_token": tokens[metadata.get("tokenizer.ggml.unknown_token_id")],
            "model_max_length": raw["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata.get("tokenizer.chat_template"),
        },
    )
    write_json(out_dir / "generation_config.json", ids)
