"""The CUDA engine against what else one could run on the same card, row by row.

    python benchmarks/gpu.py [ROW ...] [--rounds N] [--peers-python PYTHON]

The card's own limits are measured in the same rounds. Figures go to benchmarks/results/gpu.json and
gpu.md; results.py says what is in them. `--device cpu --model smollm2-135m --scaled-by 64` tries
the script on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import command
import results
from runner import Row

_LLAMA, _QWEN, _LLAMA_8B = "llama-3.2-1b", "qwen3-0.6b", "llama-3.1-8b"
_INVARIANT = {"batch-invariant": {"batch_invariant": True}}  # what it costs


def _decode(
    name: str, title: str, model: str, batch: int, context: int, tokens: int, **options: Any
) -> Row:
    what = f"{title}: decode, batch {batch}, context {context} to {context + tokens}"
    return Row(name, what, model, "decode", batch, context, tokens, **options)


ROWS = [
    _decode("decode", "Llama-3.2-1B", _LLAMA, 1, 128, 128, variants=_INVARIANT),
    _decode("decode-8k", "Llama-3.2-1B", _LLAMA, 1, 8192, 128),
    _decode("decode-32", "Llama-3.2-1B", _LLAMA, 32, 512, 128, variants=_INVARIANT),
    _decode("decode-256", "Llama-3.2-1B", _LLAMA, 256, 512, 128),
    Row(
        "mix",
        "Llama-3.2-1B: 256 requests, 100 to 1024 in and out",
        _LLAMA,
        "throughput",
        256,
        (100, 1024),
        (100, 1024),
    ),
    Row("prefill", "Llama-3.2-1B: prefill of 1024 tokens", _LLAMA, "first_token", 1, 1024, 1),
    Row(
        "first-token", "Llama-3.2-1B: first token, 128 in, loaded", _LLAMA, "first_token", 1, 128, 1
    ),
    Row("load", "Llama-3.2-1B: load, page cache warm", _LLAMA, "load", max_tokens=1),
    Row("start", "Llama-3.2-1B: process start to first token", _LLAMA, "start", max_tokens=1),
    _decode("qwen-decode", "Qwen3-0.6B", _QWEN, 1, 128, 128),
    _decode("qwen-decode-256", "Qwen3-0.6B", _QWEN, 256, 512, 128),
    _decode("8b-decode", "Llama-3.1-8B", _LLAMA_8B, 1, 128, 128),
    _decode("8b-decode-32", "Llama-3.1-8B", _LLAMA_8B, 32, 512, 128),
]

if __name__ == "__main__":
    command.main(
        __doc__ or "",
        ROWS,
        ["llama.cpp", "llama-batched-bench", "transformers"],
        results.DIRECTORY / "gpu.json",
        device="cuda",
    )
