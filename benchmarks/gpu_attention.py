"""Measures attention and sampling on this GPU, each beside the card's own limit.

    python benchmarks/gpu_attention.py [decode] [prefill] [sampling] [--json FILE]

decode    one token of each sequence over its whole context; the limit is reading K and V
prefill   whole prompts; the limit is the arithmetic of the scores and the weighted sums, at the
          rate given by --tflops (the card's bfloat16 products, dense)
sampling  a token for each row of logits; the limit is reading them once

Shapes are Llama-3.2-1B's: 32 query heads over 8 KV heads of 64 dimensions, 128,256 tokens.
Every layer has a cache of its own, as far as memory goes, so that nothing is in the L2 cache that
would not be there in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tinyvllm import _core

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 8, 64, 16, 128256
BLOCK_SIZE = 16
CACHE_BYTES = 24e9
REPETITIONS = 7

DECODES = [(n, context) for n in (1, 32, 256) for context in (128, 640, 4096 if n > 32 else 8192)]
PREFILLS = [(1, 128), (1, 512), (1, 1024), (1, 4096), (8, 512)]
SAMPLINGS: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {"temperature": 0.0}),
    ("temperature", {}),
    ("top_k 50, top_p 0.9", {"top_k": 50, "top_p": 0.9}),
    ("top_p 0.9", {"top_p": 0.9}),
    ("greedy, 20 logprobs", {"temperature": 0.0, "num_logprobs": 20}),
]


def microseconds(samples: list[float], calls: int) -> tuple[float, float]:
    """Median and spread of one call, from milliseconds of `calls`."""
    each = [1000 * sample / calls for sample in samples]
    return statistics.median(each), max(each) - min(each)


def read_rate(ctx: Any) -> float:
    """Bytes a second that the card reads when it does nothing else."""
    timer = _core.MatmulTimer(ctx, [("store", 131072, 8192)], 1)
    return float(timer.weight_bytes / (min(timer.read_milliseconds(4, REPETITIONS)) / 1000))


def time_attention(
    ctx: Any, sequences: int, tokens: int, context: int, split: int = 0
) -> tuple[float, float]:
    token_bytes = 2 * KV_HEADS * HEAD_DIM * 2
    layers = max(1, min(LAYERS, int(CACHE_BYTES / (sequences * context * token_bytes))))
    samples = _core.time_attention(
        ctx,
        sequences,
        tokens,
        context,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        layers,
        BLOCK_SIZE,
        split,
        20,
        REPETITIONS,
    )
    return microseconds(samples, layers)


def report(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    numbers = (
        f"{row['microseconds']:10.2f} us  +- {row['spread']:6.2f}  {row['rate']:8.1f} {row['unit']}"
    )
    print(f"{row['name']:44s}{numbers}  {row['share']:6.1%} of the limit", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawTextHelpFormatter, description=__doc__
    )
    parser.add_argument("what", nargs="*", default=["decode", "prefill", "sampling"])
    parser.add_argument("--tflops", type=float, default=749.0)
    parser.add_argument(
        "--splits", default="0", help="lengths of a decode's splits; 0: the op's own"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ctx = _core.CudaContext()
    limit = read_rate(ctx)
    print(f"reading: {limit / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []

    if "decode" in arguments.what:
        for sequences, context in DECODES:
            read = sequences * context * 2 * KV_HEADS * HEAD_DIM * 2
            for split in map(int, arguments.splits.split(",")):
                time, spread = time_attention(ctx, sequences, 1, context, split)
                rate = read / time * 1e6
                name = f"decode {sequences} x {context}" + (f", splits of {split}" if split else "")
                report(
                    rows,
                    {
                        "name": name,
                        "microseconds": time,
                        "spread": spread,
                        "rate": rate / 1e9,
                        "unit": "GB/s",
                        "share": rate / limit,
                    },
                )
    if "prefill" in arguments.what:
        for sequences, tokens in PREFILLS:
            flops = sequences * 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
            time, spread = time_attention(ctx, sequences, tokens, tokens)
            rate = flops / time * 1e6
            report(
                rows,
                {
                    "name": f"prefill {sequences} x {tokens}",
                    "microseconds": time,
                    "spread": spread,
                    "rate": rate / 1e12,
                    "unit": "TFLOP/s",
                    "share": rate / (arguments.tflops * 1e12),
                },
            )
    if "sampling" in arguments.what:
        for name, options in SAMPLINGS:
            for count in (1, 32, 256):
                chosen = {
                    "temperature": 0.8,
                    "top_k": 0,
                    "top_p": 1.0,
                    "num_logprobs": -1,
                    **options,
                }
                samples = _core.time_sampling(
                    ctx, count, VOCAB, **chosen, passes=20, repetitions=REPETITIONS
                )
                time, spread = microseconds(samples, 1)
                rate = count * VOCAB * 4 / time * 1e6
                report(
                    rows,
                    {
                        "name": f"sampling, {name}, {count} rows",
                        "microseconds": time,
                        "spread": spread,
                        "rate": rate / 1e9,
                        "unit": "GB/s",
                        "share": rate / limit,
                    },
                )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"read_bytes_per_second": limit, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
