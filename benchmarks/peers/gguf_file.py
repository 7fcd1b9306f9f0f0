"""Writes a checkpoint directory as GGUF, the file that llama.cpp reads: same weights, same bits.

What a GGUF must hold is laid down in ggml's docs/gguf.md and in llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peers.safetensors_file import Bits, read_tensors, rope_factors

# What the GGUF calls the tensors of each layer, and how Hugging Face does.
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Writes path, through a temporary name, so that a file there is always whole."""
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = config["model_type"]
    if architecture not in ("llama", "qwen3"):
        raise ValueError(f"model_type is {architecture}; this writer knows llama and qwen3.")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    _add_config(writer, config)
    _add_tokenizer(writer, checkpoint)
    tensors = dict(read_tensors(checkpoint / "model.safetensors"))
    for name, tensor in _renamed(tensors, config):
        if tensor.ndim == 1:  # llama.cpp keeps norms in float32
            writer.add_tensor(name, (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(
                name,
                tensor.view(np.uint8),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    if config.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", rope_factors(config).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _add_config(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])


def _add_tokenizer(writer: Any, checkpoint: Path) -> None:
    """The byte-level BPE tokenizer of the checkpoint."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()} | special
    kinds = [
        gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        for number in sorted(tokens)
    ]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[number] for number in sorted(tokens)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    config = json.loads((checkpoint / "config.json").read_text())
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    post_processor = tokenizer.get("post_processor") or {}
    writer.add_add_bos_token(post_processor.get("type") == "TemplateProcessing")


def _renamed(tensors: dict[str, Bits], config: dict[str, Any]) -> Iterator[tuple[str, Bits]]:
    for ours, theirs in _TENSORS.items():
        if f"{theirs}.weight" in tensors:  # no lm_head where it is tied
            yield f"{ours}.weight", tensors[f"{theirs}.weight"]
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER_TENSORS.items():
            tensor = tensors.get(f"model.layers.{layer}.{theirs}.weight")
            if tensor is None:
                continue
            if config["model_type"] == "llama" and ours in ("attn_q", "attn_k"):
                kind = "num_attention_heads" if ours == "attn_q" else "num_key_value_heads"
                tensor = _interleave_halves(tensor, config[kind])
            yield f"blk.{layer}.{ours}.weight", tensor


def _interleave_halves(weight: Bits, num_heads: int) -> Bits:
    """llama.cpp rotates neighbours (0, 1), Hugging Face halves (0, head_dim / 2): rows move."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
