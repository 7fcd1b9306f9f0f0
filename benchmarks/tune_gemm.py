"""Measures every way to compute a model's matrix products on this GPU, and keeps the fastest.

    python benchmarks/tune_gemm.py [--model MODEL]... [--rows 1,8,64] [--json FILE] [--table FILE]

For each matrix of the model and each number of rows (tokens of a step) all kernels that take it
are timed, in a CUDA graph of one product a layer with weights of its own. The fastest few are then
compared in a graph of all products of a step, where neighbours overlap. The report gives a
product's time beside the rate at which it reads its weights, as a share of what the card can read,
and its rate of arithmetic. --table writes the choices as csrc/ops/cuda/matmul_table.inc wants them,
for the next build; they are those of this card and this version of cuBLASLt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyvllm import _core
from tinyvllm.cli.env import gpu_driver
from tinyvllm.errors import TinyvllmError

TABLE = "csrc/ops/cuda/matmul_table.inc"
USES = {
    "store": "kStore",
    "add": "kAdd",
    "norm": "kNorm",
    "logits": "kNorm",
    "swiglu": "kNormSwiGlu",
}
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
MAX_LOGIT_ROWS = 256  # a step takes logits of its sequences' last tokens only
MAX_STREAMING_ROWS = 256
FINALISTS = 3
CUBLASLT_RANKS = 6


@dataclass(frozen=True)
class Matrix:
    name: str
    use: str  # what surrounds the product; see MatmulTimer
    outputs: int
    depth: int

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.use, self.outputs, self.depth)


@dataclass(frozen=True)
class Model:
    layers: int
    hidden: int
    query: int  # num_heads * head_dim
    qkv: int
    intermediate: int
    vocab: int

    def layer(self) -> list[Matrix]:
        return [
            Matrix("qkv", "norm", self.qkv, self.hidden),
            Matrix("o", "add", self.hidden, self.query),
            Matrix("gate_up", "swiglu", 2 * self.intermediate, self.hidden),
            Matrix("down", "add", self.hidden, self.intermediate),
        ]

    def lm_head(self) -> Matrix:
        return Matrix("lm_head", "logits", self.vocab, self.hidden)


MODELS = {
    "llama-3.2-1b": Model(16, 2048, 2048, 3072, 8192, 128256),
    "qwen3-0.6b": Model(28, 1024, 2048, 4096, 3072, 151936),
    "llama-3.1-8b": Model(32, 4096, 4096, 6144, 14336, 128256),
}


@dataclass(frozen=True)
class Plan:
    kernel: str
    shape: int = 0
    blocks_per_multiprocessor: int = 0
    fuses_norm: bool = False
    rank: int = 0

    def native(self) -> _core.MatmulPlan:
        return _core.MatmulPlan(**asdict(self))

    @classmethod
    def of(cls, plan: _core.MatmulPlan) -> Plan:
        return cls(**{name: getattr(plan, name) for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        if self.kernel == "cublaslt":
            return f"cublaslt({self.rank})"
        if self.kernel == "plain":
            return "plain"
        shape = ", ".join(map(str, _core.streaming_shapes()[self.shape]))
        fused = ", true" if self.fuses_norm else ""
        return f"streaming({{{shape}}}, {self.blocks_per_multiprocessor}{fused})"


def candidates(matrix: Matrix, rows: int) -> list[Plan]:
    """The plans worth a measurement: tiles far too narrow or too wide for the rows are not."""
    plans = [Plan("cublaslt", rank=rank) for rank in range(CUBLASLT_RANKS)]
    if rows > MAX_STREAMING_ROWS:
        return plans
    normalises = matrix.use in ("norm", "logits", "swiglu")
    for shape, (_, column_tiles, *_) in enumerate(_core.streaming_shapes()):
        tile_rows = 8 * column_tiles
        if tile_rows < min(rows, 64) or tile_rows > max(8, 2 * rows):
            continue
        for blocks in (0, 1, 2, 3, 4) if tile_rows == 8 else (0, 1, 2):
            plans.append(Plan("streaming", shape, blocks))
            if normalises and rows <= 8 and shape < _core.num_normalising_shapes():
                plans.append(Plan("streaming", shape, blocks, True))
    return plans


class Bench:
    """Times sequences of products with the median of a few measurements."""

    def __init__(self, ctx: _core.CudaContext, matrices: list[Matrix], max_rows: int) -> None:
        self.matrices = matrices
        self.timer = _core.MatmulTimer(ctx, [matrix.key for matrix in matrices], max_rows)

    def seconds(self, rows: int, plans: list[Plan]) -> float | None:
        """Of one pass over all matrices; None where a plan does not take them."""
        native = [plan.native() for plan in plans]
        try:
            once = min(self.timer.milliseconds(rows, native, passes=1, repetitions=2))
            passes = max(1, min(20, int(4 / once)))
            times = self.timer.milliseconds(rows, native, passes=passes, repetitions=3)
        except TinyvllmError:
            return None
        return statistics.median(times) / 1e3


def fastest(bench: Bench, rows: int, plans: Iterable[Plan]) -> list[tuple[float, Plan]]:
    """(seconds a product, plan), fastest first."""
    timed = []
    for plan in plans:
        seconds = bench.seconds(rows, [plan] * len(bench.matrices))
        if seconds is not None:
            timed.append((seconds / len(bench.matrices), plan))
    return sorted(timed, key=lambda pair: pair[0])


def tune(ctx: _core.CudaContext, model: Model, all_rows: list[int]) -> dict[str, Any]:
    layer, lm_head = model.layer(), model.lm_head()
    most = max(all_rows)
    benches = {matrix.name: Bench(ctx, [matrix] * model.layers, most) for matrix in layer}
    benches["lm_head"] = Bench(ctx, [lm_head], min(most, MAX_LOGIT_ROWS))
    step = [matrix for _ in range(model.layers) for matrix in layer]
    decode = Bench(ctx, [*step, lm_head], min(most, MAX_LOGIT_ROWS))
    prefill = Bench(ctx, step, most)
    read = statistics.median(decode.timer.read_milliseconds(passes=3, repetitions=7)) / 1e3
    rate = decode.timer.weight_bytes / read
    print(f"read limit {rate / 1e12:.3f} TB/s: {read * 1e3:.4f} ms for all weights", flush=True)

    results: dict[str, Any] = {"read_bytes_per_second": rate, "rows": {}}
    for rows in all_rows:
        with_logits = rows <= MAX_LOGIT_ROWS
        matrices = [*layer, lm_head] if with_logits else layer
        bench = decode if with_logits else prefill
        ranked = {
            matrix.name: fastest(benches[matrix.name], rows, candidates(matrix, rows))
            for matrix in matrices
        }

        def whole(choice: dict[str, Plan], bench: Bench = bench, rows: int = rows) -> float:
            seconds = bench.seconds(rows, [choice[matrix.name] for matrix in bench.matrices])
            return float("inf") if seconds is None else seconds

        best = {name: timed[0][1] for name, timed in ranked.items()}
        best_seconds = whole(best)
        for name, timed in ranked.items():
            for _, plan in timed[1:FINALISTS]:
                candidate = {**best, name: plan}
                seconds = whole(candidate)
                if seconds < best_seconds:
                    best, best_seconds = candidate, seconds
        library = {
            name: next(plan for _, plan in timed if plan.kernel == "cublaslt")
            for name, timed in ranked.items()
        }
        default = dict(
            zip(
                (matrix.name for matrix in bench.matrices),
                map(Plan.of, bench.timer.plans(rows)),
                strict=True,
            )
        )
        library_seconds, default_seconds = whole(library), whole(default)
        if default_seconds <= best_seconds:  # what is built in stays where nothing beats it
            best, best_seconds = default, default_seconds

        print(
            f"rows {rows}: step {best_seconds * 1e3:.4f} ms tuned, {default_seconds * 1e3:.4f} as "
            f"built, {library_seconds * 1e3:.4f} cuBLASLt"
            + (f"; {read / best_seconds:.1%} of the read limit" if with_logits else "")
        )
        for matrix in matrices:
            timed = ranked[matrix.name]
            size = matrix.outputs * matrix.depth
            own = next((pair for pair in timed if pair[1].kernel != "cublaslt"), None)
            other = next(pair for pair in timed if pair[1].kernel == "cublaslt")
            shares = f"{2 * size / timed[0][0] / rate:6.1%} read, "
            shares += f"{2 * size * rows / timed[0][0] / 1e12:5.1f} TFLOP/s"
            ours = f"{own[0] * 1e6:8.2f} us {own[1]!s:35}" if own else " " * 47
            print(
                f"  {matrix.name:8}{ours} cublaslt {other[0] * 1e6:8.2f} us ({other[1].rank}) "
                f"{shares}  -> {best[matrix.name]}",
                flush=True,
            )
        results["rows"][rows] = {
            "tuned_seconds": best_seconds,
            "default_seconds": default_seconds,
            "cublaslt_seconds": library_seconds,
            "plans": {name: str(plan) for name, plan in best.items()},
            "products": {
                name: [(seconds, str(plan)) for seconds, plan in timed]
                for name, timed in ranked.items()
            },
        }
    return results


def table_header(ctx: _core.CudaContext) -> list[str]:
    """With what the choices hold for: a rank is one of that library's proposals on that card."""
    return [
        "// Written by benchmarks/tune_gemm.py: {outputs, depth, use, up to rows, plan}.",
        f"// On {ctx.name}, driver {gpu_driver()['driver']}, cuBLASLt {ctx.cublaslt}.",
    ]


def table_rows(model: Model, results: dict[str, Any]) -> list[str]:
    matrices = [*model.layer(), model.lm_head()]
    return [
        f"{{{matrix.outputs}, {matrix.depth}, MatmulUse::{USES[matrix.use]}, {rows}, "
        f"{measured['plans'][matrix.name]}}},"
        for matrix in matrices
        for rows, measured in results["rows"].items()
        if matrix.name in measured["plans"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: llama-3.2-1b")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="every measurement, for later")
    parser.add_argument("--table", type=Path, help=f"where to write the choices, such as {TABLE}")
    options = parser.parse_args()

    ctx = _core.CudaContext()
    print(f"{ctx.name}, compute capability {ctx.compute_capability}, cuBLASLt {ctx.cublaslt}")
    rows = sorted({int(count) for count in options.rows.split(",")})
    table = table_header(ctx)
    report = {}
    for name in options.model or ["llama-3.2-1b"]:
        began = time.perf_counter()
        print(f"\n{name}")
        report[name] = tune(ctx, MODELS[name], rows)
        print(f"{time.perf_counter() - began:.0f} s")
        table += [f"// {name}", *table_rows(MODELS[name], report[name])]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.table:
        options.table.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
