"""Writes a checkpoint directory as an OpenVINO model, as OpenVINO GenAI reads it: same weights.

The usual way is optimum-intel, which cannot be installed beside the Transformers of
requirements-bench.txt. The graph is short: a stateful decoder with the inputs input_ids,
attention_mask, position_ids and beam_idx and the output logits; GenAI replaces its caches and its
attention by paged ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

from peers.safetensors_file import read_tensors, rope_factors, rope_frequencies


def write_openvino(checkpoint: Path, directory: Path) -> None:
    """Writes directory, through a temporary name, so that one there is always whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    decoder = _Decoder(config, checkpoint)  # the constants point into its tensors
    ov.save_model(decoder.build(), partial / "openvino_model.xml", compress_to_fp16=False)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, partial / name)
    partial.rename(directory)


def write_tokenizer(checkpoint: Path, directory: Path) -> None:
    """Writes the checkpoint's tokenizer as an OpenVINO model."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tokenizer, detokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True
    )
    ov.save_model(tokenizer, partial / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, partial / "openvino_detokenizer.xml")
    partial.rename(directory)


def _input(shape: list[int], dtype: type[np.generic], name: str) -> Any:
    parameter = op.parameter(shape, dtype)
    parameter.set_friendly_name(name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


class _Decoder:
    """Llama and Qwen3, from their config.json and their tensors."""

    def __init__(self, config: dict[str, Any], checkpoint: Path) -> None:
        self._config = config
        self._tensors = dict(read_tensors(checkpoint / "model.safetensors"))
        self._heads = config["num_attention_heads"]
        self._kv_heads = config["num_key_value_heads"]
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        self._sinks: list[Any] = []

    def build(self) -> Any:
        ids = _input([-1, -1], np.int64, "input_ids")
        mask = _input([-1, -1], np.int64, "attention_mask")
        positions = _input([-1, -1], np.int64, "position_ids")
        self._beam = _input([-1], np.int32, "beam_idx")
        self._batch = op.gather(op.shape_of(ids), op.constant([0]), op.constant(0))
        self._allowed = self._causal_mask(mask, positions)
        self._cos, self._sin = self._rotation(positions)

        embedding = self._weight("model.embed_tokens")
        x = op.gather(embedding, op.convert(ids, "i32"), op.constant(0))
        for layer in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            h = self._norm(x, f"{name}.input_layernorm")
            x = op.add(x, self._attention(h, layer))
            h = self._norm(x, f"{name}.post_attention_layernorm")
            gate = op.swish(self._linear(h, f"{name}.mlp.gate_proj"))
            up = self._linear(h, f"{name}.mlp.up_proj")
            x = op.add(x, self._linear(op.multiply(gate, up), f"{name}.mlp.down_proj"))
        x = self._norm(x, "model.norm")
        tied = "lm_head.weight" not in self._tensors
        head = embedding if tied else self._weight("lm_head")
        logits = op.matmul(x, head, False, True)
        logits.output(0).get_tensor().set_names({"logits"})
        return ov.Model([op.result(logits)], self._sinks, [ids, mask, positions, self._beam])

    def _weight(self, name: str) -> Any:
        """A bfloat16 constant, widened where it is used."""
        bits = self._tensors[f"{name}.weight"]
        tensor = ov.Tensor(bits, ov.Shape(bits.shape), ov.Type.bf16)
        return op.convert(op.constant(tensor), "f32")

    def _linear(self, x: Any, name: str) -> Any:
        return op.matmul(x, self._weight(name), False, True)

    def _norm(self, x: Any, name: str) -> Any:
        mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), op.constant([-1]), True)
        root = op.sqrt(op.add(mean, op.constant(np.float32(self._config["rms_norm_eps"]))))
        scaled = op.multiply(x, op.divide(op.constant(np.float32(1)), root))
        gamma = self._tensors[f"{name}.weight"].astype(np.uint32) << 16
        return op.multiply(scaled, op.constant(gamma.view(np.float32)))

    def _causal_mask(self, attention_mask: Any, positions: Any) -> Any:
        """[batch, 1, queries, keys]: whether a query may see a key."""
        total = op.gather(op.shape_of(attention_mask), op.constant(1), op.constant(0))
        keys = op.range(op.constant(0), total, op.constant(1), "i64")
        return op.unsqueeze(
            op.less_equal(keys, op.unsqueeze(positions, op.constant([-1]))), op.constant([1])
        )

    def _rotation(self, positions: Any) -> tuple[Any, Any]:
        """cos and sin, [batch, 1, tokens, head_dim]."""
        frequencies = rope_frequencies(self._config) / rope_factors(self._config)
        column = op.constant(frequencies.astype(np.float32).reshape(1, -1, 1))
        row = op.convert(op.unsqueeze(positions, op.constant([1])), "f32")
        angles = op.transpose(op.matmul(column, row, False, False), op.constant([0, 2, 1]))
        both = op.concat([angles, angles], -1)
        axis = op.constant([1])
        return op.unsqueeze(op.cos(both), axis), op.unsqueeze(op.sin(both), axis)

    def _rotate(self, x: Any) -> Any:
        half = self._head_dim // 2
        low, high, end = op.constant([0]), op.constant([half]), op.constant([2**63 - 1])
        step, axis = op.constant([1]), op.constant([3])
        first, second = op.slice(x, low, high, step, axis), op.slice(x, high, end, step, axis)
        turned = op.concat([op.multiply(second, op.constant(np.float32(-1))), first], -1)
        return op.add(op.multiply(x, self._cos), op.multiply(turned, self._sin))

    def _split_heads(self, x: Any, heads: int, norm: str | None) -> Any:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]"""
        split = op.reshape(x, op.constant([0, 0, heads, self._head_dim]), True)
        if norm is not None and f"{norm}.weight" in self._tensors:
            split = self._norm(split, norm)
        return op.transpose(split, op.constant([0, 2, 1, 3]))

    def _cached(self, x: Any, name: str) -> Any:
        """x behind what the cache of this name holds; the cache then holds both."""
        shape = ov.PartialShape([-1, self._kv_heads, -1, self._head_dim])
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = Variable(info)
        empty = op.broadcast(
            op.constant(np.float32(0)),
            op.concat([self._batch, op.constant([self._kv_heads, 0, self._head_dim])], 0),
        )
        past = op.gather(op.read_value(empty, variable), self._beam, op.constant(0))
        both = op.concat([past, x], 2)
        self._sinks.append(op.assign(both, variable))
        return both

    def _repeat(self, x: Any) -> Any:
        """Each KV head once for every query head that shares it."""
        group = self._heads // self._kv_heads
        if group == 1:
            return x
        wide = op.unsqueeze(x, op.constant([2]))
        length = op.gather(op.shape_of(x), op.constant([2]), op.constant(0))
        shape = op.concat(
            [
                self._batch,
                op.constant([self._kv_heads, group]),
                length,
                op.constant([self._head_dim]),
            ],
            0,
        )
        return op.reshape(
            op.broadcast(wide, shape, "BIDIRECTIONAL"),
            op.constant([0, self._heads, -1, self._head_dim]),
            True,
        )

    def _attention(self, h: Any, layer: int) -> Any:
        name = f"model.layers.{layer}.self_attn"
        q = self._split_heads(self._linear(h, f"{name}.q_proj"), self._heads, f"{name}.q_norm")
        k = self._split_heads(self._linear(h, f"{name}.k_proj"), self._kv_heads, f"{name}.k_norm")
        v = self._split_heads(self._linear(h, f"{name}.v_proj"), self._kv_heads, None)
        keys = self._cached(self._rotate(k), f"past_key_values.{layer}.key")
        values = self._cached(v, f"past_key_values.{layer}.value")
        out = op.scaled_dot_product_attention(
            self._rotate(q), self._repeat(keys), self._repeat(values), self._allowed
        )
        merged = op.reshape(
            op.transpose(out, op.constant([0, 2, 1, 3])),
            op.constant([0, 0, self._heads * self._head_dim]),
            True,
        )
        return self._linear(merged, f"{name}.o_proj")
