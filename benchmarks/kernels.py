"""The CPU's matrix products and decode steps against what the machine allows.

    python benchmarks/kernels.py gemm|scaling [--model MODEL] ...

gemm     rate of each matrix of a model over M = 1 to 1,024 rows, with the weights as they lie and
         repacked, beside PyTorch's (oneDNN). The limit is the arithmetic rate, or what reading the
         weights leaves time for if that is less.
scaling  decode rate over context and over batch, beside the prediction of tinyvllm.model_cost.

Figures go to benchmarks/results/kernels-*.json, .md, .png and .svg: {"schema": 1, "points": [...]}
with commit, date and machine as in results.py, medians, and the limits measured beside each point.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import plots
import results
from peer_process import ROOT, PeerError, PeerSpec, read_answer
from results import Json
from runner import MODELS, Bench, mapped_weights
from tinyvllm import LLM, SamplingParams, _core, dummy
from tinyvllm.limits import MachineLimits, measure_limits
from tinyvllm.model_cost import ModelCost

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CONTEXTS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_COLD_BYTES = 512 << 20  # of weights in turn, as in a model: more than a cache holds


def matrices(model: str) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, depth), as the model's steps multiply them."""
    config: dict[str, Any] = dict(dummy.NAMED_CONFIGS[model])
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "qkv": ((heads + 2 * config["num_key_value_heads"]) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * config["intermediate_size"], hidden),
        "down": (hidden, config["intermediate_size"]),
        "lm_head": (config["vocab_size"], hidden),
    }


# --- Matrix products ------------------------------------------------------------------------------

# (rows, outputs, depth, copies, rounds) -> the seconds of each round
Timer = Callable[[int, int, int, int, int], list[float]]


@contextmanager
def torch_timer(num_threads: int, python: str) -> Iterator[Timer | None]:
    """PyTorch in a process of its own; None, with a line on stderr, where it is not installed."""
    spec = PeerSpec("torch", "peers.torch_matmul", python=python)
    command = [python, "-m", spec.module, "--num-threads", str(num_threads)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        try:
            read_answer(spec, process.stdout)
        except PeerError as error:
            print(f"torch did not run: {error}", file=sys.stderr)
            yield None
            return

        def run(*arguments: int) -> list[float]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            seconds: Any = read_answer(spec, process.stdout)
            return list(seconds)

        yield run
        process.stdin.close()


def gemm(arguments: argparse.Namespace) -> list[Json]:
    ctx = _core.CpuContext(arguments.num_threads)

    points: list[Json] = []
    with torch_timer(arguments.num_threads, arguments.peers_python) as torch:
        timers: dict[str, Timer | None] = {
            "tinyvllm": partial(_core.time_matmul, ctx, layout="rows"),
            "tinyvllm repacked": partial(_core.time_matmul, ctx, layout="panels"),
            "torch": torch,
        }
        headings = "".join(f"{peer:>19s}" for peer in timers)
        print(f"{'matrix':8s} {'M':>5s} {'limit':>8s}{headings}  GFLOP/s")
        for name, (outputs, depth) in matrices(arguments.model).items():
            if arguments.matrices and name not in arguments.matrices:
                continue
            for rows in arguments.rows:
                flops, weight_bytes = 2 * rows * outputs * depth, 2 * outputs * depth
                # Where a product takes long, one copy is enough: its weights are read once anyway.
                copies = max(1, min(-(-_COLD_BYTES // weight_bytes), 2 * 10**10 // flops + 1))
                limits = measure_limits("cpu", arguments.num_threads)
                limit = min(
                    limits.bf16_flops_per_second,
                    flops / weight_bytes * limits.read_bandwidth_bytes_per_second,
                )
                rates: dict[str, float | None] = {}
                for peer, timer in timers.items():
                    rates[peer] = None
                    if timer is not None:
                        seconds = timer(rows, outputs, depth, copies, arguments.rounds)
                        rates[peer] = flops / statistics.median(seconds)
                points.append(
                    {
                        "matrix": name,
                        "outputs": outputs,
                        "depth": depth,
                        "rows": rows,
                        "flops_per_second": rates,
                        "limit_flops_per_second": limit,
                        **vars(limits),
                    }
                )
                cells = [
                    "" if rate is None else f"{rate / 1e9:.0f} ({rate / limit:.0%})"
                    for rate in rates.values()
                ]
                shown = "".join(f"{cell:>19s}" for cell in cells)
                print(f"{name:8s} {rows:5d} {limit / 1e9:8.0f}{shown}")
                sys.stdout.flush()
    return points


def gemm_markdown(points: list[Json]) -> str:
    peers = list(points[0]["flops_per_second"])
    lines = [f"| matrix | M | limit | {' | '.join(peers)} |", "|---" * (3 + len(peers)) + "|"]
    for point in points:
        limit = point["limit_flops_per_second"]
        cells = [
            "" if rate is None else f"{rate / 1e9:.0f} ({rate / limit:.0%})"
            for rate in point["flops_per_second"].values()
        ]
        lines.append(
            f"| {point['matrix']} [{point['outputs']}, {point['depth']}] | {point['rows']} | "
            f"{limit / 1e9:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", "GFLOP/s, with the share of the limit."]) + "\n"


# --- Decode over context and batch ----------------------------------------------------------------


def scaling(arguments: argparse.Namespace) -> list[Json]:
    checkpoint = Bench(models=arguments.models).checkpoint(arguments.model)
    cost = ModelCost(checkpoint)
    generator = random.Random(0)
    steps = arguments.steps

    def limits() -> MachineLimits:
        return measure_limits("cpu", arguments.num_threads, mapped_weights(checkpoint))

    def point(axis: str, x: int, rates: list[float], predicted: list[float]) -> Json:
        shares = [rate / limit for rate, limit in zip(rates, predicted, strict=True)]
        entry = {
            "axis": axis,
            "x": x,
            "values": rates,
            "median": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "predicted": statistics.median(predicted),
            "share": statistics.median(shares),
        }
        print(
            f"{axis} {x:6d}: {entry['median']:8.1f} tok/s, predicted {entry['predicted']:8.1f}, "
            f"share {entry['share']:.0%}"
        )
        sys.stdout.flush()
        return entry

    points = []
    longest = max(arguments.contexts, default=0)
    if longest:
        prompt = [generator.randint(256, 40_000) for _ in range(longest)]
        # With its prefix cached, a context costs only what is new in it.
        with LLM(
            checkpoint,
            num_threads=arguments.num_threads,
            max_model_len=longest + steps + 1,
            max_num_seqs=1,
            quiet=True,
        ) as llm:
            for context in sorted(arguments.contexts):
                rates, predicted = [], []
                decode_rate(llm, [prompt[:context]], 1)
                for _ in range(arguments.rounds):
                    seconds = cost.decode_seconds(limits(), [context], [steps])
                    predicted.append(steps / seconds)
                    rates.append(decode_rate(llm, [prompt[:context]], steps))
                points.append(point("context", context, rates, predicted))
    if arguments.batches:
        with LLM(
            checkpoint,
            num_threads=arguments.num_threads,
            max_model_len=16 + steps + 1,
            max_num_seqs=max(arguments.batches),
            quiet=True,
        ) as llm:
            for batch in sorted(arguments.batches):
                prompts = [
                    [generator.randint(256, 40_000) for _ in range(16)] for _ in range(batch)
                ]
                rates, predicted = [], []
                for _ in range(arguments.rounds):
                    seconds = cost.decode_seconds(limits(), [16] * batch, [steps] * batch)
                    predicted.append(batch * steps / seconds)
                    rates.append(decode_rate(llm, prompts, steps))
                points.append(point("batch", batch, rates, predicted))
    return points


def decode_rate(llm: LLM, prompts: list[list[int]], steps: int) -> float:
    """Output tokens a second once every prompt has its first token."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    waiting, began = {*range(len(prompts))}, 0.0
    counted = 0
    for delta in llm.stream(prompts, params):
        if not waiting:
            counted += len(delta.token_ids)
        elif delta.token_ids:
            waiting.discard(delta.prompt_index)
            began = time.perf_counter()
    return counted / (time.perf_counter() - began)


def scaling_markdown(points: list[Json]) -> str:
    lines = ["| | decode, tok/s | predicted | share |", "|---|---|---|---|"]
    lines += [
        f"| {point['axis']} {point['x']} | {results.shown(point['median'], 'tok/s')} "
        f"| {results.shown(point['predicted'], 'tok/s')} | {point['share']:.0%} |"
        for point in points
    ]
    return "\n".join(lines) + "\n"


# --- The command ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["gemm", "scaling"])
    parser.add_argument("--model", choices=sorted(dummy.NAMED_CONFIGS), default="llama-3.2-1b")
    parser.add_argument("--models", type=Path, default=MODELS, help="where weights are written")
    parser.add_argument("--num-threads", type=int, default=_core.default_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--matrices", nargs="*", default=[], help="gemm: names; none: all")
    parser.add_argument("--rows", nargs="*", type=int, default=list(_ROWS), help="gemm: each M")
    parser.add_argument("--contexts", nargs="*", type=int, default=list(_CONTEXTS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(_BATCHES))
    parser.add_argument("--steps", type=int, default=16, help="scaling: tokens of a measurement")
    parser.add_argument("--output", type=Path, help="the JSON; table and plot are put beside it")
    arguments = parser.parse_args()
    path = arguments.output or results.DIRECTORY / f"kernels-{arguments.part}.json"
    points = {"gemm": gemm, "scaling": scaling}[arguments.part](arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": 1,
        "model": arguments.model,
        **results.provenance(),
        "machine": results.machine("cpu", arguments.num_threads),
        "points": points,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.part == "gemm":
        path.with_suffix(".md").write_text(gemm_markdown(points))
        plots.draw_gemm(points, path)
    else:
        path.with_suffix(".md").write_text(scaling_markdown(points))
        by_axis = {
            "context, tokens": [point for point in points if point["axis"] == "context"],
            "sequences": [point for point in points if point["axis"] == "batch"],
        }
        plots.draw_scaling({name: own for name, own in by_axis.items() if own}, path)


if __name__ == "__main__":
    main()
