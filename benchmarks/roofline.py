"""What a model's work costs at the least: the limit that each figure is shown beside.

The time of a step is that of reading all weights once or of multiplying, whichever is longer, and
that of reading the keys and values of every sequence:

    max(weight bytes / read bandwidth, flops / arithmetic rate) + KV bytes / read bandwidth
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvllm.limits import MachineLimits

_BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class ModelCost:
    layer_parameters: int  # in matrices, all layers
    head_parameters: int
    kv_values_per_token: int
    attention_width: int  # query heads x head_dim, all layers

    @classmethod
    def of(cls, checkpoint: Path) -> ModelCost:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            layer_parameters=layers * (attention + 3 * hidden * config["intermediate_size"]),
            head_parameters=hidden * config["vocab_size"],
            kv_values_per_token=layers * 2 * kv_heads * head_dim,
            attention_width=layers * heads * head_dim,
        )

    def weight_bytes(self) -> int:
        return _BYTES * (self.layer_parameters + self.head_parameters)

    def step_seconds(
        self, limits: MachineLimits, num_tokens: int, num_sequences: int, context: float
    ) -> float:
        """A step of num_tokens, of which one a sequence is sampled from; each attends to `context`
        positions on average."""
        read, rate = limits.read_bandwidth_bytes_per_second, limits.bf16_flops_per_second
        flops = 2.0 * self.layer_parameters * num_tokens
        flops += 2.0 * self.head_parameters * num_sequences
        flops += 4 * self.attention_width * num_tokens * context
        kv_bytes = _BYTES * self.kv_values_per_token * num_sequences * context
        return max(self.weight_bytes() / read, flops / rate) + kv_bytes / read

    def prefill_seconds(self, limits: MachineLimits, prompt_lengths: Sequence[int]) -> float:
        tokens = sum(prompt_lengths)
        context = sum(length * length / 2 for length in prompt_lengths) / tokens
        return self.step_seconds(limits, tokens, len(prompt_lengths), context)

    def decode_seconds(
        self, limits: MachineLimits, contexts: Sequence[int], num_tokens: Sequence[int]
    ) -> float:
        """So many more tokens of each sequence, all in one batch from its context on."""
        seconds = 0.0
        for step in range(max(num_tokens)):
            running = [c + step for c, n in zip(contexts, num_tokens, strict=True) if step < n]
            mean = sum(running) / len(running)
            seconds += self.step_seconds(limits, len(running), len(running), mean)
        return seconds
