"""What a model's work costs at least: floating-point operations, and bytes that must be read.

Held against the machine's limits (limits.py) this says how much of them a run has reached, the
roofline. Only what no implementation can avoid is counted: a product with each weight for each
token, attention over the tokens in sight, and each step one pass over the weights and over the
cached keys and values. Embedding rows, norms and the sampler are small against that and are left
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyvllm import _core
from tinyvllm.limits import MachineLimits

_SIZES = {"bfloat16": 2, "float32": 4}


@dataclass
class Cost:
    """Of a piece of work. Adds up."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
        )

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    def seconds(self, limits: MachineLimits) -> float:
        """Of one step: its products read or multiply, whichever takes longer, and its attention,
        which cannot begin before them, reads keys and values."""
        read, rate = limits.read_bandwidth_bytes_per_second, limits.bf16_flops_per_second
        return max(self.weight_bytes / read, self.flops / rate) + self.kv_bytes / read


class ModelCost:
    """The cost of steps and tokens of one model."""

    def __init__(
        self, directory: Path, dtype: str = "bfloat16", checkpoint_dtype: str = "bfloat16"
    ) -> None:
        """dtype: that of the computation, bfloat16 or float32."""
        config = _core.parse_model_config(directory / "config.json")
        hidden, head_dim = config["hidden_size"], config["head_dim"]
        query_size, kv_size = config["num_heads"] * head_dim, config["num_kv_heads"] * head_dim
        attention = hidden * (2 * query_size + 2 * kv_size)
        layer = attention + 3 * hidden * config["intermediate_size"]
        head = config["vocab_size"] * hidden
        # A float32 engine reads a bfloat16 file as it is; all else has the engine's own type.
        narrow = "bfloat16" in (dtype, checkpoint_dtype)

        self._token_flops = 2.0 * layer * config["num_layers"]
        self._logits_flops = 2.0 * head
        self._attention_flops = 4.0 * query_size  # a layer, a token in sight: q.k and the sum of v
        self._kv_bytes = 2 * kv_size * _SIZES[dtype]  # a layer, a token in sight
        self._windows = Counter(config["sliding_window"])  # how many layers have which; 0: none
        self.num_parameters = layer * config["num_layers"] + head * (
            1 if config["tie_word_embeddings"] else 2
        )
        self.step_bytes = (2 if narrow else 4) * (layer * config["num_layers"] + head)

    def step(self) -> Cost:
        """What a step reads however few tokens it has."""
        return Cost(weight_bytes=self.step_bytes)

    def prefill(self, num_tokens: int, num_cached: int = 0) -> Cost:
        """A prompt of num_tokens, the first num_cached of them from the cache, and its logits."""
        seen = self._seen(num_cached, num_tokens)
        return Cost(
            flops=(num_tokens - num_cached) * self._token_flops
            + seen * self._attention_flops
            + self._logits_flops,
            kv_bytes=num_cached * self._kv_bytes * self._windows.total(),
        )

    def decode(self, num_prompt: int, num_tokens: int) -> Cost:
        """The tokens after a prompt, one a step: each reads the keys and values before it."""
        seen = self._seen(num_prompt, num_prompt + num_tokens)
        return Cost(
            flops=num_tokens * (self._token_flops + self._logits_flops)
            + seen * self._attention_flops,
            kv_bytes=seen * self._kv_bytes,
        )

    def _seen(self, begin: int, end: int) -> int:
        """The sum over positions and layers of how many tokens each attends to."""
        return sum(
            layers * (_seen(end, window) - _seen(begin, window))
            for window, layers in self._windows.items()
        )

    def prefill_seconds(self, limits: MachineLimits, prompt_lengths: Sequence[int]) -> float:
        """The least for these prompts, all in one step."""
        return sum(map(self.prefill, prompt_lengths), self.step()).seconds(limits)

    def decode_seconds(
        self, limits: MachineLimits, contexts: Sequence[int], num_tokens: Sequence[int]
    ) -> float:
        """The least for so many more tokens of each sequence, all in one batch from its context
        on."""
        seconds = 0.0
        for step in range(max(num_tokens)):
            running = [c + step for c, n in zip(contexts, num_tokens, strict=True) if step < n]
            work = (self.decode(context, 1) for context in running)
            seconds += sum(work, self.step()).seconds(limits)
        return seconds


def _seen(num_tokens: int, window: int) -> int:
    """The sum over the first num_tokens positions of how many tokens each attends to."""
    inside = min(num_tokens, window) if window else num_tokens
    return inside * (inside + 1) // 2 + (num_tokens - inside) * window
