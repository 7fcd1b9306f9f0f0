"""Measures what the engine gains over a loop around a forward pass, on the bundled model.

    python benchmarks/engine.py [mix] [prefix] [scheduling] [--scale S] [--model DIR] [--json FILE]

mix         256 requests of 100 to 1,024 tokens in and out (nano-vllm's protocol): continuous
            against static batching, then a pool that holds a tenth of the requests, then one
            request at a time. All must give the same tokens.
prefix      32 requests that share their first 1,000 tokens, with the prefix cache off and on.
scheduling  CPU time of a step outside the forward pass and the sampler, with 256 sequences
            running.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import results
from tinyvllm import LLM, SamplingParams
from tinyvllm._core import default_num_threads
from tinyvllm.llm import BUNDLED_MODEL

Prompts = list[list[int]]


def run(
    prompts: Prompts,
    params: list[SamplingParams],
    model: Path = BUNDLED_MODEL,
    **options: Any,
) -> dict[str, Any]:
    """One engine, all requests at once: seconds, tokens, and the engine's counters."""
    with LLM(model, **options) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)  # warm-up
        before = llm.stats()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        stats = llm.stats()
    tokens = [output.outputs[0].token_ids for output in outputs]
    names = ("num_steps", "prompt_tokens", "generation_tokens", "num_preemptions")
    return {
        "seconds": seconds,
        "output_tokens_per_second": sum(map(len, tokens)) / seconds,
        "kv_cache_tokens": stats["kv_cache_tokens"],
        **{name: stats[name] - before[name] for name in names},
        "tokens": tokens,
    }


def mix(scale: float, model: Path) -> dict[str, Any]:
    generator = random.Random(0)
    count = max(1, int(256 * scale))
    prompts = [
        [generator.randint(3, 2000) for _ in range(generator.randint(100, 1024))]
        for _ in range(count)
    ]
    params = [
        SamplingParams(
            temperature=0.6,
            ignore_eos=True,
            max_tokens=generator.randint(100, 1024),
            seed=generator.getrandbits(32),
        )
        for _ in range(count)
    ]
    longest = [len(p) + (s.max_tokens or 0) for p, s in zip(prompts, params, strict=True)]
    tenth = max(max(longest), sum(longest) // 10) // 16 + 1
    variants: dict[str, dict[str, Any]] = {
        "continuous": {},
        "static": {"batching": "static"},
        "pool of a tenth": {"num_gpu_blocks_override": tenth},
        "one at a time": {"max_num_seqs": 1},
    }
    rows: dict[str, dict[str, Any]] = {}
    expected: list[list[int]] = []
    for name, options in variants.items():
        row = rows[name] = run(prompts, params, model, **options)
        tokens = row.pop("tokens")
        expected = expected or tokens
        row["same tokens as continuous"] = tokens == expected
        print(
            f"{name:16s} {row['seconds']:7.1f} s  {row['output_tokens_per_second']:7.0f} tok/s  "
            f"{row['num_steps']:6d} steps  {row['num_preemptions']:4d} preemptions  "
            f"{row['prompt_tokens']:7d} prompt tokens computed  "
            f"KV {row['kv_cache_tokens']:6d} tokens  "
            f"same tokens: {row['same tokens as continuous']}",
            flush=True,
        )
    ratio = rows["static"]["seconds"] / rows["continuous"]["seconds"]
    print(f"continuous / static throughput: {ratio:.2f}")
    return {**rows, "continuous_over_static": ratio}


def prefix() -> dict[str, Any]:
    generator = random.Random(0)
    shared = [generator.randint(3, 2000) for _ in range(1000)]
    prompts = [shared + [generator.randint(3, 2000) for _ in range(20)] for _ in range(32)]
    params = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)] * len(prompts)
    rows = {
        name: run(prompts, params, enable_prefix_caching=enabled)
        for name, enabled in (("cache off", False), ("cache on", True))
    }
    same = rows["cache off"].pop("tokens") == rows["cache on"].pop("tokens")
    for name, row in rows.items():
        computed, seconds = row["prompt_tokens"], row["seconds"]
        print(f"{name:10s} {computed:6d} prompt tokens computed, {seconds:.2f} s")
    print(f"same tokens: {same}")
    return {**rows, "same_tokens": same}


def scheduling() -> dict[str, Any]:
    """Each step's own share, from the engine's clock, while 256 sequences decode."""
    generator = random.Random(0)
    prompts = [[generator.randint(3, 2000) for _ in range(64)] for _ in range(256)]
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    samples: list[float] = []
    with LLM(BUNDLED_MODEL, max_num_seqs=256) as llm:
        before = llm.stats()
        for _ in llm.stream(prompts, params):
            now = llm.stats()
            if now["num_steps"] == before["num_steps"]:
                continue
            if before["num_requests_running"] == 256 == now["num_requests_running"]:
                samples.append((now["scheduling_seconds"] - before["scheduling_seconds"]) * 1e6)
            before = now
    row = {
        "steps": len(samples),
        "median_microseconds": statistics.median(samples),
        "p90_microseconds": statistics.quantiles(samples, n=10)[-1],
    }
    print(
        f"{row['steps']} steps of 256 sequences: scheduling takes a median of "
        f"{row['median_microseconds']:.0f} microseconds (p90 {row['p90_microseconds']:.0f})"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help="mix, prefix, scheduling; all if none")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the mix's 256 requests")
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="of the mix")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    parts = arguments.parts or ["prefix", "scheduling", "mix"]
    figures: dict[str, Any] = {
        "schema": 1,
        **results.provenance(),
        "machine": results.machine("cpu", default_num_threads()),
    }
    for part in parts:
        print(f"--- {part}", flush=True)
        figures[part] = {
            "mix": lambda: mix(arguments.scale, arguments.model),
            "prefix": prefix,
            "scheduling": scheduling,
        }[part]()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
