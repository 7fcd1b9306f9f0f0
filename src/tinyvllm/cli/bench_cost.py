"""What a model's work costs at least: floating-point operations, and bytes that must be read.

Held against the machine's limits this says how much of them a run has reached (the roofline). Only
what no implementation can avoid is counted: a product with each weight for each token, attention
over the tokens in sight, and each step one pass over the weights and over the cached keys and
values. Embedding rows, norms and the sampler are small against that and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvllm import _core


@dataclass
class Cost:
    """Of a piece of work. Adds up."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class ModelCost:
    """The cost of steps and tokens of one model."""

    def __init__(self, directory: Path, info: dict[str, Any]) -> None:
        """info: the engine's `stats()`, for the dtypes that it works with."""
        config = _core.parse_model_config(directory / "config.json")
        hidden, head_dim = config["hidden_size"], config["head_dim"]
        query_size = config["num_heads"] * head_dim
        attention = hidden * (2 * query_size + 2 * config["num_kv_heads"] * head_dim)
        layer = attention + 3 * hidden * config["intermediate_size"]
        head = config["vocab_size"] * hidden
        # A float32 engine reads a bfloat16 file as it is; all else has the engine's own type.
        narrow = "bfloat16" in (info["dtype"], info["checkpoint_dtype"])

        self._token_flops = 2.0 * layer * config["num_layers"]
        self._logits_flops = 2.0 * head
        self._attention_flops = 4.0 * query_size  # a layer, a token in sight: q.k and the sum of v
        self._kv_bytes = info["kv_cache_bytes_per_token"] / config["num_layers"]
        self._windows: list[int] = config["sliding_window"]  # a layer; 0: none
        self.num_parameters = layer * config["num_layers"] + head * (
            1 if config["tie_word_embeddings"] else 2
        )
        self.step_bytes = (2 if narrow else 4) * (layer * config["num_layers"] + head)

    def step(self) -> Cost:
        """What a step reads however few tokens it has."""
        return Cost(bytes=self.step_bytes)

    def prefill(self, num_tokens: int, num_cached: int = 0) -> Cost:
        """A prompt of num_tokens, the first num_cached of them from the cache, and its logits."""
        seen = sum(
            _seen(num_tokens, window) - _seen(num_cached, window) for window in self._windows
        )
        return Cost(
            flops=(num_tokens - num_cached) * self._token_flops
            + seen * self._attention_flops
            + self._logits_flops,
            bytes=num_cached * self._kv_bytes * len(self._windows),
        )

    def decode(self, num_prompt: int, num_tokens: int) -> Cost:
        """The tokens after a prompt, one a step: each reads the keys and values before it."""
        seen = sum(
            _seen(num_prompt + num_tokens, window) - _seen(num_prompt, window)
            for window in self._windows
        )
        return Cost(
            flops=num_tokens * (self._token_flops + self._logits_flops)
            + seen * self._attention_flops,
            bytes=seen * self._kv_bytes,
        )


def _seen(num_tokens: int, window: int) -> int:
    """The sum over the first num_tokens positions of how many tokens each attends to."""
    inside = min(num_tokens, window) if window else num_tokens
    return inside * (inside + 1) // 2 + (num_tokens - inside) * window
